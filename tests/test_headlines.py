import json
import shutil
from pathlib import Path

import pytest

from cifar import headlines, runs
from cifar.errors import UserError
from cifar.runs import Run


@pytest.fixture
def outputs(evaluated_run, tmp_path) -> Path:
    """Copies of an evaluated run: old and new, and one in a group between them."""
    for day, place in ((1, "old"), (2, "5-seeds/member"), (3, "new")):
        shutil.copytree(evaluated_run.path, tmp_path / place)
        Run(tmp_path / place).update(start=f"2026-01-0{day}T00:00:00+00:00")
    (tmp_path / "5-seeds" / "summary.json").write_text(json.dumps({"status": "running", "config": {"seeds": 5}}))
    (tmp_path / "latest").symlink_to("new")
    return tmp_path


def order(outputs: Path, sort: str | None = None) -> list[str]:
    return [row["run"] for row in headlines.table(str(outputs), sort)]


def test_the_list_has_every_run_once_newest_first_with_what_it_saved(outputs, evaluated_run):
    rows = headlines.table(str(outputs))
    assert [row["run"] for row in rows] == ["new", "member", "old"]
    metrics, seconds = evaluated_run.read("metrics.json"), evaluated_run.record["seconds"]
    for row in rows:
        assert (row["status"], row["recipe"], row["dataset"], row["seed"]) == ("completed", "convnet", "digits", 0)
        assert (row["accuracy"], row["views"], row["loss"]) == tuple(
            metrics[key] for key in ("accuracy", "accuracy_tta", "loss")
        )
        assert row["calibration"] == metrics["calibration"]["after"]["expected_calibration_error"]
        assert (row["epochs"], row["seconds"], row["damaged"]) == (2, sum(seconds.values()), [])
    with pytest.raises(UserError, match=r"there is no run in .*nowhere: make one"):
        headlines.table(str(outputs / "nowhere"))


def test_it_is_sorted_by_any_column_the_best_first_and_the_unknown_last(outputs):
    for place, share in (("old", 0.9), ("new", 0.8)):
        run = Run(outputs / place)
        run.write("metrics.json", {**run.metrics, "accuracy_tta": share, "loss": share})
    (outputs / "5-seeds" / "member" / "metrics.json").unlink()
    assert order(outputs, "views") == ["old", "new", "member"]
    assert order(outputs, "loss") == ["new", "old", "member"]
    assert order(outputs, "run") == ["member", "new", "old"]
    for column in headlines.COLUMNS:
        assert sorted(order(outputs, column)) == ["member", "new", "old"]
        assert column in headlines.columns(column)[:3]
    with pytest.raises(UserError, match="unknown column 'speed': did you mean seed"):
        headlines.table(str(outputs), "speed")


@pytest.mark.parametrize("status", ["interrupted", "failed"])
def test_how_a_run_ended_is_told(outputs, status):
    Run(outputs / "new").update(status=status)
    Run(outputs / "old").update(status="running")
    assert [row["status"] for row in headlines.table(str(outputs))] == [status, "completed", "killed"]


RUBBISH = ["", "{", "[1]", "null", "{}", '{"seconds": [1], "accuracy": "high", "recipe": 3, "start": "soon"}', "\0\xff"]


@pytest.mark.parametrize("content", [*RUBBISH, None])
@pytest.mark.parametrize("file", ["run.json", "config.json", "history.jsonl", "metrics.json"])
def test_a_damaged_run_has_its_row_which_names_the_file(outputs, file, content):
    path = outputs / "new" / file
    path.unlink() if content is None else path.write_text(content, encoding="latin-1")
    for sort in (None, *headlines.COLUMNS):
        rows = {row["run"]: row for row in headlines.table(str(outputs), sort)}
        assert rows.keys() == {"new", "member", "old"}
        assert rows["old"]["damaged"] == []
        harmless = {"history.jsonl": [None, ""], "metrics.json": [None]}
        assert rows["new"]["damaged"] == ([] if content in harmless.get(file, []) else [file])


@pytest.mark.parametrize("content", RUBBISH)
def test_a_damaged_group_has_its_row(outputs, content):
    (outputs / "5-seeds" / "summary.json").write_text(content, encoding="latin-1")
    (row,) = headlines.groups(str(outputs))
    assert (row["group"], row["status"], row["accuracy"]) == ("5-seeds", "damaged: summary.json", None)


def test_a_group_is_listed_with_mean_and_deviation(outputs):
    (row,) = headlines.groups(str(outputs))
    assert row == {"group": "5-seeds", "status": "killed", "accuracy": None, "accuracy_tta": None}
    spread = {"mean": 0.9, "standard_deviation": 0.01, "interval_95": [0.89, 0.91]}
    summary = {"status": "completed", "config": {"seeds": 5}, "figures": {"accuracy": spread, "accuracy_tta": spread}}
    runs.write_json(outputs / "5-seeds" / "summary.json", summary)
    (row,) = headlines.groups(str(outputs))
    assert (row["status"], row["accuracy"]) == ("completed", [0.9, 0.01])
