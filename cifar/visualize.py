"""The figures of a run: FIGURES lists them all; `visualize` draws those whose data the run has saved.

To add a figure, write a function that draws it and add one entry to FIGURES.
"""

from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import groupby
from operator import itemgetter
from pathlib import Path
from typing import Any

import numpy as np

from cifar import analysis, evaluate, gallery
from cifar.data import Dataset
from cifar.errors import UserError
from cifar.files import atomic_write
from cifar.gallery import PLAIN
from cifar.records import Analysis, EpochRecord, LayerRecord, Metrics, ModelRecord
from cifar.runs import Run, damaged
from cifar.style import BLUE, GREEN, GREY, ORANGE, Figure, MaxNLocator, PowerNorm, canvas, drawing, label, label_percent

_FEW_CLASSES = 20  # have room for counts in a confusion matrix, and for large letters
_MANY_CLASSES = 100  # still have a row each; of more classes only the worst have one
_WORST_CLASSES = 40
_MAX_BLOCKS = 24  # of the architecture figure


def training_history(history: list[EpochRecord], kept_epoch: int, subject: str) -> Figure:
    """Plot loss, accuracy and learning rate by epoch, and mark the epoch whose weights were kept, if one is known.

    Shades the epochs on small images, where validation at full size lags, and those on the hardest images.
    """
    figure = canvas(f"Training history: {subject}", 13, 4.5)
    epochs, first, last = [line.epoch for line in history], history[0], history[-1]
    small = [line.epoch for line in history if line.image_size < last.image_size]
    hard = [line.epoch for line in history if line.images and first.images and line.images < first.images]
    training, validation = ("o-", BLUE, "training (augmented)"), ("s--", ORANGE, "validation")
    panels: dict[str, dict[str, tuple[str, str, str | None]]] = {
        "cross-entropy": {"train_loss": training, "val_loss": validation},
        "accuracy": {"train_accuracy": training, "val_accuracy": validation},
        "learning rate": {"lr": ("o-", GREEN, None)},
    }
    for axes, (title, lines) in zip(figure.subplots(1, 3), panels.items()):
        for key, (style, color, name) in lines.items():
            if getattr(first, key) is not None:
                size = 4 if len(history) <= 50 else 0
                axes.plot(epochs, [getattr(line, key) for line in history], style, color=color, label=name, ms=size)
        if small:
            name = f"trained at {first.image_size}x{first.image_size}"
            axes.axvspan(small[0] - 0.5, small[-1] + 0.5, color=GREY, alpha=0.12, linewidth=0, label=name)
        if hard and first.images and last.images:
            name = f"trained on the hardest {last.images / first.images:.0%}"
            axes.axvspan(hard[0] - 0.5, hard[-1] + 0.5, color=GREY, alpha=0.3, linewidth=0, label=name)
        if kept_epoch:
            axes.axvline(kept_epoch, color=GREY, linestyle=":", label=f"weights of epoch {kept_epoch} kept")
        axes.set(title=title, xlabel="epoch", xlim=(first.epoch - 0.5, last.epoch + 0.5))
        axes.xaxis.set_major_locator(MaxNLocator(integer=True, min_n_ticks=1))
        axes.grid(alpha=0.3)
    figure.legend(*figure.axes[0].get_legend_handles_labels(), loc="outside lower center", ncols=5)
    label_percent(figure.axes[1], "y")
    axes.set_ylim(bottom=0)
    return figure


def confusion_matrix(metrics: Metrics, subject: str) -> Figure:
    """Draw counts as numbers, where they fit, and fractions of the true class as color.

    Of many classes, those with the most errors have rows and columns of their own, and the others share one.
    """
    counts, names, which = np.array(metrics.confusion_matrix), list(metrics.per_class), ""
    if len(names) > _MANY_CLASSES:
        errors = counts.sum(0) + counts.sum(1) - 2 * counts.diagonal()
        shown = np.sort(np.argsort(-errors, kind="stable")[:_WORST_CLASSES])
        rows = np.full(len(names), _WORST_CLASSES)
        rows[shown] = range(_WORST_CLASSES)
        counts = np.zeros((_WORST_CLASSES + 1,) * 2, int)
        np.add.at(counts, (rows[:, None], rows), metrics.confusion_matrix)
        which = f" (the {_WORST_CLASSES} classes with the most errors of {len(names):,})"
        names = [*(names[number] for number in shown), f"the other {len(names) - _WORST_CLASSES:,}"]
    names = [label(name) for name in names]
    size = max(6.5, 0.13 * len(names))
    cell = 72 * size / len(names)  # points
    figure = canvas(f"Confusion matrix{which}: {subject},\n{PLAIN}", size + 2.5, size + 1.5)
    axes = figure.add_subplot(xlabel="predicted class", ylabel="true class")
    # With a square-root scale, a confusion of 1% differs from none, beside a diagonal of 95%.
    norm, percentages = PowerNorm(0.5, vmin=0, vmax=100), 100 * counts / counts.sum(1, keepdims=True).clip(1)
    ticks = [0, 1, 5, 10, 25, 50, 75, 100]
    drawn = axes.imshow(percentages, cmap="Blues", norm=norm)
    figure.colorbar(drawn, label="% of the true class (square-root scale)", ticks=ticks, shrink=0.8)
    if len(names) <= _FEW_CLASSES:
        for (row, column), count in np.ndenumerate(counts):
            color = "white" if percentages[row, column] > 30 else "black"
            axes.text(column, row, count, ha="center", va="center", color=color, fontsize=min(10, 0.3 * cell))
    font = min(10, 0.7 * cell)
    turn = 0 if max(map(len, names)) * 0.7 * font < cell else 90
    axes.set_xticks(range(len(names)), names, fontsize=font, rotation=turn)
    axes.set_yticks(range(len(names)), names, fontsize=font)
    axes.tick_params(length=0)
    axes.spines[:].set_visible(False)
    return figure


def per_class_metrics(metrics: Metrics, subject: str) -> Figure:
    """Plot precision, recall and F1 of each class, the highest F1 on top; dots, as bars would have to start at 0."""
    classes, which = sorted(metrics.measured_classes, key=lambda name: -metrics.per_class[name].f1), ""
    if len(classes) > _MANY_CLASSES:
        which = f" (the {_WORST_CLASSES} classes with the lowest F1 of {len(classes):,})"
        classes = classes[-_WORST_CLASSES:]
    height, font = (0.35, 10) if len(classes) <= _FEW_CLASSES else (0.17, 7)
    title = f"Precision, recall and F1 by class{which}: {subject},\n{PLAIN}"
    figure = canvas(title, 8.5, 2 + height * max(5, len(classes)))
    axes, rows = figure.add_subplot(xlabel="score"), range(len(classes))
    for key, marker, color in (("precision", ">", BLUE), ("recall", "<", ORANGE), ("f1", "o", GREEN)):
        values, name = [getattr(metrics.per_class[name], key) for name in classes], key.replace("f1", "F1")
        axes.scatter(values, rows, marker=marker, color=color, label=name, s=3.5 * font, zorder=2)
    axes.axvline(metrics.macro_average.f1, color=GREY, linestyle=":", label=f"macro F1 {metrics.macro_average.f1:.1%}")
    axes.set_ylim(len(classes) - 0.3, -0.7)
    axes.set_xlim(*np.clip(axes.get_xlim(), -0.01, 1.01))
    label_percent(axes, "x")
    axes.set_yticks(rows, [label(name) for name in classes], fontsize=font)
    axes.grid(alpha=0.3)
    figure.legend(loc="outside lower center", ncols=4)
    return figure


def precision_recall(analysis: Analysis, metrics: Metrics, subject: str) -> Figure:
    """Plot a curve for each class; only the three with the lowest average precision have a color and a name."""
    figure = canvas(f"Precision-recall curves by class: {subject},\n{PLAIN}", 8.5, 6)
    axes, scores = figure.add_subplot(), metrics.average_precision or {}
    ranked = sorted(analysis.precision_recall, key=lambda name: scores[name] or 0.0)
    looks = [(ORANGE, "-", 2), (BLUE, "--", 2), (GREEN, ":", 2), *[("#bbbbbb", "-", 1)] * len(ranked)]
    for rank, (name, (color, style, width)) in enumerate(zip(ranked, looks)):
        curve = analysis.precision_recall[name]
        text: str | None = f"{label(name)}, average precision {scores[name]:.1%}"
        if name.startswith("_"):
            text = f" {text}"  # or Matplotlib would leave it out of the legend
        if rank >= 3:
            text = f"other classes ({len(ranked) - 3})" if rank == 3 else None
        marker = "o" if len(set(curve.recall)) < 10 else None  # of few images; a single point has no line
        points = [0, *curve.recall], [curve.precision[0], *curve.precision]
        axes.plot(*points, style, color=color, lw=width, zorder=width, marker=marker, markersize=4, label=text)
    axes.set(xlabel="recall", ylabel="precision", xlim=(0, 1.005), ylim=(0, 1.02))
    figure.legend(loc="outside lower center", ncols=2)
    label_percent(axes, "xy")
    axes.grid(alpha=0.3)
    return figure


def calibration(metrics: Metrics, subject: str) -> Figure:
    """Plot accuracy against confidence, before and after temperature scaling, above the number of images per bin."""
    figure = canvas(f"Calibration: {subject}, {PLAIN}", 12, 6.8)
    diagrams, histograms = figure.subplots(2, 2, sharex=True, sharey="row", height_ratios=(3, 1))
    content = metrics.calibration
    fit = f"fitted on {content.fitted_on:,} validation images" if content.fitted_on else "without validation images"
    titles = "before temperature scaling", f"after temperature scaling (T = {content.temperature:.3f}, {fit})"
    for part, title, upper, lower in zip((content.before, content.after), titles, diagrams, histograms):
        rows = [(bin.low, bin.count, bin.confidence, bin.accuracy) for bin in part.bins]
        lows, counts, confidences, accuracies = np.array(rows, float).T  # NaN without images
        style = {"width": 1 / len(rows), "align": "edge", "color": "#b8d6ea", "edgecolor": "white"}
        upper.bar(lows, accuracies, **style, label="accuracy in the bin")
        upper.plot(confidences, accuracies, "o", color=BLUE, label="at the bin's mean confidence", clip_on=False)
        upper.plot([0, 1], [0, 1], "--", color=GREY, label="perfect calibration")
        errors = f"{part.expected_calibration_error:.2%}, negative log-likelihood {part.negative_log_likelihood:.4f}"
        upper.set(xlim=(0, 1), ylim=(0, 1.02), title=f"{title}\nexpected calibration error {errors}")
        label_percent(upper, "xy")
        lower.bar_label(lower.bar(lows, counts, **style), fmt="{:,.0f}", fontsize=7, padding=1)
        lower.margins(y=0.2)
        lower.set_xlabel("confidence")
    diagrams[0].set_ylabel("accuracy")
    histograms[0].set_ylabel("images")
    figure.legend(*diagrams[0].get_legend_handles_labels(), loc="outside lower center", ncols=3)
    return figure


def blocks(layers: Sequence[LayerRecord]) -> list[LayerRecord]:
    """Join layers that follow each other and belong to the same part of the network, such as `groups.1.conv`.

    A part is named by the first two words of the dotted names, in deep networks by the first; else all are one.
    """
    for words in (2, 1, 0):
        parts = [".".join((layer.name.split(".")[:-1] or [layer.name])[:words]) for layer in layers]
        groups = groupby(zip(parts, layers), itemgetter(0))
        found = [_block(part or "all layers", [layer for _, layer in members]) for part, members in groups]
        if len(found) <= _MAX_BLOCKS:
            break
    return found


def _block(name: str, layers: list[LayerRecord]) -> LayerRecord:
    kinds = Counter(layer.kind for layer in layers)
    kind = ", ".join(f"{count} {kind}" if count > 1 else kind for kind, count in kinds.items())
    costs = {key: sum(getattr(layer, key) for layer in layers) for key in ("parameters", "multiply_adds")}
    return LayerRecord(name=name, kind=kind, output_shape=layers[-1].output_shape, **costs)


def architecture(model: ModelRecord, subject: str) -> Figure:
    """Draw the parameters and the work of the network's blocks, from input to logits."""
    shown = blocks(model.layers)
    total = f"{model.parameters:,} parameters, {model.multiply_adds / 1e6:,.1f} million multiply-adds per image"
    figure = canvas(f"Network {label(model.name)}: {subject}\n{total}", 12, 1.4 + 0.45 * len(shown))
    names = [f"{label(block.name)} → {'x'.join(map(str, block.output_shape))}" for block in shown]
    rows = [f"{name}\n{label(block.kind, 60)}" for name, block in zip(names, shown)]
    for axes, key in zip(figure.subplots(1, 2, sharey=True), ("parameters", "multiply_adds")):
        values = [getattr(block, key) for block in shown]
        bars = axes.barh(range(len(shown)), values, height=0.6, color=BLUE)
        axes.bar_label(bars, fmt="{:,.0f}", padding=3, fontsize=8)
        axes.set(title=key.replace("_", "-"), xlim=(0, 1.3 * max(values, default=0) or 1), xticks=[])
        axes.set_yticks(range(len(shown)), rows, fontsize=8)
    axes.invert_yaxis()
    return figure


@dataclass(frozen=True)
class FigureSpec:
    """A figure that a run can have."""

    alt: str  # what a screen reader says
    draw: Callable[..., Figure]  # takes what `needs` names, and the subject of the title
    needs: tuple[str, ...]  # keys of `read_results`
    has_photos: bool = False  # made of dataset images, which a page must not invert in dark mode


# By file name without .png, in the order in which pages show them.
FIGURES: dict[str, FigureSpec] = {
    "training_history": FigureSpec(
        "Loss, accuracy and learning rate by epoch", training_history, ("history", "kept_epoch")
    ),
    "confusion_matrix": FigureSpec("Confusion matrix: true class by predicted class", confusion_matrix, ("metrics",)),
    "per_class_metrics": FigureSpec("Precision, recall and F1 by class", per_class_metrics, ("metrics",)),
    "precision_recall": FigureSpec("Precision-recall curve of each class", precision_recall, ("analysis", "metrics")),
    "misclassified": FigureSpec("Most confident mistakes", gallery.misclassified, ("predictions", "dataset"), True),
    "dataset_samples": FigureSpec("Training images of each class", gallery.dataset_samples, ("dataset",), True),
    "sample_predictions": FigureSpec("Predictions", gallery.sample_predictions, ("predictions", "dataset"), True),
    "architecture": FigureSpec("Blocks of the network and their costs", architecture, ("model",)),
    "calibration": FigureSpec("Accuracy by confidence, before and after calibration", calibration, ("metrics",)),
}


def visualize(run: Run, dataset: Dataset) -> list[Path]:
    """Draw the figures whose data the run has saved, as PNG files in its figures/, and return their paths.

    Opens the test split only if the run has been evaluated. Raises UserError if the dataset is not the run's, the run
    has saved nothing to draw, one of its files is damaged, or a figure cannot be written.
    """
    run.check_dataset(dataset.name)
    results = read_results(run, dataset)
    if not any(results[key] is not None for key in ("history", "metrics", "predictions")):
        raise UserError(f"{run.path.name} has nothing to draw: no epoch has finished, and it has not been evaluated")
    paths = {name: run.figures / f"{name}.png" for name in drawable(results)}
    with drawing():
        for name, path in paths.items():
            with atomic_write(path) as partial:
                run.figures.mkdir(exist_ok=True)
                draw(name, results).savefig(partial, format="png")
    return list(paths.values())


def read_results(run: Run, dataset: Dataset) -> dict[str, Any]:
    """Read what the run has saved, under the names that FIGURES needs; None where it has saved nothing.

    Raises UserError if a file is damaged, or not of the dataset's test split.
    """
    metrics, predictions = run.read_if_present("metrics.json"), None
    if (path := run.path / "predictions.csv").exists():
        predictions = evaluate.read_predictions(run)
        if predictions["true"].tolist() != [dataset.classes[number] for number in dataset.test.labels.tolist()]:
            raise damaged(path, f"it does not match the test split of {dataset.name}")
    if metrics and not metrics.can_be_of(dataset.test.sha256()):
        raise damaged(run.path / "metrics.json", f"{dataset.name} has other test images than it was measured on")
    return {
        "subject": f"{label(run.config.title, 40)} on {label(dataset.name)}",
        "dataset": dataset,
        "history": run.history() or None,
        "kept_epoch": metrics.epoch or 0 if metrics else 0,
        "model": run.record.model,
        "metrics": metrics,
        "analysis": analysis.read(run, metrics),
        "corruptions": run.read_if_present("corruptions.json"),
        "predictions": predictions,
    }


def drawable(results: dict[str, Any]) -> list[str]:
    """Return the names of the figures whose data is there."""
    return [name for name, spec in FIGURES.items() if all(results[need] is not None for need in spec.needs)]


def draw(name: str, results: dict[str, Any]) -> Figure:
    """Draw one figure; call it within `drawing`."""
    spec = FIGURES[name]
    return spec.draw(*(results[need] for need in spec.needs), results["subject"])
