"""A run's predictions.csv: what the network says of every test image, written and read."""

import csv
import io
from dataclasses import dataclass

import numpy as np

from cifar.config import UserError
from cifar.datasets import Dataset
from cifar.runs import Run, damaged

_NAME = "predictions.csv"


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
    columns = _columns(dataset)
    try:
        with path.open(newline="", encoding="utf-8") as file:
            header, *rows = csv.reader(file)
        table = [(float(row[0]), numbers[row[1]], numbers[row[2]], float(row[3])) for row in rows]
    except OSError as error:
        raise UserError(f"cannot read {path}: {error.strerror}") from None
    except (ValueError, KeyError, IndexError, csv.Error):
        header, rows, table = [], [], []
    index, true, predicted, confidence = np.array(table).reshape(-1, 4).T
    whole = header == columns and all(len(row) == len(columns) for row in rows)
    if not (whole and ((confidence >= 0) & (confidence <= 1)).all()):
        raise damaged(path, "a line is not as it was written")
    labels = dataset.test.labels.numpy()
    if not (np.array_equal(index, np.arange(len(labels))) and np.array_equal(true, labels)):
        raise damaged(path, f"it does not fit the test split of {dataset.name}")
    return Predictions(true.astype(int), predicted.astype(int), confidence)


def _columns(dataset: Dataset) -> list[str]:
    return ["index", "true", "predicted", "confidence", *dataset.classes]
