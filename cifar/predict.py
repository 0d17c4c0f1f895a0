"""Predictions for images: files, or arrays, tensors and Pillow's images in memory."""

import csv
import glob
import json
import os
import sys
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from itertools import islice
from pathlib import Path
from typing import Any, cast

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from cifar import console, evaluate, files, folder
from cifar.errors import UsageError, UserError, csv_cell, display_path, known_name, listing
from cifar.images import FITS, MAX_BYTES, AnyImage, Source, as_source, decode_all
from cifar.runs import Run

_BATCH = 500  # images that are decoded before the network sees them
_ROWS = 20  # that the terminal shows at most
_COLUMNS = ("image", "predicted", "confidence", "probably_none", "error")  # of a .csv file, before the classes


@dataclass(frozen=True)
class Prediction:
    """The result for one image: calibrated probabilities (classes,), or why the image could not be read."""

    source: AnyImage = field(repr=False)
    probabilities: np.ndarray | None
    error: str | None = None
    classes: tuple[str, ...] = ()
    probably_none: bool = False  # whether the confidence is below that of all but a few of the validation images

    @property
    def label(self) -> str:
        """The most probable class. Raises UserError if the image could not be read."""
        return self.top(1)[0][0]

    @property
    def confidence(self) -> float:
        """The probability of the most probable class. Raises UserError if the image could not be read."""
        return self.top(1)[0][1]

    def top(self, count: int = 3) -> list[tuple[str, float]]:
        """Return the most probable classes with their probabilities. Raises UserError if the image was not read."""
        if self.probabilities is None:
            name = self.name if isinstance(self.source, Path | str) else "the image"
            raise UserError(f"{name} cannot be read: {self.error}")
        order = (-self.probabilities).argsort(kind="stable")[:count]
        return [(self.classes[number], float(self.probabilities[number])) for number in order]

    @property
    def name(self) -> str:
        return str(self.source) if isinstance(self.source, Path | str) else "standard input"


class Predictor:
    """The network of an evaluated run, ready to predict."""

    def __init__(self, run: Run, device_name: str = "auto"):
        """Load the run's best weights. Raises UserError if it has no checkpoint or has not been evaluated."""
        calibration = run.metrics.calibration
        self.run = run
        self.classes: tuple[str, ...] = tuple(run.dataset.classes)
        self.temperature: float = calibration.temperature
        self.threshold: float | None = calibration.threshold  # confidence below which it is probably none of them
        self.network, content, self.precision = evaluate.load_network(run, self.classes, device_name)
        self.network.to(memory_format=torch.channels_last)
        self.image_size: int = content["image_size"]

    def probabilities(self, images: Tensor) -> np.ndarray:
        """Compute calibrated probabilities, float64 (N, classes), of uint8 images (N, 3, image_size, image_size)."""
        shape = (3, self.image_size, self.image_size)
        if images.dtype != torch.uint8 or images.shape[1:] != shape:
            given = f"{images.dtype} {tuple(images.shape)}"
            raise UserError(f"probabilities() takes torch.uint8 (N, {', '.join(map(str, shape))}), not {given}")
        logits = evaluate.infer(self.network, images, precision=self.precision)
        return (logits.double() / self.temperature).softmax(1).numpy()

    def predict(self, images: AnyImage | Iterable[AnyImage], fit: str = "crop") -> list[Prediction]:
        """Return a prediction for each image, in order; a file that cannot be read does not stop the others.

        images: one image or several: paths, the bytes of files, Pillow's images, arrays or tensors (see
        `images.as_source`). fit: what happens to an image that is not square, crop or letterbox.
        Raises UserError for what is none of these.
        """
        is_one = isinstance(images, str | Path | bytes | Image.Image) or getattr(images, "ndim", 4) in (0, 2, 3)
        is_one = is_one or hasattr(images, "read") or not isinstance(images, Iterable)
        several = cast("Iterable[AnyImage]", [images] if is_one else images)
        return list(self.stream(several, fit))

    def stream(self, images: Iterable[AnyImage], fit: str = "crop") -> Iterator[Prediction]:
        """Yield the predictions of `predict` one by one, of any number of images."""
        known_name("fit", fit, FITS)
        remaining = iter(images)
        while batch := list(islice(remaining, _BATCH)):
            decoded = decode_all([as_source(image) for image in batch], self.image_size, fit)
            readable = [image for image in decoded if isinstance(image, Tensor)]
            rows = iter(self.probabilities(torch.stack(readable)) if readable else [])
            for source, image in zip(batch, decoded):
                if isinstance(image, Tensor):
                    row = next(rows)
                    yield Prediction(source, row, None, self.classes, self.is_probably_none(row))
                else:
                    yield Prediction(source, None, str(image))

    def is_probably_none(self, probabilities: np.ndarray) -> bool:
        """Tell whether the confidence is below that of all but a few of the validation images."""
        return self.threshold is not None and bool(probabilities.max() < self.threshold)


def find_images(paths: Sequence[str]) -> list[Source]:
    """Find the images that files, folders, glob patterns and `-` (standard input) stand for.

    A folder stands for the images below it, as in a dataset; says what else it has. A path that does not exist stays
    in the list, so that its error appears in its place. What is named twice, in any spelling, is found once.
    """
    found: dict[str, Source] = {}
    for path in dict.fromkeys(paths):
        if path == "-":
            if sys.stdin is None or sys.stdin.closed:
                raise UserError("standard input is closed, so no image can be read from it")
            found[path] = sys.stdin.buffer.read(MAX_BYTES + 1)
            continue
        if path.startswith(("http://", "https://")):
            raise UsageError(f"images are files: download {path} first")
        matches = [] if os.path.exists(path) else sorted(glob.glob(path, recursive=True))
        for match in map(Path, matches or [path]):
            files = [match]
            if os.path.isdir(match):
                files, note = folder.find_images(match)
                if note or not files:
                    console.say(f"{display_path(match)}: {note or 'no images'}")
            found |= {os.path.abspath(file): file for file in files}
    if not found:
        raise UserError(f"there is no image in {listing(list(paths))}")
    return list(found.values())


def write(path: Path, predictions: Sequence[Prediction], predictor: Predictor) -> None:
    """Write predictions to a .csv or .json file. Raises UserError if it cannot be written."""
    rows = [_row(prediction) for prediction in predictions]
    nothing = dict.fromkeys(predictor.classes, "")
    lines = [[*_COLUMNS, *(f"{name} (class)" if name in _COLUMNS else name for name in predictor.classes)]]
    for row in rows:
        lines.append([*(row.get(column, "") for column in _COLUMNS), *row.get("probabilities", nothing).values()])
    with files.atomic_write(path) as partial:
        path.parent.mkdir(parents=True, exist_ok=True)
        if path.suffix.lower() == ".json":
            partial.write_text(json.dumps(rows, indent=2) + "\n", encoding="utf-8")
            return
        with partial.open("w", newline="", encoding="utf-8", errors="surrogateescape") as file:
            csv.writer(file).writerows(map(csv_cell, line) for line in lines)


def _row(prediction: Prediction) -> dict[str, Any]:
    """Return one prediction as a JSON file holds it."""
    if prediction.probabilities is None:
        return {"image": prediction.name, "error": prediction.error}
    probabilities = dict(zip(prediction.classes, (round(float(p), 6) for p in prediction.probabilities)))
    return {
        "image": prediction.name,
        "predicted": prediction.label,
        "confidence": probabilities[prediction.label],
        "probably_none": prediction.probably_none,
        "probabilities": probabilities,
    }


def show_predictions(predictions: Sequence[Prediction], predictor: Predictor) -> None:
    """Print the most probable classes of each image; of many images, the number of each class and the first few."""
    readable = [prediction for prediction in predictions if prediction.probabilities is not None]
    origin = " (which comes with this program)," if predictor.run.is_shipped else ","
    console.say(f"predictions of {predictor.run.path.name}{origin} trained on {predictor.run.dataset.name}")
    shown = predictions
    if len(predictions) > _ROWS:
        shown = predictions[: _ROWS // 2]
        counts = Counter(prediction.label for prediction in readable).most_common(_ROWS // 2)
        columns = {"most frequent": [name for name, _ in counts], "images": [f"{count:,}" for _, count in counts]}
        console.out.print(console.table(f"{len(predictions):,} images", columns))
    room = max(20, console.out.width - 60)  # three classes of CIFAR-10 with their probabilities need the rest
    names = [display_path(prediction.name) for prediction in shown]
    columns = {"image": [name if len(name) <= room else f"…{name[1 - room :]}" for name in names]}
    for rank, place in enumerate(("first", "second", "third")[: len(predictor.classes)]):
        columns[place] = [_cell(prediction, rank) for prediction in shown]
    console.out.print(console.table("", columns))
    if len(predictions) > len(shown):
        console.say(f"and {len(predictions) - len(shown):,} more images; --output saves all predictions")
    failed = [prediction for prediction in predictions if prediction.error]
    for prediction in failed[: _ROWS // 2]:
        console.say(f"cannot read {prediction.name}: {prediction.error}", style="red")
    if len(failed) > _ROWS // 2:
        console.say(f"and {len(failed) - _ROWS // 2:,} more that cannot be read", style="red")
    if unsure := [prediction.name for prediction in readable if prediction.probably_none]:
        console.say(f"probably none of the classes (confidence below {predictor.threshold:.1%}): {listing(unsure)}")


def _cell(prediction: Prediction, rank: int) -> str:
    """Return the most probable class, for rank 0, or a less probable one, with its probability."""
    if prediction.probabilities is None:
        return "" if rank else "cannot be read"
    label, probability = prediction.top(rank + 1)[rank]
    return f"{label} {probability:.1%}"
