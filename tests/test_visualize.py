import dataclasses
import itertools
import os
import re

import matplotlib
import numpy as np
import pytest
from matplotlib import pyplot
from PIL import Image

from cifar import model, records, visualize
from cifar.errors import UserError
from cifar.records import EpochRecord, LayerRecord, ModelRecord
from cifar.visualize import FIGURES
from commands import run
from handmade import CLASSES, LAYERS, MATRIX, make_dataset, make_line, make_metrics, make_run

SUBJECT = "fast on digits"


def metrics_of(*arguments, **keywords) -> records.Metrics:
    return records.parse("metrics.json", make_metrics(*arguments, **keywords))


def history_of(*lines: dict) -> list[EpochRecord]:
    return records.parse("history.jsonl", list(lines)).root


def boxes(figure, labels) -> list:
    figure.draw_without_rendering()
    return [label.get_window_extent() for label in labels if label.get_text()]


def test_every_figure_is_drawn_in_order_as_a_png_at_150_dpi(tmp_path):
    run = make_run(tmp_path)
    paths = visualize.visualize(run, make_dataset())
    assert paths == [run.figures / f"{name}.png" for name in FIGURES]
    assert set(run.figures.iterdir()) == set(paths)
    for path in paths:
        with Image.open(path) as image:
            assert image.format == "PNG"
            assert image.info["dpi"] == pytest.approx((150, 150), abs=0.1)
            assert len(image.convert("L").getcolors()) > 10, f"{path.name} is blank"
        assert str(tmp_path).encode() not in path.read_bytes()


@pytest.mark.parametrize(
    "classes",
    [["no", "yes"], [f"aquarium_fish_{number}" for number in range(150)], ["x" * 200, "\x1b[31mred", "$a$\nb"]],
    ids=["two", "many", "strange"],
)
def test_titles_say_what_is_shown_and_nothing_is_cut_or_too_large(tmp_path, classes):
    true = [*range(len(classes))] * 2
    predicted = [(label + index % 3) % len(classes) for index, label in enumerate(true)]
    run = make_run(tmp_path, classes, true=true, predicted=predicted, confidence=[0.6] * len(true))
    results = visualize.read_results(run, make_dataset(classes, true))
    with visualize.drawing():
        figures = {name: visualize.draw(name, results) for name in visualize.drawable(results)}
    for name, figure in figures.items():
        is_plain = "test split, without test-time augmentation" in figure.get_suptitle()
        assert is_plain == (name not in ("training_history", "dataset_samples", "architecture"))
        assert SUBJECT in figure.get_suptitle()
        figure.draw_without_rendering()
        inner, outer = figure.get_tightbbox(), figure.bbox_inches
        assert min(inner.xmin, inner.ymin) >= 0, name
        assert inner.xmax <= outer.xmax, name
        assert inner.ymax <= outer.ymax < 25, name


def test_without_an_evaluation_the_test_split_stays_closed(tmp_path):
    dataset = make_dataset()
    paths = visualize.visualize(make_run(tmp_path, evaluated=False), dataset)
    assert [path.stem for path in paths] == ["training_history", "dataset_samples", "architecture"]
    assert "test" not in vars(dataset)


def test_what_cannot_be_drawn_is_one_sentence(tmp_path):
    with pytest.raises(UserError, match="has nothing to draw"):
        visualize.visualize(make_run(tmp_path, epochs=0, evaluated=False), make_dataset())
    run = make_run(tmp_path)
    with pytest.raises(UserError, match=r"predictions.csv is damaged: it does not match the test split of digits"):
        visualize.visualize(run, make_dataset(true=(1,) * 12))
    with pytest.raises(UserError, match="was trained on digits, not on cifar10"):
        visualize.visualize(run, dataclasses.replace(make_dataset(), key="cifar10"))
    run.figures.write_text("in the way", encoding="utf-8")
    with pytest.raises(UserError, match=r"^cannot write .*training_history.png: "):
        visualize.visualize(run, make_dataset())
    run.write("metrics.json", run.read("metrics.json").model_dump(exclude_unset=True) | {"test_sha256": "0" * 64})
    with pytest.raises(UserError, match=r"metrics.json is damaged: digits has other test images than it was mea"):
        visualize.visualize(run, make_dataset())


def test_the_users_matplotlib_is_left_alone():
    with matplotlib.rc_context({"axes.facecolor": "black", "figure.dpi": 40}):
        before = dict(matplotlib.rcParams)
        with visualize.drawing():
            axes = visualize.canvas("a title", 4, 4).add_subplot()
        assert dict(matplotlib.rcParams) == before
    assert axes.get_facecolor() == (1, 1, 1, 1)
    assert pyplot.get_fignums() == []


def test_a_backend_that_is_not_installed_does_not_matter(tmp_path):
    script = "import sys; from cifar import visualize; visualize.canvas('x', 2, 2).savefig(sys.argv[1])"
    flags = ("-W", "error", "-W", "ignore::DeprecationWarning")
    environment = {**os.environ, "MPLBACKEND": "module://not_installed.backend"}
    assert run(*flags, "-c", script, str(tmp_path / "figure.png"), env=environment)[0] == 0
    assert (tmp_path / "figure.png").stat().st_size


def test_any_name_is_shown_as_it_is_or_one_sentence_says_why_not(tmp_path, capfd):
    classes = ["$a_1$", "50% <b>[v2]^\\x", "\u732b" * 40, "\u0645\u0648\u0633", "\U0001f41f\U00010600", "x" * 200]
    true = [*range(6)] * 2
    dataset = dataclasses.replace(make_dataset(classes, true), test_files=["a/$b$_c.png"] * 12)
    run = make_run(tmp_path, classes, true=true, predicted=true[::-1], confidence=[0.6] * 12)
    visualize.visualize(run, dataset)
    printed = capfd.readouterr()
    assert (printed.out.count("no installed font"), printed.out.count("\n"), printed.err) == (1, 1, "")
    axes = visualize.confusion_matrix(run.metrics, SUBJECT).axes[0]
    shown = [label.get_text() for label in axes.get_yticklabels()]
    assert (shown[:2], shown[3:5]) == (classes[:2], classes[3:5])
    assert (shown[2], shown[5]) == (f"{classes[2][:7]}\u2026{classes[2][:7]}", f"{'x' * 14}\u2026{'x' * 15}")


def test_the_history_is_plotted_as_saved():
    history = history_of(*(make_line(epoch) for epoch in range(1, 5)))
    keys = ("train_loss", "val_loss"), ("train_accuracy", "val_accuracy"), ("lr",)
    for axes, names in zip(visualize.training_history(history, 0, SUBJECT).axes, keys, strict=True):
        for line, name in zip(axes.lines, names, strict=True):
            assert line.get_xydata().tolist() == [[saved.epoch, getattr(saved, name)] for saved in history]


@pytest.mark.parametrize("epochs", [1, 2, 200])
def test_epoch_ticks_are_whole_numbers_from_one(epochs):
    figure = visualize.training_history(history_of(*map(make_line, range(1, epochs + 1))), 1, SUBJECT)
    for axes in figure.axes:
        low, high = axes.get_xlim()
        ticks = [tick for tick in axes.get_xticks() if low <= tick <= high]
        assert ticks
        assert set(ticks) <= set(range(1, epochs + 1))
        assert epochs > 1 or axes.lines[0].get_markersize() > 0, "a single epoch needs a marker"


def test_epochs_on_small_and_on_hard_images_are_shaded():
    lines = [make_line(1, images=40, image_size=24), make_line(2, images=40), make_line(3, images=10)]
    for axes in visualize.training_history(history_of(*lines), 0, SUBJECT).axes:
        shades = {shade.get_label(): (shade.get_x(), shade.get_width()) for shade in axes.patches}
        assert shades == {"trained at 24x24": (0.5, 1), "trained on the hardest 25%": (2.5, 1)}


def test_the_marked_epoch_is_the_one_whose_weights_were_kept(tmp_path):
    run = make_run(tmp_path / "evaluated", epochs=3)  # its validation is best at epoch 3
    results = visualize.read_results(run, make_dataset())
    marker = visualize.draw("training_history", results).axes[0].lines[-1]
    assert (list(marker.get_xdata()), marker.get_label()) == ([1, 1], "weights of epoch 1 kept")
    trained = make_run(tmp_path / "trained", epochs=3, evaluated=False)
    trained.checkpoints.mkdir()
    (trained.checkpoints / "best.pt").write_bytes(b"damaged, and not needed")
    assert visualize.read_results(trained, make_dataset())["kept_epoch"] == 0


def test_the_confusion_matrix_shows_counts_and_colors_fractions():
    axes = visualize.confusion_matrix(metrics_of(), SUBJECT).axes[0]
    assert [text.get_text() for text in axes.texts] == [str(count) for row in MATRIX for count in row]
    assert np.allclose(axes.images[0].get_array(), [[75, 25, 0], [0, 100, 0], [50, 0, 50]])
    assert [label.get_text() for label in axes.get_yticklabels()] == list(CLASSES)
    empty = visualize.confusion_matrix(metrics_of(matrix=((3, 1, 0), (0, 4, 0), (0, 0, 0))), SUBJECT)
    assert np.allclose(empty.axes[0].images[0].get_array()[2], 0), "no division by zero"


@pytest.mark.parametrize("draw", [visualize.confusion_matrix, visualize.per_class_metrics])
def test_labels_of_many_classes_do_not_overlap_and_the_worst_classes_are_shown(draw):
    classes = [f"aquarium_fish_{number}" for number in range(150)]
    matrix = np.eye(150, dtype=int) * 50
    matrix[range(110, 150), range(149, 109, -1)] += 1
    matrix[0, 110] += 1
    axes = draw(metrics_of(classes, matrix), SUBJECT).axes[0]
    if draw is visualize.per_class_metrics:  # classes without images are not the worst
        matrix[range(20), range(20)], matrix[0, 110] = 0, 0
        lowest = draw(metrics_of(classes, matrix), SUBJECT).axes[0]
        assert {label.get_text() for label in lowest.get_yticklabels()} == set(classes[110:])
    for labels in (axes.get_xticklabels(), axes.get_yticklabels()):
        assert not any(first.overlaps(second) for first, second in itertools.pairwise(boxes(axes.figure, labels)))
    assert {label.get_text() for label in axes.get_yticklabels()} - {"the other 110"} == set(classes[110:])
    assert re.search("the 40 classes with the (most errors|lowest F1) of 150", axes.figure.get_suptitle())
    for drawn in axes.images:
        assert np.allclose(drawn.get_array().sum(1), 100), "no image is left out"
        assert drawn.get_array()[40, 0] == pytest.approx(100 / 5501)


def test_dots_are_the_saved_scores_with_the_highest_f1_on_top():
    metrics = metrics_of()
    axes = visualize.per_class_metrics(metrics, SUBJECT).axes[0]
    order = [label.get_text() for label in axes.get_yticklabels()]
    assert (order, axes.yaxis_inverted()) == (["dog", "cat", "ship"], True)
    dots = {group.get_label(): group.get_offsets() for group in axes.collections}
    for name, key in (("precision", "precision"), ("recall", "recall"), ("F1", "f1")):
        assert np.allclose(dots[name], [(getattr(metrics.per_class[name], key), row) for row, name in enumerate(order)])


def test_calibration_bars_are_the_saved_bins():
    before, after, counts, _ = visualize.calibration(metrics_of(), SUBJECT).axes
    empty, bar = before.patches
    assert np.isnan(empty.get_height())
    assert (bar.get_x(), bar.get_width(), bar.get_height()) == (0.5, 0.5, 0.75)
    assert before.lines[0].get_xydata()[1].tolist() == [0.8, 0.75]
    assert [text.get_text() for text in counts.texts] == ["0", "12"]
    assert "expected calibration error 5.00%, negative log-likelihood 0.7000" in before.get_title()
    assert "T = 1.250, fitted on 10 validation images" in after.get_title()


def test_the_three_lowest_precision_recall_curves_stand_out(tmp_path):
    true, predicted = [*range(5)] * 2, [0, 1, 2, 3, 4, 0, 2, 2, 3, 3]
    run = make_run(tmp_path, list("abcde"), true=true, predicted=predicted, confidence=[0.6] * 10)
    metrics, analysis = run.metrics, run.read("analysis.json")
    axes = visualize.precision_recall(analysis, metrics, SUBJECT).axes[0]
    lowest = sorted("abcde", key=lambda name: metrics.average_precision[name])[:3]
    expected = [f"{name}, average precision {metrics.average_precision[name]:.1%}" for name in lowest]
    assert [line.get_label() for line in axes.lines[:4]] == [*expected, "other classes (2)"]
    curve = analysis.precision_recall[lowest[0]]
    assert axes.lines[0].get_xydata()[1:].tolist() == [list(point) for point in zip(curve.recall, curve.precision)]
    assert axes.lines[0].get_marker() == "o", "two images make two points"
    assert len({line.get_color() for line in axes.lines}) == 4


def test_a_class_whose_name_begins_with_an_underscore_is_in_the_legend(tmp_path):
    run = make_run(tmp_path, ["_background_", "b"], true=[0, 1, 0, 1], predicted=[0, 1, 1, 0], confidence=[0.6] * 4)
    figure = visualize.precision_recall(run.read("analysis.json"), run.metrics, SUBJECT)
    assert any("_background_" in text.get_text() for text in figure.legends[0].get_texts())


@pytest.mark.parametrize("name", ["airbench96", "resnet18"])
def test_the_architecture_holds_every_layer_once_without_overlaps(name):
    layers = model.layers(model.build(name, 10, 32), 32)
    blocks = visualize.blocks(layers)
    for key in ("parameters", "multiply_adds"):
        assert sum(getattr(block, key) for block in blocks) == sum(getattr(layer, key) for layer in layers)
    assert blocks[-1].output_shape == [10]
    figure = visualize.architecture(ModelRecord(name=name, parameters=1, multiply_adds=1, layers=layers), SUBJECT)
    texts = boxes(figure, figure.axes[0].texts)
    assert not any(first.overlaps(second) for first, second in itertools.combinations(texts, 2))
    for axes in figure.axes:
        assert all(box.x1 < axes.bbox.x1 for box in boxes(figure, axes.texts))


def layers_called(*names: str) -> list[LayerRecord]:
    return [LayerRecord(**{**LAYERS[0], "name": name}) for name in names]


def test_layers_are_grouped_by_their_dotted_names():
    names = ["normalize", "stem.0", "stem.1", "stages.0.0.conv1.0", "stages.0.1.norm2", "groups.1.conv1", "head"]
    blocks = visualize.blocks(layers_called(*names))
    assert [block.name for block in blocks] == ["normalize", "stem", "stages.0", "groups.1", "head"]
    assert [block.kind for block in blocks[:2]] == ["Conv2d", "2 Conv2d"]
    assert (blocks[1].output_shape, blocks[1].parameters) == ([4, 8, 8], 216)


@pytest.mark.parametrize(
    ("name", "expected"),
    [("stages.{}.conv", ["stem", "stages", "head"]), ("block{}.conv", ["all layers"]), ("layer{}", ["all layers"])],
)
def test_very_deep_networks_fit(name, expected):
    blocks = visualize.blocks(layers_called("stem.0", *(name.format(number) for number in range(400)), "head"))
    assert [block.name for block in blocks] == expected
    assert sum(block.parameters for block in blocks) == 402 * 108
