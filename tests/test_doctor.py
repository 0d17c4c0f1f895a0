"""Each check with its condition made true: full disks, taken ports, old packages, damaged files, a broken torch."""

import dataclasses
import importlib.metadata
import os
import re
import shutil
import socket
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from packaging.requirements import Requirement

from cifar import archive, doctor, limits
from cifar.archive import ARCHIVES
from cifar.config import PROJECT, Config
from commands import INVOKE
from conftest import as_nobody
from server import CONTENT, archive_of, fail, send

DIGITS = ("--dataset", "digits")


def run_doctor(*flags: str, python: tuple[str, ...] = (), setup: str = "", **environment) -> tuple[int, str, str]:
    """`invoke doctor` in a process of its own, after the code `setup`."""
    command = [sys.executable, *python, "-c", f"{setup}\n{INVOKE}", "doctor", *flags]
    env = {**os.environ, **environment}
    done = subprocess.run(command, cwd=PROJECT, env=env, capture_output=True, text=True, timeout=60)
    return done.returncode, done.stdout, done.stderr


def line_of(subject: str, out: str) -> str:
    """What was printed about one subject, on one line."""
    found = re.search(rf"^(\w+) +{subject} .*\n( +cure: .*\n)?", out, re.MULTILINE)
    return " ".join(found[0].split())


def test_a_machine_that_is_fit_is_told_so_with_exit_code_0(real_cifar10, tmp_path):
    code, out, err = run_doctor("--data-dir", real_cifar10.place, "--output-dir", str(tmp_path / "new"))
    assert (code, err) == (0, "")
    assert "each file with its published MD5" in line_of("dataset", out)
    assert f"torch {torch.__version__.split('+')[0]}" in line_of("packages", out)
    assert not (tmp_path / "new").exists()


# Packages


def packages(tmp_path: Path, *lines: str) -> list[doctor.Finding]:
    (tmp_path / "requirements.txt").write_text("# bounds\n\n" + "\n".join(lines) + "\n")
    return doctor._packages(tmp_path / "requirements.txt")


def test_a_package_that_is_too_old_too_new_missing_or_unsafe_is_named_with_its_cure(tmp_path, monkeypatch):
    monkeypatch.setitem(doctor._NEEDED_BY, "no-such-thing-either", "invoke dance")
    version = importlib.metadata.version("numpy")
    lines = ("numpy>=99,<100", "pillow<1", "no-such-thing>=1", "no-such-thing-either", "rich>=1  # below 999: CVE-1, x")
    old, new, missing, unneeded, unsafe = packages(tmp_path, "pytest>=1  # below 1: CVE-2, y", *lines)
    assert (old.level, old.says) == ("warning", f"numpy {version} is not what is tested: <100,>=99")
    assert new.says.startswith("pillow ")
    assert (missing.level, missing.says) == ("failure", "no-such-thing is missing: a run needs it")
    assert (unneeded.level, unneeded.says) == ("warning", "no-such-thing-either is missing: invoke dance needs it")
    assert unsafe.level == "warning"
    assert unsafe.says.endswith("has a known security hole, closed in 999: CVE-1, x")
    assert {finding.cure for finding in (old, missing, unsafe)} == {
        f"pip install -r {os.path.relpath(tmp_path)}/requirements.txt"
    }


def test_without_packaging_nothing_can_be_compared_and_that_is_told(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "packaging.requirements", None)
    (found,) = packages(tmp_path, "numpy>=1")
    assert (found.level, found.cure) == ("failure", f"pip install -r {os.path.relpath(tmp_path)}/requirements.txt")
    assert found.says == "packaging is missing, so that no version can be compared"


def test_packages_as_they_should_be_are_one_line(tmp_path):
    assert [finding.level for finding in packages(tmp_path, "numpy>=1  # below 1: CVE-1", "rich")] == ["ok"]


def test_every_security_fix_of_the_projects_requirements_is_understood():
    lines = [line.partition("#") for line in doctor.REQUIREMENTS.read_text(encoding="utf-8").splitlines()]
    fixes = [(Requirement(line), comment.strip()) for line, _, comment in lines if line.strip() and "CVE" in comment]
    assert {requirement.name for requirement, _ in fixes} >= {"torch", "pillow", "gradio"}
    for requirement, comment in fixes:
        assert "closed in" in doctor._package(requirement, "0.1", comment, "").says
    assert not any("CVE" in comment for line, _, comment in lines if not line.strip())


def test_a_torchvision_for_another_torch_is_a_failure(tmp_path, monkeypatch):
    for name, needs in (("torch-2.9.0", ""), ("torchvision-0.1.0", "Requires-Dist: torch (==2.10.0)\n")):
        folder = tmp_path / f"{name}.dist-info"
        folder.mkdir()
        package, version = name.split("-")
        (folder / "METADATA").write_text(f"Metadata-Version: 2.1\nName: {package}\nVersion: {version}\n{needs}")
    monkeypatch.syspath_prepend(str(tmp_path))
    found = packages(tmp_path, "torch", "torchvision")
    assert [(finding.level, finding.says) for finding in found] == [
        ("failure", "torchvision 0.1.0 is built for torch==2.10.0, and torch is 2.9.0")
    ]


def test_a_missing_torch_is_told_with_the_cure(tmp_path):
    """The environment has invoke, rich and packaging alone."""
    for name in ("invoke", "rich", "packaging", "pygments", "markdown_it", "mdurl"):
        packages = Path(importlib.import_module(name).__file__).parent.parent
        for part in packages.glob(f"{name}*"):
            (tmp_path / part.name).symlink_to(part)
    code, out, err = run_doctor(*DIGITS, python=("-S",), PYTHONPATH=str(tmp_path))
    assert code == 1
    assert err == "error: a run would fail: see packages, torch\n"
    assert re.search(
        r"failure +packages +torch is missing: a run needs it\n +cure: pip install -r requirements.txt", out
    )
    assert "warning  packages  gradio is missing: invoke demo needs it" in out
    assert "No module named 'torch'" in line_of("torch", out)


@pytest.mark.parametrize(
    "error", ["OSError('libtorch_cpu.so: cannot open shared object file')", "RuntimeError()", "AttributeError('x\\ny')"]
)
def test_a_broken_torch_is_told_with_the_cure_and_no_traceback(tmp_path, error):
    (tmp_path / "torch").mkdir()
    (tmp_path / "torch" / "__init__.py").write_text(f"raise {error}")
    code, out, err = run_doctor(*DIGITS, PYTHONPATH=str(tmp_path))
    assert (code, err) == (1, "error: a run would fail: see torch\n")
    assert re.match("failure torch it cannot be imported: (libtorch|RuntimeError|x).* cure: pip", line_of("torch", out))
    assert line_of("dataset", out) == "ok dataset digits needs no download"


# Hardware


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU here")
def test_a_gpu_that_is_asked_for_or_there_and_cannot_be_used_is_told(tmp_path, monkeypatch):
    (found,) = doctor._hardware(Config(device="cuda"))
    assert (found.level, found.cure) == ("failure", "leave out --device, or name one of those")
    assert doctor._hardware(Config())[0].level == "ok"
    (tmp_path / "nvidia-smi").write_text("#!/bin/sh\n")
    (tmp_path / "nvidia-smi").chmod(0o755)
    monkeypatch.setenv("PATH", str(tmp_path))
    assert "finds no GPU" in doctor._hardware(Config())[0].says


@pytest.mark.parametrize(("flag", "level"), [("avx512_bf16", "ok"), ("avx2", "note")])
def test_a_processor_without_bfloat16_is_a_note(monkeypatch, flag, level):
    monkeypatch.setattr(torch.cpu, "get_capabilities", lambda: {flag: True})
    assert doctor._hardware(Config(device="cpu"))[-1].level == level


@pytest.mark.skipif(not hasattr(os, "sched_setaffinity") or os.cpu_count() < 2, reason="no core to take away")
def test_more_threads_than_the_process_may_use_are_a_warning():
    setup = "import os; os.sched_setaffinity(0, {min(os.sched_getaffinity(0))})"
    code, out, _ = run_doctor(*DIGITS, setup=setup, OMP_NUM_THREADS="2")
    assert code == 0
    assert line_of("threads", out).startswith("warning threads 2 on the 1 cores that this process may use")
    assert line_of("threads", out).endswith("cure: export OMP_NUM_THREADS=1")


def test_fewer_threads_than_cores_are_a_note_where_the_environment_says_so(monkeypatch):
    monkeypatch.setattr(limits, "cores", lambda: 4)
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    assert doctor._threads(1).level == "note"
    monkeypatch.delenv("OMP_NUM_THREADS")
    assert doctor._threads(2).level == "ok"  # as torch counts cores that share their units once


MEMORY = """
import resource, sys
resource.setrlimit(resource.RLIMIT_AS, (2_000_000_000, 2_000_000_000))
from cifar import doctor
for name in ("auto", "digits"):
    print(doctor._memory(name).level, doctor._memory(name).says)
"""


@pytest.mark.skipif(sys.platform != "linux", reason="limits of the address space are Linux's")
def test_too_little_memory_is_a_failure_and_what_is_too_little_depends_on_the_dataset():
    done = subprocess.run([sys.executable, "-c", MEMORY], cwd=PROJECT, capture_output=True, text=True)
    cifar10, digits = done.stdout.splitlines()
    assert cifar10.startswith("failure ")
    assert "of 2.0; the recipe fast takes up to 3.0" in cifar10
    assert not digits.startswith("failure ")


def test_memory_that_others_take_is_a_warning(monkeypatch):
    monkeypatch.setattr(limits, "memory", lambda: (8e9, 1e9))
    assert doctor._memory("auto").level == "warning"


# Disk and data


@pytest.fixture
def small_disk(tmp_path):
    """A file system of ten megabytes."""
    if sys.platform != "linux" or os.geteuid() != 0:
        pytest.skip("only root can mount a small file system")
    mount = ["mount", "-t", "tmpfs", "-o", "size=10m", "tmpfs", str(tmp_path)]
    if subprocess.run(mount, capture_output=True).returncode:
        pytest.skip("no file system can be mounted here")
    yield tmp_path
    subprocess.run(["umount", str(tmp_path)], check=True)


def test_a_disk_without_room_is_a_failure_for_the_run_and_for_the_data(small_disk):
    found = doctor._disk(str(small_disk / "outputs"))
    assert (found.level, found.cure) == ("failure", "make room, or name another folder with --output-dir")
    assert re.match(r"10 MB free in .*outputs, and 20 needed", found.says)
    found = doctor._missing(ARCHIVES["cifar10"], Config(data_dir=str(small_disk)), "host", "")
    assert found.level == "failure"
    assert re.match(r"cifar-10-python.tar.gz is to be fetched: 10 MB free in .*, and 357 needed", found.says)


def test_a_folder_that_cannot_be_written_or_read_is_a_failure(tmp_path):
    (tmp_path / "file").write_text("")
    found = doctor._disk(str(tmp_path / "file" / "outputs"))
    assert (found.level, found.cure) == ("failure", "make room, or name another folder with --output-dir")
    (tmp_path / "closed").mkdir(mode=0)
    tmp_path.chmod(0o755)
    with as_nobody():
        assert "Permission denied" in doctor._disk(str(tmp_path / "closed")).says
        config = Config(data_dir=str(tmp_path / "closed"))
        found = doctor._dataset(config, doctor._reaching(None, config))
    assert (found.level, found.says) == ("failure", f"cannot read {tmp_path / 'closed'}: Permission denied")


@pytest.fixture
def known(monkeypatch, server):
    """A small archive that stands for CIFAR-10's, and the server that it is on."""
    files = {"one": "c4ca4238a0b923820dcc509a6f75849b"}  # md5 of b"1", as RFC 1321's tools give it
    known = archive_of(CONTENT, files=files, urls=(server.play("a", send()),))
    monkeypatch.setitem(ARCHIVES, "cifar10", known)
    return known


def dataset(folder: Path, name: str = "cifar10") -> doctor.Finding:
    findings = doctor.examine(Config(dataset=name, data_dir=str(folder), output_dir=str(folder)), 7860)
    return next(finding for finding in findings if finding.subject == "dataset")


def test_a_dataset_is_checked_file_by_file_without_a_connection(known, server, tmp_path):
    (tmp_path / "data").mkdir()
    (tmp_path / "data" / "one").write_bytes(b"1")
    assert dataset(tmp_path).level == dataset(tmp_path / "data").level == "ok"
    (tmp_path / "data" / "one").write_bytes(b"2")
    found = dataset(tmp_path)
    assert (found.level, found.says) == ("failure", f"{tmp_path / 'data' / 'one'} is damaged")
    assert found.cure == f"put back the original, or delete {tmp_path / 'data'} to fetch it anew"
    assert server.asked == []


def test_a_file_that_is_missing_beside_others_is_named(tmp_path):
    (tmp_path / "batches.meta").write_bytes(b"")
    assert archive.trouble(ARCHIVES["cifar10"], tmp_path)[0] == f"{tmp_path / 'batches.meta'} is damaged"
    known = dataclasses.replace(ARCHIVES["cifar10"], files={"gone": "x", "batches.meta": "y"})
    assert archive.trouble(known, tmp_path)[0] == f"{tmp_path / 'gone'} is missing"


def test_an_archive_is_checked_without_a_connection(known, server, tmp_path):
    (tmp_path / "data.tar.gz").write_bytes(CONTENT)
    assert "the next run unpacks it" in dataset(tmp_path).says
    (tmp_path / "data.tar.gz").write_bytes(CONTENT[:-1])
    for place in (tmp_path, tmp_path / "data.tar.gz"):
        assert (dataset(place).level, "damaged or another file" in dataset(place).says) == ("failure", True)
    assert server.asked == []


def test_who_would_send_a_missing_dataset_is_asked_and_nothing_fetched(known, server, tmp_path):
    found = dataset(tmp_path)
    host = server.url.removeprefix("http://")
    assert (found.level, found.says) == ("note", f"not in {tmp_path}: the next run fetches its 1 MB from {host}")
    server.play("a", fail(503))
    assert (dataset(tmp_path).level, dataset(tmp_path, "auto").level) == ("failure", "warning")
    assert "HTTP 503" in dataset(tmp_path).says
    assert "would train on scikit-learn's digits" in dataset(tmp_path, "auto").says
    assert list(tmp_path.iterdir()) == []


def test_an_archive_without_room_to_unpack_it_is_a_failure(known, tmp_path, monkeypatch):
    monkeypatch.setitem(ARCHIVES, "cifar10", dataclasses.replace(known, unpacked=2**60))
    (tmp_path / "data.tar.gz").write_bytes(CONTENT)
    found = dataset(tmp_path)
    assert (found.level, found.cure) == ("failure", "copy it to another folder, and name that with --data-dir")
    assert "has the published SHA-256 and cannot be unpacked: " in found.says


# What a run does without


def test_a_taken_port_is_a_warning():
    with socket.create_server(("127.0.0.1", 0)) as listener:
        port = listener.getsockname()[1]
        found = doctor._port(port)
    assert (found.level, found.cure) == ("warning", "invoke demo --port with another number")
    assert found.says == f"the demo cannot listen on port {port}: Address already in use"
    assert doctor._port(port).level == "ok"


@pytest.mark.parametrize("port", ["0", "65536", "x", "-1", "²"])
def test_a_port_that_is_none_is_a_usage_error(port):
    code, out, err = run_doctor(f"--port={port}")
    assert (code, out) == (2, "")
    assert err == f"error: --port takes a number from 1 to 65535, not '{port}'\n"


def test_without_a_browser_there_is_a_note(tmp_path, monkeypatch):
    monkeypatch.setenv("PATH", str(tmp_path))
    (found,) = doctor._browser()
    assert found.level == "note"
    for name in ("chromium", "chromedriver"):
        (tmp_path / name).write_text("#!/bin/sh\n")
        (tmp_path / name).chmod(0o755)
    assert shutil.which("chromium")
    assert doctor._browser() == []
