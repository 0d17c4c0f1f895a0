"""A run's predictions.csv: what the network says of every test image, written and read."""

import csv
import io
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from cifar.datasets import Dataset
from cifar.errors import UserError, short
from cifar.runs import Run, damaged

_NAME = "predictions.csv"
_COLUMNS = ["index", "true", "predicted", "confidence"]  # then the classes' probabilities
_NOT_AS_WRITTEN = "a line is not as it was written"


@dataclass(frozen=True)
class Predictions:
    """One entry per test image, in the split's order: class numbers (N,), and confidence (N,) in 0..1."""

    true: np.ndarray
    predicted: np.ndarray
    confidence: np.ndarray


def write(run: Run, probabilities: np.ndarray, dataset: Dataset) -> None:
    """A row per test image, with its calibrated probabilities (N, classes)."""
    classes = dataset.classes
    text = io.StringIO()
    writer = csv.writer(text)
    writer.writerow(_columns(dataset))
    for index, (row, label) in enumerate(zip(probabilities, dataset.test.labels.tolist())):
        winner = int(row.argmax())
        shares = [f"{share:.6f}" for share in (row[winner], *row)]
        writer.writerow([index, classes[label], classes[winner], *shares])
    run.write_text(_NAME, text.getvalue())


def read(run: Run, dataset: Dataset) -> Predictions | None:
    """None if there is no file. Raises UserError if it is damaged or not of the dataset's test split."""
    path = run.path / _NAME
    if not path.exists():
        return None
    numbers = {name: number for number, name in enumerate(dataset.classes)}
    header, rows = _lines(path)
    try:
        table = [(float(index), numbers[true], numbers[said], float(sure)) for index, true, said, sure, *_ in rows]
    except (ValueError, KeyError):
        raise damaged(path, _NOT_AS_WRITTEN) from None
    index, true, predicted, confidence = np.array(table).reshape(-1, 4).T
    if header != _columns(dataset) or not ((confidence >= 0) & (confidence <= 1)).all():
        raise damaged(path, _NOT_AS_WRITTEN)
    labels = dataset.test.labels.numpy()
    if not (np.array_equal(index, np.arange(len(labels))) and np.array_equal(true, labels)):
        raise damaged(path, f"it does not fit the test split of {dataset.name}")
    return Predictions(true.astype(int), predicted.astype(int), confidence)


def read_names(run: Run) -> tuple[np.ndarray, np.ndarray]:
    """The true and the predicted class of each test image by name, (N,) and (N,), of a run without its dataset.

    Raises UserError if the file cannot be read or is damaged.
    """
    _, rows = _lines(run.path / _NAME)
    true, predicted = np.array([row[1:3] for row in rows], dtype=str).reshape(-1, 2).T
    return true, predicted


def _lines(path: Path) -> tuple[list[str], list[list[str]]]:
    """The header, which begins as it is written, and the rows, which are as long. Raises UserError if it is not so."""
    try:
        with path.open(newline="", encoding="utf-8") as file:
            header, *rows = csv.reader(file, strict=True)
    except OSError as error:
        raise UserError(f"cannot read {short(path)}: {error.strerror}") from None
    except (ValueError, csv.Error):
        raise damaged(path, _NOT_AS_WRITTEN) from None
    if header[: len(_COLUMNS)] != _COLUMNS or any(len(row) != len(header) for row in rows):
        raise damaged(path, _NOT_AS_WRITTEN)
    return header, rows


def _columns(dataset: Dataset) -> list[str]:
    return [*_COLUMNS, *dataset.classes]
