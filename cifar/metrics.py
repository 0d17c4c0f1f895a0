"""Metrics of logits, probabilities and labels: accuracy, scores by class, calibration, ranking, significance.

scikit-learn and SciPy's statistics are imported where they are used: they take a second, and the demo would wait.
"""

import math
from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from scipy.special import log_softmax, softmax

BELOW_THRESHOLD = 0.05  # fraction of the validation images that are less confident than the threshold
SIGNIFICANCE_LEVEL = 0.05  # below which a p value is called significant


def measure(logits: np.ndarray, logits_tta: np.ndarray, labels: np.ndarray, classes: Sequence[str]) -> dict[str, Any]:
    """Compute the metrics of logits (N, classes), and the accuracy of those with TTA, against labels (N,).

    All fractions are in 0..1. To add a metric to metrics.json, add a key here, and show it in templates/report.html if
    it `is defined`, as it is not in older runs.
    """
    import pandas
    from sklearn.metrics import confusion_matrix, precision_recall_fscore_support, top_k_accuracy_score

    numbers, predicted = range(len(classes)), logits.argmax(1)
    by_class = precision_recall_fscore_support(labels, predicted, labels=numbers, zero_division=0)
    averaged = dict(zip(("precision", "recall", "f1"), by_class))
    support = np.bincount(labels, minlength=len(classes))
    matrix = confusion_matrix(labels, predicted, labels=numbers)
    correct, correct_tta = int((predicted == labels).sum()), int((logits_tta.argmax(1) == labels).sum())
    scores = {"top5_accuracy": logits, "top5_accuracy_tta": logits_tta} if len(classes) > 10 else {}
    has_images = support > 0  # averages are over these classes
    return {
        "n": len(labels),
        "accuracy": correct / len(labels),
        "interval_95": wilson_interval(correct, len(labels)),
        "accuracy_tta": correct_tta / len(labels),
        "interval_95_tta": wilson_interval(correct_tta, len(labels)),
        **{name: top_k_accuracy_score(labels, score, k=5, labels=numbers) for name, score in scores.items()},
        "loss": F.cross_entropy(torch.from_numpy(logits), torch.from_numpy(labels)).item(),
        "per_class": pandas.DataFrame(averaged | {"support": support}, index=list(classes)).to_dict("index"),
        "macro_average": {name: float(values[has_images].mean()) for name, values in averaged.items()},
        "weighted_average": {name: float(np.average(values, weights=support)) for name, values in averaged.items()},
        "most_confused": most_confused(matrix, classes),
        "confusion_matrix": matrix.tolist(),
    }


def wilson_interval(correct: int, total: int) -> list[float]:
    """Return the 95% confidence interval of a fraction (Wilson 1927), as two numbers in 0..1."""
    from scipy.stats import binomtest

    return [float(end) for end in binomtest(correct, total).proportion_ci(method="wilson")]


def most_confused(matrix: np.ndarray, classes: Sequence[str], most: int = 10) -> list[dict[str, Any]]:
    """List the largest counts off the diagonal of a confusion matrix, at most so many, largest first, without zeros."""
    pairs = [
        {"true": classes[row], "predicted": classes[column], "count": int(matrix[row, column])}
        for row, column in np.argwhere(matrix)
        if row != column
    ]
    return sorted(pairs, key=lambda pair: pair["count"], reverse=True)[:most]


def ranking_scores(probabilities: np.ndarray, labels: np.ndarray, classes: Sequence[str]) -> dict[str, Any]:
    """Compute the metrics of probabilities (N, classes) as a ranking of the images.

    average_precision: by class; None for a class without images. selective: if only the most confident predictions are
    kept, the error rate averaged over all fractions kept (Geifman and El-Yaniv 2017, arXiv:1705.08500), and the largest
    fraction of which 99% are correct.
    """
    from sklearn.metrics import average_precision_score

    order = np.argsort(-probabilities.max(1), kind="stable")
    wrong = (probabilities.argmax(1) != labels)[order]
    risks = wrong.cumsum() / np.arange(1, len(labels) + 1)  # error rate of the 1, 2, ... N most confident
    trusted = np.flatnonzero(risks <= 0.01 + 1e-12)
    coverage = (int(trusted[-1]) + 1) / len(labels) if len(trusted) else 0.0
    return {
        "average_precision": {
            name: min(1.0, float(average_precision_score(labels == number, column))) if number in labels else None
            for number, (name, column) in enumerate(zip(classes, probabilities.T))
        },
        "selective": {"area_under_risk_coverage": float(risks.mean()), "coverage_at_99_accuracy": coverage},
    }


# Calibration: Guo et al. 2017, arXiv:1706.04599.


def calibrate(val_logits: np.ndarray, val_labels: np.ndarray) -> dict[str, Any]:
    """Fit the temperature, and choose the threshold of confidence below which an image is probably none of the classes.

    Without validation images the temperature is 1 and there is no threshold.
    """
    temperature = fit_temperature(val_logits, val_labels) if len(val_labels) else 1.0
    confidence = softmax(val_logits.astype(np.float64) / temperature, axis=1).max(1, initial=0)
    return {
        "temperature": temperature,
        "threshold": float(np.quantile(confidence, BELOW_THRESHOLD)) if len(val_labels) else None,
        "threshold_share": BELOW_THRESHOLD,
        "fitted_on": len(val_labels),
    }


def fit_temperature(logits: np.ndarray, labels: np.ndarray) -> float:
    """Return the T in 0.01..100 that minimizes the cross-entropy of logits (N, classes) / T against labels (N,).

    A label counts as 1 - 1 / (N + 2), the other classes share the rest (Platt 1999, section 2.2): if the network is
    right for all N images, T would otherwise go to zero, and every confidence to one.
    """
    from scipy.optimize import minimize_scalar

    count, classes = logits.shape
    targets = np.full(logits.shape, 1 / (count + 2) / max(1, classes - 1))
    targets[np.arange(count), labels] = 1 - 1 / (count + 2)

    def loss(log_temperature: float) -> float:
        return -(targets * log_softmax(logits.astype(np.float64) / math.exp(log_temperature), axis=1)).mean()

    return math.exp(minimize_scalar(loss, bounds=(math.log(0.01), math.log(100)), method="bounded").x)


def reliability(logits: np.ndarray, labels: np.ndarray) -> dict[str, Any]:
    """Compute expected calibration error, negative log-likelihood and the bins of the reliability diagram."""
    probabilities = softmax(logits.astype(np.float64), axis=1)
    confidence = probabilities.max(1)
    correct = probabilities.argmax(1) == labels
    edges = np.linspace(0, 1, 16)
    indices = np.digitize(confidence, edges[1:-1], right=True)
    bins: list[dict[str, Any]] = []
    for index, low in enumerate(edges[:-1]):
        inside = indices == index
        count = int(inside.sum())
        means = [float(values[inside].mean()) if count else None for values in (confidence, correct)]
        bins.append({"low": float(low), "count": count, "confidence": means[0], "accuracy": means[1]})
    gaps = [bin["count"] * abs(bin["confidence"] - bin["accuracy"]) for bin in bins if bin["count"]]
    likelihood = F.cross_entropy(torch.from_numpy(logits).double(), torch.from_numpy(labels)).item()
    return {"expected_calibration_error": sum(gaps) / len(labels), "negative_log_likelihood": likelihood, "bins": bins}


def mean_and_spread(values: Sequence[float], least: float = -math.inf, most: float = math.inf) -> dict[str, Any]:
    """Compute mean, sample standard deviation and the mean's 95% interval (Student 1908) of two values or more.

    least, most: bounds of the values, at which the interval is cut off.
    """
    from scipy.stats import t

    mean, standard_deviation = float(np.mean(values)), float(np.std(values, ddof=1))
    half = float(t.ppf(0.975, len(values) - 1)) * standard_deviation / len(values) ** 0.5
    interval = [max(mean - half, least), min(mean + half, most)]
    return {"mean": mean, "standard_deviation": standard_deviation, "interval_95": interval}


def holm(p_values: Sequence[float]) -> list[float]:
    """Return p values corrected for multiple comparisons (Holm 1979), in the order given."""
    order = np.argsort(p_values)
    factors = np.arange(len(p_values), 0, -1)
    corrected = np.maximum.accumulate(factors * np.array(p_values)[order]).clip(max=1)
    return corrected[np.argsort(order)].tolist()
