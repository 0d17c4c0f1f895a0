"""Decoded images on the disk: a file of pixels for each split, mapped into memory by any number of processes.

They are written once, and checked before they are used. about.json, which describes them, is written last.
"""

import contextlib
import hashlib
import json
import math
import mmap
import warnings
from collections.abc import Iterable
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from cifar import files
from cifar.data import Split
from cifar.files import atomic_write, open_regular

PARTS = ("train", "test")
_ABOUT = "about.json"
# Bytes of a file whose pixels are always compared with their hash, which takes half a second. Those of a larger file
# are if its time of change is not the one recorded.
_ALWAYS_HASHED = 1e9


def write(place: Path, images: Iterable[tuple[str, Tensor]]) -> dict[str, Any]:
    """Write each image to the file of its part; returns a SHA-256 for each part, which `seal` takes.

    None of the files appears before all images have been written. Raises UserError if they cannot be.
    """
    digests = {part: hashlib.sha256() for part in PARTS}
    with contextlib.ExitStack() as stack:
        partial = {part: stack.enter_context(atomic_write(_pixels(place, part))) for part in PARTS}
        opened = {part: stack.enter_context(path.open("wb")) for part, path in partial.items()}
        for part, image in images:
            pixels = image.contiguous().numpy().data
            opened[part].write(pixels)
            digests[part].update(pixels)
    return digests


def seal(place: Path, digests: dict[str, Any], labels: dict[str, Tensor], about: dict[str, Any]) -> None:
    """Describe the files that `write` has written, so that `read` accepts them; about: what else to keep, as JSON."""
    for part, digest in digests.items():
        digest.update(labels[part].numpy())
        status = _pixels(place, part).stat()
        about |= {f"{part}_sha256": digest.hexdigest(), f"{part}_changed": status.st_mtime_ns}
    with atomic_write(place / _ABOUT) as partial:
        partial.write_text(json.dumps(about), encoding="utf-8")


def read_about(place: Path) -> dict[str, Any]:
    """Read what `seal` has kept. Raises UserError or ValueError if it is missing or damaged."""
    return files.parse_json(files.read(place / _ABOUT))


def read(place: Path, part: str, labels: Tensor, size: int, about: dict[str, Any]) -> Split:
    """Map the images of a part into memory. Raises ValueError, KeyError or OSError if they changed since `seal`."""
    shape = (len(labels), 3, size, size)
    with open_regular(_pixels(place, part)) as file:
        mapping = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ)
        changed = _pixels(place, part).stat().st_mtime_ns
    if len(mapping) != math.prod(shape):
        raise ValueError("the file has another size")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # that torch cannot write to it
        source = torch.frombuffer(mapping, dtype=torch.uint8).view(shape)
    split = Split(source, labels, mapping=mapping)
    is_hashed = len(mapping) <= _ALWAYS_HASHED or changed != about[f"{part}_changed"]
    if is_hashed and split.sha256() != about[f"{part}_sha256"]:
        raise ValueError("the pixels have changed")
    return replace(split, digest=about[f"{part}_sha256"])


def _pixels(place: Path, part: str) -> Path:
    return place / f"{part}.pixels"
