"""A folder of the user's images as a dataset: listed by class, split, decoded, and cached."""

import hashlib
import os
from collections import Counter, defaultdict
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import PIL
import torch
from torch import Tensor

from cifar import console
from cifar.data import Split
from cifar.errors import UserError, listing
from cifar.images import decode_all
from cifar.runs import atomic_write, writing

_DECODED_TOGETHER = 500  # images
_SPLIT_NAMES = ("train", "training", "test", "testing", "val", "valid", "validation")
_LITTER = ("Thumbs.db", "desktop.ini", "__MACOSX", "lost+found")  # that systems leave in folders


@dataclass(frozen=True)
class ImageFolder:
    """The images of a folder. Test images are sorted by their names, training images by their hashes."""

    classes: tuple[str, ...]
    train: Split
    test: Split
    note: str | None  # what the user must not overlook


@dataclass(frozen=True)
class _File:
    name: str  # relative to the root, with /
    size: int  # bytes
    changed: int  # in nanoseconds
    label: int
    part: str  # train, test, or "" if the folder is not split


def load(root: Path, size: int, cache_dir: Path) -> ImageFolder:
    """Load the images of root/train/CLASS/ and root/test/CLASS/, or of root/CLASS/, at any depth below these.

    size: pixels; images are decoded and cropped to squares as by `images.decode`. cache_dir: keeps them decoded.
    Classes are named by their folders, and sorted. Without train/ and test/, the fifth of each class with the lowest
    SHA-256 is the test split: the same images for every seed and whatever their names are, so that it stays sealed over
    many runs, and copies of an image are on the same side.
    Raises UserError if there are not two classes, too few images of one, or too many files that are not images.
    """
    try:
        classes, files, ignored = list_images(root)
        cache = cache_dir / "decoded" / f"{root.name}-{_hash(str(root))[:12]}-{size}.npz"
        # 3: the format of the cache
        fingerprint = _hash(repr([3, size, PIL.__version__, classes, ignored, files]))
        if images := _read_cache(cache, fingerprint, classes):
            return images
        images = _read(root, classes, files, ignored, size)
    except OSError as error:
        raise UserError(f"cannot read {error.filename or root}: {error.strerror}") from None
    _write_cache(cache, fingerprint, images)
    return images


def _hash(text: str) -> str:
    return hashlib.sha256(text.encode(errors="surrogateescape")).hexdigest()


# Listing


def list_images(root: Path) -> tuple[tuple[str, ...], list[_File], list[str]]:
    """Return the classes, their files sorted by name, and the names of folders beside train/ and test/."""
    folders = _folders(root)
    parts = ("train", "test") if {"train", "test"} <= set(folders) else ("",)
    classes = _folders(root / parts[0])
    _require_classes(root, parts, classes)
    files = [
        _File(*found, label, part)
        for part in parts
        for label, name in enumerate(classes)
        for found in _walk(root / part / name, Path(part, name).as_posix())
    ]
    if not files:
        raise UserError(f"{root} is empty: there are no images in its folders")
    ignored = sorted(set(folders) - set(parts)) if parts[0] else []
    return tuple(classes), sorted(files, key=lambda file: file.name), ignored


def _require_classes(root: Path, parts: Sequence[str], classes: list[str]) -> None:
    """Raise UserError unless the folder has two classes or more with readable names."""
    splits = [name for name in classes if name.lower() in _SPLIT_NAMES and _folders(root / name)]
    if splits and not parts[0]:
        advice = "name the two splits train and test; validation images are taken from train"
        raise UserError(f"{root} has {listing(splits)}, and not both train and test: {advice}")
    for name in (root.name, *classes):
        if name.encode(errors="replace").decode() != name:
            raise UserError(f"cannot use {root}: the name {name!a} is not valid UTF-8; rename it")
    if not classes:
        raise UserError(f"{root / parts[0]} has no folders: put the images of each class into a folder of its name")
    if len(classes) == 1:
        raise UserError(f"{root / parts[0]} has only one class, {classes[0]}; at least two are needed")
    if unknown := set(_folders(root / parts[-1])) - set(classes):
        raise UserError(f"{root / 'test'} has classes that train/ does not have: {listing(sorted(unknown))}")


def _folders(folder: Path) -> list[str]:
    return sorted(entry.name for entry in _entries(folder) if entry.is_dir())


def _entries(folder: Path) -> list[os.DirEntry]:
    """List what is in a folder, except hidden files and litter."""
    return [entry for entry in os.scandir(folder) if not entry.name.startswith(".") and entry.name not in _LITTER]


def _walk(folder: Path, prefix: str) -> Iterator[tuple[str, int, int]]:
    """Yield name, size and time of change of each file in the folder and below it."""
    for entry in _entries(folder):
        name = f"{prefix}/{entry.name}"
        if entry.is_dir(follow_symlinks=False):
            yield from _walk(Path(entry.path), name)
        elif entry.is_file():
            yield name, entry.stat().st_size, entry.stat().st_mtime_ns


# Splitting and decoding


def _read(root: Path, classes: tuple[str, ...], files: list[_File], ignored: list[str], size: int) -> ImageFolder:
    with ThreadPoolExecutor(os.cpu_count()) as pool:
        digests = dict(zip(files, pool.map(lambda file: _digest(root / file.name), files)))
    is_split = bool(files[0].part)
    test = [file for file in files if file.part == "test"] if is_split else _choose_test(files, digests)
    train = sorted(set(files) - set(test), key=lambda file: (digests[file], file.name))
    _require_enough(root, classes, train, test)
    images, errors = _decode(root, train + test, size)
    notes = []
    if ignored:
        notes.append(f"{', '.join(ignored)} beside train and test: ignored; validation images are taken from train.")
    if errors:
        notes.append(_unreadable(errors, len(files)))
        images = images[[file not in errors for file in train + test]]
        train, test = ([file for file in part if file not in errors] for part in (train, test))
        _require_enough(root, classes, train, test)
    names = {digests[file]: file.name for file in train}
    if copies := [f"{file.name} is {names[digests[file]]}" for file in test if digests[file] in names]:
        count = f"{len(copies):,} of {len(test):,} test images are also training images"
        notes.append(f"{count}, so the test accuracy is too high: {listing(copies)}.")
    everything = Split(images, torch.tensor([file.label for file in train + test]))
    return ImageFolder(classes, everything[: len(train)], everything[len(train) :], " ".join(notes) or None)


def _digest(path: Path) -> bytes:
    try:
        with path.open("rb") as file:
            return hashlib.file_digest(file, "sha256").digest()
    except OSError:  # the decoder reports it
        return b""


def _choose_test(files: list[_File], digests: dict[_File, bytes]) -> list[_File]:
    """Choose the fifth of each class with the lowest digests, and their copies."""
    by_label = defaultdict(list)
    for file in files:
        by_label[file.label].append(digests[file])
    last = {label: sorted(own)[max(1, round(len(own) / 5)) - 1] for label, own in by_label.items()}
    return [file for file in files if digests[file] <= last[file.label]]


def _require_enough(root: Path, classes: tuple[str, ...], train: list[_File], test: list[_File]) -> None:
    """Raise UserError if a class has not one image to train on, one to validate with and one to test."""
    counts = [Counter(file.label for file in files) for files in (train, test)]
    if few := [name for label, name in enumerate(classes) if counts[0][label] < 2 or counts[1][label] < 1]:
        is_split = any(file.part for file in train + test)
        needed = "2 in train/ and 1 in test/" if is_split else "3 different ones"
        raise UserError(f"{root} has too few images of {listing(few)}: each class needs at least {needed}")


def _decode(root: Path, files: list[_File], size: int) -> tuple[Tensor, dict[_File, UserError]]:
    """Return the images (N, 3, size, size), and the errors of files that are not images, whose pixels are arbitrary."""
    images = torch.empty(len(files), 3, size, size, dtype=torch.uint8)
    errors = {}
    console.say(f"decoding {len(files):,} images of {root}")
    with console.counting_bar("images", len(files)) as advance:
        for start in range(0, len(files), _DECODED_TOGETHER):
            batch = files[start : start + _DECODED_TOGETHER]
            for index, image in enumerate(decode_all([root / file.name for file in batch], size), start):
                if isinstance(image, UserError):
                    errors[files[index]] = image
                else:
                    images[index] = image
            advance(len(batch))
    return images, errors


def _unreadable(errors: dict[_File, UserError], count: int) -> str:
    """Name the files that are not images. Raises UserError if they are over 1% of `count`."""
    names = listing(sorted(f"{file.name} ({error})" for file, error in errors.items()))
    failed = f"{len(errors):,} of {count:,} files"
    if len(errors) > count / 100:
        raise UserError(f"cannot read {failed} as images (at most 1% may fail): fix or delete {names}")
    return f"{failed} could not be read as images and were left out: {names}."


# The cache: one .npz file for each folder and image size. It holds only arrays: reading it cannot run code.


def _read_cache(cache: Path, fingerprint: str, classes: tuple[str, ...]) -> ImageFolder | None:
    """Read the images back; None if there is no cache, a file has changed since it was written, or it is damaged."""
    try:
        with cache.open("rb") as file, np.load(file, allow_pickle=False) as arrays:  # compares checksums
            written_for, note = arrays["about"].tolist()
            if written_for == fingerprint:
                train, test = (
                    Split(torch.from_numpy(arrays[f"{part}_images"]), torch.from_numpy(arrays[f"{part}_labels"]))
                    for part in ("train", "test")
                )
                return ImageFolder(classes, train, test, note or None)
    except Exception:  # numpy and zipfile raise exceptions of any type for damaged files
        pass
    return None


def _write_cache(cache: Path, fingerprint: str, images: ImageFolder) -> None:
    """Save the images, or say that it is not possible."""
    try:
        with writing(cache):
            cache.parent.mkdir(parents=True, exist_ok=True)
        with atomic_write(cache) as partial, partial.open("wb") as file:
            np.savez(
                file,
                about=np.array([fingerprint, images.note or ""]),
                train_images=images.train.images.numpy(),
                train_labels=images.train.labels.numpy(),
                test_images=images.test.images.numpy(),
                test_labels=images.test.labels.numpy(),
            )
    except UserError as error:
        console.say(f"the images cannot be cached, and will be decoded again by the next run: {error}")
