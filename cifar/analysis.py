"""Probabilities to what a person asks of a network: where it fails, when it can be trusted, which labels look wrong.

scikit-learn is imported where it is used, as metrics.py says.
"""

from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np

from cifar.runs import Run, damaged

_FILE = "analysis.json"
_PAIRS, _PAIR_PICTURES = 6, 8
_MISTAKES = 24
_SUSPECTS = 30
_POINTS = 101  # of a curve as it is kept
_TRUSTED = 0.99  # accuracy


def scores(probabilities: np.ndarray, labels: np.ndarray, classes: Sequence[str]) -> dict[str, Any]:
    """What metrics.json says of probabilities (N, classes) as a ranking, and of their winner's as confidence.

    average_precision: by class, None for one without images. selective: if only the surest images are answered, the
    mean error rate over all such shares (Geifman and El-Yaniv 2017, arXiv:1705.08500), and the largest share of
    which 99% are right.
    """
    risk = _risk(probabilities, labels)
    trusted = np.flatnonzero(risk <= 1 - _TRUSTED + 1e-12)
    return {
        "average_precision": _average_precision(probabilities, labels, classes),
        "selective": {
            "area_under_risk_coverage": float(risk.mean()),
            "coverage_at_99_accuracy": (int(trusted[-1]) + 1) / len(labels) if len(trusted) else 0.0,
        },
    }


def analyse(
    probabilities: np.ndarray, labels: np.ndarray, classes: Sequence[str], most_confused: Sequence[dict[str, Any]]
) -> dict[str, Any]:
    """analysis.json: curves, and pictures by their index in the split, of probabilities (N, classes).

    most_confused: as metrics.json has it.
    """
    return {
        "confused_pairs": [_confused_pair(pair, probabilities, labels, classes) for pair in most_confused[:_PAIRS]],
        "confident_mistakes": _confident_mistakes(probabilities, labels, classes),
        "suspected_labels": _suspected_labels(probabilities, labels, classes),
        "precision_recall": _precision_recall(probabilities, labels, classes),
        "risk_coverage": _risk_coverage(probabilities, labels),
    }


def read(run: Run, metrics: dict[str, Any] | None) -> dict[str, Any] | None:
    """A run's analysis.json, None if there is none. Raises UserError if it is damaged, or not of the metrics.json."""
    content = run.read_if_there(_FILE)
    if content and metrics:
        ranked = [name for name, score in metrics.get("average_precision", {}).items() if score is not None]
        if "selective" not in metrics or content["precision_recall"].keys() != set(ranked):
            raise damaged(run.path / _FILE, "it does not fit metrics.json")
    return content


def pictures(content: dict[str, Any]) -> Iterator[dict[str, Any]]:
    """Every picture that an analysis.json names, some of them more than once."""
    for pair in content["confused_pairs"]:
        yield from pair["pictures"]
    yield from content["confident_mistakes"]
    yield from content["suspected_labels"]


def highest(values: np.ndarray, chosen: np.ndarray, most: int) -> np.ndarray:
    """The indices of the highest values where `chosen`, the highest first, the earlier of equals first."""
    indices = np.flatnonzero(chosen)
    return indices[np.argsort(-values[indices], kind="stable")][:most]


def _confused_pair(
    pair: dict[str, Any], probabilities: np.ndarray, labels: np.ndarray, classes: Sequence[str]
) -> dict[str, Any]:
    """A pair of metrics.json with its surest pictures."""
    true, other = classes.index(pair["true"]), classes.index(pair["predicted"])
    inside = (labels == true) & (probabilities.argmax(1) == other)
    shown = highest(probabilities.max(1), inside, _PAIR_PICTURES)
    return {**pair, "pictures": [_picture(index, probabilities, labels, classes) for index in shown]}


def _confident_mistakes(probabilities: np.ndarray, labels: np.ndarray, classes: Sequence[str]) -> list[dict[str, Any]]:
    shown = highest(probabilities.max(1), probabilities.argmax(1) != labels, _MISTAKES)
    return [_picture(index, probabilities, labels, classes) for index in shown]


def _suspected_labels(probabilities: np.ndarray, labels: np.ndarray, classes: Sequence[str]) -> list[dict[str, Any]]:
    """The pictures whose labels are the least likely beside the class that the network sees, by their log odds.

    Confidence alone ranks worse: of the first 30 of CIFAR-10's test split in a run of `fast`, people (CIFAR-10H,
    Peterson et al. 2019) name another class than the label for 9 by log odds and for 5 by confidence.
    """
    given = probabilities[np.arange(len(labels)), labels]
    log_odds = np.log(probabilities.max(1)) - np.log(np.maximum(given, np.finfo(float).tiny))
    shown = highest(log_odds, probabilities.argmax(1) != labels, _SUSPECTS)
    return [{**_picture(index, probabilities, labels, classes), "log_odds": float(log_odds[index])} for index in shown]


def _picture(index: int, probabilities: np.ndarray, labels: np.ndarray, classes: Sequence[str]) -> dict[str, Any]:
    row = probabilities[index]
    return {
        "index": int(index),
        "true": classes[labels[index]],
        "predicted": classes[row.argmax()],
        "confidence": float(row.max()),
        "true_probability": float(row[labels[index]]),
    }


def _average_precision(
    probabilities: np.ndarray, labels: np.ndarray, classes: Sequence[str]
) -> dict[str, float | None]:
    from sklearn.metrics import average_precision_score

    there = [labels == number for number in range(len(classes))]
    return {
        name: float(average_precision_score(true, column)) if true.any() else None
        for name, true, column in zip(classes, there, probabilities.T)
    }


def _precision_recall(
    probabilities: np.ndarray, labels: np.ndarray, classes: Sequence[str]
) -> dict[str, dict[str, list[float]]]:
    """By class that has images: at each hundredth of recall, the first threshold's precision and recall that reach it.

    Both are rounded, to keep the file small.
    """
    from sklearn.metrics import precision_recall_curve

    curves = {}
    for number, name in enumerate(classes):
        true = labels == number
        if not true.any():
            continue
        precision, recall, _ = precision_recall_curve(true, probabilities[:, number])
        precision, recall = precision[::-1], recall[::-1]  # by falling threshold
        places = np.searchsorted(recall, np.linspace(0, 1, _POINTS)[1:] - 1e-12)
        curves[name] = {"recall": recall[places].round(4).tolist(), "precision": precision[places].round(4).tolist()}
    return curves


def _risk(probabilities: np.ndarray, labels: np.ndarray) -> np.ndarray:
    """The share that is wrong of the 1, 2, ... N surest images: (N,)."""
    order = np.argsort(-probabilities.max(1), kind="stable")
    wrong = (probabilities.argmax(1) != labels)[order]
    return wrong.cumsum() / np.arange(1, len(labels) + 1)


def _risk_coverage(probabilities: np.ndarray, labels: np.ndarray) -> dict[str, list[float]]:
    """The error rate of the surest images, at each hundredth of their share."""
    risk = _risk(probabilities, labels)
    counts = np.unique(np.linspace(0, len(labels), _POINTS).round().astype(int).clip(1))
    return {"coverage": (counts / len(labels)).tolist(), "risk": risk[counts - 1].tolist()}
