"""Image grids: mistakes, sample predictions and training images, with captions."""

from typing import TYPE_CHECKING

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from cifar.data import Dataset
from cifar.style import BLUE, ORANGE, Axes, Figure, canvas, label

if TYPE_CHECKING:
    from pandas import DataFrame

PLAIN = "test split, without test-time augmentation"
_IMAGES, _COLUMNS = 32, 8  # of the test split
_SAMPLES, _SAMPLE_ROWS = 10, 20  # training images per class, and classes


def misclassified(predictions: "DataFrame", dataset: Dataset, subject: str) -> Figure:
    """Show the wrong predictions with the highest confidence, highest first; the earlier of equal ones first."""
    wrong = predictions[predictions.true != predictions.predicted]
    shown = wrong.sort_values("confidence", ascending=False, kind="stable")[:_IMAGES]
    which = "all" if len(shown) == len(wrong) else f"the {len(shown)} most confident"
    title = f"Misclassified images: {subject}, {which} of {len(wrong):,} among {len(predictions):,}"
    return _grid(shown, dataset, title)


def sample_predictions(predictions: "DataFrame", dataset: Dataset, subject: str) -> Figure:
    """Show evenly spaced images of the test split, right or wrong."""
    shown = predictions.iloc[_evenly_spaced(len(predictions), _IMAGES)]
    title = f"Sample predictions: {subject}, {len(shown)} images, evenly spaced among {len(predictions):,}"
    return _grid(shown, dataset, title)


def _grid(shown: "DataFrame", dataset: Dataset, title: str) -> Figure:
    """Draw test images row by row, each above a caption of two or three lines."""
    rows, files = -(-len(shown) // _COLUMNS) or 1, dataset.test_files
    title += f",\n{PLAIN}; with calibrated confidence and {'file name' if files else 'index in the split'}"
    figure = canvas(title, 12, 0.8 + 1.74 * rows, "compressed")
    axes = figure.add_subplot()
    axes.set_axis_off()
    if shown.empty:
        axes.text(0.5, 0.5, "No image is misclassified.", ha="center", va="center", fontsize="x-large")
        return figure
    images = dataset.test.images[shown["index"].tolist()]
    height, width = images.shape[-2:]
    below, beside = round(0.45 * height), round(0.25 * width)
    _show(axes, images, _COLUMNS, below, beside)
    for position, row in enumerate(shown.itertuples(index=False)):
        is_right = row.true == row.predicted
        name = files[row.index].rpartition("/")[2] if files else f"#{row.index}"
        lines = [f"{'✓' if is_right else '✗'} {row.confidence:.1%} {row.predicted}", name]
        text = "\n".join(label(line, 23) for line in (lines if is_right else [*lines, f"true {row.true}"]))
        corner = position % _COLUMNS * (width + beside) - 0.5, position // _COLUMNS * (height + below) + height
        axes.text(*corner, text, va="top", fontsize=7.5, color=BLUE if is_right else ORANGE, linespacing=1.1)
    return figure


def dataset_samples(dataset: Dataset, subject: str) -> Figure:
    """Show a row of training images for each class, the first ones; of many classes some, evenly spaced."""
    images, labels, count = dataset.train.images, dataset.train.labels, len(dataset.classes)
    numbers = _evenly_spaced(count, _SAMPLE_ROWS)
    which = "" if len(numbers) == count else f", {len(numbers)} of {count:,} classes"
    title = f"Training images{which}: {subject},\nthe first {_SAMPLES} of each class, and the size of the class"
    figure = canvas(title, 9, 0.9 + 0.75 * len(numbers), "compressed")
    axes = figure.add_subplot()
    rows = [images[(labels == number).nonzero()[:_SAMPLES, 0]] for number in numbers]
    padded = [F.pad(row, (0, 0) * 3 + (0, _SAMPLES - len(row)), value=255) for row in rows]
    below, beside = (size // 10 for size in images.shape[-2:])
    _show(axes, torch.cat(padded), _SAMPLES, below, beside)
    sizes, height = labels.bincount(minlength=count), images.shape[-2]
    names = [f"{label(dataset.classes[number])}\n{sizes[number]:,}" for number in numbers]
    axes.set_yticks(np.arange(len(numbers)) * (height + below) + height / 2, names)
    axes.set_xticks([])
    axes.tick_params(length=0)
    axes.spines[:].set_visible(False)
    return figure


def _evenly_spaced(count: int, most: int) -> np.ndarray:
    return np.unique(np.linspace(0, count - 1, min(most, count)).round().astype(int))


def _show(axes: Axes, images: Tensor, columns: int, below: int, beside: int) -> None:
    """Draw images (N, 3, H, W) row by row as one, with white pixels below and beside each: one imshow is fast."""
    cells = F.pad(images, (0, beside, 0, below, 0, 0, 0, -len(images) % columns), value=255)
    _, channels, height, width = cells.shape
    grid = cells.view(-1, columns, channels, height, width).permute(0, 3, 1, 4, 2).reshape(-1, columns * width, 3)
    axes.imshow(grid.numpy(), interpolation="nearest", alpha=1)  # without alpha, Matplotlib takes twice the memory
