import csv
import dataclasses
import itertools
import json
from dataclasses import asdict

import matplotlib
import numpy as np
import pytest
import torch
from matplotlib import pyplot
from matplotlib.figure import Figure
from matplotlib.transforms import Bbox
from PIL import Image

from cifar import model, visualize
from cifar.config import MODELS, Config, UserError
from cifar.data import Split
from cifar.datasets import Dataset
from cifar.runs import Run

CLASSES = ("cat", "dog", "ship")
TRUE = (0, 0, 0, 0, 1, 1, 1, 1, 2, 2, 2, 2)
PREDICTED = (0, 0, 0, 1, 1, 1, 1, 1, 0, 0, 2, 2)  # wrong at 3, 8 and 9
CONFIDENCE = (0.9, 0.8, 0.7, 0.6, 0.9, 0.9, 0.9, 0.9, 0.95, 0.75, 0.5, 0.5)
MATRIX = ((3, 1, 0), (0, 4, 0), (2, 0, 2))
NAMES = [
    "training_history.png",
    "confusion_matrix.png",
    "per_class_metrics.png",
    "misclassified.png",
    "dataset_samples.png",
    "sample_predictions.png",
    "architecture.png",
    "calibration.png",
]
LAYERS = [
    {"name": "stem.0", "kind": "Conv2d", "output_shape": [4, 8, 8], "parameters": 108, "multiply_adds": 6912},
    {"name": "stem.1", "kind": "ReLU", "output_shape": [4, 8, 8], "parameters": 0, "multiply_adds": 0},
    {"name": "head", "kind": "Linear", "output_shape": [3], "parameters": 771, "multiply_adds": 768},
]


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
    return {
        "per_class": {
            name: dict(zip(("precision", "recall", "f1", "support"), map(float, row)))
            for name, row in zip(classes, zip(precision, recall, f1, counts.sum(1)))
        },
        "macro_average": {"precision": precision.mean(), "recall": recall.mean(), "f1": f1.mean()},
        "confusion_matrix": counts.tolist(),
        "calibration": {"temperature": 1.25, "fitted_on": fitted_on, "before": part, "after": part},
    }


def make_run(path, classes=CLASSES, *, epochs=3, true=TRUE, predicted=PREDICTED, confidence=CONFIDENCE, evaluated=True):
    run = Run(path)
    run.write("config.json", asdict(Config(dataset="digits")))
    run.write("run.json", {"model": {"name": "tiny", "parameters": 879, "multiply_adds": 7680, "layers": LAYERS}})
    for epoch in range(1, epochs + 1):
        run.append_history(make_line(epoch))
    if evaluated:
        matrix = np.zeros((len(classes), len(classes)), int)
        np.add.at(matrix, (list(true), list(predicted)), 1)
        run.write("metrics.json", make_metrics(classes, matrix))
        with (path / "predictions.csv").open("w", newline="", encoding="utf-8") as file:
            writer = csv.writer(file)
            writer.writerow(["index", "true", "predicted", "confidence", *classes])
            for index, (label, winner, share) in enumerate(zip(true, predicted, confidence)):
                writer.writerow([index, classes[label], classes[winner], share, *[0] * len(classes)])
    return run


def figures(run, dataset):
    return dict(visualize._figures(run, dataset))


def texts(figure: Figure) -> list[str]:
    return [text.get_text() for text in figure.axes[0].texts]


def block(figure: Figure, row: int, column: int, height: int, width: int) -> np.ndarray:
    """The 8x8 image at a place of the drawn mosaic, whose cells are `height` x `width`."""
    (image,) = figure.axes[0].images
    return image.get_array()[row * height : row * height + 8, column * width : column * width + 8]


def boxes(figure: Figure, labels) -> list[Bbox]:
    figure.draw_without_rendering()
    return [label.get_window_extent() for label in labels if label.get_text()]


def test_every_figure_is_a_png_at_150_dpi(tmp_path):
    run, dataset = make_run(tmp_path), make_dataset()
    paths = visualize.visualize(run, dataset)
    assert paths == [run.figures / name for name in NAMES]
    assert sorted(path.name for path in run.figures.iterdir()) == sorted(NAMES)
    for path in paths:
        with Image.open(path) as picture:
            assert picture.format == "PNG"
            assert picture.info["dpi"] == pytest.approx((150, 150), abs=0.1)
            assert len(picture.convert("L").getcolors()) > 10, f"{path.name} is blank"
        assert str(tmp_path).encode() not in path.read_bytes()
    with Image.open(run.figures / "training_history.png") as picture:
        assert picture.size == (1950, 630)


def test_every_title_names_recipe_and_dataset_and_what_was_not_augmented(tmp_path):
    titles = {name: figure.get_suptitle() for name, figure in figures(make_run(tmp_path), make_dataset()).items()}
    assert [f"{name}.png" for name in titles] == NAMES
    assert all("fast on digits" in title for title in titles.values())
    plain = {name for name, title in titles.items() if "test split, without test-time augmentation" in title}
    assert plain == {"confusion_matrix", "per_class_metrics", "misclassified", "sample_predictions", "calibration"}


@pytest.mark.parametrize("count", [2, 3, 100])
def test_nothing_is_cut_at_the_edge(tmp_path, count):
    classes = [f"aquarium_fish_{number}" for number in range(count)]
    true = list(range(count)) * 2
    predicted = [(label + index % 3) % count for index, label in enumerate(true)]
    run = make_run(tmp_path, classes, true=true, predicted=predicted, confidence=[0.5] * len(true))
    for name, figure in figures(run, make_dataset(classes, true)).items():
        figure.draw_without_rendering()
        inner, outer = figure.get_tightbbox(), figure.bbox_inches
        assert inner.xmin >= 0, name
        assert inner.ymin >= 0, name
        assert inner.xmax <= outer.xmax, name
        assert inner.ymax <= outer.ymax, name


def test_the_history_is_drawn_as_saved_from_epoch_one():
    history = [make_line(epoch) for epoch in range(1, 5)]
    loss, accuracy, rate = visualize._training_history(history, "fast on digits").axes
    drawn = [*loss.lines[:2], *accuracy.lines[:2], rate.lines[0]]
    keys = ("train_loss", "val_loss", "train_accuracy", "val_accuracy", "lr")
    for line, key in zip(drawn, keys, strict=True):
        assert list(line.get_xdata()) == [1, 2, 3, 4]
        assert list(line.get_ydata()) == [saved[key] for saved in history]


@pytest.mark.parametrize("epochs", [1, 2, 11, 200])
def test_epoch_ticks_are_whole_numbers_from_one(epochs):
    figure = visualize._training_history([make_line(epoch) for epoch in range(1, epochs + 1)], "fast on digits")
    for axes in figure.axes:
        low, high = axes.get_xlim()
        ticks = [tick for tick in axes.get_xticks() if low <= tick <= high]
        assert ticks
        assert all(tick == int(tick) and 1 <= tick <= epochs for tick in ticks)


def test_a_single_epoch_shows_as_markers():
    figure = visualize._training_history([make_line(1)], "fast on digits")
    for axes in figure.axes:
        assert axes.lines[0].get_marker() == "o"
        assert axes.lines[0].get_markersize() > 0


def test_epochs_on_small_images_are_shaded():
    history = [make_line(1, image_size=24), make_line(2, image_size=24), make_line(3)]
    for axes in visualize._training_history(history, "fast on digits").axes:
        (shade,) = axes.patches
        assert (shade.get_x(), shade.get_width()) == (0.5, 2)
        assert shade.get_label() == "trained at 24x24"
    assert not visualize._training_history([make_line(1)], "fast on digits").axes[0].patches


def test_the_best_epoch_is_the_earlier_of_equals():
    history = [make_line(epoch, val_accuracy=accuracy) for epoch, accuracy in ((1, 0.5), (2, 0.9), (3, 0.9))]
    for axes in visualize._training_history(history, "fast on digits").axes:
        assert list(axes.lines[-1].get_xdata()) == [2, 2]
        assert axes.lines[-1].get_label() == "best epoch 2, kept"


def test_without_validation_the_last_epoch_is_marked_and_no_line_is_empty():
    history = [make_line(epoch, validated=False) for epoch in (1, 2, 3)]
    loss, accuracy, _ = visualize._training_history(history, "fast on digits").axes
    for axes in (loss, accuracy):
        assert [line.get_label() for line in axes.lines] == ["training (augmented)", "last epoch 3, kept"]


def test_the_heatmap_annotates_counts_and_colours_shares():
    figure = visualize._confusion_matrix(make_metrics(), "fast on digits")
    assert texts(figure) == [str(count) for row in MATRIX for count in row]
    shares = figure.axes[0].collections[0].get_array()
    assert np.allclose(shares, [[75, 25, 0], [0, 100, 0], [50, 0, 50]])
    assert [label.get_text() for label in figure.axes[0].get_yticklabels()] == list(CLASSES)


def test_a_class_without_images_is_an_empty_row():
    figure = visualize._confusion_matrix(make_metrics(matrix=((3, 1, 0), (0, 4, 0), (0, 0, 0))), "fast on digits")
    assert np.allclose(figure.axes[0].collections[0].get_array()[2], 0)


@pytest.mark.parametrize("draw", [visualize._confusion_matrix, visualize._per_class_metrics])
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
    axes = visualize._per_class_metrics(metrics, "fast on digits").axes[0]
    order = [label.get_text() for label in axes.get_yticklabels()]
    assert order == ["dog", "cat", "ship"]
    assert axes.yaxis_inverted()
    dots = {group.get_label(): group.get_offsets() for group in axes.collections[1:]}
    for label, key in (("precision", "precision"), ("recall", "recall"), ("F1", "f1")):
        assert np.allclose(dots[label], [(metrics["per_class"][name][key], row) for row, name in enumerate(order)])


def test_an_axis_that_does_not_start_at_zero_says_so():
    high = visualize._per_class_metrics(make_metrics(matrix=np.eye(3) * 9 + 1), "fast on digits").axes[0]
    assert high.get_xlim()[0] == pytest.approx(0.8)  # the lowest score is 10/12
    assert high.get_xlabel() == "score; the axis starts at 80%, not at zero"
    low = visualize._per_class_metrics(make_metrics(matrix=[[0, 1, 0]] * 3), "fast on digits").axes[0]
    assert low.get_xlim()[0] == 0
    assert low.get_xlabel() == "score"


def test_misclassified_are_ordered_by_confidence(tmp_path):
    figure = figures(make_run(tmp_path), make_dataset())["misclassified"]
    assert texts(figure) == [
        "true ship\npredicted cat\n95.0%   #8",
        "true ship\npredicted cat\n75.0%   #9",
        "true cat\npredicted dog\n60.0%   #3",
    ]
    assert "3 among 12" in figure.get_suptitle()
    for column, value in enumerate((20, 21, 3)):  # 10 x class + place in the class
        assert (block(figure, 0, column, height=12, width=10) == value).all()


def test_of_many_errors_the_32_most_confident_are_shown_the_earlier_first_of_equals(tmp_path):
    confidence = [0.5] * 20 + [0.9] * 20
    run = make_run(tmp_path, true=[0] * 40, predicted=[1] * 40, confidence=confidence)
    figure = figures(run, make_dataset(true=[0] * 40))["misclassified"]
    shown = [int(text.rsplit("#")[1]) for text in texts(figure)]
    assert shown == [*range(20, 40), *range(12)]
    assert "the 32 most confident of 40 among 40" in figure.get_suptitle()


def test_no_errors_are_said_in_words(tmp_path):
    figure = figures(make_run(tmp_path, predicted=TRUE), make_dataset())["misclassified"]
    assert texts(figure) == ["No image is misclassified."]
    assert not figure.axes[0].images


def test_sample_predictions_mark_right_and_wrong_without_colour(tmp_path):
    captions = texts(figures(make_run(tmp_path), make_dataset())["sample_predictions"])
    assert len(captions) == 12
    assert captions[0] == "✓ cat\n90.0%   #0\n"
    assert captions[3] == "✗ dog\n60.0%   #3\ntrue cat"
    assert [index for index, text in enumerate(captions) if text.startswith("✗")] == [3, 8, 9]


def test_sample_predictions_are_spread_over_the_whole_split(tmp_path):
    labels = [0] * 311
    run = make_run(tmp_path, true=labels, predicted=labels, confidence=[1] * 311)
    captions = texts(figures(run, make_dataset(true=labels))["sample_predictions"])
    assert [int(text.split("#")[1]) for text in captions] == list(range(0, 311, 10))


def test_dataset_samples_have_a_row_for_each_class():
    figure = visualize._dataset_samples(make_dataset(), "fast on digits")
    for row, column in itertools.product(range(3), range(3)):
        assert (block(figure, row, column, height=8, width=8) == 10 * row + column).all()
    assert (block(figure, 0, 3, height=8, width=8) == 255).all(), "a class has three training images"
    assert [label.get_text() for label in figure.axes[0].get_yticklabels()] == ["cat\n3", "dog\n3", "ship\n3"]
    assert figure.axes[0].images[0].get_interpolation() == "nearest"


def test_dataset_samples_of_100_classes_show_20():
    classes = [f"fish{number}" for number in range(100)]
    figure = visualize._dataset_samples(make_dataset(classes), "fast on digits")
    names = [label.get_text().split("\n")[0] for label in figure.axes[0].get_yticklabels()]
    assert len(names) == 20
    assert (names[0], names[-1]) == ("fish0", "fish99")
    assert "20 of 100 classes" in figure.get_suptitle()


@pytest.mark.parametrize("name", MODELS)
def test_the_blocks_hold_every_layer_once_and_fit_a_page(name):
    layers = json.loads(json.dumps([asdict(layer) for layer in model.layers(model.build(name, 10, 32), 32)]))
    blocks = visualize._blocks(layers)
    assert sum(block["parameters"] for block in blocks) == sum(layer["parameters"] for layer in layers)
    assert sum(block["multiply_adds"] for block in blocks) == sum(layer["multiply_adds"] for layer in layers)
    assert blocks[-1]["shape"] == "10"
    assert len({block["name"] for block in blocks}) == len(blocks) <= 12
    network = {"name": name, "parameters": 1_234_567, "multiply_adds": 89_000_000, "layers": layers}
    figure = visualize._architecture(network, "fast on digits")
    assert figure.get_suptitle().endswith("1,234,567 parameters, 89.0 million multiply-adds an image")
    drawn = boxes(figure, figure.axes[0].texts)
    assert not any(first.overlaps(second) for first, second in itertools.combinations(drawn, 2))
    for axes in figure.axes:
        assert all(box.x1 < axes.bbox.x1 for box in boxes(figure, axes.texts))


def test_layers_are_grouped_by_their_dotted_names():
    names = ["normalize", "stem.0", "stem.1", "stages.0.0.conv1.0", "stages.0.0.shortcut.0", "stages.0.1.norm2"]
    names += ["blocks.0.0.0", "blocks.0.2", "groups.1.conv1", "groups.1.pool", "head"]
    layers = [{**LAYERS[0], "name": name} for name in names]
    blocks = visualize._blocks(layers)
    expected = ["normalize", "stem", "stages.0.0", "stages.0.1", "blocks.0", "groups.1", "head"]
    assert [block["name"] for block in blocks] == expected
    assert blocks[1]["steps"] == "Conv2d → Conv2d"
    assert blocks[2]["steps"] == "Conv2d  +  shortcut Conv2d"
    assert (blocks[1]["shape"], blocks[1]["parameters"]) == ("4x8x8", 216)


def test_a_block_of_very_many_layers_names_the_first_and_counts_all():
    layer = {"kind": "BatchNorm2d", "output_shape": (8, 4, 4), "parameters": 1, "multiply_adds": 2}
    (block,) = visualize._blocks([{**layer, "name": f"features.dense{n}.norm"} for n in range(400)])
    assert block["steps"] == " → ".join(["BatchNorm2d"] * 6) + " → …, 400 layers"
    assert (block["parameters"], block["multiply_adds"]) == (400, 800)


def test_the_architecture_has_each_blocks_costs(tmp_path):
    _, parameters, work = figures(make_run(tmp_path), make_dataset())["architecture"].axes
    assert [bar.get_width() for bar in parameters.patches] == [108, 771]
    assert [text.get_text() for text in work.texts] == ["6,912", "768"]


def test_calibration_bars_are_the_saved_bins():
    figure = visualize._calibration(make_metrics()["calibration"], "fast on digits")
    before, after, counts, _ = figure.axes
    (bar,) = before.patches
    assert (bar.get_x(), bar.get_width(), bar.get_height()) == (0.5, 0.5, 0.75)
    assert before.lines[0].get_xydata().tolist() == [[0.8, 0.75]]
    assert [text.get_text() for text in counts.texts] == ["0", "12"]
    assert before.get_title() == "before\nexpected calibration error 5.00%"
    assert "temperature 1.250, fitted on 10 validation images" in after.get_title()


def test_a_temperature_that_was_not_fitted_says_so():
    after = visualize._calibration(make_metrics(fitted_on=0)["calibration"], "fast on digits").axes[1]
    assert "as no image was held out to fit it" in after.get_title()


def test_a_run_without_evaluation_draws_the_rest_and_leaves_the_test_split_closed(tmp_path):
    dataset = make_dataset()
    paths = visualize.visualize(make_run(tmp_path, evaluated=False), dataset)
    assert [path.name for path in paths] == ["training_history.png", "dataset_samples.png", "architecture.png"]
    assert "test" not in vars(dataset)


def test_a_run_that_measured_nothing_cannot_be_drawn(tmp_path):
    run = make_run(tmp_path, epochs=0, evaluated=False)
    with pytest.raises(UserError, match="has nothing to draw"):
        visualize.visualize(run, make_dataset())


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (lambda text: "", "is damaged"),
        (lambda text: text[:-5], "is damaged"),
        (lambda text: "\x00\x01", "is damaged"),
        (lambda text: text.replace("ship", "boat"), "is damaged"),
        (lambda text: text.replace("confidence", "sureness"), "is damaged"),
        (lambda text: text.replace("0.95", "nan"), "is damaged"),
        (lambda text: text.replace("0.95", "1.95"), "is damaged"),
        (lambda text: text.replace("0.95", "high"), "is damaged"),
        (lambda text: "".join(text.splitlines(keepends=True)[:-1]), "does not fit the test split"),
        (lambda text: text.splitlines()[0], "does not fit the test split"),
        (lambda text: text.replace("3,cat,dog", "3,dog,dog"), "does not fit the test split"),
        (lambda text: text.replace("\n3,cat", "\n4,cat"), "does not fit the test split"),
    ],
)
def test_predictions_that_do_not_fit_are_refused_before_anything_is_drawn(tmp_path, damage, message):
    run = make_run(tmp_path)
    path = tmp_path / "predictions.csv"
    intact = path.read_text(encoding="utf-8")
    damaged = damage(intact)
    assert damaged != intact
    path.write_text(damaged, encoding="utf-8")
    with pytest.raises(UserError, match=message) as error:
        visualize.visualize(run, make_dataset())
    assert "predictions.csv" in str(error.value)
    assert "\n" not in str(error.value)
    assert not run.figures.exists()


def test_another_dataset_is_refused(tmp_path):
    other = dataclasses.replace(make_dataset(), key="cifar10")
    with pytest.raises(UserError, match="was trained on digits, not on cifar10"):
        visualize.visualize(make_run(tmp_path), other)


def test_a_folder_that_cannot_be_written_is_one_sentence(tmp_path):
    run = make_run(tmp_path)
    run.figures.write_text("in the way", encoding="utf-8")
    with pytest.raises(UserError, match=r"^cannot write .*training_history.png: "):
        visualize.visualize(run, make_dataset())


def test_the_users_matplotlib_stays_as_it_was(tmp_path):
    with matplotlib.rc_context({"axes.facecolor": "black", "figure.dpi": 40}):
        before = dict(matplotlib.rcParams)
        paths = visualize.visualize(make_run(tmp_path), make_dataset())
        assert dict(matplotlib.rcParams) == before
    assert pyplot.get_fignums() == []
    with Image.open(paths[0]) as picture:
        assert picture.convert("L").getextrema() == (0, 255)
        assert picture.convert("L").histogram()[255] > picture.width * picture.height / 2, "the user's black shows"
