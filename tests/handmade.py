"""Hand-made datasets and runs, small enough to work out by hand what becomes of them.

`make_line`, `make_metrics` and `CORRUPTIONS` are contents of JSON files; `records.parse` makes models of them.
"""

import os
from pathlib import Path

import numpy as np
import torch
from torch import nn

from cifar import analysis, evaluate, metrics
from cifar.config import Config
from cifar.data import Dataset, Split
from cifar.records import EpochRecord
from cifar.runs import Run

CLASSES = ("cat", "dog", "ship")
ESCAPED = ("cat", "dog", "<ship>")
TRUE = (0, 0, 0, 0, 1, 1, 1, 1, 2, 2, 2, 2)
PREDICTED = (0, 0, 0, 1, 1, 1, 1, 1, 0, 0, 2, 2)  # wrong at 3, 8 and 9
CONFIDENCE = (0.9, 0.8, 0.7, 0.6, 0.9, 0.9, 0.9, 0.9, 0.95, 0.75, 0.5, 0.5)
# Of five other images: right with confidence 0.9 and 0.8, wrong with 0.7, right with 0.6, wrong with 0.5.
PROBABILITIES = np.array([[0.9, 0.1, 0.0], [0.2, 0.8, 0.0], [0.7, 0.2, 0.1], [0.1, 0.3, 0.6], [0.2, 0.5, 0.3]])
LABELS = np.array([0, 1, 1, 2, 2])
MATRIX = ((3, 1, 0), (0, 4, 0), (2, 0, 2))
LAYERS = [
    {"name": "stem.0", "kind": "Conv2d", "output_shape": [4, 8, 8], "parameters": 108, "multiply_adds": 6912},
    {"name": "stem.1", "kind": "ReLU", "output_shape": [4, 8, 8], "parameters": 0, "multiply_adds": 0},
    {"name": "head", "kind": "Linear", "output_shape": [3], "parameters": 771, "multiply_adds": 768},
]
MODEL = {"name": "tiny", "parameters": 879, "multiply_adds": 7680, "layers": LAYERS}
RECORD = {"status": "completed", "start": "2026-01-01T00:00:00+00:00", "seconds": {}}
FACTS = {"dataset": "digits", "recipe": "fast", "split": "test", "epoch": 1}


class Brightness(nn.Module):
    """A network whose logits are the brightness of the left, the right and the upper half."""

    def __init__(self):
        super().__init__()
        self.head = nn.Linear(3, 3)

    def forward(self, images):
        grey = images.mean(1)
        return torch.stack([grey[:, :, :4].mean((1, 2)), grey[:, :, 4:].mean((1, 2)), grey[:, :4].mean((1, 2))], 1)


class Command:
    """A folder's path, which makes the folder when it is unpickled."""

    def __init__(self, path: Path):
        self.path = path

    def __reduce__(self):
        return os.mkdir, (str(self.path),)


def _cells(*accuracies: float) -> list[dict]:
    """A row of corruptions.json with calibration errors of 0.1 and 0.3."""
    return [
        {"accuracy": accuracy, "expected_calibration_error": error} for accuracy, error in zip(accuracies, (0.1, 0.3))
    ]


CORRUPTIONS = {
    "dataset": "digits",
    "n": 12,
    "clean": {"accuracy": 0.75, "expected_calibration_error": 0.05},
    "mean": {"accuracy": 0.4, "expected_calibration_error": 0.2},
    "corruptions": {"noise": _cells(0.5, 0.1), "shift": _cells(0.7, 0.3)},
}


def make_dataset(classes=CLASSES, true=TRUE, key="digits") -> Dataset:
    """Images of 8x8 pixels; all pixels of an image are 10 x its class + its position within the class."""

    def split(labels):
        labels = torch.tensor(labels)
        positions = torch.stack([(labels[:index] == label).sum() for index, label in enumerate(labels)])
        values = ((10 * labels + positions) % 256).to(torch.uint8)
        return Split(values.view(-1, 1, 1, 1).expand(-1, 3, 8, 8).contiguous(), labels)

    splits = {"train": split([*range(len(classes))] * 3), "test": split(true)}
    return Dataset(key=key, classes=tuple(classes), location="memory", can_flip=False, read=splits.__getitem__)


def make_line(epoch, validated=True, **changes) -> dict:
    """One epoch's line of history.jsonl."""
    line = {"epoch": epoch, "image_size": 32, "lr": 0.1 / epoch}
    line |= {"train_loss": 2 / epoch, "train_accuracy": 1 - 0.4 / epoch}
    validation = {"val_loss": 2.5 / epoch, "val_accuracy": 1 - 0.5 / epoch}
    line |= validation if validated else dict.fromkeys(validation)
    return line | {"images_per_second": 100.0, "seconds": 1.0} | changes


def make_epochs(count) -> list[EpochRecord]:
    """The first epochs of a history."""
    return [EpochRecord(**make_line(epoch)) for epoch in range(1, count + 1)]


def make_metrics(classes=CLASSES, matrix=MATRIX, fitted_on=10) -> dict:
    """The content of metrics.json for a confusion matrix."""
    counts = np.array(matrix)
    true, predicted = (number.ravel().repeat(counts.ravel()) for number in np.indices(counts.shape))
    logits = np.eye(len(classes), dtype=np.float32)[predicted]
    bins = [
        {"low": 0.0, "count": 0, "confidence": None, "accuracy": None},
        {"low": 0.5, "count": int(counts.sum()), "confidence": 0.8, "accuracy": 0.75},
    ]
    reliability = {"expected_calibration_error": 0.05, "negative_log_likelihood": 0.7, "bins": bins}
    after = reliability | {"expected_calibration_error": 0.02}
    calibration = {"temperature": 1.25, "fitted_on": fitted_on, "before": reliability, "after": after}
    logits_tta = logits.copy()
    if len(wrong := np.flatnonzero(true != predicted)):  # TTA corrects a mistake
        logits_tta[wrong[0]] = np.eye(len(classes))[true[wrong[0]]]
    measured = metrics.measure(logits, logits_tta, true, classes)
    return FACTS | measured | {"loss": 0.5, "calibration": calibration}


def make_run(path, classes=CLASSES, *, epochs=3, true=TRUE, predicted=PREDICTED, confidence=CONFIDENCE, evaluated=True):
    """A run of `epochs` epochs; if evaluated, with metrics, analysis, corruptions and predictions.

    What the confidence leaves is shared out evenly over the other classes.
    """
    run, count = Run(path), len(classes)
    path.mkdir(parents=True, exist_ok=True)
    run.write("config.json", Config(dataset="digits", val_size=10).model_dump())
    run.write("run.json", RECORD | {"model": MODEL})
    run.write_history(make_epochs(epochs))
    if not evaluated:
        return run
    labels, winners = np.array(true), np.array(predicted)
    matrix = np.zeros((count, count), int)
    np.add.at(matrix, (labels, winners), 1)
    sure = np.array(confidence, float)[:, None]
    probabilities = np.where(np.arange(count) == winners[:, None], sure, (1 - sure) / max(1, count - 1))
    content = make_metrics(classes, matrix)
    run.write("metrics.json", content | metrics.ranking_scores(probabilities, labels, classes))
    run.write("analysis.json", analysis.analyze(probabilities, labels, classes, content["most_confused"]))
    run.write("corruptions.json", CORRUPTIONS)
    evaluate.write_predictions(run, probabilities, labels, classes)
    return run


def erring_run(folder: Path, wrong, *, classes=ESCAPED, images=300, history=3, test_sha256="same", **settings) -> Run:
    """An evaluated run that errs on the images `wrong`; the class of image i is i modulo the number of classes."""
    true = np.arange(images) % len(classes)
    predicted = np.where(np.isin(np.arange(images), list(wrong)), (true + 1) % len(classes), true)
    run = make_run(folder, classes, epochs=history, true=true, predicted=predicted, confidence=[0.9] * images)
    run.write("config.json", Config(dataset="digits", val_size=10, **settings).model_dump())
    run.update(seconds={"train": 9.5})
    run.write("metrics.json", run.metrics.model_dump() | {"test_sha256": test_sha256})
    return run
