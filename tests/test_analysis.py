import csv

import numpy as np
import pytest
from sklearn.metrics import auc, average_precision_score, precision_recall_curve

from cifar import analysis

CLASSES = ("cat", "dog", "ship")
# Five pictures, of which the third and the last are taken for another class.
PROBABILITIES = np.array([[0.9, 0.1, 0.0], [0.2, 0.8, 0.0], [0.7, 0.2, 0.1], [0.1, 0.3, 0.6], [0.2, 0.5, 0.3]])
LABELS = np.array([0, 1, 1, 2, 2])
PAIRS = [{"true": "dog", "predicted": "cat", "count": 1}, {"true": "ship", "predicted": "dog", "count": 1}]


def saved_probabilities(run, dataset) -> np.ndarray:
    with (run.path / "predictions.csv").open(newline="", encoding="utf-8") as file:
        return np.array([[float(row[name]) for name in dataset.classes] for row in csv.DictReader(file)])


def test_risk_and_coverage_are_counted_by_hand():
    # By confidence: right at 0.9 and 0.8, wrong at 0.7, right at 0.6, wrong at 0.5.
    risks = [0, 0, 1 / 3, 1 / 4, 2 / 5]
    selective = analysis.scores(PROBABILITIES, LABELS, CLASSES)["selective"]
    assert selective["area_under_risk_coverage"] == pytest.approx(sum(risks) / 5)
    assert selective["coverage_at_99_accuracy"] == 2 / 5
    curve = analysis.analyse(PROBABILITIES, LABELS, CLASSES, [])["risk_coverage"]
    assert curve == {"coverage": [0.2, 0.4, 0.6, 0.8, 1.0], "risk": pytest.approx(risks)}


def test_nothing_is_trusted_where_the_surest_is_wrong():
    assert analysis.scores(PROBABILITIES[2:3], LABELS[2:3], CLASSES)["selective"] == {
        "area_under_risk_coverage": 1.0,
        "coverage_at_99_accuracy": 0.0,
    }


def test_pictures_carry_index_label_and_both_probabilities():
    (first, second) = analysis.analyse(PROBABILITIES, LABELS, CLASSES, PAIRS)["confident_mistakes"]
    assert first == {"index": 2, "true": "dog", "predicted": "cat", "confidence": 0.7, "true_probability": 0.2}
    assert second == {"index": 4, "true": "ship", "predicted": "dog", "confidence": 0.5, "true_probability": 0.3}


def test_labels_are_suspected_by_the_odds_against_them_not_by_confidence_alone():
    probabilities = np.array([[0.60, 0.39, 0.01], [0.55, 0.01, 0.44], [0.9, 0.1, 0.0], [0.5, 0.5, 0.0]])
    suspects = analysis.analyse(probabilities, np.array([1, 1, 0, 2]), CLASSES, [])["suspected_labels"]
    assert [picture["index"] for picture in suspects] == [3, 1, 0]
    assert [picture["log_odds"] for picture in suspects[1:]] == pytest.approx([np.log(55), np.log(60 / 39)])
    assert np.isfinite(suspects[0]["log_odds"]), "a probability of zero"


def test_wrong_labels_come_first(evaluated_run, digits):
    probabilities, labels = saved_probabilities(evaluated_run, digits), digits.test.labels.numpy().copy()
    right = np.flatnonzero(probabilities.argmax(1) == labels)
    changed = right[np.argsort(-probabilities[right].max(1))][:5]
    labels[changed] = probabilities[changed].argmin(1)
    suspects = analysis.analyse(probabilities, labels, digits.classes, [])["suspected_labels"]
    assert {picture["index"] for picture in suspects[:5]} == set(changed.tolist())
    for picture in suspects[:5]:
        assert picture["true"] == digits.classes[labels[picture["index"]]]
        assert picture["predicted"] == digits.classes[digits.test.labels[picture["index"]]]


def test_the_saved_lists_are_those_of_the_saved_predictions(evaluated_run, digits):
    details, metrics = evaluated_run.read("analysis.json"), evaluated_run.read("metrics.json")
    probabilities, labels = saved_probabilities(evaluated_run, digits), digits.test.labels.numpy()
    predicted, confidence = probabilities.argmax(1), probabilities.max(1)
    matrix = np.array(metrics["confusion_matrix"])
    for pair in details["confused_pairs"]:
        true, other = digits.classes.index(pair["true"]), digits.classes.index(pair["predicted"])
        inside = np.flatnonzero((labels == true) & (predicted == other))
        assert pair["count"] == matrix[true, other] == len(inside)
        shown = [picture["index"] for picture in pair["pictures"]]
        assert len(shown) == min(8, len(inside))
        assert set(shown) <= set(inside)
        assert (np.diff(confidence[shown]) <= 0).all()
    wrong = np.flatnonzero(predicted != labels)
    assert details["confident_mistakes"][0]["index"] == wrong[confidence[wrong].argmax()]
    for picture in analysis.pictures(details):
        assert labels[picture["index"]] == digits.classes.index(picture["true"])
        assert picture["confidence"] == pytest.approx(confidence[picture["index"]], abs=1e-6)


def test_average_precision_is_scikit_learns_on_the_saved_predictions(evaluated_run, digits):
    saved = evaluated_run.read("metrics.json")["average_precision"]
    probabilities = saved_probabilities(evaluated_run, digits)
    for number, name in enumerate(digits.classes):
        expected = average_precision_score(digits.test.labels.numpy() == number, probabilities[:, number])
        assert saved[name] == pytest.approx(expected, abs=1e-4)


def test_points_of_the_precision_recall_curve_are_points_of_scikit_learns(evaluated_run, digits):
    probabilities = saved_probabilities(evaluated_run, digits)
    labels = digits.test.labels.numpy()
    curves = evaluated_run.read("analysis.json")["precision_recall"]
    # predictions.csv rounds, and of two that it makes equal the curve has but one point.
    of_rounded = analysis.analyse(probabilities, labels, digits.classes, [])["precision_recall"]
    for number, name in enumerate(digits.classes):
        precision, recall, _ = precision_recall_curve(labels == number, probabilities[:, number])
        points = {(round(p, 4), round(r, 4)) for p, r in zip(precision.tolist(), recall.tolist())}
        kept = list(zip(curves[name]["precision"], curves[name]["recall"]))
        assert set(zip(of_rounded[name]["precision"], of_rounded[name]["recall"])) <= points
        assert len(kept) == len(of_rounded[name]["recall"])
        assert all(reached >= level / 100 - 1e-4 for level, (_, reached) in enumerate(kept, start=1))
        assert auc(curves[name]["recall"], curves[name]["precision"]) == pytest.approx(auc(recall, precision), abs=0.03)


def test_a_class_without_images_has_no_average_precision_and_no_curve():
    present = LABELS < 2
    assert analysis.scores(PROBABILITIES[present], LABELS[present], CLASSES)["average_precision"]["ship"] is None
    curves = analysis.analyse(PROBABILITIES[present], LABELS[present], CLASSES, [])["precision_recall"]
    assert list(curves) == ["cat", "dog"]


def test_without_mistakes_the_lists_are_empty():
    right = np.array([0, 1, 3])
    details = analysis.analyse(PROBABILITIES[right], LABELS[right], CLASSES, [])
    assert not list(analysis.pictures(details))
