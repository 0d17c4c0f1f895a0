"""report.html: all that a run has saved, on one page that needs neither network nor other files."""

import base64
import io
import shlex
from pathlib import Path
from typing import Any

import numpy as np
from jinja2 import Environment, FileSystemLoader
from PIL import Image

from cifar import analysis, saliency
from cifar.config import FIELDS, help_text
from cifar.data import Split
from cifar.datasets import Dataset
from cifar.picture import read_rgb
from cifar.runs import Run, damaged

_TEMPLATE = Path(__file__).parent / "templates" / "report.html"
_FIGURES = {  # with what a screen reader says
    "training_history": "Loss, accuracy and learning rate by epoch",
    "confusion_matrix": "Confusion matrix: how often each true class was taken for each other",
    "per_class_metrics": "Precision, recall and F1 by class",
    "precision_recall": "Precision against recall, a curve for each class",
    "misclassified": "The mistakes of the highest confidence",
    "dataset_samples": "Training images of each class",
    "sample_predictions": "Test images spread over the split, with what the network says",
    "architecture": "The network as blocks, with the parameters and multiply-adds of each",
    "calibration": "Accuracy against confidence, before and after the temperature",
    "risk_coverage": "Error rate against the share of images that is answered",
    "corruptions": "Accuracy and calibration error by corruption and severity",
}
_OF_PICTURES = ("misclassified", "dataset_samples", "sample_predictions")
_LARGEST = 64  # pixels, of a side of a picture


def write(run: Run, dataset: Dataset) -> Path:
    """Write report.html of what the run has saved, leaving out what it has not; returns its path.

    Raises UserError if a file of the run is damaged, or the page cannot be written.
    """
    loader = FileSystemLoader(_TEMPLATE.parent)
    environment = Environment(loader=loader, autoescape=True, trim_blocks=True, lstrip_blocks=True)
    environment.filters |= {"percent": _percent, "mean": _mean}
    page = environment.get_template(_TEMPLATE.name).render(_content(run, dataset))
    run.write_text("report.html", page)
    return run.path / "report.html"


def _content(run: Run, dataset: Dataset) -> dict[str, Any]:
    """What the template shows: the run's files as they are, and its pictures as data."""
    record, config = run.record, run.config
    metrics, harmed = run.read_if_there("metrics.json"), run.read_if_there("corruptions.json")
    details = analysis.read(run, metrics)
    heats = saliency.read(run, config.image_size) if details else {}
    return {
        "name": run.path.name,
        "subject": f"{config.title} on {dataset.name}",
        "record": record,
        "command": shlex.join(record.get("command", [])),
        "settings": [(field, getattr(config, field), help_text(field)) for field in FIELDS],
        "history": run.history(),
        "metrics": metrics,
        "details": details,
        "harmed": harmed,
        "figures": _figures(run),
        "explained": bool(heats),
        "pictures": _pictures(run, details, heats, dataset.test) if details else {},
    }


def _figures(run: Run) -> dict[str, dict[str, Any]]:
    """The figures that are whole, by name; as WebP, which takes half the room of PNG, and charts without a loss."""
    found = {}
    for name, meaning in _FIGURES.items():
        if image := read_rgb(run.figures / f"{name}.png"):
            quality = {"quality": 85, "method": 2} if name in _OF_PICTURES else {"lossless": True, "method": 3}
            source = _data(image, "WEBP", **quality)
            found[name] = {"source": source, "meaning": meaning, "width": image.width, "height": image.height}
    return found


def _pictures(
    run: Run, details: dict[str, Any], heats: dict[int, np.ndarray], split: Split
) -> dict[int, dict[str, str]]:
    """By index: the picture, and with its heat over it, where that has been saved."""
    indices = {picture["index"] for picture in analysis.pictures(details)}
    if max(indices, default=0) >= len(split):
        raise damaged(run.path / "analysis.json", "it names pictures that are not in the test split")
    found = {}
    for index in indices:
        image = split.images[index].permute(1, 2, 0).numpy()
        found[index] = {"seen": _thumbnail(image)}
        if index in heats:
            found[index]["decided"] = _thumbnail(saliency.overlay(image, heats[index]))
    return found


def _thumbnail(image: np.ndarray) -> str:
    picture = Image.fromarray(image)
    picture.thumbnail((_LARGEST, _LARGEST))
    return _data(picture, "PNG")


def _data(image: Image.Image, form: str, **options: Any) -> str:
    """The picture as an address that holds it."""
    file = io.BytesIO()
    image.save(file, form, **options)
    return f"data:image/{form.lower()};base64,{base64.b64encode(file.getvalue()).decode()}"


def _percent(share: float | None, decimals: int = 2) -> str:
    return "\u2013" if share is None else f"{share:.{decimals}%}"


def _mean(rows: list[dict[str, float]], key: str) -> float:
    return sum(row[key] for row in rows) / len(rows)
