"""A network's weights on disk, and with them the state of a training: the only torch.save and torch.load."""

import io
import zipfile
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from cifar.errors import UserError
from cifar.files import replacing

FORMAT = 1
_KEYS = {"format", "model", "classes", "image_size", "epoch", "weights"}
_MOST_BYTES = 16_000_000_000  # of a file: twice that of torchvision's largest with what Adam remembers
_MOST_PICKLED = 4_000_000  # bytes, of the part that is not tensors
_MOST_PIXELS = 128  # along a side of an image
_MOST_CLASSES = 10_000


def save(
    path: Path,
    *,
    model: str,
    classes: tuple[str, ...],
    image_size: int,
    epoch: int,
    weights: dict[str, Tensor],
    training: dict[str, Any] | None = None,
    previous: Path | None = None,
) -> None:
    """Write a checkpoint; a reader sees the old one or the new one, never a part. Raises UserError if it cannot.

    weights: a state_dict. epoch: the epochs that made them, from 1. training: what a training needs to go on.
    previous: the name that the old one gets.
    """
    content = {
        "format": FORMAT,
        "model": model,
        "classes": list(classes),
        "image_size": image_size,
        "epoch": epoch,
        "weights": weights,
    }
    # Into memory first: where the disk is full, torch.save itself tells no more than that it failed.
    file = io.BytesIO()
    torch.save(content if training is None else {**content, "training": training}, file)
    with replacing(path, previous) as partial:
        partial.write_bytes(file.getbuffer())


def load(path: Path) -> dict[str, Any]:
    """What `save` wrote, on the CPU; nothing in the file is executed.

    `weights` still have to go through `put_weights`, and what is in `training`, if it is there, through who takes it
    up. Raises UserError if the file is missing, damaged or of another format.
    """
    try:
        _check_file(path)
        content = torch.load(path, map_location="cpu", weights_only=True)
    except FileNotFoundError:
        why = "the run ended before its first epoch did, or the file was taken away"
        raise UserError(f"there is no checkpoint {path}: {why}") from None
    except PermissionError as error:
        raise UserError(f"cannot read the checkpoint {path}: {error.strerror}") from None
    except Exception:  # a damaged file makes the unpickler stumble in any way there is
        raise UserError(f"the checkpoint {path} is damaged or not one of this program's") from None
    if not isinstance(content, dict) or content.keys() - {"training"} != _KEYS or content["format"] != FORMAT:
        raise UserError(f"the checkpoint {path} is not of format {FORMAT}")
    if problem := _problem(**{key: content[key] for key in _KEYS - {"format"}}):
        raise UserError(f"the checkpoint {path} is damaged: {problem}")
    return content


def put_weights(path: Path, content: dict[str, Any], network: nn.Module) -> None:
    """Give the network what `load` read from the path. Raises UserError unless it fits and all of it is finite."""
    weights, own = content["weights"], network.state_dict()
    if weights.keys() != own.keys() or not all(_is_like(tensor, own[name]) for name, tensor in weights.items()):
        raise UserError(f"the weights in {path} do not fit the network {content['model']}")
    if not all(tensor.isfinite().all() for tensor in weights.values()):
        raise UserError(f"the weights in {path} are not finite")
    network.load_state_dict(weights)


def check_tensor(name: str, tensor: Any, like: Tensor) -> None:
    """Raise ValueError unless it is a finite tensor of the shape and type of the other."""
    if not (_is_like(tensor, like) and tensor.isfinite().all()):
        raise ValueError(f"its {name} is not possible")


def _is_like(tensor: Any, other: Tensor) -> bool:
    """Whether it is a dense tensor on the CPU, of the other's shape and type, whose elements are all in the file."""
    return (
        type(tensor) is Tensor
        and (tensor.layout, tensor.device.type, tensor.is_quantized) == (torch.strided, "cpu", False)
        and (tensor.shape, tensor.dtype) == (other.shape, other.dtype)
        and tensor.nbytes <= tensor.untyped_storage().nbytes()
    )


def _check_file(path: Path) -> None:
    """Raise, before anything is unpacked, unless the file is what torch.save writes: a zip, not compressed, intact.

    So it takes no more memory than it has bytes. torch.load compares no checksum: a flipped bit is another weight.
    """
    size = path.stat().st_size
    if not path.is_file() or size > _MOST_BYTES:
        raise ValueError("not a file, or too large")
    with zipfile.ZipFile(path) as archive:
        members = archive.infolist()
        stored = all(member.compress_type == zipfile.ZIP_STORED for member in members)
        pickled = sum(member.file_size for member in members if member.filename.endswith(".pkl"))
        if not stored or sum(member.file_size for member in members) > size or pickled > _MOST_PICKLED:
            raise ValueError("not as torch.save writes it")
        if archive.testzip():
            raise ValueError("a checksum is wrong")


def _problem(model: Any, classes: Any, image_size: Any, epoch: Any, weights: Any) -> str | None:
    """What is wrong with the parts of a checkpoint, if anything is."""
    if type(model) is not str:
        return "its network has no name"
    if type(classes) is not list or not 0 < len(classes) <= _MOST_CLASSES or {type(name) for name in classes} != {str}:
        return "its classes are no names"
    if type(image_size) is not int or not 8 <= image_size <= _MOST_PIXELS:
        return "its image size is not possible"
    if type(epoch) is not int or epoch < 0:
        return "its epoch is not possible"
    return None if isinstance(weights, dict) else "its weights are none"
