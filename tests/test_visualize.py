import csv
import dataclasses
from dataclasses import asdict

import matplotlib
import numpy as np
import pytest
import torch
from matplotlib import pyplot
from matplotlib.figure import Figure
from matplotlib.transforms import Bbox
from PIL import Image

from cifar import analysis, visualize
from cifar.config import Config
from cifar.data import Split
from cifar.datasets import Dataset
from cifar.errors import UserError
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
    "precision_recall.png",
    "misclassified.png",
    "dataset_samples.png",
    "sample_predictions.png",
    "architecture.png",
    "calibration.png",
    "risk_coverage.png",
    "corruptions.png",
]
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
    assert plain == set(titles) - {"training_history", "dataset_samples", "architecture"}


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


def test_a_run_without_evaluation_draws_the_rest_and_leaves_the_test_split_closed(tmp_path):
    dataset = make_dataset()
    paths = visualize.visualize(make_run(tmp_path, evaluated=False), dataset)
    assert [path.name for path in paths] == ["training_history.png", "dataset_samples.png", "architecture.png"]
    assert "test" not in vars(dataset)


def test_a_run_that_measured_nothing_cannot_be_drawn(tmp_path):
    run = make_run(tmp_path, epochs=0, evaluated=False)
    with pytest.raises(UserError, match="has nothing to draw"):
        visualize.visualize(run, make_dataset())


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
