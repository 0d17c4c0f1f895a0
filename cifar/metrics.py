"""Logits and labels to metrics: accuracy with its interval, scores by class, confusions, calibration.

scikit-learn and SciPy's statistics are imported where they are used: they take a second, and the demo would wait.
"""

import math
from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from scipy.special import log_softmax, softmax
from torch import Tensor

_BINS = 15
_UNSURE_SHARE = 0.05  # of the validation images, on which the network is called unsure


def accuracy(logits: Tensor, labels: Tensor) -> float:
    """The share, in 0..1, of logits (N, classes) whose largest is at the label (N,)."""
    return (logits.argmax(1) == labels).float().mean().item()


def measure(logits: np.ndarray, logits_tta: np.ndarray, labels: np.ndarray, classes: Sequence[str]) -> dict[str, Any]:
    """The metrics of logits (N, classes) and of their test-time augmented form against labels (N,), shares in 0..1.

    What is not called `tta` is from the plain logits.
    """
    from sklearn.metrics import classification_report, confusion_matrix

    numbers = range(len(classes))
    predicted = logits.argmax(1)
    # By number, as a class may be called "accuracy", which is a key of the report.
    report = classification_report(labels, predicted, labels=numbers, output_dict=True, zero_division=0)
    matrix = confusion_matrix(labels, predicted, labels=numbers)
    correct, correct_tta = int((predicted == labels).sum()), int((logits_tta.argmax(1) == labels).sum())
    return {
        "n": len(labels),
        "accuracy": correct / len(labels),
        "interval_95": wilson_interval(correct, len(labels)),
        "accuracy_tta": correct_tta / len(labels),
        "interval_95_tta": wilson_interval(correct_tta, len(labels)),
        "loss": F.cross_entropy(torch.from_numpy(logits), torch.from_numpy(labels)).item(),
        "per_class": {name: _scores(report[str(number)]) for number, name in enumerate(classes)},
        "macro_average": _scores(report["macro avg"]),
        "weighted_average": _scores(report["weighted avg"]),
        "most_confused": most_confused(matrix, classes),
        "confusion_matrix": matrix.tolist(),
    }


def wilson_interval(correct: int, total: int) -> tuple[float, float]:
    """The 95% confidence interval of a share (Wilson 1927), as two numbers in 0..1."""
    from scipy.stats import binomtest

    interval = binomtest(correct, total).proportion_ci(method="wilson")
    return float(interval.low), float(interval.high)


def most_confused(matrix: np.ndarray, classes: Sequence[str]) -> list[dict[str, Any]]:
    """The ten cells off the diagonal with the largest counts, largest first, and none that is zero."""
    wrong = matrix - np.diag(np.diag(matrix))
    order = np.argsort(-wrong, axis=None, kind="stable")[:10]
    cells = [np.unravel_index(cell, wrong.shape) for cell in order]
    return [
        {"true": classes[row], "predicted": classes[column], "count": int(wrong[row, column])}
        for row, column in cells
        if wrong[row, column]
    ]


def calibrate(val_logits: np.ndarray, val_labels: np.ndarray) -> dict[str, Any]:
    """The temperature that makes confidence on validation fit accuracy, and the threshold of an answer.

    threshold: the confidence that all but `threshold_share` of the validation images reach, so that a picture
    below it is probably none of the classes. Without validation the temperature is 1 and there is no threshold.
    Source: Guo et al. 2017, arXiv:1706.04599.
    """
    temperature = fit_temperature(val_logits, val_labels) if len(val_labels) else 1.0
    confidence = softmax(val_logits / temperature, axis=1).max(1, initial=0)
    return {
        "temperature": temperature,
        "threshold": float(np.quantile(confidence, _UNSURE_SHARE)) if len(val_labels) else None,
        "threshold_share": _UNSURE_SHARE,
        "fitted_on": len(val_labels),
    }


def calibration_error(logits: np.ndarray, labels: np.ndarray, temperature: float) -> dict[str, Any]:
    """How far confidence is from accuracy, `before` and `after` the temperature, each as `reliability` gives it."""
    return {"before": reliability(logits, labels), "after": reliability(logits / temperature, labels)}


def fit_temperature(logits: np.ndarray, labels: np.ndarray) -> float:
    """The T, from 0.01 to 100, that minimizes the cross-entropy of logits (N, classes) / T against labels (N,)."""
    from scipy.optimize import minimize_scalar

    def loss(log_temperature: float) -> float:
        scaled = log_softmax(logits.astype(np.float64) / math.exp(log_temperature), axis=1)
        return -scaled[np.arange(len(labels)), labels].mean()

    return math.exp(minimize_scalar(loss, bounds=(math.log(0.01), math.log(100)), method="bounded").x)


def reliability(logits: np.ndarray, labels: np.ndarray) -> dict[str, Any]:
    """Expected calibration error, negative log-likelihood and the bins of the reliability diagram."""
    from sklearn.metrics import log_loss

    probabilities = softmax(logits.astype(np.float64), axis=1)
    confidence = probabilities.max(1)
    correct = probabilities.argmax(1) == labels
    edges = np.linspace(0, 1, _BINS + 1)
    places = np.digitize(confidence, edges[1:-1], right=True)
    bins = []
    for place, low in enumerate(edges[:-1]):
        inside = places == place
        count = int(inside.sum())
        means = [float(values[inside].mean()) if count else None for values in (confidence, correct)]
        bins.append({"low": float(low), "count": count, "confidence": means[0], "accuracy": means[1]})
    gaps = [bin["count"] * abs(bin["confidence"] - bin["accuracy"]) for bin in bins if bin["count"]]
    classes = range(probabilities.shape[1])
    likelihood = log_loss(labels, probabilities, labels=classes)
    return {"expected_calibration_error": sum(gaps) / len(labels), "negative_log_likelihood": likelihood, "bins": bins}


def _scores(row: dict[str, float]) -> dict[str, Any]:
    return {
        "precision": row["precision"],
        "recall": row["recall"],
        "f1": row["f1-score"],
        "support": int(row["support"]),
    }
