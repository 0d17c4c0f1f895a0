# ruff: noqa: E402 (the environment is changed before matplotlib is imported)
"""The look of all figures. Import matplotlib from here: an MPLBACKEND that is not installed makes its import fail."""

import contextlib
import logging
import os
import warnings
from collections.abc import Iterator
from typing import Any, Literal

_backend = os.environ.pop("MPLBACKEND", None)  # may not be installed here, as in a notebook's `!python`
logging.getLogger("matplotlib").setLevel(logging.ERROR)  # it warns of a home directory that is read-only
import matplotlib.style

if _backend is not None:
    os.environ["MPLBACKEND"] = _backend
from matplotlib import font_manager
from matplotlib.axes import Axes as Axes
from matplotlib.colors import PowerNorm as PowerNorm
from matplotlib.figure import Figure as Figure
from matplotlib.ticker import MaxNLocator as MaxNLocator
from matplotlib.ticker import PercentFormatter
from rich.cells import cell_len

from cifar import console

_Layout = Literal["constrained", "compressed"]
BLUE, ORANGE, GREEN, GREY = "#0072B2", "#D55E00", "#009E73", "#666666"  # Okabe and Ito 2008: safe if color-blind
_STYLE = {
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.titlesize": "medium",
    "figure.dpi": 150,
    "figure.titlesize": "large",
    "figure.constrained_layout.h_pad": 0.1,
    "figure.constrained_layout.w_pad": 0.1,
    "legend.frameon": False,
    "text.parse_math": False,  # a class may be called "$"
}
# For class names in scripts that matplotlib's own font lacks: what Linux, Windows and macOS bring along.
_MORE_FONTS = (
    *("Noto Sans CJK SC", "Noto Sans CJK JP", "WenQuanYi Zen Hei", "Noto Sans Devanagari", "Noto Sans Thai"),
    *("Microsoft YaHei", "Malgun Gothic", "Nirmala UI", "Leelawadee UI", "Arial Unicode MS", "Hiragino Sans GB"),
)


def canvas(title: str, width: float, height: float, layout: _Layout = "constrained") -> Figure:
    """Return an empty figure, in inches, independent of pyplot and of the user's backend."""
    figure = Figure(figsize=(width, height), layout=layout)
    figure.suptitle(title)
    return figure


def label(name: str, most: int = 30) -> str:
    """Return a name as a figure shows it: control characters escaped, and its middle left out if it is too long.

    most: characters, of which those of East Asian scripts and emoji count double.
    """
    name = console.printable(name)
    if cell_len(name) > most:
        kept = most * len(name) // cell_len(name) - 1
        name = f"{name[: kept // 2]}…{name[len(name) - (kept + 1) // 2 :]}"
    return name


def label_percent(axes: Axes, which: str) -> None:
    """Label the ticks along "x", "y" or both, "xy", in percent."""
    for name in which:
        getattr(axes, f"{name}axis").set_major_formatter(PercentFormatter(1))


@contextlib.contextmanager
def drawing() -> Iterator[None]:
    """Draw in the figures' style; characters that no font has become one sentence instead of warnings."""
    fonts = ["DejaVu Sans", *(font for font in _MORE_FONTS if font in font_manager.get_font_names())]
    style: list[Any] = ["default", _STYLE, {"font.family": fonts}]
    with matplotlib.style.context(style), warnings.catch_warnings(record=True) as caught:
        warnings.filterwarnings("always", message="Glyph")
        yield
    if any(str(warning.message).startswith("Glyph") for warning in caught):
        console.say("some names have characters that no installed font has: the figures show boxes", style="yellow")
