"""Pictures to figures: mistakes, predictions and training images, row by row with captions."""

from collections.abc import Sequence

import numpy as np
import torch
import torch.nn.functional as F
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from torch import Tensor

from cifar import analysis
from cifar.charts import BLUE, ORANGE, PLAIN, canvas
from cifar.datasets import Dataset
from cifar.predictions import Predictions

_SHOWN, _COLUMNS = 32, 8  # images of the test split
_SAMPLES, _SAMPLE_ROWS = 12, 20  # training images of a class, and classes
_LINE = 23  # characters that fit below an image


def misclassified(predictions: Predictions, dataset: Dataset, subject: str) -> Figure:
    """The wrong predictions with the highest confidence, highest first, the earlier image first of equals."""
    wrong = predictions.true != predictions.predicted
    shown, total = analysis.highest(predictions.confidence, wrong, _SHOWN), wrong.sum()
    which = f"the {len(shown)} most confident of {total:,}" if len(shown) < total else f"{total}"
    title = (
        f"Misclassified images, {which} among {len(predictions.true):,}: {subject},\n{PLAIN}; calibrated confidence, "
        "and the image's index in the split"
    )
    captions = [
        f"true {dataset.classes[predictions.true[index]]}\n"
        f"predicted {dataset.classes[predictions.predicted[index]]}\n"
        f"{predictions.confidence[index]:.1%}   #{index}"
        for index in shown
    ]
    return _captioned(dataset.test.images[shown], captions, title, empty="No image is misclassified.")


def sample_predictions(predictions: Predictions, dataset: Dataset, subject: str) -> Figure:
    """Images at equal distances over the test split, right or wrong."""
    total = len(predictions.true)
    shown = np.unique(np.linspace(0, total - 1, min(_SHOWN, total)).round().astype(int))
    right = predictions.true == predictions.predicted
    title = (
        f"Predictions of {len(shown)} images spread evenly over the {total:,}: {subject},\n{PLAIN}; "
        "calibrated confidence, and the image's index in the split"
    )
    captions = [
        f"{'✓' if right[index] else '✗'} {dataset.classes[predictions.predicted[index]]}\n"
        f"{predictions.confidence[index]:.1%}   #{index}\n"
        + ("" if right[index] else f"true {dataset.classes[predictions.true[index]]}")
        for index in shown
    ]
    colors = [BLUE if right[index] else ORANGE for index in shown]
    return _captioned(dataset.test.images[shown], captions, title, colors)


def _captioned(
    images: Tensor, captions: Sequence[str], title: str, colors: Sequence[str] | None = None, empty: str = ""
) -> Figure:
    """Images (N, 3, H, W) row by row, each over its caption of three lines; `empty` is said where there is none."""
    rows = max(1, -(-len(images) // _COLUMNS))
    figure = canvas(title, 12, 0.8 + 1.74 * rows, "compressed")
    axes = figure.add_subplot()
    axes.set_axis_off()
    if not len(images):
        axes.text(0.5, 0.5, empty, ha="center", va="center", fontsize="x-large")
        return figure
    height, width = images.shape[-2:]
    below, beside = round(0.45 * height), round(0.25 * width)
    _show(axes, images, _COLUMNS, below, beside)
    for place, (caption, color) in enumerate(zip(captions, colors or ["black"] * len(captions))):
        row, column = divmod(place, _COLUMNS)
        lines = [line if len(line) <= _LINE else line[: _LINE - 1] + "…" for line in caption.split("\n")]
        corner = column * (width + beside) - 0.5, row * (height + below) + height
        axes.text(*corner, "\n".join(lines), va="top", fontsize=7.5, color=color, linespacing=1.1)
    return figure


def _show(axes: Axes, images: Tensor, columns: int, below: int, beside: int) -> None:
    """Images (N, 3, H, W) row by row as one, with white pixels below and beside each: one imshow is fast."""
    missing = -len(images) % columns
    cells = F.pad(images, (0, beside, 0, below, 0, 0, 0, missing), value=255)
    _, channels, height, width = cells.shape
    mosaic = cells.view(-1, columns, channels, height, width).permute(0, 3, 1, 4, 2).reshape(-1, columns * width, 3)
    axes.imshow(mosaic.numpy(), interpolation="nearest")


def dataset_samples(dataset: Dataset, subject: str) -> Figure:
    """A row per class of its first training images; of many classes some, at equal distances."""
    count = len(dataset.classes)
    chosen = np.unique(np.linspace(0, count - 1, min(_SAMPLE_ROWS, count)).round().astype(int))
    which = "" if len(chosen) == count else f", {len(chosen)} of {count} classes"
    title = f"Training images{which}: {subject}, the first {_SAMPLES} of each class and how many there are"
    figure = canvas(title, 10.5, 0.7 + 0.75 * len(chosen), "compressed")
    axes = figure.add_subplot()
    images, labels = dataset.train.images, dataset.train.labels
    firsts = [images[(labels == number).nonzero().flatten()[:_SAMPLES]] for number in chosen]
    whole = torch.cat([F.pad(first, (0, 0) * 3 + (0, _SAMPLES - len(first)), value=255) for first in firsts])
    height, width = images.shape[-2:]
    _show(axes, whole, _SAMPLES, height // 10, width // 10)
    counts = labels.bincount(minlength=count)
    middles = np.arange(len(chosen)) * (height + height // 10) + height / 2
    axes.set_yticks(middles, [f"{dataset.classes[number]}\n{counts[number]:,}" for number in chosen])
    axes.set_xticks([])
    axes.tick_params(length=0)
    axes.spines[:].set_visible(False)
    return figure
