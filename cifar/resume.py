"""What a training leaves on the disk while it runs, and how it is taken up again."""

import hashlib
import shlex
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from cifar import checkpoint, console, device
from cifar.config import FIELDS, PLACES, PROJECT, Config
from cifar.datasets import Dataset
from cifar.errors import UserError, short
from cifar.runs import Run
from cifar.signals import Interrupted
from cifar.state import State

_SAVE_SECONDS = 50.0  # between checkpoints within an epoch; a step and the writing fit into what a minute has left
_CODE = (  # the modules that a training goes through
    *("data", "device", "distributed", "evaluate", "metrics", "model"),
    *("optim", "state", "train", "whole_batch", "zoo"),
)


class Keeper:
    """Keeps the state of a run's training in last.pt, the one before in previous.pt, and the best weights in best.pt.

    The history is written first, then best.pt, then last.pt: whatever was written when a process was killed, it is
    what the state in last.pt leads to again.
    """

    def __init__(self, run: Run, dataset: Dataset, state: State):
        self.run, self.dataset, self.state = run, dataset, state
        self.premises = premises(run.config, dataset)
        self.last, self.previous, self.best = (run.checkpoints / f"{name}.pt" for name in ("last", "previous", "best"))
        self._count_from_now()

    def _count_from_now(self) -> None:
        self.started = time.perf_counter() - self.state.seconds
        self.saved = time.monotonic()

    def restore(self) -> bool:
        """Set the state to that of the last checkpoint, and the history likewise; whether there is one.

        A last.pt that is damaged or missing is replaced by previous.pt, and that is said.
        Raises UserError if no checkpoint can be used although there are some.
        """
        problem = None
        for path in (path for path in (self.last, self.previous) if path.exists()):
            try:
                self._take_up(path)
            except UserError as error:
                problem = problem or error
                continue
            if path == self.previous:
                console.banner(f"{problem or f'{self.last} is missing'}: going on from {self.previous.name}.")
            self._count_from_now()
            self.run.cut_history(self.state.epoch - 1)
            self.run.mark_resumed(self.state.epoch, self.state.step, self.state.seconds)
            return True
        if problem:
            anew = f"python main.py --config {shlex.quote(short(self.run.path / 'config.json'))}"
            raise UserError(f"{problem}; `{anew}` begins it anew")
        self.run.cut_history(0)
        return False

    def _take_up(self, path: Path) -> None:
        content = checkpoint.load(path)
        training = content.get("training")
        if not isinstance(training, dict) or training.keys() != {"premises", "state"}:
            raise UserError(f"the checkpoint {path} holds no training that could go on")
        require_same(training["premises"], self.premises, str(path))
        try:
            self.state.load_state_dict(training["state"])
        except ValueError as error:
            raise UserError(f"the checkpoint {path} is damaged: {error}") from None
        if self.state.best_epoch:
            best = checkpoint.load(self.best)
            if best["epoch"] < self.state.best_epoch:
                raise UserError(f"{self.best} is not of epoch {self.state.best_epoch}, as {path} wants it")
            checkpoint.put_weights(self.best, best, self.state.network)  # to see whether they fit
        checkpoint.put_weights(path, content, self.state.network)

    def pause(self, signal_number: Callable[[], int | None]) -> None:
        """After a step: save if it is time to. Raises Interrupted if there is a number of a signal that has come."""
        number = signal_number()
        is_due = number is not None or time.monotonic() - self.saved >= _SAVE_SECONDS
        if is_due and self.state.step:  # an epoch that has not begun was saved with the one before
            self.state.check_finite()
            self._save_last()
        if number is not None:
            raise Interrupted(number)

    def end_epoch(self, record: dict[str, Any]) -> bool:
        """Save an epoch that has ended, with its line of the history; whether it is the best so far."""
        self.run.append_history(record)
        is_best = self.state.end_epoch(record["val_accuracy"])
        if is_best:
            checkpoint.save(self.best, **self._description())
        self._save_last()
        return is_best

    def _save_last(self) -> None:
        self.state.seconds = time.perf_counter() - self.started
        training = {"premises": self.premises, "state": self.state.state_dict()}
        checkpoint.save(self.last, **self._description(), training=training, previous=self.previous)
        self.saved = time.monotonic()

    def _description(self) -> dict[str, Any]:
        return {
            "model": self.run.config.model,
            "classes": self.dataset.classes,
            "image_size": self.dataset.train.images.shape[-1],
            "epoch": self.state.epoch - 1,
            "weights": self.state.network.state_dict(),
        }


def premises(config: Config, dataset: Dataset) -> dict[str, Any]:
    """What must not change for a training to go on as it would have: its settings, images, code and arithmetic."""
    hardware = device.choose(config.device)
    settings = {name.replace("_", " "): getattr(config, name) for name in FIELDS if name not in PLACES}
    code = {f"cifar/{name}.py": _sha256(PROJECT / "cifar" / f"{name}.py") for name in _CODE}
    return {
        **settings,
        "device": hardware.type,
        "precision": device.resolve_precision(config.precision, hardware),
        "training images": dataset.train.sha256(),
        "PyTorch": str(torch.__version__),
        **code,
    }


def _sha256(path: Path) -> str:
    return hashlib.sha256(path.read_bytes()).hexdigest()


def require_same(then: Any, now: dict[str, Any], what: str) -> None:
    """Raise UserError that names how the premises of what was begun `then` differ from those of now, if they do."""
    if not isinstance(then, dict):
        raise UserError(f"{what} does not say what it was made with")
    changes = [
        f"{name} has changed" if name.endswith(".py") else f"{name} was {then.get(name)} and is {now.get(name)}"
        for name in sorted(then.keys() | now.keys(), key=str)
        if then.get(name) != now.get(name)
    ]
    if changes:
        raise UserError(f"{what} was made with something else, so that it cannot go on: {', '.join(changes)}")
