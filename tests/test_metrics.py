import math

import numpy as np
import pytest

from cifar import metrics


def test_the_wilson_interval_is_that_of_the_formula():
    low, high = metrics.wilson_interval(8, 10)
    z = 1.959963985
    middle = (0.8 + z * z / 20) / (1 + z * z / 10)
    half = z / (1 + z * z / 10) * math.sqrt(0.8 * 0.2 / 10 + z * z / 400)
    assert (low, high) == (pytest.approx(middle - half), pytest.approx(middle + half))
    assert metrics.wilson_interval(10, 10)[1] == 1


def test_the_most_confused_pairs_are_the_largest_counts_off_the_diagonal():
    matrix = np.array([[9, 2, 0], [5, 1, 3], [0, 0, 7]])
    assert metrics.most_confused(matrix, "abc") == [
        {"true": "b", "predicted": "a", "count": 5},
        {"true": "b", "predicted": "c", "count": 3},
        {"true": "a", "predicted": "b", "count": 2},
    ]


def random_logits(count: int, classes: int = 4, scale: float = 1.0) -> tuple[np.ndarray, np.ndarray]:
    """Logits whose probabilities are right, times `scale`."""
    rng = np.random.default_rng(0)
    logits = rng.normal(size=(count, classes)) * 2
    shares = np.exp(logits) / np.exp(logits).sum(1, keepdims=True)
    labels = np.array([rng.choice(classes, p=row) for row in shares])
    return logits * scale, labels


def test_the_temperature_undoes_a_scaling_of_calibrated_logits():
    assert metrics.fit_temperature(*random_logits(20_000, scale=3.0)) == pytest.approx(3, rel=0.03)


def test_calibration_error_is_the_mean_gap_between_confidence_and_accuracy():
    # Two bins: three answers at confidence 0.9, of which two are right; one at 0.6, which is wrong.
    confidences = np.array([0.9, 0.9, 0.9, 0.6])
    logits = np.log(np.stack([confidences, 1 - confidences], 1))
    labels = np.array([0, 0, 1, 1])
    calibration = metrics.calibration_error(logits, labels, 1.0)
    before = calibration["before"]
    assert before["expected_calibration_error"] == pytest.approx((3 * abs(0.9 - 2 / 3) + 0.6) / 4)
    likelihood = -(2 * math.log(0.9) + math.log(0.1) + math.log(0.4)) / 4
    assert before["negative_log_likelihood"] == pytest.approx(likelihood)
    assert [bin["count"] for bin in before["bins"] if bin["count"]] == [1, 3]
    assert before == calibration["after"]


def test_calibration_on_validation_lowers_the_error_on_test():
    logits, labels = random_logits(20_000, scale=3.0)
    calibration = metrics.calibrate(logits[:10_000], labels[:10_000])
    assert calibration["fitted_on"] == 10_000
    errors = metrics.calibration_error(logits[10_000:], labels[10_000:], calibration["temperature"])
    assert errors["before"]["expected_calibration_error"] > 0.1
    assert errors["after"]["expected_calibration_error"] < 0.02


def test_without_validation_nothing_is_calibrated():
    calibration = metrics.calibrate(np.zeros((0, 2)), np.zeros(0, dtype=int))
    assert (calibration["temperature"], calibration["threshold"], calibration["fitted_on"]) == (1, None, 0)


def test_a_class_may_be_called_like_a_key_of_scikit_learns_report():
    logits = np.eye(3)[[0, 1, 2, 2]]
    measured = metrics.measure(logits, logits, np.array([0, 1, 2, 1]), ("accuracy", "macro avg", "2"))
    assert [scores["recall"] for scores in measured["per_class"].values()] == [1, 0.5, 1]
    assert measured["macro_average"]["recall"] == pytest.approx(2.5 / 3)
