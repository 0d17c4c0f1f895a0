"""The JSON files of a run: which contents are accepted, and how a wrong one is reported."""

import copy
import json
from pathlib import Path

import pytest

from cifar import records
from cifar.config import PROJECT
from handmade import CORRUPTIONS

REFERENCE = PROJECT / "outputs" / "reference"
RUN = PROJECT / "tests" / "old_run"  # of the first version
FILES = sorted(path for folder in (REFERENCE, RUN) for path in folder.rglob("*.json*") if path.name in records.RECORDS)


def load(path: Path):
    text = path.read_text()
    return [json.loads(line) for line in text.splitlines()] if path.suffix == ".jsonl" else json.loads(text)


def test_the_reference_runs_hold_every_kind_of_file_but_corruptions():
    assert {path.name for path in FILES} == records.RECORDS.keys() - {"corruptions.json"}


@pytest.mark.parametrize("path", FILES, ids=lambda path: f"{path.parent.name}/{path.name}")
def test_every_reference_file_is_read_and_written_with_the_same_content(path):
    content = load(path)
    model = records.parse(path.name, content)
    assert json.loads(json.dumps(model.model_dump(exclude_unset=True))) == content


@pytest.mark.parametrize(
    ("file", "place", "value", "sentence"),
    [
        ("run.json", "status", ..., "status is missing"),
        ("run.json", "status", "fine", "status should be 'running', 'completed', 'interrupted', 'failed' or 'killed'"),
        ("run.json", "end", "0001-01-01T00:00:00", "end should be a time in ISO 8601"),
        ("run.json", "seconds.train", True, "seconds.train should be a valid number"),
        ("run.json", "seconds", [], "seconds should be a JSON object"),
        ("run.json", "dataset.classes", "cat", "dataset.classes should be a list"),
        ("run.json", "model.layers.1.name", 1, "model.layers.1.name should be text"),
        ("run.json", "commit", "\udcff", "commit has characters that are not valid Unicode"),
        ("history.jsonl", "0.val_loss", ..., "0.val_loss is missing"),
        ("history.jsonl", "1.epoch", 1, "its epochs are not 1, 2, 3 and so on"),
        ("history.jsonl", "1.val_accuracy", None, "some of its epochs have no validation"),
        ("metrics.json", "calibration.temperature", 0, "calibration.temperature should be greater than 0"),
        ("metrics.json", "accuracy", 1.5, "accuracy should be less than or equal to 1"),
        ("metrics.json", "loss", float("nan"), "loss should be a finite number"),
        ("metrics.json", "loss", 10**400, "loss should be a valid number"),
        ("metrics.json", "loss", -1e308, "loss should be greater than -1000"),
        ("metrics.json", "n", 10_001, "its confusion_matrix does not sum to n"),
        ("metrics.json", "accuracy", 0.79, "its confusion_matrix contradicts its accuracy"),
        ("metrics.json", "per_class.cat", ..., "its confusion_matrix does not have a row and a column for each class"),
        ("metrics.json", "average_precision.cat", ..., "its average_precision does not have the same classes as"),
        ("metrics.json", "interval_95", [0.5], "interval_95.1 is missing"),
        ("metrics.json", "interval_95", [0.5, 0.6, 0.7], "interval_95 should be a shorter list"),
        ("analysis.json", "precision_recall.cat.recall", [0.5], "precision_recall.cat should be a curve: two lists of"),
        ("analysis.json", "precision_recall.cat.recall", [], "precision_recall.cat.recall should not be an empty list"),
        ("analysis.json", "confident_mistakes.3.index", 1.0, "confident_mistakes.3.index should be a valid integer"),
        ("corruptions.json", "corruptions", {}, "its corruptions do not all have the same severities"),
        ("corruptions.json", "corruptions", {"noise": []}, "its corruptions do not all have the same severities"),
        ("corruptions.json", "corruptions.noise.1", ..., "its corruptions do not all have the same severities"),
    ],
)
def test_a_wrong_value_is_reported_with_its_place(file, place, value, sentence):
    content = part = copy.deepcopy(CORRUPTIONS) if file == "corruptions.json" else load(RUN / file)
    *path, last = (int(key) if key.isdecimal() else key for key in place.split("."))
    for key in path:
        part = part[key]
    if value is ...:
        del part[last]
    else:
        part[last] = value
    with pytest.raises(ValueError) as error:  # noqa: PT011
        records.parse(file, content)
    assert str(error.value).startswith(sentence)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize("file", records.RECORDS)
@pytest.mark.parametrize("content", [None, "x", {"": None}, [3], [{}]])
def test_content_of_another_kind_is_refused(file, content):
    with pytest.raises(ValueError, match=r"should be a|is missing"):
        records.parse(file, content)
