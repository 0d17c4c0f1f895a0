import itertools

import numpy as np
import pytest

from cifar import charts
from drawn import boxes, texts
from handmade import CLASSES, HARMED, MATRIX, make_line, make_metrics


def test_the_history_is_drawn_as_saved_from_epoch_one():
    history = [make_line(epoch) for epoch in range(1, 5)]
    loss, accuracy, rate = charts.training_history(history, "fast on digits").axes
    drawn = [*loss.lines[:2], *accuracy.lines[:2], rate.lines[0]]
    keys = ("train_loss", "val_loss", "train_accuracy", "val_accuracy", "lr")
    for line, key in zip(drawn, keys, strict=True):
        assert list(line.get_xdata()) == [1, 2, 3, 4]
        assert list(line.get_ydata()) == [saved[key] for saved in history]


@pytest.mark.parametrize("epochs", [1, 2, 11, 200])
def test_epoch_ticks_are_whole_numbers_from_one(epochs):
    figure = charts.training_history([make_line(epoch) for epoch in range(1, epochs + 1)], "fast on digits")
    for axes in figure.axes:
        low, high = axes.get_xlim()
        ticks = [tick for tick in axes.get_xticks() if low <= tick <= high]
        assert ticks
        assert all(tick == int(tick) and 1 <= tick <= epochs for tick in ticks)


def test_a_single_epoch_shows_as_markers():
    figure = charts.training_history([make_line(1)], "fast on digits")
    for axes in figure.axes:
        assert axes.lines[0].get_marker() == "o"
        assert axes.lines[0].get_markersize() > 0


def test_epochs_on_small_images_are_shaded():
    history = [make_line(1, image_size=24), make_line(2, image_size=24), make_line(3)]
    for axes in charts.training_history(history, "fast on digits").axes:
        (shade,) = axes.patches
        assert (shade.get_x(), shade.get_width()) == (0.5, 2)
        assert shade.get_label() == "trained at 24x24"
    assert not charts.training_history([make_line(1)], "fast on digits").axes[0].patches


def test_epochs_on_hard_images_are_shaded():
    history = [make_line(1, images=40), make_line(2, images=40), make_line(3, images=10), make_line(4, images=10)]
    for axes in charts.training_history(history, "fast on digits").axes:
        (shade,) = axes.patches
        assert (shade.get_x(), shade.get_width()) == (2.5, 2)
        assert shade.get_label() == "trained on the hardest 25%"


def test_the_best_epoch_is_the_earlier_of_equals():
    history = [make_line(epoch, val_accuracy=accuracy) for epoch, accuracy in ((1, 0.5), (2, 0.9), (3, 0.9))]
    for axes in charts.training_history(history, "fast on digits").axes:
        assert list(axes.lines[-1].get_xdata()) == [2, 2]
        assert axes.lines[-1].get_label() == "best epoch 2, kept"


def test_without_validation_the_last_epoch_is_marked_and_no_line_is_empty():
    history = [make_line(epoch, validated=False) for epoch in (1, 2, 3)]
    loss, accuracy, _ = charts.training_history(history, "fast on digits").axes
    for axes in (loss, accuracy):
        assert [line.get_label() for line in axes.lines] == ["training (augmented)", "last epoch 3, kept"]


def test_the_heatmap_annotates_counts_and_colours_shares():
    figure = charts.confusion_matrix(make_metrics(), "fast on digits")
    assert texts(figure) == [str(count) for row in MATRIX for count in row]
    shares = figure.axes[0].collections[0].get_array()
    assert np.allclose(shares, [[75, 25, 0], [0, 100, 0], [50, 0, 50]])
    assert [label.get_text() for label in figure.axes[0].get_yticklabels()] == list(CLASSES)


def test_a_class_without_images_is_an_empty_row():
    figure = charts.confusion_matrix(make_metrics(matrix=((3, 1, 0), (0, 4, 0), (0, 0, 0))), "fast on digits")
    assert np.allclose(figure.axes[0].collections[0].get_array()[2], 0)


@pytest.mark.parametrize("draw", [charts.confusion_matrix, charts.per_class_metrics])
def test_the_labels_of_100_classes_do_not_overlap(draw):
    classes = [f"aquarium_fish_{number}" for number in range(100)]
    figure = draw(make_metrics(classes, np.eye(100, dtype=int) * 50 + 1), "fast on digits")
    axes = figure.axes[0]
    assert not axes.texts
    for labels in (axes.get_xticklabels(), axes.get_yticklabels()):
        drawn = boxes(figure, labels)
        assert not any(first.overlaps(second) for first, second in itertools.pairwise(drawn))
    assert [label.get_text() for label in axes.get_yticklabels()] == classes


def test_per_class_dots_are_the_saved_scores_the_highest_f1_on_top():
    metrics = make_metrics()
    axes = charts.per_class_metrics(metrics, "fast on digits").axes[0]
    order = [label.get_text() for label in axes.get_yticklabels()]
    assert order == ["dog", "cat", "ship"]
    assert axes.yaxis_inverted()
    dots = {group.get_label(): group.get_offsets() for group in axes.collections[1:]}
    for label, key in (("precision", "precision"), ("recall", "recall"), ("F1", "f1")):
        assert np.allclose(dots[label], [(metrics["per_class"][name][key], row) for row, name in enumerate(order)])


def test_an_axis_that_does_not_start_at_zero_says_so():
    high = charts.per_class_metrics(make_metrics(matrix=np.eye(3) * 9 + 1), "fast on digits").axes[0]
    assert high.get_xlim()[0] == pytest.approx(0.8)  # the lowest score is 10/12
    assert high.get_xlabel() == "score; the axis starts at 80%, not at zero"
    low = charts.per_class_metrics(make_metrics(matrix=[[0, 1, 0]] * 3), "fast on digits").axes[0]
    assert low.get_xlim()[0] == 0
    assert low.get_xlabel() == "score"


def test_calibration_bars_are_the_saved_bins():
    figure = charts.calibration(make_metrics()["calibration"], "fast on digits")
    before, after, counts, _ = figure.axes
    (bar,) = before.patches
    assert (bar.get_x(), bar.get_width(), bar.get_height()) == (0.5, 0.5, 0.75)
    assert before.lines[0].get_xydata().tolist() == [[0.8, 0.75]]
    assert [text.get_text() for text in counts.texts] == ["0", "12"]
    assert before.get_title() == "before\nexpected calibration error 5.00%, negative log-likelihood 0.7000"
    assert "temperature 1.250, fitted on 10 validation images" in after.get_title()


def test_a_temperature_that_was_not_fitted_says_so():
    after = charts.calibration(make_metrics(fitted_on=0)["calibration"], "fast on digits").axes[1]
    assert "as no image was held out to fit it" in after.get_title()


def test_the_three_curves_of_the_lowest_average_precision_stand_out():
    curves = {name: {"recall": [0.5, 1.0], "precision": [1.0, share]} for name, share in zip("abcde", (5, 1, 4, 2, 3))}
    scores = {"average_precision": dict(zip("abcde", (0.9, 0.5, 0.8, 0.6, 0.7)))}
    axes = charts.precision_recall(curves, scores, "fast on digits").axes[0]
    assert [line.get_label() for line in axes.lines[:3]] == [
        "b, average precision 50.0%",
        "d, average precision 60.0%",
        "e, average precision 70.0%",
    ]
    assert axes.lines[0].get_xydata().tolist() == [[0.5, 1.0], [1.0, 1]]
    assert axes.lines[3].get_label() == "the other 2"
    assert len({line.get_color() for line in axes.lines}) == 4


@pytest.mark.parametrize("count", [1, 2, 3])
def test_with_up_to_three_classes_there_are_no_others(count):
    curves = {name: {"recall": [1.0], "precision": [1.0]} for name in "abc"[:count]}
    axes = charts.precision_recall(curves, {"average_precision": dict.fromkeys("abc", 1.0)}, "fast on digits").axes[0]
    assert len(axes.lines) == count


def test_the_risk_is_drawn_as_saved_and_the_share_of_which_99_percent_are_right_is_marked():
    curve = {"coverage": [0.5, 1.0], "risk": [0.0, 0.2]}
    selective = {"area_under_risk_coverage": 0.05, "coverage_at_99_accuracy": 0.5}
    axes = charts.risk_coverage(curve, {"selective": selective}, "fast on digits").axes[0]
    assert axes.lines[0].get_xydata().tolist() == [[0.5, 0.0], [1.0, 0.2]]
    labels = axes.get_legend_handles_labels()[1]
    assert labels == ["mean 5.00% (area under the curve)", "of the surest 50.0%, 99% are right"]
    selective["coverage_at_99_accuracy"] = 0.0
    axes = charts.risk_coverage(curve, {"selective": selective}, "fast on digits").axes[0]
    assert len(axes.get_legend_handles_labels()[1]) == 1


def test_corruptions_are_percent_by_kind_the_mildest_on_top():
    accuracy, error = charts.corruptions(HARMED, "fast on digits").axes
    assert [label.get_text() for label in accuracy.get_yticklabels()] == ["shift", "noise"]
    assert [text.get_text() for text in accuracy.texts] == ["70.0", "30.0", "50.0", "10.0"]
    assert [text.get_text() for text in error.texts] == ["10.0", "30.0", "10.0", "30.0"]
    assert accuracy.get_title() == "accuracy in percent; 75.0% unharmed, 40.0% in the mean"
