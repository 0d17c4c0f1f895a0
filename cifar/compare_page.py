"""A comparison on disk: its numbers, its figure, and both on one page that needs no network."""

import base64
from pathlib import Path
from typing import Any

from jinja2 import Environment, FileSystemLoader, StrictUndefined

from cifar import compare_figure
from cifar.files import replacing
from cifar.runs import write_json

_TEMPLATES = Path(__file__).parent / "templates"


def write(comparison: dict[str, Any], folder: Path) -> Path:
    """Write comparison.json, comparison.png and comparison.html into the folder; returns the page's path.

    Raises UserError if they cannot be written.
    """
    page = folder / "comparison.html"
    with replacing(page) as partial:
        folder.mkdir(parents=True, exist_ok=True)
        write_json(folder / "comparison.json", comparison)
        with replacing(folder / "comparison.png") as figure:
            compare_figure.draw(comparison).savefig(figure, format="png")
        picture = base64.b64encode((folder / "comparison.png").read_bytes()).decode()
        partial.write_text(render(comparison, picture), encoding="utf-8", errors="backslashreplace")
    return page


def render(comparison: dict[str, Any], picture: str) -> str:
    """The page's HTML. picture: a PNG in base64."""
    environment = Environment(
        loader=FileSystemLoader(_TEMPLATES), autoescape=True, undefined=StrictUndefined, trim_blocks=True
    )
    return environment.get_template("compare.html").render(comparison, picture=picture)
