"""The figures of a run: FIGURES lists them all; `visualize` draws those whose data the run has saved.

To add a figure, write a function that draws it and add one entry to FIGURES. seaborn is imported inside the functions
that use it: it takes a second.
"""

import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import groupby
from pathlib import Path
from typing import Any

import numpy as np

from cifar import analysis, evaluate, gallery
from cifar.datasets import Dataset
from cifar.errors import UserError
from cifar.gallery import PLAIN
from cifar.records import Analysis, Corruptions, EpochRecord, LayerRecord, Metrics, ModelRecord
from cifar.runs import Run, atomic_write, damaged
from cifar.style import BLUE, GREEN, GREY, ORANGE, Figure, MaxNLocator, PowerNorm, canvas, drawing, label, label_percent

_FEW_CLASSES = 20  # have room for counts in a confusion matrix, and for large letters
_MAX_CLASSES = 100  # of a figure; beyond them those with the lowest F1 are shown
_MAX_BLOCKS = 50  # of the architecture figure
_MAX_STEPS = 95  # characters that fit into a block


def training_history(history: list[EpochRecord], subject: str) -> Figure:
    """Plot loss, accuracy and learning rate by epoch, and mark the epoch whose weights were kept.

    Shades the epochs on small images, where validation at full size lags, and those on the hardest images.
    """
    figure = canvas(f"Training history: {subject}", 13, 4.2)
    epochs, first, last = [line.epoch for line in history], history[0], history[-1]
    is_validated = first.val_loss is not None
    best = max(history, key=lambda line: line.val_accuracy).epoch if is_validated else last.epoch
    small = [line.epoch for line in history if line.image_size < last.image_size]
    hard = [line.epoch for line in history if line.images and first.images and line.images < first.images]
    training, validation = ("o-", BLUE, "training (augmented)"), ("s--", ORANGE, "validation")
    panels = {
        "cross-entropy": {"train_loss": training, "val_loss": validation},
        "accuracy": {"train_accuracy": training, "val_accuracy": validation},
        "learning rate": {"lr": ("o-", GREEN, None)},
    }
    for axes, (title, lines) in zip(figure.subplots(1, 3), panels.items()):
        for key, (style, color, name) in lines.items():
            if is_validated or name != "validation":
                size = 4 if len(history) <= 50 else 0
                axes.plot(epochs, [getattr(line, key) for line in history], style, color=color, label=name, ms=size)
        if small:
            name = f"trained at {first.image_size}x{first.image_size}"
            axes.axvspan(small[0] - 0.5, small[-1] + 0.5, color=GREY, alpha=0.12, linewidth=0, label=name)
        if hard:
            name = f"trained on the hardest {last.images / first.images:.0%}"
            axes.axvspan(hard[0] - 0.5, hard[-1] + 0.5, color=GREY, alpha=0.3, linewidth=0, label=name)
        axes.axvline(best, color=GREY, linestyle=":", label=f"{'best' if is_validated else 'last'} epoch {best} (kept)")
        axes.set(title=title, xlabel="epoch", xlim=(first.epoch - 0.5, last.epoch + 0.5))
        axes.xaxis.set_major_locator(MaxNLocator(integer=True, min_n_ticks=1))
        axes.grid(alpha=0.3)
        axes.legend(fontsize="small", frameon=True, framealpha=0.9, edgecolor="none")
    label_percent(figure.axes[1], "y")
    axes.set_ylim(bottom=0)
    return figure


def confusion_matrix(metrics: Metrics, subject: str) -> Figure:
    """Draw counts as numbers, where they fit, and fractions of the true class as color."""
    import seaborn

    classes, which = _by_f1(metrics)
    shown = [number for number, name in enumerate(metrics.per_class) if name in classes]
    names = [label(name) for name in metrics.per_class if name in classes]
    counts = np.array(metrics.confusion_matrix)
    percentages = 100 * counts / counts.sum(1, keepdims=True).clip(1)
    size, has_counts = max(6.5, 0.13 * len(names)), len(names) <= _FEW_CLASSES
    cell = 72 * size / len(names)  # points
    font = min(10, 0.7 * cell)
    figure = canvas(f"Confusion matrix{which}: {subject},\n{PLAIN}", size + 2.5, size + 1.5)
    axes = seaborn.heatmap(
        percentages[np.ix_(shown, shown)],
        # With a square-root scale, a confusion of 1% differs from none, beside a diagonal of 95%.
        norm=PowerNorm(0.5, vmin=0, vmax=100),
        cmap="Blues",
        cbar_kws={"label": "% of the true class (square-root scale)", "ticks": [0, 1, 5, 10, 25, 50, 75, 100]},
        annot=counts if has_counts else None,
        annot_kws={"size": min(10, 0.3 * cell)},
        fmt="d",
        linewidths=0.5 if has_counts else 0,
        xticklabels=names,
        yticklabels=names,
        ax=figure.add_subplot(),
    )
    axes.set(xlabel="predicted class", ylabel="true class")
    axes.tick_params(axis="x", labelsize=font, rotation=0 if max(map(len, names)) * 0.7 * font < cell else 90)
    axes.tick_params(axis="y", labelsize=font, rotation=0)
    return figure


def _by_f1(metrics: Metrics) -> tuple[list[str], str]:
    """Return the classes, the highest F1 first, and words for those that are left out because they are too many."""
    classes = sorted(metrics.per_class, key=lambda name: -metrics.per_class[name].f1)
    if len(classes) <= _MAX_CLASSES:
        return classes, ""
    return classes[-_MAX_CLASSES:], f" (the {_MAX_CLASSES} of {len(classes):,} classes with the lowest F1)"


def per_class_metrics(metrics: Metrics, subject: str) -> Figure:
    """Plot precision, recall and F1 of each class, the highest F1 on top; dots, as bars would have to start at 0."""
    classes, which = _by_f1(metrics)
    scores = {key: [getattr(metrics.per_class[name], key) for name in classes] for key in ("precision", "recall", "f1")}
    height, font = (0.35, 10) if len(classes) <= _FEW_CLASSES else (0.17, 7)
    title = f"Precision, recall and F1 by class{which}: {subject},\n{PLAIN}"
    figure = canvas(title, 8.5, 2 + height * max(5, len(classes)))
    axes, rows = figure.add_subplot(), range(len(classes))
    lowest, highest = np.min(list(scores.values()), axis=0), np.max(list(scores.values()), axis=0)
    axes.hlines(rows, lowest, highest, color="#cccccc", linewidth=2, zorder=1)
    for (key, values), marker, color in zip(scores.items(), "><o", (BLUE, ORANGE, GREEN)):
        name = "F1" if key == "f1" else key
        axes.scatter(values, rows, marker=marker, color=color, label=name, s=3.5 * font, zorder=2, clip_on=False)
    axes.axvline(metrics.macro_average.f1, color=GREY, linestyle=":", label=f"macro F1 {metrics.macro_average.f1:.1%}")
    start = max(0, np.floor(20 * lowest.min() - 0.2) / 20)
    axes.set(xlim=(start, 1.01 - 0.01 * start), ylim=(len(classes) - 0.3, -0.7))
    axes.set_xlabel(f"score (the axis starts at {start:.0%})")
    label_percent(axes, "x")
    axes.set_yticks(rows, [label(name) for name in classes], fontsize=font)
    right = axes.secondary_yaxis("right")
    right.set_yticks(rows, [f"{value:.1%}" for value in scores["f1"]], fontsize=font)
    right.set_ylabel("F1")
    axes.grid(axis="x", alpha=0.3)
    figure.legend(loc="outside lower center", ncols=4)
    return figure


def precision_recall(analysis: Analysis, metrics: Metrics, subject: str) -> Figure:
    """Plot a curve for each class; only the three with the lowest average precision have a color and a name."""
    figure = canvas(f"Precision-recall curves by class: {subject},\n{PLAIN}", 8.5, 6)
    axes, scores = figure.add_subplot(), metrics.average_precision
    ranked = sorted(analysis.precision_recall, key=lambda name: scores[name])
    looks = [(ORANGE, "-", 2), (BLUE, "--", 2), (GREEN, ":", 2), *[("#bbbbbb", "-", 1)] * len(ranked)]
    for rank, (name, (color, style, width)) in enumerate(zip(ranked, looks)):
        curve, text = analysis.precision_recall[name], f"{label(name)}, average precision {scores[name]:.1%}"
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


def risk_coverage(analysis: Analysis, metrics: Metrics, subject: str) -> Figure:
    """Plot the error rate among the most confident images against the fraction of images that they make up."""
    selective, curve = metrics.selective, analysis.risk_coverage
    figure = canvas(f"Risk-coverage curve: {subject},\n{PLAIN}", 8.5, 5.2)
    axes, coverage = figure.add_subplot(), selective.coverage_at_99_accuracy
    area = f"area under the curve {selective.area_under_risk_coverage:.2%}"
    axes.plot(curve.coverage, curve.risk, color=BLUE, linewidth=2, label=area)
    axes.fill_between(curve.coverage, curve.risk, color=BLUE, alpha=0.12, linewidth=0)
    axes.axhline(0.01, color=GREY, linestyle=":", linewidth=1)
    if coverage:
        axes.axvline(coverage, color=ORANGE, linestyle="--", label=f"99% accuracy on the most confident {coverage:.1%}")
    axes.set(xlabel="coverage: fraction of images answered, most confident first", ylabel="risk: error rate among them")
    axes.set(xlim=(0, 1), ylim=(0, max(1.1 * max(curve.risk), 0.02)))
    figure.legend(loc="outside lower center", ncols=2)
    label_percent(axes, "xy")
    axes.grid(alpha=0.3)
    return figure


def corruptions(corruptions: Corruptions, subject: str) -> Figure:
    """Show accuracy and calibration error by corruption and severity, the mildest corruption on top."""
    import seaborn

    title = f"Robustness to corruptions: {subject},\n{corruptions.n:,} images of the {PLAIN}"
    figure = canvas(title, 12, 2.1 + 0.36 * len(corruptions.corruptions))
    panels = ("accuracy", "accuracy", "Blues", 100), ("expected_calibration_error", "calibration error", "Oranges", 10)
    style = {"annot": True, "fmt": ".1f", "annot_kws": {"size": 9}, "linewidths": 0.5, "cbar": False, "vmin": 0}
    for axes, (key, name, colors, most) in zip(figure.subplots(1, 2, sharey=True), panels):
        values = 100 * analysis.tabulate(corruptions, key)
        seaborn.heatmap(values, vmax=max(most, values.max(axis=None)), cmap=colors, ax=axes, **style)
        clean, mean = getattr(corruptions.clean, key), getattr(corruptions.mean, key)
        axes.set(title=f"{name} in percent: {clean:.1%} on clean images, mean {mean:.1%}", xlabel="severity")
        axes.tick_params(length=0, labelrotation=0)
    return figure


def blocks(layers: Sequence[LayerRecord]) -> list[LayerRecord]:
    """Join the layers into blocks by their dotted names, in very deep networks by the first part of the name alone.

    `stages.0.1.conv1.0` belongs to stages.0.1, `blocks.0.1.2` to blocks.0, `stem.2` to stem, `head` to itself.
    """
    for pattern in (r"[^.]+(\.\d+)*(?=\.\D)|[^.]+(\.\d+)?(?=\.)|.*", r"[^.]*"):
        groups = groupby(layers, lambda layer, pattern=pattern: re.match(pattern, layer.name).group())
        found = [_block(name, list(members)) for name, members in groups]
        if len(found) <= _MAX_BLOCKS:
            break
    return found


def _block(name: str, layers: list[LayerRecord]) -> LayerRecord:
    paths = [[layer.kind for layer in layers if (".shortcut" in layer.name) == is_last] for is_last in (False, True)]
    steps = "  +  shortcut ".join(" → ".join(path) for path in paths if path)
    if len(steps) > _MAX_STEPS:
        steps = f"{steps[:_MAX_STEPS].rpartition(' → ')[0]} → …, {len(layers)} layers"
    costs = {key: sum(getattr(layer, key) for layer in layers) for key in ("parameters", "multiply_adds")}
    return LayerRecord(name=name, kind=steps, output_shape=layers[-1].output_shape, **costs)


def architecture(model: ModelRecord, subject: str) -> Figure:
    """Draw the network's blocks from input to logits, with the parameters and the work of each."""
    shown = blocks(model.layers)
    rows = range(len(shown))
    total = f"{model.parameters:,} parameters, {model.multiply_adds / 1e6:,.1f} million multiply-adds per image"
    figure = canvas(f"Network {label(model.name)}: {subject}\n{total}", 12, 1.4 + 0.62 * len(shown))
    flow, *costs = figure.subplots(1, 3, sharey=True, width_ratios=(4, 1, 1))
    flow.barh(rows, 1, height=0.7, color="#e8f1f8", edgecolor=BLUE)
    arrow = {"arrowstyle": "-|>", "color": GREY, "shrinkA": 0, "shrinkB": 0}
    for row, block in enumerate(shown):
        shape = "x".join(map(str, block.output_shape))
        flow.text(0.015, row - 0.15, label(block.name, 50), weight="bold", va="center", fontsize=9)
        flow.text(0.985, row - 0.15, shape, weight="bold", va="center", ha="right", fontsize=9)
        flow.text(0.015, row + 0.15, block.kind, va="center", fontsize=8)
        if row:
            flow.annotate("", (0.5, row - 0.35), (0.5, row - 0.65), arrowprops=arrow)
    flow.set(xlim=(0, 1), ylim=(len(shown) - 0.5, -0.5), title="block, its layers, and its output shape")
    for axes, key in zip(costs, ("parameters", "multiply_adds")):
        values = [getattr(block, key) for block in shown]
        axes.bar_label(axes.barh(rows, values, height=0.4, color=BLUE), fmt="{:,.0f}", padding=3, fontsize=8)
        axes.set(title=key.replace("_", "-"), xlim=(0, 1.8 * max(values, default=0) or 1))
    for axes in figure.axes:
        axes.set(xticks=[], yticks=[])
        axes.spines[:].set_visible(False)
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
    "training_history": FigureSpec("Loss, accuracy and learning rate by epoch", training_history, ("history",)),
    "confusion_matrix": FigureSpec("Confusion matrix: true class by predicted class", confusion_matrix, ("metrics",)),
    "per_class_metrics": FigureSpec("Precision, recall and F1 by class", per_class_metrics, ("metrics",)),
    "precision_recall": FigureSpec("Precision-recall curve of each class", precision_recall, ("analysis", "metrics")),
    "misclassified": FigureSpec("Most confident mistakes", gallery.misclassified, ("predictions", "dataset"), True),
    "dataset_samples": FigureSpec("Training images of each class", gallery.dataset_samples, ("dataset",), True),
    "sample_predictions": FigureSpec("Predictions", gallery.sample_predictions, ("predictions", "dataset"), True),
    "architecture": FigureSpec("Blocks of the network and their costs", architecture, ("model",)),
    "calibration": FigureSpec("Accuracy by confidence, before and after calibration", calibration, ("metrics",)),
    "risk_coverage": FigureSpec("Error rate by fraction of images answered", risk_coverage, ("analysis", "metrics")),
    "corruptions": FigureSpec("Accuracy and calibration error by corruption", corruptions, ("corruptions",)),
}


def visualize(run: Run, dataset: Dataset) -> list[Path]:
    """Draw the figures whose data the run has saved, as PNG files in its figures/, and return their paths.

    Opens the test split only if the run has predictions. Raises UserError if the dataset is not the run's, the run
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

    Raises UserError if a file is damaged, or the predictions are not of the dataset's test split.
    """
    metrics, predictions = run.read_if_present("metrics.json"), None
    if (path := run.path / "predictions.csv").exists():
        predictions = evaluate.read_predictions(run)
        if predictions["true"].tolist() != [dataset.classes[number] for number in dataset.test.labels.tolist()]:
            raise damaged(path, f"it does not match the test split of {dataset.name}")
    return {
        "subject": f"{run.config.title} on {label(dataset.name)}",
        "dataset": dataset,
        "history": run.history() or None,
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
