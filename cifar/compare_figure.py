"""A comparison as one figure: accuracies, curves, and differences by class."""

from collections.abc import Sequence
from itertools import cycle
from typing import Any

import matplotlib.style
import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import FuncFormatter, MaxNLocator, PercentFormatter

from cifar import charts

# Okabe and Ito 2008: safe when colour-blind. Runs beyond the seventh repeat them with another line.
_COLORS = charts.BLUE, charts.ORANGE, charts.GREEN, "#CC79A7", "#56B4E9", "#E69F00", charts.GREY
_LINES = "-", "--", ":", "-."
_TALLEST = 16  # inches
_CURVES = {  # title, label of the x axis, and what is over what
    "loss": ("training loss", "epoch", "epoch", "train_loss"),
    "epochs": ("validation accuracy", "epoch", "epoch", "val_accuracy"),
    "seconds": ("validation accuracy", "seconds of training", "seconds", "val_accuracy"),
}


def draw(comparison: dict[str, Any]) -> Figure:
    """The figure of what `compare.compare` made."""
    runs, classes = comparison["runs"], comparison["classes_shown"]
    with matplotlib.style.context(charts.STYLE):
        height = np.clip(2.5 + 0.16 * len(classes) * (len(runs) - 1), 7.5, _TALLEST) + 0.25 * len(runs)
        figure = Figure(figsize=(14, height), dpi=charts.DPI, layout="constrained")
        axes = figure.subplot_mosaic(_panels(runs, classes))
        _draw_accuracies(axes["accuracy"], runs)
        for panel in ("loss", "epochs", "seconds"):
            if panel in axes:
                _draw_curves(axes[panel], runs, *_CURVES[panel])
        if classes:
            _draw_classes(axes["classes"], classes, runs, of=len(comparison["classes"]))
        handles = [
            axes["loss"].plot([], [], line, color=color, label=f"{run['letter']}  {run['run']}: {run['subject']}")[0]
            for run, (color, line) in zip(runs, _looks(runs))
        ]
        figure.legend(handles=handles, loc="outside lower center")
    return figure


def _panels(runs: Sequence[dict[str, Any]], classes: Sequence[Any]) -> list[list[str]]:
    """Where things are drawn; what no run has, has no place."""
    validated = any(None not in run["curves"].get("val_accuracy", [None]) for run in runs)
    rows = [["accuracy", "loss"], ["epochs", "seconds"]] if validated else [["accuracy"], ["loss"]]
    return [[*row, "classes"] for row in rows] if classes else rows


def _looks(runs: Sequence[Any]) -> list[tuple[str, str]]:
    """The colour and the line of each run."""
    return [(color, _LINES[place // len(_COLORS) % 4]) for place, (_, color) in enumerate(zip(runs, cycle(_COLORS)))]


def _draw_accuracies(axes: Axes, runs: Sequence[dict[str, Any]]) -> None:
    """Both accuracies of each run with their intervals, a run a row."""
    for shift, marker, key, interval, label in (
        (-0.12, "o", "accuracy", "interval_95", "plain"),
        (0.12, "D", "accuracy_tta", "interval_95_tta", "with views"),
    ):
        for row, (run, (color, _)) in enumerate(zip(runs, _looks(runs))):
            axes.plot(run[interval], [row + shift] * 2, color=color)
            axes.plot(run[key], row + shift, marker, color=color, markersize=5)
        axes.plot([], [], marker, color=charts.GREY, label=label)
    axes.set(title="accuracy on the test split, 95% interval", ylim=(len(runs) - 0.5, -1))  # room for the legend
    axes.set_yticks(range(len(runs)), [run["letter"] for run in runs])
    axes.xaxis.set_major_locator(MaxNLocator(6, steps=[1, 2, 2.5, 5, 10]))
    axes.xaxis.set_major_formatter(FuncFormatter(lambda share, _: f"{100 * share:.3g}%"))
    axes.grid(axis="x", alpha=0.3)
    axes.legend(fontsize="small", loc="upper center", ncols=2, borderaxespad=0)


def _draw_curves(axes: Axes, runs: Sequence[dict[str, Any]], title: str, label: str, x: str, y: str) -> None:
    for run, (color, line) in zip(runs, _looks(runs)):
        if run["curves"] and None not in run["curves"][y]:
            epochs = len(run["curves"][y])
            marker = "o" if epochs == 1 else None  # of one epoch there is no line
            axes.plot(run["curves"][x], run["curves"][y], line, color=color, marker=marker)
    if not axes.lines:
        axes.text(
            0.5, 0.5, "nothing was recorded", ha="center", va="center", transform=axes.transAxes, color=charts.GREY
        )
    axes.set(title=title, xlabel=label)
    axes.xaxis.set_major_locator(MaxNLocator(integer=True, min_n_ticks=1))
    if y == "val_accuracy":
        axes.yaxis.set_major_formatter(PercentFormatter(1))
    axes.grid(alpha=0.3)


def _draw_classes(axes: Axes, shown: Sequence[dict[str, Any]], runs: Sequence[dict[str, Any]], of: int) -> None:
    """How far each class's recall is from the first run's, with its interval where the runs are paired."""
    others = len(runs) - 1
    for place, (color, _) in enumerate(_looks(runs)[1:]):
        for row, one in enumerate(shown):
            height = row + 0.7 * ((place + 0.5) / others - 0.5)
            axes.plot(one["difference"][place], height, "o", color=color, markersize=4)
            if one["interval_95"][place]:
                axes.plot(one["interval_95"][place], [height] * 2, color=color, linewidth=1)
    axes.axvline(0, color=charts.GREY, linewidth=1)
    which = f"\nthe {len(shown)} of {of} classes that differ most" if len(shown) < of else ""
    axes.set(title=f"recall by class, as points more than A{which}", ylim=(len(shown) - 0.4, -0.6))
    axes.set_yticks(range(len(shown)), [one["class"] for one in shown])
    axes.xaxis.set_major_locator(MaxNLocator(6, steps=[1, 2, 2.5, 5, 10]))
    axes.xaxis.set_major_formatter(FuncFormatter(lambda share, _: f"{100 * share:+.3g}" if share else "0"))
    axes.grid(axis="x", alpha=0.3)
