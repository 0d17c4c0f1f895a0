"""A network's layers to a figure of its blocks and what they cost."""

import re
from itertools import groupby
from typing import Any

from matplotlib.axes import Axes
from matplotlib.figure import Figure

from cifar.charts import BLUE, GREY, canvas

_STEPS = 95  # characters that fit into a block


def _blocks(layers: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """The layers joined into blocks by their dotted names: what runs, the shape that leaves it, what it costs.

    `stages.0.1.conv1.0` belongs to stages.0.1, `blocks.0.1.2` to blocks.0, `stem.2` to stem, `head` to itself.
    """

    def block_name(layer: dict[str, Any]) -> str:
        return re.match(r"[^.]+(\.\d+)*(?=\.\D)|[^.]+(\.\d+)?(?=\.)|.*", layer["name"]).group()

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


def architecture(network: dict[str, Any], subject: str) -> Figure:
    """The blocks from input to logits, each with its parameters and its work for one image."""
    blocks = _blocks(network["layers"])
    total = (
        f"{network['parameters']:,} parameters, {network['multiply_adds'] / 1e6:,.1f} million multiply-adds an image"
    )
    figure = canvas(f"Network {network['name']}: {subject}\n{total}", 12, 1.4 + 0.62 * len(blocks))
    flow, *costs = figure.subplots(1, 3, sharey=True, width_ratios=(4, 1, 1))
    _draw_flow(flow, blocks)
    for axes, key in zip(costs, ("parameters", "multiply_adds")):
        values = [block[key] for block in blocks]
        bars = axes.barh(range(len(blocks)), values, height=0.4, color=BLUE)
        axes.bar_label(bars, [f"{value:,}" for value in values], padding=3, fontsize=8)
        axes.set(title=key.replace("_", "-"), xlim=(0, 1.8 * max(values, default=0) or 1))
    for axes in (flow, *costs):
        axes.set(xticks=[], yticks=[])
        axes.spines[:].set_visible(False)
    return figure


def _draw_flow(axes: Axes, blocks: list[dict[str, Any]]) -> None:
    """A box for each block, downwards, with an arrow to the next."""
    axes.barh(range(len(blocks)), 1, height=0.7, color="#e8f1f8", edgecolor=BLUE)
    for row, block in enumerate(blocks):
        axes.text(0.015, row - 0.15, block["name"], weight="bold", va="center", fontsize=9)
        axes.text(0.985, row - 0.15, block["shape"], weight="bold", va="center", ha="right", fontsize=9)
        axes.text(0.015, row + 0.15, block["steps"], va="center", fontsize=8)
        if row:
            arrow = {"arrowstyle": "-|>", "color": GREY, "shrinkA": 0, "shrinkB": 0}
            axes.annotate("", (0.5, row - 0.35), (0.5, row - 0.65), arrowprops=arrow)
    axes.set(xlim=(0, 1), ylim=(len(blocks) - 0.5, -0.5), title="block, its layers, and the shape that leaves it")
