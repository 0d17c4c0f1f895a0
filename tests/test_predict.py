"""Predictions for image files: found, computed, shown and written."""

import csv
import io
import json
import os
import re
import sys
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
from rich.console import Console

from cifar import console, data, predict
from cifar.errors import UsageError, UserError
from cifar.predict import Prediction
from conftest import CIFAR10_CLASSES
from image_files import picture


@pytest.fixture(scope="module")
def predictor(evaluated_run) -> predict.Predictor:
    return predict.Predictor(evaluated_run, "cpu")


def stand_in(classes, threshold=0.5) -> SimpleNamespace:
    """What `write` and `show_predictions` need of a predictor."""
    return SimpleNamespace(
        classes=tuple(classes),
        run=SimpleNamespace(path=Path("my-run"), dataset=SimpleNamespace(name="pets"), is_shipped=False),
        threshold=threshold,
    )


def test_a_folder_of_the_test_images_gets_the_predictions_of_evaluate(predictor, evaluated_run, digits, tmp_path):
    for index, image in enumerate(digits.test.images):
        picture(image).save(tmp_path / f"{index:05}.png")
    predictions = list(predictor.predict(predict.find_images([str(tmp_path)])))
    saved = np.genfromtxt(evaluated_run.path / "predictions.csv", delimiter=",", skip_header=1)
    np.testing.assert_allclose([prediction.probabilities for prediction in predictions], saved[:, 4:], atol=1e-6)


def test_an_image_that_cannot_be_read_keeps_its_place(predictor, digits, tmp_path):
    picture(digits.test.images[0]).save(good := tmp_path / "good.png")
    sources = [good, b"not an image", tmp_path / "missing.png", good.read_bytes()]
    predictions = list(predictor.predict(sources))
    names = [str(good), "standard input", str(tmp_path / "missing.png"), "standard input"]
    assert [prediction.name for prediction in predictions] == names
    errors = [prediction.error for prediction in predictions]
    assert [errors[0], "not an image" in errors[1], "No such file" in errors[2], errors[3]] == [None, True, True, None]
    np.testing.assert_allclose(predictions[0].probabilities, predictions[3].probabilities, atol=1e-6)


def test_a_twentieth_of_the_validation_images_is_below_the_threshold(predictor, evaluated_run, digits):
    _, val = data.train_val_split(digits.train, evaluated_run.config.val_size, evaluated_run.config.seed)
    below = [predictor.is_probably_none(row) for row in predictor.probabilities(val.images)]
    assert abs(np.mean(below) - 0.05) < 0.02
    assert predictor.is_probably_none(np.full(10, 0.1))


def test_files_folders_and_globs_are_found_in_order_without_hidden_files(tmp_path, monkeypatch, capsys):
    for name in ("b.png", "a.png", ".hidden", ".git/d.png", "inner/c.png", "[1]/e.png", "x.txt", "inner/Thumbs.db"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_bytes(b"")
    for name in ("loop", "inner/loop"):
        (tmp_path / name).symlink_to(tmp_path)
    monkeypatch.chdir(tmp_path)

    def found(*paths: str) -> list[str]:
        return [str(path) for path in predict.find_images(paths)]

    assert found(".") == ["[1]/e.png", "a.png", "b.png", "inner/c.png"]
    assert capsys.readouterr().out == ".: Skipped: 2 circular or repeated links (loop, inner/loop); 1 .txt file.\n"
    assert found("*.png") == ["a.png", "b.png"]
    assert found("[1]") == ["[1]/e.png"]
    absolute = str(tmp_path / "a.png")
    assert found("none.png", absolute, "inner/c.png", "none.png") == ["none.png", absolute, "inner/c.png"]
    assert found("a.png", "./a.png", absolute, "inner/../a.png", "*.png") == ["a.png", "b.png"]
    assert found("a" * 300, "a.png") == ["a" * 300, "a.png"]
    (tmp_path / "empty").mkdir()
    assert found("empty", "a.png") == ["a.png"]
    assert capsys.readouterr().out == "empty: no images\n"
    with pytest.raises(UserError, match=r"^there is no image in empty$"):
        found("empty")


def test_an_address_is_refused_in_one_sentence():
    with pytest.raises(UsageError, match=r"^images are files: download https://x\.org/a\.png first$"):
        predict.find_images(["https://x.org/a.png"])


def test_a_dash_is_standard_input_and_a_closed_one_is_an_error(monkeypatch):
    monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO(b"image")))
    assert predict.find_images(["-", "x.png", "-"]) == [b"image", Path("x.png")]
    monkeypatch.setattr(predict, "MAX_BYTES", 1000)
    with open("/dev/zero") as endless:
        monkeypatch.setattr(sys, "stdin", endless)
        assert predict.find_images(["-"]) == [bytes(1001)]
    for closed in (endless, None):
        monkeypatch.setattr(sys, "stdin", closed)
        with pytest.raises(UserError, match="standard input is closed"):
            predict.find_images(["-"])


def predictions_of(names, classes, sure=0.9, threshold=0.5) -> list[Prediction]:
    """One prediction for each name; the first is of the first class, the second of the second and so on."""
    rows = np.full((len(names), len(classes)), (1 - sure) / max(1, len(classes) - 1))
    rows[np.arange(len(names)), np.arange(len(names)) % len(classes)] = sure
    return [Prediction(Path(name), row, None, tuple(classes), sure < threshold) for name, row in zip(names, rows)]


@pytest.fixture(params=[80, 120])
def written(request, monkeypatch) -> io.StringIO:
    """What is written to a terminal of so many columns."""
    terminal = Console(file=io.StringIO(), force_terminal=True, color_system=None, width=request.param, highlight=False)
    monkeypatch.setattr(console, "out", terminal)
    return terminal.file


def test_class_names_are_whole_and_control_characters_escaped_whatever_the_path(written):
    names = ["/data/" + "a_long_folder/" * 9 + "photo.png", "relative/[red].png", "bell\a.png"]
    classes = (*CIFAR10_CLASSES[:2], "[bold]cat\n")
    predict.show_predictions(predictions_of(names, classes, sure=0.4), stand_in(classes))
    printed = written.getvalue()
    assert max(map(len, printed.splitlines()[:6])) <= console.out.width
    for part in ("_folder/photo.png", "relative/[red].png", r"bell\x07.png", "automobile 40.0%", r"[bold]cat\n 40.0%"):
        assert part in printed
    assert "probably none of the classes (confidence below 50.0%): /data/a_long" in " ".join(printed.split())


def test_of_many_images_a_summary_and_the_first_are_shown(written, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    classes = [f"class {number}" for number in range(13)]
    predictions = predictions_of([f"{n:04}.png" for n in range(1200)], classes)
    predictions[-1] = Prediction(Path("broken"), None, "the file is empty")
    predict.show_predictions(predictions, stand_in(classes))
    printed = written.getvalue()
    summary = re.findall(r"class (\d+) *│ *(\d+)$", printed, re.MULTILINE)
    # Image n is of class n modulo 13, and 1200 is 92 times 13 and 4; the one that cannot be read was of class 3.
    assert summary == [(str(number), "93" if number < 3 else "92") for number in range(10)]
    assert printed.count(".png") == 10
    assert "and 1,190 more images; --output saves all predictions" in printed
    assert "cannot read broken: the file is empty" in printed


def test_predictions_are_written_as_csv_and_json(tmp_path):
    classes = ("image", "error", "=1+1", "-")
    predictions = predictions_of(["@a.png", "b.png", "c,\udc80.png"], classes, sure=0.7)
    predictions.append(Prediction(b"", None, "empty"))
    for name in ("new/a.CSV", "a.JSON"):
        predict.write(tmp_path / name, predictions, stand_in(classes))
    rows = json.loads((tmp_path / "a.JSON").read_text(encoding="utf-8"))
    assert rows[0] == {
        "image": "@a.png",
        "predicted": "image",
        "confidence": 0.7,
        "probably_none": False,
        "probabilities": {"image": 0.7, "error": 0.1, "=1+1": 0.1, "-": 0.1},
    }
    assert rows[3] == {"image": "standard input", "error": "empty"}
    with (tmp_path / "new" / "a.CSV").open(newline="", encoding="utf-8", errors="surrogateescape") as file:
        header, *lines = csv.reader(file)
    assert header[:5] == ["image", "predicted", "confidence", "probably_none", "error"]
    assert header[5:] == ["image (class)", "error (class)", "'=1+1", "'-"]
    assert lines == [
        ["'@a.png", "image", "0.7", "False", "", "0.7", "0.1", "0.1", "0.1"],
        ["b.png", "error", "0.7", "False", "", "0.1", "0.7", "0.1", "0.1"],
        ["c,\udc80.png", "'=1+1", "0.7", "False", "", "0.1", "0.1", "0.7", "0.1"],
        ["standard input", "", "", "", "empty", "", "", "", ""],
    ]
    with pytest.raises(UserError, match="cannot write"):
        predict.write(tmp_path / "a.JSON" / "b.csv", predictions, stand_in(classes))
    assert not [name for name in os.listdir(tmp_path) if "partial" in name]
