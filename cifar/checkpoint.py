"""A network's weights on disk: the only torch.save and torch.load."""

from pathlib import Path
from typing import Any

import torch

from cifar.config import UserError
from cifar.runs import replacing

FORMAT = 1
_KEYS = {"format", "model", "classes", "image_size", "epoch", "weights"}


def save(path: Path, *, model: str, classes: tuple[str, ...], image_size: int, epoch: int, weights: dict) -> None:
    """Write a checkpoint; a reader sees the old one or the new one, never a part. Raises UserError if it cannot.

    weights: a state_dict. epoch: the epochs that made them, from 1.
    """
    content = {
        "format": FORMAT,
        "model": model,
        "classes": list(classes),
        "image_size": image_size,
        "epoch": epoch,
        "weights": weights,
    }
    with replacing(path) as partial:
        torch.save(content, partial)


def load(path: Path) -> dict[str, Any]:
    """What `save` wrote, with the weights on the CPU; nothing in the file is executed.

    Raises UserError if the file is missing, damaged or of another format.
    """
    try:
        content = torch.load(path, map_location="cpu", weights_only=True)
    except FileNotFoundError:
        raise UserError(f"there is no checkpoint {path}: the run ended before its first epoch did") from None
    except PermissionError as error:
        raise UserError(f"cannot read the checkpoint {path}: {error.strerror}") from None
    except Exception:  # a damaged file makes the unpickler stumble in any way there is
        raise UserError(f"the checkpoint {path} is damaged or not one of this program's") from None
    if not isinstance(content, dict) or content.keys() != _KEYS or content["format"] != FORMAT:
        raise UserError(f"the checkpoint {path} is not of format {FORMAT}")
    return content
