"""Groups of seeds: by main.py in a process that is killed, and by hand on files."""

import json
import os
import shutil
import signal
import statistics
import subprocess
import sys
import time
from dataclasses import asdict, replace
from pathlib import Path

import pytest

import main
from cifar import demo_runs, outputs, runs, seeds
from cifar.config import PROJECT, Config
from cifar.errors import UserError
from cifar.runs import Run
from commands import MAIN, start
from conftest import quick_config


@pytest.fixture(scope="module")
def interrupted(tmp_path_factory) -> tuple[Path, list[str]]:
    """An output folder where the second of two seeds was killed, and the flags of the command."""
    folder = tmp_path_factory.mktemp("outputs")
    flags = ["--recipe", "convnet", "--dataset", "digits", "--epochs", "1", "--device", "cpu", "--seed", "3"]
    flags += ["--seeds", "2", "--output-dir", str(folder)]
    with start(MAIN, *flags) as process:
        deadline = time.monotonic() + 100
        while len(list(folder.glob("*/*/run.json"))) < 2 and time.monotonic() < deadline:
            time.sleep(0.02)
        process.send_signal(signal.SIGKILL)
    assert process.returncode == -signal.SIGKILL
    return folder, flags


def test_a_killed_group_goes_on_where_it_stopped(interrupted, capsys):
    folder, flags = interrupted
    (group,) = outputs.groups(folder)
    first, killed = sorted(group.glob("*/"))
    before = (first / "run.json").stat()
    assert (Run(first).status(), Run(killed).status()) == ("completed", "killed")
    assert main.main(flags) == 0
    printed = capsys.readouterr().out
    assert f"going on with {os.path.relpath(group)}: 1 of 2 seeds are there" in printed
    assert outputs.groups(folder) == [group]
    assert (first / "run.json").stat() == before
    assert {place: Run(place).config.seed for place in group.glob("*/")} == {first: 3, killed: 4}
    last = killed  # the run that was killed goes on, where its last checkpoint is

    summary = json.loads((group / "summary.json").read_text(encoding="utf-8"))
    assert summary["status"] == "completed"
    assert [(row["seed"], row["run"]) for row in summary["runs"]] == [(3, first.name), (4, last.name)]
    accuracies = [Run(place).read("metrics.json")["accuracy"] for place in (first, last)]
    assert summary["figures"]["accuracy"]["mean"] == pytest.approx(statistics.mean(accuracies))
    assert summary["figures"]["accuracy"]["standard_deviation"] == pytest.approx(statistics.stdev(accuracies))
    assert f"{statistics.mean(accuracies):.2%}" in printed.rsplit("seeds 3 to 4", 1)[1]

    assert (folder / "latest").resolve() == last
    assert outputs.find(str(folder)).path == last
    (folder / "latest").unlink()
    assert outputs.find(str(folder)).path == last
    assert outputs.find(str(folder), first.name).path == first
    assert list(demo_runs.evaluated(str(folder))) == [last.name, first.name]
    with pytest.raises(UserError, match="holds the runs of several seeds"):
        outputs.find(str(folder), group.name)


def make_group(folder: Path, **settings) -> Path:
    """A group of two seeds whose process has been killed."""
    config = quick_config(folder, seeds=2, val_size=143, flip="none", small_size=24, **settings)
    path = runs.make_directory(config, "_2-seeds")
    runs.write_json(path / runs.SUMMARY, {"status": "running", "note": None, "config": asdict(config)})
    return path


HOLDER = """
import sys
from pathlib import Path
from cifar import outputs

with outputs.claim_group(Path(sys.argv[1])):
    print(flush=True)
    input()
"""
PIPES = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE}


def test_a_group_that_another_process_works_on_is_left_alone_and_a_damaged_one_passed_over(tmp_path, capsys):
    config = quick_config(tmp_path, seeds=2)
    held = make_group(tmp_path)
    with subprocess.Popen([sys.executable, "-c", HOLDER, held], cwd=PROJECT, **PIPES) as process:
        process.stdout.readline()
        assert outputs.group_status(held) == "running"
        with pytest.raises(UserError, match="is in use"), outputs.claim_group(held):
            pass
        fresh = seeds.begin(config)
        assert fresh.path != held
        process.kill()
    assert outputs.group_status(held) == "killed"
    assert seeds.begin(replace(config, data_dir="elsewhere")).path == fresh.path
    (fresh.path / runs.SUMMARY).write_text("{")
    capsys.readouterr()
    assert seeds.begin(config).path == held
    assert f"{os.path.relpath(fresh.path)} cannot be gone on with: " in capsys.readouterr().out


def test_a_group_with_other_settings_or_that_is_complete_is_left_alone(tmp_path):
    config = quick_config(tmp_path, seeds=2)
    other, done = make_group(tmp_path, epochs=3), make_group(tmp_path)
    runs.write_json(done / runs.SUMMARY, {**runs.read_json(done / runs.SUMMARY), "status": "completed"})
    assert seeds.begin(config).path not in (other, done)


def test_nothing_is_made_for_settings_that_do_not_fit(tmp_path):
    with pytest.raises(UserError, match="--val-size 5 does not fit"):
        seeds.begin(quick_config(tmp_path / "outputs", seeds=2, val_size=5))
    assert not list((tmp_path / "outputs").iterdir())


def test_only_a_whole_run_counts_as_finished(evaluated_run, tmp_path):
    group = seeds.Group(tmp_path, replace(evaluated_run.config, seeds=2))
    whole = tmp_path / "whole"
    shutil.copytree(evaluated_run.path, whole)
    assert group.finished() == {0: Run(whole)}
    assert [(config.seed, config.seeds) for config in group.missing()] == [(1, 1)]
    for name, content in (("metrics.json", "{}"), ("config.json", "{"), ("run.json", '{"status": "failed"}')):
        kept = (whole / name).read_text(encoding="utf-8")
        (whole / name).write_text(content)
        assert group.finished() == {}
        (whole / name).write_text(kept, encoding="utf-8")


def test_a_run_that_cannot_go_on_is_begun_anew_and_a_lost_one_is_named(evaluated_run, tmp_path, capsys):
    config = replace(evaluated_run.config, seeds=2, output_dir=str(tmp_path))
    group = seeds.Group(tmp_path, config)
    begun = Run(shutil.copytree(evaluated_run.path, tmp_path / "begun"))
    begun.update(status="interrupted", premises={"code": "another"})
    run, _ = group.start(next(group.missing()))
    assert run.path.name != "begun"
    assert run.config.seed == evaluated_run.config.seed
    assert "begun is begun anew: " in capsys.readouterr().out
    with pytest.raises(UserError, match="lacks the run of seed 0, 1: the same command makes it"):
        group.summarize()


@pytest.mark.parametrize("given", [{"seeds": "0"}, {"seeds": "2", "seed": str(2**32 - 1)}])
def test_seeds_that_do_not_exist_are_refused(given):
    with pytest.raises(UserError, match="--seeds"):
        Config.create(given)
