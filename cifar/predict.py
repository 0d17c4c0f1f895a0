"""Any picture to a prediction: one network behind the command line and the demo."""

import csv
import glob
import json
import sys
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np
import torch
from scipy.special import softmax
from torch import Tensor

from cifar import device, evaluate
from cifar.errors import UserError, known_name
from cifar.files import writing
from cifar.picture import FITS, Source, decode_all
from cifar.runs import Run

_BATCH = 500  # pictures decoded before the network sees them


@dataclass(frozen=True)
class Answer:
    """What came of one picture: the calibrated probabilities (classes,), or the sentence why it was refused."""

    source: str
    probabilities: np.ndarray | None
    refusal: str | None = None


class Predictor:
    """The network of an evaluated run with its classes, ready to answer."""

    def __init__(self, run: Run, device_name: str = "auto"):
        """Raises UserError if the run has no checkpoint or has not been evaluated."""
        calibration = run.metrics["calibration"]
        if "threshold" not in calibration:  # which an early version did not write
            raise UserError(f"{run.path.name} has no threshold in its metrics.json: evaluate it anew")
        self.run = run
        self.classes: tuple[str, ...] = tuple(run.dataset["classes"])
        self.temperature: float = calibration["temperature"]
        self.threshold: float | None = calibration["threshold"]  # confidence below which it is probably no class
        self.network, content = evaluate.load(run, self.classes)
        self.image_size: int = content["image_size"]
        hardware = device.choose(device_name)
        self.network.to(hardware, memory_format=torch.channels_last)
        self.precision = device.resolve_precision(run.config.precision, hardware)

    def logits(self, images: Tensor) -> Tensor:
        """uint8 images (N, 3, S, S) with S the run's image size -> float32 logits (N, classes) on the CPU."""
        return evaluate.infer(self.network, images, precision=self.precision)

    def probabilities(self, images: Tensor) -> np.ndarray:
        """uint8 images (N, 3, S, S) -> calibrated probabilities (N, classes), float64."""
        return softmax(self.logits(images).double().numpy() / self.temperature, axis=1)

    def is_probably_none(self, probabilities: np.ndarray) -> bool:
        """Whether the most probable class is less so than for all but a few of the validation images."""
        return self.threshold is not None and bool(probabilities.max() < self.threshold)

    def answer(self, sources: Iterable[tuple[str, Source]], fit: str = "crop") -> Iterator[Answer]:
        """An answer for each named picture, in order; one that is refused does not stop the others."""
        known_name("fit", fit, FITS)
        remaining = iter(sources)
        while batch := list(islice(remaining, _BATCH)):
            yield from self._answer_batch(batch, fit)

    def _answer_batch(self, batch: Sequence[tuple[str, Source]], fit: str) -> Iterator[Answer]:
        decoded = decode_all([source for _, source in batch], self.image_size, fit)
        images = [image for image in decoded if isinstance(image, Tensor)]
        rows = iter(self.probabilities(torch.stack(images)) if images else [])
        for (name, _), image in zip(batch, decoded):
            yield Answer(name, next(rows)) if isinstance(image, Tensor) else Answer(name, None, str(image))


def find_pictures(names: Sequence[str]) -> list[tuple[str, Source]]:
    """The pictures that files, folders, globs and `-` for standard input name, each with its name.

    A folder gives all its files but the hidden ones, sorted. A name that leads nowhere stays, to be refused in its
    place.
    """
    found: list[tuple[str, Source]] = []
    for name in names:
        if name == "-":
            found.append(("standard input", sys.stdin.buffer.read()))
            continue
        matches = [] if Path(name).exists() else [Path(match) for match in sorted(glob.glob(name, recursive=True))]
        for place in matches or [Path(name)]:
            inside = [path for path in sorted(place.rglob("[!.]*")) if path.is_file()] if place.is_dir() else []
            found += [(str(path), path) for path in inside or [place]]
    return found


def write(path: Path, answers: Sequence[Answer], predictor: Predictor) -> None:
    """Answers as .csv or .json: picture, predicted class, confidence, whether it is probably none, or the refusal."""
    rows = [_row(answer, predictor) for answer in answers]
    with writing(path), path.open("w", newline="", encoding="utf-8", errors="surrogateescape") as file:
        if path.suffix == ".json":
            json.dump(rows, file, indent=2)
            return
        columns = ["picture", "predicted", "confidence", "probably_none", "refusal", *predictor.classes]
        writer = csv.DictWriter(file, columns, restval="")
        writer.writeheader()
        writer.writerows(rows)


def _row(answer: Answer, predictor: Predictor) -> dict[str, Any]:
    if answer.probabilities is None:
        return {"picture": answer.source, "refusal": answer.refusal}
    shares = [round(float(share), 6) for share in answer.probabilities]
    winner = int(answer.probabilities.argmax())
    return {
        "picture": answer.source,
        "predicted": predictor.classes[winner],
        "confidence": shares[winner],
        "probably_none": predictor.is_probably_none(answer.probabilities),
        **dict(zip(predictor.classes, shares)),
    }
