"""Numbers to charts: curves, bars and matrices, and the look that all figures share."""

from collections.abc import Sequence
from typing import Any

import numpy as np
import seaborn
from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.colors import PowerNorm
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator, PercentFormatter

BLUE, ORANGE, GREEN, GREY = "#0072B2", "#D55E00", "#009E73", "#666666"  # Okabe and Ito 2008: safe when colour-blind
STYLE = [
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
PLAIN = "test split, without test-time augmentation"
DPI = 150
_PALE = "#bbbbbb"
_BIN = {"color": "#b8d6ea", "edgecolor": "white"}
_CALIBRATION = "expected_calibration_error", "negative_log_likelihood"
_NAMED = 3  # curves that stand out
_ANNOTATED = 20  # classes; the counts of more do not fit their cells


def canvas(title: str, width: float, height: float, layout: str = "constrained") -> Figure:
    """An empty figure, in inches, that belongs to no window and no backend of the user's."""
    figure = Figure(figsize=(width, height), dpi=DPI, layout=layout)
    FigureCanvasAgg(figure)
    figure.suptitle(title)
    return figure


def training_history(history: list[dict[str, Any]], subject: str) -> Figure:
    """Loss, accuracy and learning rate by epoch; the epoch whose weights were kept is marked."""
    figure = canvas(f"Training history: {subject}", 13, 4.2)
    epochs = [line["epoch"] for line in history]
    validated = history[0]["val_loss"] is not None
    best = max(history, key=lambda line: line["val_accuracy"])["epoch"] if validated else epochs[-1]
    small = [line["epoch"] for line in history if line["image_size"] < history[-1]["image_size"]]
    images = [line.get("images", 0) for line in history]
    hard = [epoch for epoch, count in zip(epochs, images) if count < images[0]]
    loss, accuracy, rate = figure.subplots(1, 3)
    for axes, key in ((loss, "loss"), (accuracy, "accuracy")):
        _plot(axes, epochs, [line[f"train_{key}"] for line in history], "o-", BLUE, "training (augmented)")
        if validated:
            _plot(axes, epochs, [line[f"val_{key}"] for line in history], "s--", ORANGE, "validation")
    _plot(rate, epochs, [line["lr"] for line in history], "o-", GREEN, None)
    for axes in (loss, accuracy, rate):
        if small:  # validation is on images of the full size, so until then it lags
            side = history[0]["image_size"]
            _shade(axes, small, 0.12, f"trained at {side}x{side}")
        if hard:
            _shade(axes, hard, 0.3, f"trained on the hardest {images[-1] / images[0]:.0%}")
    for axes, title in ((loss, "cross-entropy"), (accuracy, "accuracy"), (rate, "learning rate at the epoch's start")):
        axes.axvline(best, color=GREY, linestyle=":", label=f"{'best' if validated else 'last'} epoch {best}, kept")
        axes.set(title=title, xlabel="epoch", xlim=(epochs[0] - 0.5, epochs[-1] + 0.5))
        axes.xaxis.set_major_locator(MaxNLocator(integer=True, min_n_ticks=1))
        axes.grid(alpha=0.3)
        axes.legend(fontsize="small", frameon=True, framealpha=0.9, edgecolor="none")
    rate.set_ylim(bottom=0)
    accuracy.yaxis.set_major_formatter(PercentFormatter(1))
    return figure


def _shade(axes: Axes, epochs: Sequence[int], alpha: float, label: str) -> None:
    axes.axvspan(epochs[0] - 0.5, epochs[-1] + 0.5, color=GREY, alpha=alpha, linewidth=0, label=label)


def _plot(axes: Axes, epochs: list[int], values: list[float], style: str, color: str, label: str | None) -> None:
    axes.plot(epochs, values, style, color=color, label=label, markersize=4 if len(epochs) <= 50 else 0)


def confusion_matrix(metrics: dict[str, Any], subject: str) -> Figure:
    """Counts as numbers where they fit, and the share of the true class as colour."""
    counts, classes = np.array(metrics["confusion_matrix"]), list(metrics["per_class"])
    side = max(6.5, 0.13 * len(classes))
    cell = 72 * side / len(classes)  # points
    font = min(10, 0.7 * cell)
    figure = canvas(f"Confusion matrix: {subject}, {PLAIN}", side + 2.5, side + 1.5)
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


def per_class_metrics(metrics: dict[str, Any], subject: str) -> Figure:
    """Precision, recall and F1, a class a row, the highest F1 on top. Dots, as bars would have to start at zero."""
    classes = sorted(metrics["per_class"], key=lambda name: -metrics["per_class"][name]["f1"])
    scores = {key: [metrics["per_class"][name][key] for name in classes] for key in ("precision", "recall", "f1")}
    row_height, font = (0.35, 10) if len(classes) <= _ANNOTATED else (0.17, 7)
    title = f"Precision, recall and F1 by class: {subject},\n{PLAIN}"
    figure = canvas(title, 8.5, 2 + row_height * max(5, len(classes)))
    axes, rows = figure.add_subplot(), np.arange(len(classes))
    lowest, highest = np.min(list(scores.values()), axis=0), np.max(list(scores.values()), axis=0)
    axes.hlines(rows, lowest, highest, color="#cccccc", linewidth=2, zorder=1)
    for (key, values), marker, color in zip(scores.items(), "><o", (BLUE, ORANGE, GREEN)):
        label = "F1" if key == "f1" else key
        axes.scatter(values, rows, marker=marker, color=color, label=label, s=3.5 * font, zorder=2, clip_on=False)
    macro = metrics["macro_average"]["f1"]
    axes.axvline(macro, color=GREY, linestyle=":", label=f"mean F1 {macro:.1%}")
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


def calibration(calibration: dict[str, Any], subject: str) -> Figure:
    """Accuracy against confidence, before and after the temperature, over the number of images in each bin."""
    figure = canvas(f"Calibration: {subject}, {PLAIN}", 12, 6.8)
    reliability, counts = figure.subplots(2, 2, sharex=True, sharey="row", height_ratios=(3, 1))
    fitted_on = calibration["fitted_on"]
    fit = f"fitted on {fitted_on:,} validation images" if fitted_on else "as no image was held out to fit it"
    heads = "before", f"after temperature {calibration['temperature']:.3f}, {fit}"
    for key, head, upper, lower in zip(("before", "after"), heads, reliability, counts):
        _draw_reliability(upper, calibration[key]["bins"])
        _draw_counts(lower, calibration[key]["bins"])
        error, likelihood = (calibration[key][name] for name in _CALIBRATION)
        upper.set_title(f"{head}\nexpected calibration error {error:.2%}, negative log-likelihood {likelihood:.4f}")
    reliability[0].set_ylabel("accuracy")
    figure.legend(*reliability[0].get_legend_handles_labels(), loc="outside lower center", ncols=3)
    counts[0].set_ylabel("images")
    return figure


def _draw_reliability(axes: Axes, bins: list[dict[str, Any]]) -> None:
    filled = [bin for bin in bins if bin["count"]]
    accuracies = [bin["accuracy"] for bin in filled]
    axes.bar(
        [bin["low"] for bin in filled], accuracies, 1 / len(bins), align="edge", **_BIN, label="accuracy of the bin"
    )
    confidences = [bin["confidence"] for bin in filled]
    axes.plot(confidences, accuracies, "o", color=BLUE, label="at the bin's mean confidence", clip_on=False)
    axes.plot([0, 1], [0, 1], "--", color=GREY, label="perfectly calibrated")
    axes.set(xlim=(0, 1), ylim=(0, 1.02))
    axes.yaxis.set_major_formatter(PercentFormatter(1))


def _draw_counts(axes: Axes, bins: list[dict[str, Any]]) -> None:
    counts = [bin["count"] for bin in bins]
    bars = axes.bar([bin["low"] for bin in bins], counts, 1 / len(bins), align="edge", **_BIN)
    axes.bar_label(bars, [f"{count:,}" for count in counts], fontsize=7, padding=1)
    axes.margins(y=0.2)
    axes.set(xlabel="confidence")
    axes.xaxis.set_major_formatter(PercentFormatter(1))


def precision_recall(curves: dict[str, dict[str, list[float]]], metrics: dict[str, Any], subject: str) -> Figure:
    """A curve for each class; those of the lowest average precision stand out, as all would need as many colours."""
    figure = canvas(f"Precision against recall by class: {subject},\n{PLAIN}", 8.5, 6)
    axes, scores = figure.add_subplot(), metrics["average_precision"]
    ranked = sorted(curves, key=lambda name: scores[name])
    lowest, others = ranked[:_NAMED], ranked[_NAMED:]
    for name, color, style in zip(lowest, (ORANGE, BLUE, GREEN), ("-", "--", ":")):
        label = f"{name}, average precision {scores[name]:.1%}"
        axes.plot(curves[name]["recall"], curves[name]["precision"], style, color=color, linewidth=2, label=label)
    for name in others:
        label = f"the other {len(others)}" if name == others[0] else None
        axes.plot(curves[name]["recall"], curves[name]["precision"], color=_PALE, linewidth=1, zorder=1, label=label)
    axes.set(xlabel="recall", ylabel="precision", xlim=(0, 1.005), ylim=(0, 1.02))
    figure.legend(loc="outside lower center", ncols=2)
    _percent(axes)
    return figure


def risk_coverage(curve: dict[str, list[float]], metrics: dict[str, Any], subject: str) -> Figure:
    """The error rate among the surest images, against their share of all."""
    selective = metrics["selective"]
    share = selective["coverage_at_99_accuracy"]
    figure = canvas(f"Error rate if only the surest are answered: {subject},\n{PLAIN}", 8.5, 5.2)
    axes = figure.add_subplot()
    area = f"mean {selective['area_under_risk_coverage']:.2%} (area under the curve)"
    axes.plot(curve["coverage"], curve["risk"], color=BLUE, linewidth=2, label=area)
    axes.fill_between(curve["coverage"], curve["risk"], color=BLUE, alpha=0.12, linewidth=0)
    axes.axhline(0.01, color=GREY, linestyle=":", linewidth=1)
    if share:
        axes.axvline(share, color=ORANGE, linestyle="--", label=f"of the surest {share:.1%}, 99% are right")
    axes.set(xlabel="share of the images that is answered, by confidence", ylabel="error rate among them", xlim=(0, 1))
    axes.set_ylim(0, 1.1 * max(curve["risk"]) or 0.01)
    figure.legend(loc="outside lower center", ncols=2)
    _percent(axes)
    return figure


def corruptions(content: dict[str, Any], subject: str) -> Figure:
    """Accuracy and calibration error by kind of corruption, the mildest on top, and severity."""
    table = content["corruptions"]
    kinds = sorted(table, key=lambda kind: -np.mean([row["accuracy"] for row in table[kind]]))
    title = f"Under corruption: {subject}, {content['n']:,} images of the test split, without test-time augmentation"
    figure = canvas(title, 12, 1.8 + 0.36 * len(kinds))
    heads = {"accuracy": ("accuracy", "Blues"), "expected_calibration_error": ("calibration error", "Oranges")}
    for axes, (key, (head, colors)) in zip(figure.subplots(1, 2, sharey=True), heads.items()):
        values = 100 * np.array([[row[key] for row in table[kind]] for kind in kinds])
        seaborn.heatmap(
            values,
            ax=axes,
            vmin=0,
            vmax=100 if key == "accuracy" else max(10, values.max()),
            cmap=colors,
            linewidths=0.5,
            annot=True,
            fmt=".1f",
            annot_kws={"size": 9},
            xticklabels=range(1, values.shape[1] + 1),
            yticklabels=kinds,
            cbar=False,
        )
        axes.set_title(
            f"{head} in percent; {content['clean'][key]:.1%} unharmed, {content['mean'][key]:.1%} in the mean"
        )
        axes.set(xlabel="severity")
        axes.tick_params(length=0)
        axes.tick_params(axis="y", rotation=0)
    return figure


def _percent(axes: Axes) -> None:
    axes.xaxis.set_major_formatter(PercentFormatter(1))
    axes.yaxis.set_major_formatter(PercentFormatter(1))
    axes.grid(alpha=0.3)
