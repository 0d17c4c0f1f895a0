"""The run directory: its record from start to end, locks, finding runs, and files that are written whole."""

import contextlib
import errno
import fcntl
import json
import os
import shutil
import signal
import stat
import sys
import threading
from datetime import datetime
from pathlib import Path
from types import SimpleNamespace

import pytest

from cifar import console, files, runs
from cifar.config import Config
from cifar.errors import UserError
from cifar.records import EpochRecord
from handmade import make_epochs, make_line, make_metrics


@pytest.fixture
def config(tmp_path) -> Config:
    return Config(dataset="digits", val_size=10, output_dir=str(tmp_path / "outputs"))


@pytest.fixture
def run(config) -> runs.Run:
    return runs.create(config, seed=7)


def end(run: runs.Run, error: BaseException | None = None) -> runs.RunRecord:
    with contextlib.suppress(KeyboardInterrupt, OSError), run.lifetime(), run.stage("train"):
        if error:
            raise error
    return run.record


# The record of a run.


def test_a_new_run_records_its_settings_and_what_made_it(run, config, monkeypatch, tmp_path):
    assert run.path.name.endswith("_fast_digits")
    assert run.config == config
    content = json.loads((run.path / "run.json").read_text())
    keys = ("status", "start", "end", "seconds", "command", "commit", "dirty", "versions", "platform", "seed")
    assert tuple(content) == keys
    assert (content["status"], content["end"], content["seed"]) == ("running", None, 7)
    assert content["versions"].keys() >= {"python", "torch", "torchvision"}
    monkeypatch.setattr(runs, "_git", runs._git.__wrapped__)  # asks each time
    git = tmp_path / "git"
    git.write_text("#!/bin/sh\nprintf 'a\\377'\n")  # the name of a file may be in any encoding
    git.chmod(0o755)
    monkeypatch.setenv("PATH", str(tmp_path), prepend=os.pathsep)
    assert runs.create(config).record.commit == "a\ufffd"
    git.unlink()
    monkeypatch.setenv("PATH", str(tmp_path))  # without git
    assert runs.create(config).record.commit is None


@pytest.mark.parametrize("password", ["secret", "p@ss:é", 'qu"o\\te', "%2F"])
def test_the_credentials_of_a_url_are_stored_nowhere(config, monkeypatch, password):
    url = f"https://user:{password}@host.example:8000/@me/?token=signed%2F"
    monkeypatch.setattr(sys, "argv", ["main.py", "--mirror", url, f"--mirror={url}"])
    run = runs.create(config.replace(mirror=url), note=f"from {url}")
    clean = "https://host.example:8000/@me/"
    assert run.config.mirror == clean
    assert run.record.command[1:] == ["--mirror", clean, f"--mirror={clean}"]
    assert run.record.note == f"from {clean}"
    run.update(note="what?a=b me@home")  # no addresses
    assert run.record.note == "what?a=b me@home"


@pytest.mark.parametrize("words", [["--auth", "me:secret"], ["--AUTH=me:secret"], ["-_auth=me:secret"]])
def test_the_password_of_a_demo_in_the_same_command_is_stored_nowhere(config, monkeypatch, words):
    monkeypatch.setattr(sys, "argv", ["invoke", "train", "demo", *words])
    assert runs.create(config).record.command == ["invoke", "train", "demo"]


@pytest.mark.parametrize(
    ("error", "status"), [(None, "completed"), (KeyboardInterrupt(), "interrupted"), (OSError("disk full"), "failed")]
)
def test_a_run_records_how_it_ended_and_latest_points_at_it(config, error, status):
    before = runs.create(config)
    end(before)
    run = runs.create(config)
    assert runs.find(config.output_dir).path == before.path
    record = end(run, error)
    assert record.status == status
    assert record.end >= record.start
    assert record.seconds["train"] >= 0
    assert record.error == ("disk full" if status == "failed" else None)
    assert runs.find(config.output_dir).path == run.path
    assert os.readlink(run.path.parent / "latest") == run.path.name


@pytest.mark.parametrize("number", [signal.SIGINT, *console.ENDING])
@pytest.mark.parametrize("first", [None, KeyboardInterrupt(), OSError("disk full")])
@pytest.mark.parametrize("is_early", [True, False])
def test_a_signal_while_the_end_is_recorded_loses_no_status(run, monkeypatch, is_early, first, number):
    def interrupt(*_):
        raise console.Interrupted(number)

    def update_and_interrupt(_, **changes):
        is_end = bool(changes.get("end"))
        if is_end:
            monkeypatch.setattr(runs.Run, "update", update)
        if is_end and is_early:
            signal.raise_signal(number)
        update(run, **changes)
        if is_end and not is_early:
            signal.raise_signal(number)

    update = runs.Run.update
    monkeypatch.setattr(runs.Run, "update", update_and_interrupt)
    before = signal.signal(number, interrupt)
    try:
        record = end(run, first)
    finally:
        signal.signal(number, before)
    assert record.status == ("failed" if isinstance(first, OSError) else "interrupted")
    assert record.end


def test_a_resumed_run_loses_the_marks_of_its_end_and_half_written_files_and_sums_its_seconds(run):
    end(run, OSError("disk full"))
    (run.checkpoints / "last.pt.partial").write_text("half")
    with run.lifetime(), run.stage("train"):
        assert (run.record.status, run.record.end, run.record.error) == ("running", None, None)
        assert not list(run.checkpoints.iterdir())
        run.mark_resumed(3, 7, 100.0)
        run.mark_resumed(4, 0, 200.0)
    assert 200 <= run.record.seconds["train"] < 201
    assert [(resumed.epoch, resumed.step) for resumed in run.record.resumed] == [(3, 7), (4, 0)]


def test_an_update_keeps_what_this_version_does_not_know(run):
    run.write("run.json", {**json.loads((run.path / "run.json").read_text()), "premises": {"seed": 0}})
    run.update(note="é\udcff")
    content = json.loads((run.path / "run.json").read_text())
    assert (content["premises"], content["note"]) == ({"seed": 0}, "é\udcff")
    assert "threads" not in content


def test_a_run_without_metrics_says_what_makes_them_and_is_complete_once_it_has_them(run):
    run.update(status="interrupted")  # before it had weights
    with pytest.raises(UserError, match=r"interrupted and has no weights to evaluate; resume it with `python main\.py"):
        _ = run.metrics
    end(run)
    with pytest.raises(UserError, match=r"has not been evaluated; run `invoke evaluate --run .*`"):
        _ = run.metrics
    for content, is_complete in (({}, False), (make_metrics(), True)):
        run.write("metrics.json", content)
        assert run.is_complete() == is_complete


# Locks, and what a process that was killed leaves behind.


def test_a_run_that_says_running_is_recorded_as_killed_where_no_process_has_claimed_it(run, config):
    with run.claim():
        assert run.status() == "running"
    assert runs.find(config.output_dir, run.path.name).record.status == "killed"
    assert run.record.end >= run.record.start


def test_a_claim_waits_for_a_short_lock(run):
    with files.open_lock(run.path / "config.json") as file:
        assert files.lock(file)
        threading.Timer(0.2, lambda: fcntl.flock(file, fcntl.LOCK_UN)).start()
        with run.claim():
            pass


def test_a_run_that_ends_while_its_status_is_read_has_the_status_of_its_end(run, monkeypatch):
    monkeypatch.setattr(files, "lock", lambda _: run.update(status="completed") or True)
    assert run.status() == "completed"


def test_a_file_system_without_locks_keeps_nobody_out(run, monkeypatch):
    def fails(*_):
        raise OSError(errno.ENOLCK, os.strerror(errno.ENOLCK))

    monkeypatch.setattr(fcntl, "flock", fails)
    with run.claim(), run.claim():
        pass


def test_a_group_is_killed_when_it_says_running_and_nobody_works_on_it(tmp_path):
    files.write_json(tmp_path / "summary.json", {"status": "running", "config": {}})
    assert runs.group_status(tmp_path) == "killed"
    with runs.claim_group(tmp_path):
        assert runs.group_status(tmp_path) == "running"
    assert runs.group_status(tmp_path) == "killed"


# Names, and finding runs.


def test_runs_made_in_one_second_never_share_a_directory(config, monkeypatch):
    monkeypatch.setattr(runs, "datetime", SimpleNamespace(now=lambda: datetime(2026, 5, 4, 3, 2, 1)))
    names = [runs.make_directory(config).name for _ in range(3)]
    assert names == [f"2026-05-04_03-02-01_fast_digits{end}" for end in ("", "_2", "_3")]


def test_a_run_is_found_by_its_path_by_its_name_before_a_folder_and_without_latest(config, monkeypatch, tmp_path):
    older, run = runs.create(config), runs.create(config)
    end(run)
    end(older)
    assert runs.find(config.output_dir, str(run.path)).path == run.path
    assert runs.find(config.output_dir, run.path.name).path == run.path
    (tmp_path / "link").symlink_to(run.path)
    with runs.find(config.output_dir, str(tmp_path / "link")).claim():
        pass
    (run.path.parent / "latest").unlink()
    assert runs.find(config.output_dir).path == run.path
    monkeypatch.chdir(tmp_path)
    assert runs.find("outputs", f"outputs/{older.path.name}").path == older.path
    (tmp_path / "fast").mkdir()
    assert runs.find("outputs", "fast").is_shipped


def test_a_copy_of_latest_is_no_run_and_a_renamed_run_is_no_newer(config):
    older, newer = runs.create(config), runs.create(config)
    for run, year in ((older, 2024), (newer, 2025)):
        run.update(start=f"{year}-11-26T10:00:00+01:00", status="interrupted")
    shutil.copytree(older.path, older.path.parent / "latest")
    renamed = older.path.rename(older.path.with_name("z"))
    assert runs.directories(renamed.parent) == [newer.path, renamed]
    for found in (runs.find, runs.find_evaluated, runs.find_resumable):
        assert found(config.output_dir).path == newer.path


def test_files_of_the_user_in_or_above_the_output_folder_stay(config, tmp_path):
    run = runs.create(config)
    mine = [run.path.parent / "latest", run.path.parent / "summary.json", run.path.parent.parent / "latest"]
    for file in mine:
        file.write_text("my notes")
    end(run)
    assert [file.read_text() for file in mine] == ["my notes"] * 3


def test_the_longest_names_of_a_dataset_and_a_model_make_a_directory(config):
    names = {"dataset": "/" + "猫" * 80, "model": "m:" + "x" * 200}
    made = runs.make_directory(Config.create({**names, "output_dir": config.output_dir}), "_2-seeds")
    assert len(made.name.encode()) < 255
    assert made.name.endswith("_2-seeds")


def test_a_run_with_a_pipe_in_it_is_not_written(run):
    os.mkfifo(run.path / "log.txt")
    with pytest.raises(UserError, match=r"^remove the pipe .*log\.txt: "), run.claim():
        raise AssertionError("it was claimed")


def test_a_run_on_a_dataset_of_seeds_is_no_group(config, tmp_path):
    runs.create(config.replace(dataset=str(tmp_path / "pumpkin-seeds")))
    assert runs.groups(Path(config.output_dir)) == []


def test_who_wants_to_predict_gets_the_newest_run_that_was_evaluated_or_the_one_that_comes_with_the_program(config):
    running = runs.create(config)
    with running.claim():
        assert runs.find_evaluated(config.output_dir).is_shipped
    evaluated, latest = runs.create(config), runs.create(config)
    end(evaluated)
    end(latest)
    assert runs.find_evaluated(config.output_dir).path == latest.path  # which says that it is not evaluated
    (evaluated.path / "metrics.json").touch()
    for _ in range(2):
        assert runs.find_evaluated(config.output_dir).path == evaluated.path
        shutil.rmtree(latest.path, ignore_errors=True)  # where the link `latest` leads


def test_the_command_for_a_run_can_be_pasted_and_allows_its_own_network(run, monkeypatch, tmp_path):
    monkeypatch.chdir(tmp_path)
    place = os.path.relpath(run.path)
    assert run.command("evaluate") == f"invoke evaluate --run {place}"
    run.write("config.json", Config(recipe="plain", model="my.net:build").model_dump() | {"val_size": 5})
    moved = runs.Run(run.path.rename(run.path.with_name("a b")))
    assert moved.command("evaluate").endswith("a b' --model my.net:build")
    assert moved.command("visualize").endswith("a b'")


def test_the_newest_run_that_was_not_completed_is_the_one_to_resume(config):
    failed, interrupted, completed, damaged = (runs.create(config) for _ in range(4))
    end(failed, OSError("disk full"))
    end(completed)
    (damaged.path / "run.json").write_text("{")
    assert runs.find_resumable(config.output_dir).path == interrupted.path
    end(interrupted)
    assert runs.find_resumable(config.output_dir).path == failed.path
    assert runs.find_resumable(config.output_dir, completed.path.name).path == completed.path


def test_the_runs_of_a_group_are_found_by_its_name_and_its_latest_run_is_linked_from_outside(
    config, tmp_path, monkeypatch
):
    group = runs.make_directory(config, "_2-seeds")
    files.write_json(group / "summary.json", {"status": "running", "config": {}})
    members = [runs.create(config.replace(output_dir=str(group), seed=seed)) for seed in (0, 1)]
    for run in members:
        end(run)
    assert os.readlink(tmp_path / "outputs" / "latest") == f"{group.name}/{members[1].path.name}"
    assert runs.find(config.output_dir, members[0].path.name).path == members[0].path
    with pytest.raises(UserError, match="holds the runs of several seeds; name one of them"):
        runs.find(config.output_dir, group.name)
    with pytest.raises(UserError, match=r"none of the runs in .* has been evaluated"):
        runs.find_all(config.output_dir, group.name)
    monkeypatch.chdir(tmp_path)
    members[0].update(command=["main.py", "--seeds", "2", "--output-dir", "outputs"])
    assert members[0].resume_command == "python main.py --seeds 2 --output-dir outputs"
    monkeypatch.chdir("outputs")
    assert members[0].resume_command == "python main.py --seeds 2 --output-dir outputs --output-dir ."
    for run in members:
        (run.path / "metrics.json").touch()
    assert runs.find_all(config.output_dir, group.name) == members
    assert runs.find_all(config.output_dir, members[1].path.name) == [members[1]]


def test_runs_are_listed_newest_first_with_those_of_groups_and_damaged_ones_and_no_other_folder(tmp_path):
    files = ("01_a/run.json", "03_group/02_b/config.json", "03_group/summary.json", "04_c/history.jsonl")
    for file in (*files, "05_2-seeds/06_d/run.json", "reference/07_e/run.json", "notes/text"):
        (tmp_path / file).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / file).write_text("")
    for path in tmp_path.rglob("0*_?"):  # they are damaged, so that the time of their last change counts
        os.utime(path, (int(path.name[:2]),) * 2)
    (tmp_path / "latest").symlink_to("04_c")
    assert [path.name for path in runs.directories(tmp_path)] == ["06_d", "04_c", "02_b", "01_a"]
    assert runs.directories(tmp_path / "nowhere") == []


# Files.


@pytest.mark.parametrize(
    "damage", ["", "{", "[1]", "{}", "[" * 100_000, '{"x": NaN}', '{"x": 1e999}', "\x00", "9" * 5000]
)
def test_a_damaged_file_is_named(run, damage):
    (run.path / "run.json").write_text(damage)
    with pytest.raises(UserError, match=r"run\.json is damaged"):
        _ = run.record


def test_a_damaged_file_comes_with_the_command_that_writes_it_again(run, monkeypatch):
    monkeypatch.chdir(run.path)
    (run.path / "corruptions.json").write_text('{"n": -1}')
    sentence = "corruptions.json is damaged: n should be greater than or equal to 0"
    with pytest.raises(UserError) as error:
        run.read("corruptions.json")
    assert str(error.value) == f"{sentence}; `invoke evaluate --corruptions --run .` writes it again"


def test_a_missing_file_is_named_or_none(run):
    assert run.read_if_present("metrics.json") is None
    with pytest.raises(UserError, match=r"cannot read .*metrics\.json: No such file"):
        run.read("metrics.json")
    with pytest.raises(UserError, match=r"run\.json is damaged: dataset is missing"):
        _ = run.dataset


@pytest.mark.parametrize(("key", "value"), [("colour", 1), ("lr", "x"), ("seed", None)])
def test_wrong_settings_are_reported_with_their_file(run, key, value):
    run.write("config.json", {**run.config.model_dump(), key: value})
    with pytest.raises(UserError, match=rf"config\.json is damaged: .*{key}"):
        _ = run.config


def test_the_history_is_read_as_it_was_written(run):
    lines = [make_line(1, validated=False), make_line(2, validated=False, new_metric=0.5)]
    assert run.history() == []
    run.write_history([EpochRecord(**line) for line in lines])
    assert [epoch.model_dump(exclude_unset=True) for epoch in run.history()] == lines
    first, second = (run.path / "history.jsonl").read_text().splitlines()
    validated = json.dumps(make_line(2))
    for damage in (first[:-20], f"{first}\n\n{second}", second, f"{first}\n{first}", f"{first}\n{validated}", "[]"):
        (run.path / "history.jsonl").write_text(damage)
        with pytest.raises(UserError, match=r"history\.jsonl is damaged"):
            run.history()


@pytest.mark.parametrize("rest", ["", "{}\n", '{"epo', "\n\n", "\udcff"])
def test_the_history_is_cut_to_the_epochs_of_the_checkpoint(run, rest):
    run.write_history(make_epochs(2))
    whole = (run.path / "history.jsonl").read_bytes()
    (run.path / "history.jsonl").write_bytes(whole + os.fsencode(rest))
    run.write_history(run.history(2))
    assert (run.path / "history.jsonl").read_bytes() == whole
    with pytest.raises(UserError, match=r"history\.jsonl is damaged"):
        run.history(3)


@pytest.mark.parametrize("failing", ["fsync", "replace"])
def test_a_file_that_cannot_be_written_keeps_its_content(run, monkeypatch, failing):
    def fails(*_, **__):
        raise OSError(errno.EIO, os.strerror(errno.EIO))

    before = run.record
    with monkeypatch.context() as patch:
        patch.setattr(os, failing, fails)
        with pytest.raises(UserError, match=r"run\.json: Input/output error"):
            run.update(note="new")
    with pytest.raises(ValueError, match="not JSON compliant"):
        run.update(note=float("nan"))
    assert run.record == before
    assert not list(run.path.glob("*.partial"))


def test_a_file_is_written_where_the_system_cannot_sync_a_folder(run, monkeypatch):
    sync = os.fsync

    def sync_files_only(descriptor):
        if stat.S_ISDIR(os.fstat(descriptor).st_mode):
            raise OSError(errno.EINVAL, "Invalid argument")
        sync(descriptor)

    monkeypatch.setattr(os, "fsync", sync_files_only)
    run.update(note="written")
    assert run.record.note == "written"


# Symbolic links inside a run directory, through which a copied run could overwrite other files.


@pytest.mark.parametrize("name", ["run.json", "run.json.partial", "history.jsonl"])
def test_a_file_is_never_written_through_a_link(run, tmp_path, name):
    outside = tmp_path / "outside"
    outside.write_text((run.path / "run.json").read_text() if "run" in name else "")
    before = outside.read_text()
    (run.path / name).unlink(missing_ok=True)
    (run.path / name).symlink_to(outside)
    run.update(note="new")
    run.write_history(make_epochs(1))
    assert outside.read_text() == before
    assert (run.record.note, len(run.history())) == ("new", 1)


def test_a_group_is_not_locked_through_a_link(tmp_path):
    (tmp_path / ".lock").symlink_to(tmp_path / "outside")
    with pytest.raises(UserError, match=r"cannot write .*\.lock"), runs.claim_group(tmp_path):
        pass
    assert not (tmp_path / "outside").exists()
