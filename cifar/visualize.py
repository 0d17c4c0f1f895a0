"""Saved numbers to figures: a run's history, metrics, predictions and network as PNGs."""

import csv
import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import groupby
from pathlib import Path
from typing import Any

import matplotlib.style
import numpy as np
import seaborn
import torch
import torch.nn.functional as F
from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.colors import PowerNorm
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator, PercentFormatter
from torch import Tensor

from cifar.config import UserError
from cifar.datasets import Dataset
from cifar.runs import Run, replacing

_DPI = 150
_BLUE, _ORANGE, _GREEN, _GREY = "#0072B2", "#D55E00", "#009E73", "#666666"  # Okabe and Ito 2008: safe when colour-blind
_STYLE = [
    "default",
    {
        "axes.spines.top": False,
        "axes.spines.right": False,
        "axes.titlesize": "medium",
        "figure.titlesize": "large",
        "figure.constrained_layout.h_pad": 0.1,
        "figure.constrained_layout.w_pad": 0.1,
        "legend.frameon": False,
        "text.parse_math": False,  # a class may be called "$"
    },
]
_BIN = {"color": "#b8d6ea", "edgecolor": "white"}
_PLAIN = "test split, without test-time augmentation"
_SHOWN, _COLUMNS = 32, 8  # images of the test split
_SAMPLES, _SAMPLE_ROWS = 12, 20  # training images of a class, and classes
_LINE = 23  # characters that fit below an image
_STEPS = 95  # characters that fit into a block of the network
_ANNOTATED = 20  # classes; the counts of more do not fit their cells


def visualize(run: Run, dataset: Dataset) -> list[Path]:
    """Draw what the run has saved into its figures/, leaving out what it has not, and return the files.

    The test split is opened only if the run has predictions. Raises UserError if the dataset is not the run's,
    nothing has been measured yet, predictions.csv does not fit the test split, or a file cannot be written.
    """
    run.check_dataset(dataset.name)
    with matplotlib.style.context(_STYLE):
        return [_save(figure, run.figures / f"{name}.png") for name, figure in _figures(run, dataset)]


def _figures(run: Run, dataset: Dataset) -> Iterator[tuple[str, Figure]]:
    """Name and figure, one after the other so that one is in memory at a time. All files are read before the first."""
    history, network, subject = run.history(), run.record.get("model"), f"{run.config.title} on {dataset.name}"
    metrics = run.read("metrics.json") if (run.path / "metrics.json").exists() else None
    predictions = _read_predictions(run, dataset)
    if not (history or metrics or predictions):
        raise UserError(f"{run.path.name} has nothing to draw: it has neither a finished epoch nor an evaluation")
    if history:
        yield "training_history", _training_history(history, subject)
    if metrics:
        yield "confusion_matrix", _confusion_matrix(metrics, subject)
        yield "per_class_metrics", _per_class_metrics(metrics, subject)
    if predictions:
        yield "misclassified", _misclassified(predictions, dataset, subject)
    yield "dataset_samples", _dataset_samples(dataset, subject)
    if predictions:
        yield "sample_predictions", _sample_predictions(predictions, dataset, subject)
    if network:
        yield "architecture", _architecture(network, subject)
    if metrics:
        yield "calibration", _calibration(metrics["calibration"], subject)


def _save(figure: Figure, path: Path) -> Path:
    with replacing(path) as partial:
        path.parent.mkdir(exist_ok=True)
        figure.savefig(partial, format="png")
    return path


@dataclass(frozen=True)
class _Predictions:
    """One entry per test image, in the split's order: class numbers (N,), and confidence (N,) in 0..1."""

    true: np.ndarray
    predicted: np.ndarray
    confidence: np.ndarray


def _read_predictions(run: Run, dataset: Dataset) -> _Predictions | None:
    """predictions.csv; None if there is none. Raises UserError if it is damaged or not of the dataset's test split."""
    path = run.path / "predictions.csv"
    if not path.exists():
        return None
    numbers = {name: number for number, name in enumerate(dataset.classes)}
    columns = ["index", "true", "predicted", "confidence", *dataset.classes]
    try:
        with path.open(newline="", encoding="utf-8") as file:
            header, *rows = csv.reader(file)
        table = [(int(row[0]), numbers[row[1]], numbers[row[2]], float(row[3])) for row in rows]
    except (ValueError, KeyError, IndexError, csv.Error):
        header, rows, table = [], [], []
    index, true, predicted, confidence = np.array(table).reshape(-1, 4).T
    whole = header == columns and all(len(row) == len(columns) for row in rows)
    if not (whole and ((confidence >= 0) & (confidence <= 1)).all()):
        raise UserError(f"{path} is damaged: make it anew with `invoke evaluate`")
    labels = dataset.test.labels.numpy()
    if not (np.array_equal(index, np.arange(len(labels))) and np.array_equal(true, labels)):
        raise UserError(f"{path} does not fit the test split of {dataset.name}: make it anew with `invoke evaluate`")
    return _Predictions(true.astype(int), predicted.astype(int), confidence)


def _figure(title: str, width: float, height: float, layout: str = "constrained") -> Figure:
    """An empty figure, in inches, that belongs to no window and no backend of the user's."""
    figure = Figure(figsize=(width, height), dpi=_DPI, layout=layout)
    FigureCanvasAgg(figure)
    figure.suptitle(title)
    return figure


def _training_history(history: list[dict[str, Any]], subject: str) -> Figure:
    """Loss, accuracy and learning rate by epoch; the epoch whose weights were kept is marked."""
    figure = _figure(f"Training history: {subject}", 13, 4.2)
    epochs = [line["epoch"] for line in history]
    validated = history[0]["val_loss"] is not None
    best = max(history, key=lambda line: line["val_accuracy"])["epoch"] if validated else epochs[-1]
    small = [line for line in history if line["image_size"] < history[-1]["image_size"]]
    loss, accuracy, rate = figure.subplots(1, 3)
    for axes, key in ((loss, "loss"), (accuracy, "accuracy")):
        _plot(axes, epochs, [line[f"train_{key}"] for line in history], "o-", _BLUE, "training (augmented)")
        if validated:
            _plot(axes, epochs, [line[f"val_{key}"] for line in history], "s--", _ORANGE, "validation")
    _plot(rate, epochs, [line["lr"] for line in history], "o-", _GREEN, None)
    if small:  # validation is on images of the full size, so until then it lags
        label = f"trained at {small[0]['image_size']}x{small[0]['image_size']}"
        for axes in (loss, accuracy, rate):
            axes.axvspan(epochs[0] - 0.5, small[-1]["epoch"] + 0.5, color=_GREY, alpha=0.12, linewidth=0, label=label)
    for axes, title in ((loss, "cross-entropy"), (accuracy, "accuracy"), (rate, "learning rate at the epoch's start")):
        axes.axvline(best, color=_GREY, linestyle=":", label=f"{'best' if validated else 'last'} epoch {best}, kept")
        axes.set(title=title, xlabel="epoch", xlim=(epochs[0] - 0.5, epochs[-1] + 0.5))
        axes.xaxis.set_major_locator(MaxNLocator(integer=True, min_n_ticks=1))
        axes.grid(alpha=0.3)
        axes.legend(fontsize="small", frameon=True, framealpha=0.9, edgecolor="none")
    rate.set_ylim(bottom=0)
    accuracy.yaxis.set_major_formatter(PercentFormatter(1))
    return figure


def _plot(axes: Axes, epochs: list[int], values: list[float], style: str, color: str, label: str | None) -> None:
    axes.plot(epochs, values, style, color=color, label=label, markersize=4 if len(epochs) <= 50 else 0)


def _confusion_matrix(metrics: dict[str, Any], subject: str) -> Figure:
    """Counts as numbers where they fit, and the share of the true class as colour."""
    counts, classes = np.array(metrics["confusion_matrix"]), list(metrics["per_class"])
    side = max(6.5, 0.13 * len(classes))
    cell = 72 * side / len(classes)  # points
    font = min(10, 0.7 * cell)
    figure = _figure(f"Confusion matrix: {subject}, {_PLAIN}", side + 2.5, side + 1.5)
    axes = seaborn.heatmap(
        100 * counts / counts.sum(1, keepdims=True).clip(1),
        ax=figure.add_subplot(),
        # The square root keeps a confusion of 1% apart from none, beside a diagonal of 95%.
        norm=PowerNorm(0.5, vmin=0, vmax=100),
        cmap="Blues",
        linewidths=0.5 if len(classes) <= _ANNOTATED else 0,
        annot=counts if len(classes) <= _ANNOTATED else False,
        fmt="d",
        annot_kws={"size": min(10, 0.3 * cell)},
        xticklabels=classes,
        yticklabels=classes,
        cbar_kws={"label": "share of the true class (%), square-root scale", "ticks": [0, 1, 5, 10, 25, 50, 75, 100]},
    )
    fits = max(map(len, classes)) * 0.7 * font < cell
    axes.tick_params(axis="x", rotation=0 if fits else 90, labelsize=font)
    axes.tick_params(axis="y", rotation=0, labelsize=font)
    axes.set(xlabel="predicted class", ylabel="true class")
    return figure


def _per_class_metrics(metrics: dict[str, Any], subject: str) -> Figure:
    """Precision, recall and F1, a class a row, the highest F1 on top. Dots, as bars would have to start at zero."""
    classes = sorted(metrics["per_class"], key=lambda name: -metrics["per_class"][name]["f1"])
    scores = {key: [metrics["per_class"][name][key] for name in classes] for key in ("precision", "recall", "f1")}
    row_height, font = (0.35, 10) if len(classes) <= _ANNOTATED else (0.17, 7)
    title = f"Precision, recall and F1 by class: {subject},\n{_PLAIN}"
    figure = _figure(title, 8.5, 2 + row_height * max(5, len(classes)))
    axes, rows = figure.add_subplot(), np.arange(len(classes))
    lowest, highest = np.min(list(scores.values()), axis=0), np.max(list(scores.values()), axis=0)
    axes.hlines(rows, lowest, highest, color="#cccccc", linewidth=2, zorder=1)
    for (key, values), marker, color in zip(scores.items(), "><o", (_BLUE, _ORANGE, _GREEN)):
        label = "F1" if key == "f1" else key
        axes.scatter(values, rows, marker=marker, color=color, label=label, s=3.5 * font, zorder=2, clip_on=False)
    macro = metrics["macro_average"]["f1"]
    axes.axvline(macro, color=_GREY, linestyle=":", label=f"mean F1 {macro:.1%}")
    start = max(0, np.floor(20 * lowest.min() - 0.2) / 20)
    note = f"; the axis starts at {start:.0%}, not at zero" if start else ""
    axes.set(xlim=(start, 1 + 0.01 * (1 - start)), ylim=(len(classes) - 0.3, -0.7), xlabel=f"score{note}")
    axes.xaxis.set_major_locator(MaxNLocator(steps=[1, 2, 5, 10]))  # ticks that need no decimals
    axes.xaxis.set_major_formatter(PercentFormatter(1))
    axes.set_yticks(rows, classes, fontsize=font)
    values = axes.secondary_yaxis("right")
    values.set_yticks(rows, [f"{value:.1%}" for value in scores["f1"]], fontsize=font)
    values.set_ylabel("F1")
    axes.grid(axis="x", alpha=0.3)
    figure.legend(loc="outside lower center", ncols=4)
    return figure


def _misclassified(predictions: _Predictions, dataset: Dataset, subject: str) -> Figure:
    """The wrong predictions with the highest confidence, highest first, the earlier image first of equals."""
    wrong = np.flatnonzero(predictions.true != predictions.predicted)
    shown = wrong[np.argsort(-predictions.confidence[wrong], kind="stable")][:_SHOWN]
    which = f"the {len(shown)} most confident of {len(wrong):,}" if len(shown) < len(wrong) else f"{len(wrong)}"
    title = (
        f"Misclassified images, {which} among {len(predictions.true):,}: {subject},\n{_PLAIN}; calibrated confidence, "
        "and the image's index in the split"
    )
    captions = [
        f"true {dataset.classes[predictions.true[index]]}\n"
        f"predicted {dataset.classes[predictions.predicted[index]]}\n"
        f"{predictions.confidence[index]:.1%}   #{index}"
        for index in shown
    ]
    return _captioned(dataset.test.images[shown], captions, title, empty="No image is misclassified.")


def _sample_predictions(predictions: _Predictions, dataset: Dataset, subject: str) -> Figure:
    """Images at equal distances over the test split, right or wrong."""
    total = len(predictions.true)
    shown = np.unique(np.linspace(0, total - 1, min(_SHOWN, total)).round().astype(int))
    right = predictions.true == predictions.predicted
    title = (
        f"Predictions of {len(shown)} images spread evenly over the {total:,}: {subject},\n{_PLAIN}; "
        "calibrated confidence, and the image's index in the split"
    )
    captions = [
        f"{'✓' if right[index] else '✗'} {dataset.classes[predictions.predicted[index]]}\n"
        f"{predictions.confidence[index]:.1%}   #{index}\n"
        + ("" if right[index] else f"true {dataset.classes[predictions.true[index]]}")
        for index in shown
    ]
    colors = [_BLUE if right[index] else _ORANGE for index in shown]
    return _captioned(dataset.test.images[shown], captions, title, colors)


def _captioned(
    images: Tensor, captions: Sequence[str], title: str, colors: Sequence[str] | None = None, empty: str = ""
) -> Figure:
    """Images (N, 3, H, W) row by row, each over its caption of three lines; `empty` is said where there is none."""
    rows = max(1, -(-len(images) // _COLUMNS))
    figure = _figure(title, 12, 0.8 + 1.74 * rows, "compressed")
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


def _dataset_samples(dataset: Dataset, subject: str) -> Figure:
    """A row per class of its first training images; of many classes some, at equal distances."""
    count = len(dataset.classes)
    chosen = np.unique(np.linspace(0, count - 1, min(_SAMPLE_ROWS, count)).round().astype(int))
    which = "" if len(chosen) == count else f", {len(chosen)} of {count} classes"
    title = f"Training images{which}: {subject}, the first {_SAMPLES} of each class and how many there are"
    figure = _figure(title, 10.5, 0.7 + 0.75 * len(chosen), "compressed")
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


def _blocks(layers: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """The layers joined into blocks by their dotted names: what runs, the shape that leaves it, what it costs.

    `stages.0.1.conv1.0` belongs to stages.0.1, `blocks.0.1.2` to blocks.0, `stem.2` to stem, `head` to itself.
    """

    def block_name(layer: dict[str, Any]) -> str:
        return re.match(r"[^.]+(\.\d+)*(?=\.\D)|[^.]+(\.\d+)?(?=\.)|.+", layer["name"]).group()

    blocks = []
    for name, members in groupby(layers, block_name):
        members = list(members)
        beside = [layer for layer in members if ".shortcut" in layer["name"]]
        paths = [[layer["kind"] for layer in members if layer not in beside], [layer["kind"] for layer in beside]]
        steps = "  +  shortcut ".join(" → ".join(path) for path in paths if path)
        if len(steps) > _STEPS:
            steps = f"{steps[:_STEPS].rpartition(' → ')[0]} → …, {len(members)} layers"
        blocks.append(
            {
                "name": name,
                "steps": steps,
                "shape": "x".join(map(str, members[-1]["output_shape"])),
                "parameters": sum(layer["parameters"] for layer in members),
                "multiply_adds": sum(layer["multiply_adds"] for layer in members),
            }
        )
    return blocks


def _architecture(network: dict[str, Any], subject: str) -> Figure:
    """The blocks from input to logits, each with its parameters and its work for one image."""
    blocks = _blocks(network["layers"])
    total = (
        f"{network['parameters']:,} parameters, {network['multiply_adds'] / 1e6:,.1f} million multiply-adds an image"
    )
    figure = _figure(f"Network {network['name']}: {subject}\n{total}", 12, 1.4 + 0.62 * len(blocks))
    flow, *costs = figure.subplots(1, 3, sharey=True, width_ratios=(4, 1, 1))
    _draw_flow(flow, blocks)
    for axes, key in zip(costs, ("parameters", "multiply_adds")):
        values = [block[key] for block in blocks]
        bars = axes.barh(range(len(blocks)), values, height=0.4, color=_BLUE)
        axes.bar_label(bars, [f"{value:,}" for value in values], padding=3, fontsize=8)
        axes.set(title=key.replace("_", "-"), xlim=(0, 1.8 * max(values, default=0) or 1))
    for axes in (flow, *costs):
        axes.set(xticks=[], yticks=[])
        axes.spines[:].set_visible(False)
    return figure


def _draw_flow(axes: Axes, blocks: list[dict[str, Any]]) -> None:
    """A box for each block, downwards, with an arrow to the next."""
    axes.barh(range(len(blocks)), 1, height=0.7, color="#e8f1f8", edgecolor=_BLUE)
    for row, block in enumerate(blocks):
        axes.text(0.015, row - 0.15, block["name"], weight="bold", va="center", fontsize=9)
        axes.text(0.985, row - 0.15, block["shape"], weight="bold", va="center", ha="right", fontsize=9)
        axes.text(0.015, row + 0.15, block["steps"], va="center", fontsize=8)
        if row:
            arrow = {"arrowstyle": "-|>", "color": _GREY, "shrinkA": 0, "shrinkB": 0}
            axes.annotate("", (0.5, row - 0.35), (0.5, row - 0.65), arrowprops=arrow)
    axes.set(xlim=(0, 1), ylim=(len(blocks) - 0.5, -0.5), title="block, its layers, and the shape that leaves it")


def _calibration(calibration: dict[str, Any], subject: str) -> Figure:
    """Accuracy against confidence, before and after the temperature, over the number of images in each bin."""
    figure = _figure(f"Calibration: {subject}, {_PLAIN}", 12, 6.5)
    reliability, counts = figure.subplots(2, 2, sharex=True, sharey="row", height_ratios=(3, 1))
    fitted_on = calibration["fitted_on"]
    fit = f"fitted on {fitted_on:,} validation images" if fitted_on else "as no image was held out to fit it"
    heads = "before", f"after temperature {calibration['temperature']:.3f}, {fit}"
    for key, head, upper, lower in zip(("before", "after"), heads, reliability, counts):
        _draw_reliability(upper, calibration[key]["bins"])
        _draw_counts(lower, calibration[key]["bins"])
        upper.set_title(f"{head}\nexpected calibration error {calibration[key]['expected_calibration_error']:.2%}")
    reliability[0].set_ylabel("accuracy")
    reliability[0].legend(loc="upper left")
    counts[0].set_ylabel("images")
    return figure


def _draw_reliability(axes: Axes, bins: list[dict[str, Any]]) -> None:
    filled = [bin for bin in bins if bin["count"]]
    accuracies = [bin["accuracy"] for bin in filled]
    axes.bar(
        [bin["low"] for bin in filled], accuracies, 1 / len(bins), align="edge", **_BIN, label="accuracy of the bin"
    )
    confidences = [bin["confidence"] for bin in filled]
    axes.plot(confidences, accuracies, "o", color=_BLUE, label="at the bin's mean confidence", clip_on=False)
    axes.plot([0, 1], [0, 1], "--", color=_GREY, label="perfectly calibrated")
    axes.set(xlim=(0, 1), ylim=(0, 1.02))
    axes.yaxis.set_major_formatter(PercentFormatter(1))


def _draw_counts(axes: Axes, bins: list[dict[str, Any]]) -> None:
    counts = [bin["count"] for bin in bins]
    bars = axes.bar([bin["low"] for bin in bins], counts, 1 / len(bins), align="edge", **_BIN)
    axes.bar_label(bars, [f"{count:,}" for count in counts], fontsize=7, padding=1)
    axes.margins(y=0.2)
    axes.set(xlabel="confidence")
    axes.xaxis.set_major_formatter(PercentFormatter(1))
