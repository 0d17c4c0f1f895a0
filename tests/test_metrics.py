import math

import numpy as np
import pytest
from scipy.special import softmax
from sklearn.metrics import average_precision_score, log_loss

from cifar import metrics
from handmade import CLASSES, LABELS, PROBABILITIES


def test_the_metrics_of_six_images_are_those_worked_out_by_hand():
    # True a a a b b b, predicted a a b b b a; with TTA one more is correct.
    logits = np.array([[2, 0], [2, 0], [0, 2], [0, 2], [0, 2], [2, 0]], dtype=np.float32)
    labels = np.array([0, 0, 0, 1, 1, 1])
    logits_tta = logits.copy()
    logits_tta[5] = [0, 2]
    measured = metrics.measure(logits, logits_tta, labels, ("a", "b"))
    assert (measured["n"], measured["accuracy"], measured["accuracy_tta"]) == (6, 4 / 6, 5 / 6)
    assert measured["interval_95"] == metrics.wilson_interval(4, 6)
    assert measured["interval_95_tta"] == metrics.wilson_interval(5, 6)
    assert measured["loss"] == pytest.approx(math.log(1 + math.exp(2)) - 2 * 4 / 6)
    two_thirds = pytest.approx(2 / 3)
    assert measured["per_class"]["b"] == dict.fromkeys(("precision", "recall", "f1"), two_thirds) | {"support": 3}
    assert measured["confusion_matrix"] == [[2, 1], [1, 2]]


def test_top5_accuracy_counts_labels_among_the_five_highest_logits_and_is_absent_for_up_to_ten_classes():
    logits, labels = -np.arange(11.0) * np.ones((10, 1)), np.arange(10)  # class 0 is always the first, 10 the last
    measured = metrics.measure(logits, -logits, labels, list("abcdefghijk"))
    assert (measured["top5_accuracy"], measured["top5_accuracy_tta"]) == (5 / 10, 4 / 10)
    assert "top5_accuracy" not in metrics.measure(logits[:, :10], logits[:, :10], labels, list("abcdefghij"))


def test_a_class_may_be_called_like_a_key_of_scikit_learns_report():
    logits = np.eye(3)[[0, 1, 2, 2]]
    measured = metrics.measure(logits, logits, np.array([0, 1, 2, 1]), ("accuracy", "macro avg", "2"))
    assert [scores["recall"] for scores in measured["per_class"].values()] == [1, 0.5, 1]
    assert measured["macro_average"]["recall"] == pytest.approx(2.5 / 3)


def test_the_most_confused_pairs_are_the_largest_counts_off_the_diagonal():
    matrix = np.array([[9, 2, 0], [5, 1, 3], [0, 0, 7]])
    assert metrics.most_confused(matrix, "abc") == [
        {"true": "b", "predicted": "a", "count": 5},
        {"true": "b", "predicted": "c", "count": 3},
        {"true": "a", "predicted": "b", "count": 2},
    ]


# Ranking.


def test_risk_and_coverage_are_counted_by_hand():
    # By confidence: correct at 0.9 and 0.8, wrong at 0.7, correct at 0.6, wrong at 0.5.
    risks = [0, 0, 1 / 3, 1 / 4, 2 / 5]
    selective = metrics.ranking_scores(PROBABILITIES, LABELS, CLASSES)["selective"]
    assert selective["area_under_risk_coverage"] == pytest.approx(sum(risks) / 5)
    assert selective["coverage_at_99_accuracy"] == 2 / 5


def test_no_coverage_is_trusted_where_the_most_confident_prediction_is_wrong():
    selective = metrics.ranking_scores(PROBABILITIES[2:3], LABELS[2:3], CLASSES)["selective"]
    assert selective == {"area_under_risk_coverage": 1.0, "coverage_at_99_accuracy": 0.0}


def test_average_precision_is_scikit_learns_and_none_for_a_class_without_images():
    probabilities = np.random.default_rng(0).dirichlet([1, 1, 1], 50)
    labels = np.arange(50) % 2
    scores = metrics.ranking_scores(probabilities, labels, CLASSES)["average_precision"]
    assert scores["dog"] == pytest.approx(average_precision_score(labels == 1, probabilities[:, 1]))
    assert scores["ship"] is None


@pytest.mark.parametrize("count", [9, 18, 20, 21])  # for which scikit-learn's sum is above 1
def test_average_precision_of_a_perfect_ranking_is_1(count):
    cats = np.linspace(1, 0, 3 * count)
    scores = metrics.ranking_scores(np.stack([cats, 1 - cats], 1), np.arange(3 * count) // count, CLASSES[:2])
    assert scores["average_precision"]["cat"] == 1.0


# Calibration.


def random_logits(count: int, scale: float = 1.0) -> tuple[np.ndarray, np.ndarray]:
    """Return logits, calibrated if they are divided by `scale`, and labels."""
    rng = np.random.default_rng(0)
    logits = rng.normal(size=(count, 4)) * 2
    labels = np.array([rng.choice(4, p=row) for row in softmax(logits, axis=1)])
    return logits * scale, labels


def test_calibration_error_is_the_mean_gap_between_confidence_and_accuracy():
    # Two bins: three predictions at confidence 0.9, of which two are correct; one at 0.6, which is wrong.
    confidences = np.array([0.9, 0.9, 0.9, 0.6])
    probabilities = np.stack([confidences, 1 - confidences], 1)
    labels = np.array([0, 0, 1, 1])
    reliability = metrics.reliability(np.log(probabilities), labels)
    assert reliability["expected_calibration_error"] == pytest.approx((3 * abs(0.9 - 2 / 3) + 0.6) / 4)
    assert reliability["negative_log_likelihood"] == pytest.approx(log_loss(labels, probabilities))
    assert [bin["count"] for bin in reliability["bins"] if bin["count"]] == [1, 3]


def test_the_temperature_undoes_a_scaling_and_lowers_the_error_on_other_images():
    logits, labels = random_logits(20_000, scale=3.0)
    calibration = metrics.calibrate(logits[:10_000], labels[:10_000])
    assert calibration["temperature"] == pytest.approx(3, rel=0.04)
    assert calibration["fitted_on"] == 10_000
    before, after = (
        metrics.reliability(logits[10_000:] / temperature, labels[10_000:])["expected_calibration_error"]
        for temperature in (1, calibration["temperature"])
    )
    assert before > 0.1
    assert after < 0.02


def test_the_temperature_is_finite_where_all_validation_images_are_right():
    labels = np.arange(48) % 2
    calibration = metrics.calibrate(5.0 * np.eye(2)[labels], labels)
    # The sigmoid of 5 / T is then 49 / 50, so that exp(5 / T) is 49.
    assert calibration["temperature"] == pytest.approx(5 / np.log(49), rel=1e-4)
    assert calibration["threshold"] == pytest.approx(0.98, abs=1e-4)


def test_all_but_a_twentieth_of_the_validation_images_reach_the_threshold():
    logits, labels = random_logits(1000)
    calibration = metrics.calibrate(logits, labels)
    confidence = softmax(logits / calibration["temperature"], axis=1).max(1)
    assert (confidence < calibration["threshold"]).mean() == calibration["threshold_share"] == 0.05


def test_holm_multiplies_the_smallest_p_most_and_keeps_the_order():
    # 0.01 * 3, then 0.02 * 2, then max(0.04, 0.03 * 1).
    assert metrics.holm([0.03, 0.01, 0.02]) == pytest.approx([0.04, 0.03, 0.04])
    assert metrics.holm([0.9, 0.6]) == [1, 1]
    assert metrics.holm([]) == []


def test_the_interval_of_a_mean_ends_at_the_bounds_of_the_values():
    # Student's t of 1 degree of freedom is 12.7062: 0.95 +- 0.64 goes beyond 1.
    assert metrics.mean_and_spread([0.9, 1.0], 0, 1)["interval_95"] == pytest.approx([0.95 - 12.7062 * 0.05, 1])
    assert metrics.mean_and_spread([1.0, 1.0])["interval_95"] == [1, 1]


def test_a_class_without_images_counts_in_no_average():
    logits = np.eye(3, dtype=np.float32)[[0, 0, 2, 1]]
    measured = metrics.measure(logits, logits, np.array([0, 0, 1, 1]), ("a", "b", "none"))
    assert measured["per_class"]["none"] == {"precision": 0, "recall": 0, "f1": 0, "support": 0}
    assert measured["macro_average"]["recall"] == 0.75
    assert measured["macro_average"]["f1"] == pytest.approx((1 + 2 / 3) / 2)
