"""report.html, one page with everything that a run has saved; and what commands print at the end of a run."""

import base64
import io
import shlex
from pathlib import Path
from typing import Any

import numpy as np
from jinja2 import Environment, FileSystemLoader
from PIL import Image

from cifar import analysis, console, evaluate, images, visualize
from cifar.config import FIELDS, help_text
from cifar.data import Dataset
from cifar.errors import display_path, percent, plural
from cifar.metrics import most_confused
from cifar.records import Analysis, EpochRecord, Metrics
from cifar.runs import Run, damaged
from cifar.style import label
from cifar.visualize import FIGURES

_MAX_FIGURE = 4000  # pixels of a side: none of our own is larger
_LISTED_CLASSES = 20  # that a terminal shows
_CONFUSIONS = 100  # that the page lists
_NAME = 60  # characters of a class or file below an image, of which the middle is left out
_SMALL = 64  # pixels; larger images are photos, whose thumbnails are larger and smooth


def write(run: Run, dataset: Dataset) -> Path:
    """Write history.csv, and report.html, leaving out what the run has not saved; returns the page's path.

    The page needs neither a network nor other files. Raises UserError if a file of the run is damaged, or the page
    cannot be written.
    """
    import pandas  # takes a moment

    loader = FileSystemLoader(Path(__file__).parent / "templates")
    environment = Environment(loader=loader, autoescape=True, trim_blocks=True, lstrip_blocks=True)
    environment.filters |= {"percent": percent, "short": lambda name: label(name, _NAME)}
    record, config, results = run.record, run.config, visualize.read_results(run, dataset)
    metrics = results["metrics"]
    saved = run.read("config.json")  # lacks settings that are newer than the run
    page = environment.get_template("report.html").render(
        results,
        name=run.path.name,
        evaluation=run.command("evaluate"),
        record=record,
        command=shlex.join(record.command or []),
        unused=config.unused,
        settings=[(field, getattr(config, field) if field in saved else None, help_text(field)) for field in FIELDS],
        problems=evaluate.learning_problems(run),
        confusions=metrics and most_confused(np.array(metrics.confusion_matrix), list(metrics.per_class), _CONFUSIONS),
        has_photos=config.image_size > _SMALL,
        figures=_embed_figures(run, visualize.drawable(results)),
        images=_embed_images(run, results["analysis"], dataset, config.image_size) if results["analysis"] else {},
    )
    run.write_text("report.html", page)
    rows = [epoch.model_dump() for epoch in results["history"] or []]
    table = pandas.DataFrame(rows, columns=list(EpochRecord.model_fields), dtype=object)  # which leaves integers whole
    run.write_text("history.csv", table.to_csv(index=False, lineterminator="\r\n"))
    return run.path / "report.html"


def _embed_figures(run: Run, names: list[str]) -> dict[str, dict[str, Any]]:
    """Return the figures that are intact, by name: as WebP, half the size of PNG, and lossless for plots."""
    found = {}
    for name in names:
        if image := images.read_rgb(run.figures / f"{name}.png"):
            spec = FIGURES[name]
            image.thumbnail((_MAX_FIGURE, _MAX_FIGURE))
            quality = {"quality": 85, "method": 2} if spec.has_photos else {"lossless": True, "method": 3}
            found[name] = {"spec": spec, "source": _data_url(image, "WEBP", **quality), "size": image.size}
    return found


def _embed_images(run: Run, content: Analysis, dataset: Dataset, size: int) -> dict[int, dict[str, str]]:
    """Return each image that the analysis names, by index, with its saliency where that has been saved."""
    saliency = analysis.read_saliency(run, size)
    found = {}
    for index in {image.index for image in analysis.images(content)}:
        if index >= len(dataset.test):
            raise damaged(run.path / "analysis.json", "it names images that are not in the test split")
        image = dataset.test.images[index].permute(1, 2, 0).numpy()
        found[index] = {"image": _thumbnail(image)}
        if index in saliency:
            found[index]["saliency"] = _thumbnail(analysis.overlay(image, saliency[index]))
    return found


def _thumbnail(image: np.ndarray) -> str:
    thumbnail = Image.fromarray(image)
    if max(thumbnail.size) <= _SMALL:
        return _data_url(thumbnail, "PNG")
    thumbnail.thumbnail((192, 192))  # twice as many pixels as it is wide on the page, for screens that have them
    return _data_url(thumbnail, "WEBP", quality=80)


def _data_url(image: Image.Image, file_format: str, **options: Any) -> str:
    """Return a URL that contains the image."""
    file = io.BytesIO()
    image.save(file, file_format, **options)
    return f"data:image/{file_format.lower()};base64,{base64.b64encode(file.getvalue()).decode()}"


def show_metrics(metrics: Metrics) -> None:
    """Print the results of an evaluation: accuracies, the classes (the worst of many), the main confusions."""
    interval = "{:.2%} to {:.2%}".format
    rows = [
        ("accuracy", f"{metrics.accuracy:.2%}", interval(*metrics.interval_95)),
        ("accuracy with test-time augmentation", f"{metrics.accuracy_tta:.2%}", interval(*metrics.interval_95_tta)),
        ("loss (cross-entropy)", f"{metrics.loss:.4f}", ""),
    ]
    if metrics.top5_accuracy is not None and metrics.top5_accuracy_tta is not None:
        rows.append(("top-5 accuracy", f"{metrics.top5_accuracy:.2%}", ""))
        rows.append(("top-5 accuracy with test-time augmentation", f"{metrics.top5_accuracy_tta:.2%}", ""))
    title = f"{metrics.recipe} on {metrics.dataset}: {metrics.split} split, {metrics.n:,} images"
    console.out.print(console.table(title, dict(zip(("metric", "value", "95% interval"), zip(*rows)))))
    measured, which = metrics.measured_classes, "by class"
    classes = list(measured)
    if len(classes) > _LISTED_CLASSES:
        which = f"the {_LISTED_CLASSES} of {len(classes):,} classes with the lowest F1"
        classes = sorted(classes, key=lambda name: measured[name].f1)[:_LISTED_CLASSES]
    scores = [measured[name] for name in classes]
    columns = {
        "class": classes,
        "precision": [f"{row.precision:.1%}" for row in scores],
        "recall": [f"{row.recall:.1%}" for row in scores],
        "F1": [f"{row.f1:.1%}" for row in scores],
        "images": [f"{row.support:,}" for row in scores],
    }
    console.out.print(console.table(f"{which}, without test-time augmentation", columns))
    for pair in metrics.most_confused[:3]:
        console.say(f"most confused: {pair.true} predicted as {pair.predicted}, {plural(pair.count, 'time')}")


def show_run(run: Run) -> None:
    """Print how long the stages took, where the run and its report are, and what must not be overlooked."""
    record, page = run.record, run.path / "report.html"
    stages = [f"{stage} {seconds:.1f} s" for stage, seconds in record.seconds.items()]
    console.say("  ".join([*stages, f"total {sum(record.seconds.values()):.1f} s"]))
    console.say(f"run directory: {display_path(run.path)}")
    if page.exists():
        console.say(f"report: {display_path(page)}")
    for sentence in (record.note, *evaluate.learning_problems(run)):
        console.banner(sentence)
