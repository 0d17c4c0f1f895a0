import os

from cifar import limits


def test_the_limits_of_control_groups_are_read_from_the_process_own_up_to_the_root(tmp_path):
    """As the kernel's documentation lays them out, cgroup-v2.rst and cgroup-v1/cgroups.rst."""
    root, own = tmp_path / "cgroup", tmp_path / "own"
    own.write_text("4:memory:/jobs/one\n3:cpu,cpuacct:/jobs\n0::/jobs/one\n")
    for folder, name, text in (
        ("jobs", "cpu.max", "150000 100000"),
        ("jobs/one", "cpu.max", "max 100000"),
        ("jobs/other", "cpu.max", "1 1"),
        ("memory/jobs/one", "memory.limit_in_bytes", "1000"),
        ("memory", "memory.limit_in_bytes", "2000"),
        ("cpu/jobs", "cpu.cfs_quota_us", "-1"),
    ):
        (root / folder).mkdir(parents=True, exist_ok=True)
        (root / folder / name).write_text(f"{text}\n")
    assert list(limits._group_limits("", "cpu.max", root, own)) == ["max 100000", "150000 100000"]
    assert list(limits._group_limits("memory", "memory.limit_in_bytes", root, own)) == ["1000", "2000"]
    assert list(limits._group_limits("cpu", "cpu.cfs_quota_us", root, own)) == ["-1"]
    assert list(limits._group_limits("", "memory.max", root, tmp_path / "nowhere")) == []


def test_a_quota_counts_in_whole_cores(monkeypatch):
    texts = {"cpu.max": ["max 100000", "150000 100000"], "cpu.cfs_quota_us": ["-1"], "cpu.cfs_period_us": ["100000"]}
    monkeypatch.setattr(os, "sched_getaffinity", lambda _: set(range(64)), raising=False)
    monkeypatch.setattr(limits, "_group_limits", lambda _, name: iter(texts.get(name, [])))
    assert limits.cores() == 2
