"""A dataset, a run and parts of one that no training made: few numbers, to work out by hand what becomes of them."""

import csv
from dataclasses import asdict
from pathlib import Path

import numpy as np
import torch

from cifar import analysis, metrics
from cifar.config import Config
from cifar.data import Split
from cifar.datasets import Dataset
from cifar.runs import Run

CLASSES = ("cat", "dog", "ship")
TRUE = (0, 0, 0, 0, 1, 1, 1, 1, 2, 2, 2, 2)
PREDICTED = (0, 0, 0, 1, 1, 1, 1, 1, 0, 0, 2, 2)  # wrong at 3, 8 and 9
CONFIDENCE = (0.9, 0.8, 0.7, 0.6, 0.9, 0.9, 0.9, 0.9, 0.95, 0.75, 0.5, 0.5)
ESCAPED = ("cat", "dog", "<ship>")
MATRIX = ((3, 1, 0), (0, 4, 0), (2, 0, 2))
LAYERS = [
    {"name": "stem.0", "kind": "Conv2d", "output_shape": [4, 8, 8], "parameters": 108, "multiply_adds": 6912},
    {"name": "stem.1", "kind": "ReLU", "output_shape": [4, 8, 8], "parameters": 0, "multiply_adds": 0},
    {"name": "head", "kind": "Linear", "output_shape": [3], "parameters": 771, "multiply_adds": 768},
]

HARMED = {
    "n": 12,
    "clean": {"accuracy": 0.75, "expected_calibration_error": 0.05},
    "mean": {"accuracy": 0.4, "expected_calibration_error": 0.2},
    "corruptions": {
        kind: [
            {"severity": severity, "accuracy": accuracy, "expected_calibration_error": 0.2 * severity - 0.1}
            for severity, accuracy in enumerate(accuracies, start=1)
        ]
        for kind, accuracies in {"noise": (0.5, 0.1), "shift": (0.7, 0.3)}.items()
    },
}


def make_dataset(classes=CLASSES, true=TRUE):
    """Images of 8x8; all the pixels of one have a value of their own: 10 x class + place in the class."""

    def split(labels):
        labels = torch.tensor(labels)
        places = torch.stack([(labels[:index] == label).sum() for index, label in enumerate(labels)])
        values = ((10 * labels + places) % 256).to(torch.uint8)
        return Split(values.view(-1, 1, 1, 1).expand(-1, 3, 8, 8).contiguous(), labels)

    splits = {"train": split([*range(len(classes))] * 3), "test": split(true)}
    return Dataset(key="digits", classes=tuple(classes), place="memory", mirrors=False, read=splits.__getitem__)


def make_line(epoch, validated=True, **changes):
    line = {"epoch": epoch, "image_size": 32, "lr": 0.1 / epoch}
    line |= {"train_loss": 2 / epoch, "train_accuracy": 1 - 0.5 / epoch}
    validation = {"val_loss": 2.5 / epoch, "val_accuracy": 1 - 0.6 / epoch}
    line |= validation if validated else dict.fromkeys(validation)
    return {**line, "images_per_second": 100.0, "seconds": 1.0, **changes}


def make_metrics(classes=CLASSES, matrix=MATRIX, fitted_on=10):
    counts = np.array(matrix)
    hits = np.diag(counts)
    precision, recall = hits / counts.sum(0).clip(1), hits / counts.sum(1).clip(1)
    f1 = 2 * hits / (counts.sum(0) + counts.sum(1)).clip(1)
    bins = [{"low": 0.0, "count": 0, "confidence": None, "accuracy": None}]
    bins += [{"low": 0.5, "count": 12, "confidence": 0.8, "accuracy": 0.75}]
    part = {"expected_calibration_error": 0.05, "negative_log_likelihood": 0.7, "bins": bins}
    share = float(hits.sum() / counts.sum())
    return {
        **{"dataset": "digits", "recipe": "fast", "split": "test", "n": int(counts.sum()), "loss": 0.5},
        **{"accuracy": share, "accuracy_tta": share, "interval_95": [0.0, 1.0], "interval_95_tta": [0.0, 1.0]},
        "most_confused": [],
        "per_class": {
            name: {**dict(zip(("precision", "recall", "f1"), map(float, row))), "support": int(support)}
            for name, support, *row in zip(classes, counts.sum(1), precision, recall, f1)
        },
        "macro_average": {"precision": precision.mean(), "recall": recall.mean(), "f1": f1.mean()},
        "confusion_matrix": counts.tolist(),
        "calibration": {"temperature": 1.25, "fitted_on": fitted_on, "before": part, "after": part},
    }


def make_run(path, classes=CLASSES, *, epochs=3, true=TRUE, predicted=PREDICTED, confidence=CONFIDENCE, evaluated=True):
    run = Run(path)
    run.write("config.json", asdict(Config(dataset="digits", val_size=10)))
    network = {"name": "tiny", "parameters": 879, "multiply_adds": 7680, "layers": LAYERS}
    record = {"status": "completed", "start": "2026-01-01T00:00:00+00:00", "seconds": {}}
    run.write("run.json", {**record, "model": network})
    for epoch in range(1, epochs + 1):
        run.append_history(make_line(epoch))
    if evaluated:
        matrix = np.zeros((len(classes), len(classes)), int)
        np.add.at(matrix, (list(true), list(predicted)), 1)
        labels, shares = np.array(true), np.array(confidence)[:, None]
        is_winner = np.arange(len(classes)) == np.array(predicted)[:, None]
        probabilities = np.where(is_winner, shares, (1 - shares) / (len(classes) - 1))
        run.write("metrics.json", make_metrics(classes, matrix) | analysis.scores(probabilities, labels, classes))
        run.write("analysis.json", analysis.analyse(probabilities, labels, classes, []))
        run.write("corruptions.json", HARMED)
        rows = enumerate(zip(true, predicted, confidence))
        write_predictions(path, classes, ([i, t, p, share, *[0] * len(classes)] for i, (t, p, share) in rows))
    return run


def erring_run(folder: Path, wrong, *, classes=ESCAPED, images=300, history=3, test_sha256="same", **settings) -> Run:
    """An evaluated run whose image i is of class i modulo the classes, and which errs on the images `wrong`."""
    folder.mkdir(parents=True)
    run, count = Run(folder), len(classes)
    wrong = np.isin(np.arange(images), list(wrong))
    true = np.arange(images) % count
    predicted = np.where(wrong, (true + 1) % count, true)
    logits = 9 * np.eye(count, dtype=np.float32)[predicted]
    calibration = metrics.calibrate(logits[:0], true[:0]) | metrics.calibration_error(logits, true, 1.0)
    calibration["after"]["expected_calibration_error"] = 0.02
    run.write("config.json", asdict(Config(dataset="digits", val_size=10, **settings)))
    run.write("run.json", {"status": "completed", "start": "2026-01-01T00:00:00+00:00", "seconds": {"train": 9.5}})
    run.write(
        "metrics.json",
        {
            **{"dataset": "digits", "recipe": "fast", "split": "test", "test_sha256": test_sha256},
            **metrics.measure(logits, logits, true, classes),
            "loss": 0.5,
            "calibration": calibration,
        },
    )
    write_predictions(folder, classes, ([i, true[i], predicted[i], 0.9, *[0.1] * count] for i in range(images)))
    for epoch in range(1, history + 1):
        losses = dict.fromkeys(("train_loss", "val_loss"), 1 / epoch)
        accuracies = {"train_accuracy": 0.5, "val_accuracy": 1 - 0.5 / epoch}
        run.append_history(make_line(epoch, **losses, **accuracies, lr=0.1, images_per_second=9, seconds=2))
    return run


def write_predictions(folder: Path, classes, rows) -> None:
    """rows: the index, the numbers of the true and the predicted class, the confidence, the probabilities."""
    with (folder / "predictions.csv").open("w", newline="", encoding="utf-8") as file:
        writer = csv.writer(file)
        writer.writerow(["index", "true", "predicted", "confidence", *classes])
        writer.writerows([index, classes[true], classes[said], *shares] for index, true, said, *shares in rows)
