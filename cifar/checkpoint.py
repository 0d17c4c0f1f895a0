"""Checkpoints: weights and the state of a training on disk; the only torch.save."""

import io
import shlex
import time
import zipfile
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves

from cifar import console, device
from cifar.config import LOCATIONS, MAX_CLASSES, MAX_IMAGE_SIZE, PIPELINE, Config, known_spelling
from cifar.data import Dataset
from cifar.errors import UserError, display_path, out_of_memory
from cifar.files import atomic_write
from cifar.records import EpochRecord
from cifar.runs import Run

FORMAT = 1
_KEYS = {"format", "model", "classes", "image_size", "epoch", "weights"}
_MAX_BYTES = 16_000_000_000  # of a file: twice torchvision's largest network with Adam's state
_MAX_PICKLED_BYTES = 4_000_000  # of the part that is not tensors
_SAVE_SECONDS = 50.0  # between checkpoints within an epoch; leaves a minute time for a step and the writing
EPOCH_SECONDS = 5.0  # between checkpoints at the ends of epochs, which on a GPU take less time than the writing


class Checkpointer:
    """Saves a run's training to last.pt, the one before to previous.pt, and the best weights to best.pt.

    Each epoch's line is written to the history at once; best.pt and then last.pt _SAVE_SECONDS after the last save, at
    an epoch's end EPOCH_SECONDS after it, on a signal, and at the training's end. Until then the best weights are kept
    in memory.
    Whatever was written when a process was killed, the training that resumes from last.pt writes it again, bit for bit
    (in one process on the CPU). Of several processes all must call the methods; rank 0 alone writes.
    """

    def __init__(self, run: Run, training: Any, dataset: Dataset):
        """training: a trainer.Training."""
        self.run, self.training, self.dataset = run, training, dataset
        # What a training needs to be the same when it resumes. Of versions, code and hardware, `pipeline.resume` says
        # where they differ.
        settings = run.config.model_dump(exclude=set(LOCATIONS))
        images = {"classes": list(dataset.classes), "training images (SHA-256)": dataset.train.sha256()}
        self.requirements = {**settings, **images, "device": device.choose(run.config.device).type}
        self.last, self.previous, self.best = (run.checkpoints / f"{name}.pt" for name in ("last", "previous", "best"))
        self.history: list[EpochRecord] = []
        self.unsaved_best: dict[str, Any] | None = None
        self.saved_step = (training.epoch, training.step)
        self.saved_at = time.monotonic()
        self.last_is_intact = True  # or else the next save leaves previous.pt as it is

    def resume(self) -> bool:
        """Restore the last checkpoint and the history up to it; returns whether there is one.

        A last.pt that is damaged or missing is replaced by previous.pt, with a note.
        Raises UserError if there are checkpoints but none can be used.
        """
        problem = None
        for path in (path for path in (self.last, self.previous) if path.exists()):
            try:
                self._restore(path)
            except UserError as error:
                problem = problem or error
                continue
            if path == self.previous:
                console.banner(f"{problem or f'{self.last} is missing'}: resuming from {self.previous.name}.")
                self.last_is_intact = False
            self.saved_step = (self.training.epoch, self.training.step)
            self._prepare_run(self.training.epoch - 1)
            return True
        if problem:
            raise self._unusable(problem)
        self._prepare_run(0)
        return False

    def _unusable(self, problem: UserError) -> UserError:
        if self.run.is_in_group:
            hint = f"remove {display_path(self.run.path)} and run `{self.run.resume_command}`"
        else:
            hint = f"run `{PIPELINE} --config {shlex.quote(display_path(self.run.path / 'config.json'))}`"
        return UserError(f"{problem}; to start over, {hint}")

    def save_if_due(self, signal_number: int | None) -> None:
        """Save if the last time is long ago. Raises Interrupted, after saving, if there is a signal."""
        is_due = time.monotonic() - self.saved_at >= _SAVE_SECONDS
        agreed = device.maximum(2 * (signal_number or 0) + is_due)  # the same step for all processes
        if agreed and self.training.step:  # else the epoch before has been checked
            self.training.check_finite()
        if agreed:
            self._save()
        if agreed > 1:
            raise console.Interrupted(agreed // 2)

    def end_epoch(self, record: EpochRecord, is_best: bool) -> None:
        """Write a finished epoch's line of the history; save if it is time, or the last epoch."""
        if device.rank() == 0:
            self.history.append(record)
            self.run.write_history(self.history)
        if is_best:
            content = self._content(self.training.kept)
            weights = {name: tensor.clone() for name, tensor in content["weights"].items()}
            self.unsaved_best = {**content, "weights": weights}
        is_due = time.monotonic() - self.saved_at >= EPOCH_SECONDS
        if is_due or self.training.has_finished:
            self._save()

    def _save(self) -> None:
        """Write best.pt, if there are better weights, and last.pt, unless they are those of this step."""
        now = (self.training.epoch, self.training.step)
        if device.rank() == 0 and now != self.saved_step:
            if self.unsaved_best:
                save(self.best, self.unsaved_best)
            state, outputs = self.training.state_dict(), self._outputs()
            training = {"requirements": self.requirements, "state": state, "outputs": outputs}
            replaced = self.previous if self.last_is_intact else None
            save(self.last, {**self._content(self.training.network), "training": training}, replaced)
            self.last_is_intact = True
        self.unsaved_best, self.saved_step, self.saved_at = None, now, time.monotonic()

    def _outputs(self) -> Tensor:
        """Compute the logits of a few images, from which changed code of the network is noticed when it resumes."""
        network, images = self.training.network, self.dataset.train[:8].images.to(self.training.device)
        in_training = [module for module in network.modules() if module.training]  # not frozen BatchNorm
        with torch.no_grad():
            logits = network.eval()(images / 255)
        for module in in_training:
            module.training = True
        return logits.float().cpu()

    def _content(self, network: nn.Module) -> dict[str, Any]:
        return {
            "model": self.run.config.model,
            "classes": list(self.dataset.classes),
            "image_size": self.dataset.train.image_size,
            "epoch": self.training.epoch - 1,  # the number of epochs trained
            "weights": network.state_dict(),
        }

    def _restore(self, path: Path) -> None:
        content = load(path)
        training = content.get("training")
        if not isinstance(training, dict) or not isinstance(training.get("requirements"), dict):
            raise UserError(f"the checkpoint {path} has no training that this version can resume")
        defaults = Config(recipe=self.run.config.recipe).model_dump()  # of settings that are newer than the file
        saved = {key: defaults.get(key) for key in self.requirements} | training["requirements"]
        if changed := [key for key in sorted(saved, key=str) if saved[key] != self.requirements.get(key)]:
            changes = ", ".join(f"{key} was {saved[key]} and is {self.requirements.get(key)}" for key in changed)
            raise UserError(f"cannot resume from {path}: these settings have changed: {changes}")
        try:
            if not all(leaf.isfinite().all() for leaf in tree_leaves(training["state"]) if isinstance(leaf, Tensor)):
                raise ValueError("a value is not finite")
            self.training.load_state_dict(training["state"])
        except (ValueError, KeyError, TypeError, RuntimeError, AttributeError, IndexError) as error:
            if out_of_memory(error):
                raise
            raise UserError(f"the checkpoint {path} is damaged: {error}") from None
        if self.training.best_epoch:
            best = load(self.best)
            if best["epoch"] < self.training.best_epoch:
                raise UserError(f"{self.best} is older than epoch {self.training.best_epoch}, which {path} requires")
            check_weights(self.best, best, self.training.network)
        load_weights(path, content, self.training.network)
        then, now = training.get("outputs"), self._outputs()
        if isinstance(then, Tensor) and not (
            then.shape == now.shape and torch.allclose(then, now, 1e-2, 1e-3, equal_nan=True)
        ):
            console.banner(
                f"The network computes other values than when {path.name} was saved, so its code has changed since "
                "then: the results will differ from an uninterrupted run's."
            )

    def _prepare_run(self, epochs: int) -> None:
        """Cut the history to so many epochs, delete results of earlier weights, and record where training resumes."""
        if device.rank():
            return
        try:
            self.history = self.run.history(epochs)
        except UserError as problem:
            raise self._unusable(problem) from None
        self.run.write_history(self.history)
        if not self.training.has_finished:
            self.run.remove_evaluation()
        if self.training.optimizer.steps:
            seconds = time.perf_counter() - self.training.started
            self.run.mark_resumed(self.training.epoch, self.training.step, seconds)


def save(path: Path, content: dict[str, Any], previous: Path | None = None) -> None:
    """Write a checkpoint; a reader sees the old one or the new one, never a part. Raises UserError if it cannot.

    content: what `load` returns, but for the format. previous: where the old file is moved.
    """
    # Into memory first: when the disk is full, torch.save says no more than that it failed.
    file = io.BytesIO()
    torch.save({"format": FORMAT, **content}, file)
    with atomic_write(path, previous) as partial:
        partial.write_bytes(file.getbuffer())


def load(path: Path) -> dict[str, Any]:
    """Read a checkpoint to the CPU; nothing in the file is executed.

    `weights` must still pass `load_weights`. Raises UserError if the file is missing, damaged or of another format.
    """
    try:
        _check_file(path)
        content = torch.load(path, map_location="cpu", weights_only=True)
    except FileNotFoundError:
        raise UserError(f"there is no checkpoint {path}: it was removed, or none has been saved yet") from None
    except PermissionError as error:
        raise UserError(f"cannot read the checkpoint {path}: {error.strerror}") from None
    except Exception as error:  # a damaged file can make the unpickler raise anything
        if out_of_memory(error):
            raise
        raise UserError(f"the checkpoint {path} is damaged or not from this program") from None
    if not isinstance(content, dict) or content.keys() - {"training"} != _KEYS or content["format"] != FORMAT:
        raise UserError(f"the checkpoint {path} is not of format {FORMAT}")
    if problem := _problem(**{key: content[key] for key in _KEYS - {"format"}}):
        raise UserError(f"the checkpoint {path} is damaged: {problem}")
    return {**content, "model": known_spelling("model", content["model"])}


def load_weights(path: Path, content: dict[str, Any], network: nn.Module) -> None:
    """Load the weights that `load` read from the path. Raises UserError unless they fit and are finite."""
    check_weights(path, content, network)
    network.load_state_dict(content["weights"])


def check_weights(path: Path, content: dict[str, Any], network: nn.Module) -> None:
    """Raise UserError unless the weights that `load` read from the path fit the network and are finite."""
    weights, own = content["weights"], network.state_dict()
    if weights.keys() != own.keys() or not all(_is_like(tensor, own[name]) for name, tensor in weights.items()):
        raise UserError(f"the weights in {path} do not fit the network {content['model']}")
    if not all(tensor.isfinite().all() for tensor in weights.values()):
        raise UserError(f"the weights in {path} are not finite")


def _is_like(tensor: Any, other: Tensor) -> bool:
    """Say whether it is a dense CPU tensor of the other's shape and type, whose elements are all in the file.

    float16 stands for float32, as in the weights that come with the program.
    """
    return (
        type(tensor) is Tensor
        and (tensor.layout, tensor.device.type, tensor.is_quantized) == (torch.strided, "cpu", False)
        and tensor.shape == other.shape
        and (tensor.dtype == other.dtype or (tensor.dtype, other.dtype) == (torch.float16, torch.float32))
        and tensor.nbytes <= tensor.untyped_storage().nbytes()
    )


def _check_file(path: Path) -> None:
    """Raise, before anything is unpacked, unless the file is what torch.save writes: an uncompressed, intact zip.

    torch.load compares no checksum: a flipped bit is another weight.
    """
    if path.stat().st_size > _MAX_BYTES or not path.is_file():
        raise ValueError("not a file, or too large")
    with zipfile.ZipFile(path) as archive:
        pickled = sum(member.file_size for member in archive.infolist() if member.filename.endswith(".pkl"))
        if not is_stored(path) or pickled > _MAX_PICKLED_BYTES or archive.testzip():
            raise ValueError("not as torch.save writes it, or a checksum is wrong")


def is_stored(path: Path) -> bool:
    """Whether a zip file is uncompressed, as torch.save writes it: then it takes no more memory than it has bytes."""
    with zipfile.ZipFile(path) as archive:
        members = archive.infolist()
    is_uncompressed = all(member.compress_type == zipfile.ZIP_STORED for member in members)
    return is_uncompressed and sum(member.file_size for member in members) <= path.stat().st_size


def _problem(model: Any, classes: Any, image_size: Any, epoch: Any, weights: Any) -> str | None:
    """Return what is wrong with the parts of a checkpoint, if anything is."""
    if type(model) is not str:
        return "its network has no name"
    if type(classes) is not list or not 0 < len(classes) <= MAX_CLASSES or {type(name) for name in classes} != {str}:
        return "its classes are not names"
    if type(image_size) is not int or not 8 <= image_size <= MAX_IMAGE_SIZE:
        return "its image size is not possible"
    if type(epoch) is not int or epoch < 0:
        return "its epoch is not possible"
    return None if isinstance(weights, dict) else "it has no weights"
