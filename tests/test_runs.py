import contextlib
import fcntl
import json
import os
import threading
from datetime import datetime
from types import SimpleNamespace

import pytest

from cifar import files, outputs, runs
from cifar.config import Config
from cifar.errors import UserError
from handmade import make_line


@pytest.fixture
def config(tmp_path) -> Config:
    return Config(dataset="digits", val_size=10, output_dir=str(tmp_path / "outputs"))


def test_a_run_records_its_configuration_and_what_made_it(config):
    run = runs.create(config, seed=7)
    assert run.path.name.endswith("_fast_digits")
    assert run.config == config
    record = run.record
    assert record["status"] == "running"
    assert record["seed"] == 7
    assert record["versions"].keys() >= {"python", "torch", "torchvision"}
    assert {"commit", "dirty", "command", "start", "end", "seconds"} <= record.keys()


def test_without_git_a_run_names_no_commit(config, monkeypatch, tmp_path):
    monkeypatch.setenv("PATH", str(tmp_path))
    assert runs.create(config).record["commit"] is None


def test_two_runs_in_one_second_get_directories_of_their_own(config):
    paths = {runs.create(config).path for _ in range(5)}
    assert len(paths) == 5
    assert all((path / "run.json").exists() for path in paths)


def end(run: runs.Run, error: BaseException | None) -> dict:
    with contextlib.suppress(KeyboardInterrupt, OSError), run.lifetime(), run.stage("train"):
        if error:
            raise error
    return run.record


@pytest.mark.parametrize(
    ("error", "status"), [(None, "completed"), (KeyboardInterrupt(), "interrupted"), (OSError("disk full"), "failed")]
)
def test_a_run_records_how_it_ended_and_latest_points_at_it(config, error, status):
    before = runs.create(config)
    end(before, None)
    run = runs.create(config)
    assert outputs.find(config.output_dir).path == before.path
    record = end(run, error)
    assert record["status"] == status
    assert record["end"] >= record["start"]
    assert record["seconds"]["train"] >= 0
    assert record.get("error") == ("disk full" if status == "failed" else None)
    assert outputs.find(config.output_dir).path == run.path
    assert os.readlink(run.path.parent / "latest") == run.path.name


def test_a_run_is_found_by_its_path_its_name_and_without_the_link_latest(config, monkeypatch, tmp_path):
    older, run = runs.create(config), runs.create(config)
    end(run, None)
    end(older, None)
    assert outputs.find(config.output_dir, str(run.path)).path == run.path
    assert outputs.find(config.output_dir, run.path.name).path == run.path
    (run.path.parent / "latest").unlink()
    assert outputs.find(config.output_dir).path == run.path
    monkeypatch.chdir(tmp_path)
    assert outputs.find("outputs", f"outputs/{older.path.name}").path == older.path


def test_a_run_that_says_it_runs_while_no_process_does_is_recorded_as_killed(config):
    run = runs.create(config)
    with run.lifetime():
        assert run.status() == "running"
        assert run.record["end"] is None
    assert run.status() == "completed"
    killed = runs.create(config)
    assert outputs.find(config.output_dir, killed.path.name).record["status"] == "killed"
    assert killed.record["end"] >= killed.record["start"]


def test_a_run_that_is_claimed_cannot_be_claimed_again_until_it_is_let_go(config, monkeypatch):
    monkeypatch.setattr(runs, "_PATIENCE", 0.0)
    run = runs.create(config)
    with run.claim(), pytest.raises(UserError, match="is in use: another process writes into it"), run.lifetime():
        raise AssertionError("it was claimed twice")
    with run.claim():
        pass


def test_a_claim_waits_for_one_that_is_held_for_a_glance(config):
    run = runs.create(config)
    with run._open_lock() as file:
        assert files.lock(file)
        threading.Timer(0.2, lambda: fcntl.flock(file, fcntl.LOCK_UN)).start()
        with run.claim():
            pass


def test_the_newest_run_that_did_not_come_to_its_end_is_the_one_to_resume(config):
    with pytest.raises(UserError, match=r"there is no run in .* that could be resumed"):
        outputs.find_resumable(config.output_dir)
    failed, killed, interrupted, completed, damaged = (runs.create(config) for _ in range(5))
    end(failed, OSError("disk full"))
    end(completed, None)
    (damaged.path / "run.json").write_text("{")
    assert outputs.find_resumable(config.output_dir).path == interrupted.path
    for run in (interrupted, killed):
        end(run, None)
    assert outputs.find_resumable(config.output_dir).path == failed.path
    assert outputs.find_resumable(config.output_dir, completed.path.name).path == completed.path


def test_a_run_that_goes_on_loses_the_marks_of_its_end(config):
    run = runs.create(config)
    end(run, OSError("disk full"))
    (run.checkpoints / "last.partial").write_text("half")
    with run.lifetime():
        assert (run.record["status"], run.record["end"], "error" in run.record) == ("running", None, False)
        assert not list(run.checkpoints.iterdir())


def test_the_seconds_of_a_stage_that_was_resumed_are_those_of_all_its_parts(config):
    run = runs.create(config)
    run.mark_resumed(3, 7, 100.0)
    end(run, None)
    assert 100 <= run.record["seconds"]["train"] < 101
    assert [(again["epoch"], again["step"]) for again in run.record["resumed"]] == [(3, 7)]


@pytest.mark.parametrize("rest", ["", '{"epoch": 3}\n', '{"epo', "\n\n"])
def test_the_history_is_cut_back_to_the_epochs_that_are_known(config, rest):
    run = runs.create(config)
    lines = '{"epoch": 1}\n{"epoch": 2}\n'
    (run.path / "history.jsonl").write_text(lines + rest)
    run.cut_history(2)
    assert (run.path / "history.jsonl").read_text() == lines
    with pytest.raises(UserError, match=r"history\.jsonl is damaged"):
        run.cut_history(3)


def test_what_is_no_run_is_told_in_one_sentence(config, tmp_path):
    with pytest.raises(UserError, match="there is no finished run in"):
        outputs.find(config.output_dir)
    with pytest.raises(UserError, match="there is no run at nowhere"):
        outputs.find(config.output_dir, "nowhere")
    with pytest.raises(UserError, match="is not a run directory"):
        outputs.find(config.output_dir, str(tmp_path))


@pytest.mark.parametrize("damage", ["", "{", "[1]", "null", "{}", "[" * 100_000, '{"status": NaN}', "\x00"])
def test_a_damaged_file_of_a_run_is_named(config, damage):
    run = runs.create(config)
    (run.path / "run.json").write_text(damage)
    with pytest.raises(UserError, match=r"run\.json is damaged"):
        _ = run.record


def test_a_missing_file_of_a_run_is_named(config):
    with pytest.raises(UserError, match=r"cannot read .*metrics\.json"):
        runs.create(config).read("metrics.json")


def test_a_run_that_ends_while_one_looks_is_as_it_ended(config, monkeypatch):
    run = runs.create(config)

    def ends(_) -> bool:
        run.update(status="completed")
        return True

    monkeypatch.setattr(runs, "lock", ends)
    assert run.status() == "completed"


def test_a_run_without_its_configuration_or_its_dataset_says_so(config):
    run = runs.create(config)
    with pytest.raises(UserError, match=r"run\.json is damaged: it does not say what the dataset was"):
        _ = run.dataset
    (run.path / "config.json").unlink()
    with pytest.raises(UserError, match=r"cannot read .*config\.json: No such file"), run.claim():
        pass


def test_a_thousandth_run_in_one_second_is_refused(config, monkeypatch):
    monkeypatch.setattr(runs, "datetime", SimpleNamespace(now=lambda: datetime(2026, 5, 4, 3, 2, 1)))
    first = runs.make_directory(config)
    assert first.name == "2026-05-04_03-02-01_fast_digits"
    for number in range(2, 999):
        first.with_name(f"{first.name}_{number}").mkdir()
    assert runs.make_directory(config).name == f"{first.name}_999"
    with pytest.raises(UserError, match="already has 999 runs called 2026-05-04_03-02-01_fast_digits"):
        runs.make_directory(config)


def test_a_configuration_with_an_unknown_setting_is_refused(config):
    run = runs.create(config)
    run.write("config.json", {**run.read("config.json"), "colour": 1})
    with pytest.raises(UserError, match="unknown settings: colour"):
        _ = run.config


def test_an_output_folder_that_cannot_be_written_is_told(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(UserError, match="cannot write to the output folder"):
        runs.create(Config(output_dir=str(tmp_path / "file" / "outputs")))
    with pytest.raises(UserError, match="cannot write to the output folder"):
        runs.create(Config(output_dir=str(tmp_path / "file")))


def test_the_history_is_read_as_it_was_appended(config):
    run = runs.create(config)
    assert run.history() == []
    epochs = [make_line(1, validated=False), make_line(2, validated=False)]
    for epoch in epochs:
        run.append_history(epoch)
    assert run.history() == epochs
    whole = (run.path / "history.jsonl").read_text()
    first, second = whole.splitlines()
    validated = json.dumps(make_line(3))
    for damage in (whole[:-20], f"{first}\n\n{second}", second, f"{first}\n{first}", f"{whole}{validated}", "{}", "[]"):
        (run.path / "history.jsonl").write_text(damage)
        with pytest.raises(UserError, match=r"history\.jsonl is damaged"):
            run.history()


def test_a_file_is_replaced_whole_and_never_with_what_is_not_json(config):
    run = runs.create(config)
    before = run.record
    with pytest.raises(ValueError, match="not JSON compliant"):
        run.write("run.json", {"loss": float("nan")})
    assert run.record == before
    run.update(note="é")
    assert json.loads((run.path / "run.json").read_text(encoding="utf-8"))["note"] == "é"
    assert not list(run.path.glob("*.partial"))


def test_runs_are_listed_newest_first_with_those_of_groups_and_the_damaged_and_without_the_link(tmp_path):
    for place in ("2026-01-01_a", "2026-01-03_group/2026-01-02_b", "2026-01-04_c", "notes", "compare/a_vs_b"):
        (tmp_path / place).mkdir(parents=True)
    for file in ("2026-01-01_a/run.json", "2026-01-03_group/2026-01-02_b/config.json", "2026-01-04_c/history.jsonl"):
        (tmp_path / file).write_text("")
    (tmp_path / "2026-01-03_group" / "summary.json").write_text("{}")
    (tmp_path / "latest").symlink_to("2026-01-04_c")
    assert [place.name for place in outputs.directories(tmp_path)] == ["2026-01-04_c", "2026-01-02_b", "2026-01-01_a"]
    assert outputs.directories(tmp_path / "nowhere") == []
