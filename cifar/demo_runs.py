"""The demo's runs: found in the outputs folder, loaded when first asked for, and asked on one thread."""

import contextlib
import functools
import threading
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

import torch
from PIL import Image
from torch import Tensor

from cifar import console, data, datasets, outputs
from cifar.errors import UserError, known_name
from cifar.picture import decode
from cifar.predict import Predictor
from cifar.runs import Run
from cifar.saliency import saliency

THUMBNAILS = "thumbnails"
_LOADED = 3  # runs in memory at once
_EXAMPLES = 20
_ENLARGED = 3  # times, in a thumbnail


@dataclass(frozen=True)
class Opinion:
    """What a run makes of a picture."""

    image: Tensor  # what the network sees: uint8 (3, S, S)
    confidences: dict[str, float]  # by class, calibrated, the most probable first
    threshold: float | None  # confidence below which it is probably none of the classes
    is_probably_none: bool
    heat: Tensor | None  # how much each pixel decided: (S, S) in 0..1, if asked for

    @property
    def label(self) -> str:
        return next(iter(self.confidences))


def evaluated(output_dir: str) -> dict[str, Run]:
    """The runs of a folder, and of the groups in it, that can answer, by name, newest first."""
    found = (Run(place.resolve()) for place in outputs.directories(Path(output_dir)))
    return {run.path.name: run for run in found if _can_answer(run)}


def _can_answer(run: Run) -> bool:
    try:
        is_whole = "threshold" in run.metrics["calibration"] and run.config and run.dataset
        return bool(is_whole) and run.status() != "running" and (run.checkpoints / "best.pt").exists()
    except UserError:
        return False


class DemoRuns:
    """The evaluated runs of a folder, ready to be asked by name."""

    def __init__(self, first: Run | None, output_dir: str, data_dir: str, device: str, folder: Path):
        """Loads the run `first`, or the newest that can be; the others when they are asked for.

        Examples go into `folder`. Raises UserError if there is no evaluated run, or the first cannot be loaded.
        """
        self._first, self._output_dir, self._data_dir = first, output_dir, data_dir
        self._device, self._folder = device, folder
        # One thread asks all networks: each thread that computes would bring a pool of its own, and slow the others.
        self._thread = ThreadPoolExecutor(1, thread_name_prefix="network")
        self._drawing = threading.Lock()
        self._predictor = functools.lru_cache(_LOADED)(self._load)
        self.found = self.find()
        if not self.found:
            raise UserError(f"there is no evaluated run in {output_dir}: make one with `python main.py`")
        self.default = self._first_that_loads([first.path.name] if first else list(self.found))

    def find(self) -> dict[str, Run]:
        """The runs that are there now, by name, newest first."""
        given = {self._first.path.name: self._first} if self._first else {}
        self.found = evaluated(self._output_dir) | given
        return self.found

    def _first_that_loads(self, names: list[str]) -> str:
        """The first of the runs whose network can answer; of those before it, why not is said."""
        for name in names[:-1]:
            try:
                self.predictor(name)
                return name
            except UserError as error:
                console.say(f"{name} cannot answer: {error}")
        self.predictor(names[-1])
        return names[-1]

    def run(self, name: str) -> Run:
        """Raises UserError for a run that is not there."""
        runs = self.found if name in self.found else self.find()
        return runs[known_name("run", name, runs)]

    def predictor(self, name: str) -> Predictor:
        """Raises UserError if the run is not there or cannot be loaded."""
        return self._thread.submit(self._predictor, self.run(name).path).result()

    def ask(self, name: str, picture: Path, explain: bool) -> Opinion:
        """What the run `name` makes of the picture file. Raises UserError if either cannot be read."""
        predictor = self.predictor(name)
        image = decode(picture, predictor.image_size)
        return self._thread.submit(_opinion, predictor, image, explain).result()

    def examples(self, name: str) -> list[Path]:
        """PNG files of test images of the run's dataset, one of each class; none where the dataset is not there."""
        folder = self._folder / name
        with self._drawing:
            if not folder.exists():
                folder.mkdir(parents=True)
                with contextlib.suppress(UserError):
                    config = self.run(name).config
                    _draw(datasets.find(config.dataset, self._data_dir, config.image_size)[0].test, folder)
        return sorted(folder.glob("*.png"))

    def _load(self, path: Path) -> Predictor:
        predictor = Predictor(Run(path), self._device)
        blank = torch.zeros(3, predictor.image_size, predictor.image_size, dtype=torch.uint8)
        _opinion(predictor, blank, explain=True)  # the first answer takes several times as long as the next
        return predictor


def _opinion(predictor: Predictor, image: Tensor, explain: bool) -> Opinion:
    probabilities = predictor.probabilities(image[None])[0]
    winner = int(probabilities.argmax())
    heat = saliency(predictor.network, image, winner, precision=predictor.precision) if explain else None
    order = (-probabilities).argsort(kind="stable")
    confidences = {predictor.classes[label]: float(probabilities[label]) for label in order}
    is_none = bool(predictor.is_probably_none(probabilities))
    return Opinion(image, confidences, predictor.threshold, is_none, heat)


def _draw(split: data.Split, folder: Path) -> None:
    """Save one image of each class, drawn by chance, as a PNG file, and a larger one beside it in thumbnails/."""
    order = torch.randperm(len(split), generator=torch.Generator().manual_seed(0))
    chosen = dict(zip(split.labels[order].tolist(), order.tolist()))
    (folder / THUMBNAILS).mkdir()
    for label, index in sorted(chosen.items())[:_EXAMPLES]:
        image = Image.fromarray(split.images[index].permute(1, 2, 0).numpy())
        image.save(folder / f"{label:03}.png")
        image.resize((_ENLARGED * image.width, _ENLARGED * image.height), Image.Resampling.NEAREST).save(
            folder / THUMBNAILS / f"{label:03}.png"
        )
