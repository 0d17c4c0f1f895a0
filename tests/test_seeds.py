"""Groups of seeds: by main.py in a process that is killed, and hand-made."""

import shutil
import signal
import statistics

import pytest

from cifar import bench, files, pipeline, report, runs, seeds, visualize
from cifar.errors import UserError
from cifar.runs import Run
from commands import QUICK, main, start
from conftest import quick_config
from processes import wait_until

WITHOUT_FIGURES = """
import sys
import main
from cifar import report, visualize

visualize.visualize = report.write = lambda *_: None  # they take most of the time
main.main(sys.argv[1:])
"""


def test_the_same_command_resumes_a_killed_group(tmp_path, monkeypatch):
    flags = [*QUICK, "--seed", "3", "--seeds", "2", "--output-dir", str(tmp_path)]
    with start("-c", WITHOUT_FIGURES, *flags) as process:
        wait_until(lambda: len(list(tmp_path.glob("*/*/run.json"))) == 2)
        process.kill()
    assert process.returncode == -signal.SIGKILL
    (group,) = runs.groups(tmp_path)
    first, killed = sorted(group.glob("*/"))
    before = (first / "run.json").stat()
    assert (Run(first).status(), Run(killed).status()) == ("completed", "killed")
    log = (first / "log.txt").read_text()
    assert "seed 3, 1 of 2\n" in log
    assert "seed 4" not in log

    monkeypatch.setattr(visualize, "visualize", lambda *_: None)
    monkeypatch.setattr(report, "write", lambda *_: None)
    code, printed, errors = main(*flags)
    assert (code, errors) == (0, "")
    assert f"seed 3, 1 of 2\n{first.name} is complete: there is nothing to resume\nseed 4, 2 of 2\n" in printed
    assert runs.groups(tmp_path) == [group]
    assert (first / "run.json").stat() == before
    assert {path: Run(path).config.seed for path in group.glob("*/")} == {first: 3, killed: 4}

    summary = runs.read_json(group / "summary.json")
    assert summary.status == "completed"
    assert [(row.seed, row.run) for row in summary.runs] == [(3, first.name), (4, killed.name)]
    accuracies = [Run(path).metrics.accuracy for path in (first, killed)]
    assert summary.figures["accuracy"].mean == pytest.approx(statistics.mean(accuracies))
    assert summary.figures["accuracy"].standard_deviation == pytest.approx(statistics.stdev(accuracies))
    assert f"{statistics.mean(accuracies):.2%}" in printed.rsplit("seeds 3 to 4", 1)[1]
    assert (tmp_path / "latest").resolve() == runs.find(str(tmp_path)).path == killed


def test_a_killed_group_with_other_images_is_not_resumed(tmp_path, digits, capsys):
    config = quick_config(tmp_path, seeds=2)
    held = seeds.create(config)
    member = pipeline.create_run(held.config.replace(seeds=1, output_dir=str(held.path)), digits)
    assert seeds.create(config) == held
    member.update(dataset=member.record.dataset.model_dump() | {"train_sha256": "0" * 64})
    assert seeds.create(config) != held
    assert f"{held.path.name} cannot be resumed: its training images were others" in capsys.readouterr().out


def test_only_a_killed_group_of_the_same_settings_is_resumed(tmp_path, capsys):
    config = quick_config(tmp_path, seeds=2)
    held = seeds.create(config)
    with runs.claim_group(held.path):
        new = seeds.create(config)
    assert new.path != held.path
    assert seeds.create(config.replace(data_dir="elsewhere")).path == new.path
    assert seeds.create(config.replace(epochs=3)).path not in (held.path, new.path)
    (new.path / runs.SUMMARY).write_text("{")
    capsys.readouterr()
    assert seeds.create(config) == held
    assert f"{new.path.name} cannot be resumed: " in capsys.readouterr().out
    files.write_json(held.path / runs.SUMMARY, held.summary.model_dump() | {"status": "completed"})
    assert seeds.create(config).path not in (held.path, new.path)


def test_a_group_in_use_is_one_sentence(tmp_path, monkeypatch):
    group = seeds.create(quick_config(tmp_path, seeds=2))
    monkeypatch.setattr(seeds, "create", lambda config: group)  # another command takes it after it was found
    with runs.claim_group(group.path), pytest.raises(UserError, match="is in use by another process"):
        seeds.run(group.config)


def test_minutes_are_planned_once_and_the_same_command_resumes_the_group(tmp_path, monkeypatch):
    def plan(config, dataset):
        return config.replace(epochs=7, minutes=None)

    monkeypatch.setattr(bench, "plan_epochs", plan)
    config = quick_config(tmp_path, seeds=2, minutes=5)
    group = seeds.create(config)
    assert (group.summary.given["minutes"], group.config.epochs, group.config.minutes) == (5, 7, None)
    monkeypatch.setattr(bench, "plan_epochs", None)
    assert seeds.create(config) == group
    monkeypatch.setattr(bench, "plan_epochs", plan)
    for change in ({"minutes": 6}, {"warmup_epochs": 1}):
        assert seeds.create(config.replace(**change)) != group
    assert seeds.create(quick_config(tmp_path, seeds=2, epochs=7)) != group


def test_nothing_is_made_for_settings_that_do_not_fit(tmp_path):
    with pytest.raises(UserError, match="--val-size 5 does not fit"):
        seeds.create(quick_config(tmp_path / "outputs", seeds=2, val_size=5))
    assert not list((tmp_path / "outputs").iterdir())


def test_a_run_is_a_member_unless_its_files_are_damaged(evaluated_run, tmp_path, capsys):
    group = seeds.Group(tmp_path, evaluated_run.config.replace(seeds=2))
    run = Run(shutil.copytree(evaluated_run.path, tmp_path / "run"))
    assert (group.members(), capsys.readouterr().out) == ({0: run}, "")
    for name, content in (("run.json", '{"status": "failed"}'), ("config.json", "{")):
        kept = (run.path / name).read_text(encoding="utf-8")
        (run.path / name).write_text(content, encoding="utf-8")
        assert (group.members(), "run cannot be resumed: " in capsys.readouterr().out) == ({}, True)
        (run.path / name).write_text(kept, encoding="utf-8")
