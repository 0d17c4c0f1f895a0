"""A folder of the user's own pictures: listed by class, split, decoded once, and kept decoded in a cache."""

import hashlib
import json
import os
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import PIL
import torch

from cifar import console, shapes
from cifar.data import Split
from cifar.errors import UserError, some
from cifar.files import replacing
from cifar.picture import decode_all

_FORMAT = 1  # of a cache; one that another release wrote is made anew
_TOGETHER = 500  # pictures decoded at a time
_TEST_SHARE = 0.2  # of a folder that has no test/
_REFUSED_SHARE = 0.01  # of the files may be no pictures
_LEAST = {"train": 2, "test": 1}  # pictures of a class: one to train on, one to validate with, one to test


@dataclass(frozen=True)
class Pictures:
    """What a folder holds. The test pictures are in the order of their names, the others in that of their hashes."""

    classes: tuple[str, ...]
    all: Split  # first those to train on
    train_size: int
    note: str | None  # what must not be overlooked

    @property
    def train(self) -> Split:
        return self.all[: self.train_size]

    @property
    def test(self) -> Split:
        return self.all[self.train_size :]


@dataclass(frozen=True)
class _File:
    name: str  # from the root, with /
    label: int
    part: str  # train, test, or "" where the folder does not say
    state: str  # size and time of change


def load(root: Path, size: int, cache_dir: Path) -> Pictures:
    """The pictures of root/train/CLASS/ and root/test/CLASS/, or of root/CLASS/, in any depth, size x size pixels.

    Classes are named by their folders, and sorted. Pictures are decoded and made square as `picture.decode` does.
    Without train/ and test/, the fifth of each class with the lowest SHA-256 is the test split: it stays the same
    whatever the seed and the names, so that it stays sealed over many runs, and copies of a picture stay together.
    Raises UserError if the folder has no two classes, too few pictures of one, or too much that is no picture.
    """
    try:
        classes, files, unread = _list(root)
        cache = cache_dir / "decoded" / f"{root.name}-{_hash([str(root)])[:12]}-{size}.npz"
        states = (f"{file.name}\0{file.state}" for file in files)
        fingerprint = _hash([str(_FORMAT), str(size), PIL.__version__, *classes, *unread, *states])
        if pictures := _load(cache, fingerprint, classes):
            return pictures
        pictures = _read(root, classes, files, unread, size)
    except OSError as error:
        raise UserError(f"cannot read {error.filename or root}: {error.strerror}") from None
    _save(cache, fingerprint, pictures)
    return pictures


def _hash(texts: Sequence[str]) -> str:
    return hashlib.sha256("\n".join(texts).encode(errors="surrogateescape")).hexdigest()


# What lies where.


def _list(root: Path) -> tuple[tuple[str, ...], list[_File], list[str]]:
    """The classes, all files in their folders but the hidden ones, sorted by name, and the folders beside train/."""
    inside = set(_folders(root))
    if "train" in inside and "test" not in inside and _folders(root / "train"):
        raise UserError(f"{root} has train/ but no test/: add it, or put the classes' folders into {root} itself")
    parts = ["train", "test"] if {"train", "test"} <= inside else [""]
    classes = _folders(root / parts[0])
    if unreadable := [name for name in (root.name, *classes) if not shapes.text(name)]:
        raise UserError(f"{root} cannot be read: the name {unreadable[0]!a} is not in UTF-8, rename it")
    if not classes:
        raise UserError(f"{root / parts[0]} has no folders: each class's pictures go into one that is called like it")
    if len(classes) == 1:
        raise UserError(f"{root / parts[0]} has one class, {classes[0]}: there is nothing to tell apart")
    if strange := set(_folders(root / parts[-1])) - set(classes):
        raise UserError(f"{root / 'test'} has classes that train/ has not: {some(sorted(strange))}")
    numbers = {name: number for number, name in enumerate(classes)}
    places = [(part, name) for part in parts for name in classes if (root / part / name).is_dir()]
    files = [
        _File(name, numbers[label], part, state)
        for part, label in places
        for name, state in _walk(root / part / label, "/".join(filter(None, (part, label))))
    ]
    if not files:
        raise UserError(f"{root} is empty: there is no picture in its folders")
    return tuple(classes), sorted(files, key=lambda file: file.name), sorted(inside - set(parts)) if parts[0] else []


def _folders(place: Path) -> list[str]:
    return sorted(entry.name for entry in os.scandir(place) if entry.is_dir() and not entry.name.startswith("."))


def _walk(place: Path, name: str) -> Iterator[tuple[str, str]]:
    """Name and state of each file in the folder, and in those below it."""
    for entry in os.scandir(place):
        if entry.name.startswith("."):
            continue
        if entry.is_dir(follow_symlinks=False):
            yield from _walk(Path(entry.path), f"{name}/{entry.name}")
        elif entry.is_file():
            about = entry.stat()
            yield f"{name}/{entry.name}", f"{about.st_size} {about.st_mtime_ns}"


# Splitting and decoding.


def _read(root: Path, classes: tuple[str, ...], files: list[_File], unread: list[str], size: int) -> Pictures:
    with ThreadPoolExecutor(os.cpu_count()) as pool:
        digests = dict(zip(files, pool.map(lambda file: _digest(root / file.name), files)))
    tested = [file for file in files if file.part == "test"] if files[0].part else _drawn(files, digests)
    trained = sorted(set(files) - set(tested), key=lambda file: (digests[file], file.name))
    _require_enough(root, classes, trained, tested)
    images, refusals = _decode(root, trained + tested, size)
    notes = [f"{', '.join(unread)} beside train and test: not read; validation is held out of train."] if unread else []
    if refusals:
        kept = [number for number, file in enumerate(trained + tested) if file.name not in refusals]
        images = images[kept]
        trained, tested = ([file for file in part if file.name not in refusals] for part in (trained, tested))
        notes.append(_left_out(refusals, files))
        _require_enough(root, classes, trained, tested)
    notes += _leaked(digests, trained, tested)
    labels = torch.tensor([file.label for file in trained + tested])
    return Pictures(classes, Split(images, labels), len(trained), " ".join(notes) or None)


def _digest(path: Path) -> bytes:
    try:
        with path.open("rb") as file:
            return hashlib.file_digest(file, "sha256").digest()
    except OSError:  # the decoder will say why
        return b""


def _drawn(files: list[_File], digests: dict[_File, bytes]) -> list[_File]:
    """The files of the test split of a folder that does not say."""
    by_label: dict[int, list[bytes]] = {}
    for file in files:
        by_label.setdefault(file.label, []).append(digests[file])
    last = {label: sorted(own)[max(1, round(_TEST_SHARE * len(own))) - 1] for label, own in by_label.items()}
    return [file for file in files if digests[file] <= last[file.label]]


def _require_enough(root: Path, classes: tuple[str, ...], trained: list[_File], tested: list[_File]) -> None:
    few = set()
    for part, files in (("train", trained), ("test", tested)):
        counts = np.bincount([file.label for file in files], minlength=len(classes))
        few.update(np.flatnonzero(counts < _LEAST[part]).tolist())
    if few:
        has_parts = any(file.part for file in trained + tested)
        least = f"{_LEAST['train']} in train/ and {_LEAST['test']} in test/" if has_parts else "3 that differ"
        names = some([classes[number] for number in sorted(few)])
        raise UserError(f"{root} has too few pictures of {names}: each class takes at least {least}")


def _decode(root: Path, files: list[_File], size: int) -> tuple[torch.Tensor, dict[str, str]]:
    """The images (N, 3, size, size), arbitrary where there was no picture, and why by the names of those files."""
    images = torch.empty(len(files), 3, size, size, dtype=torch.uint8)
    refusals = {}
    console.say(f"decoding {len(files):,} pictures of {root}")
    with console.counting_bar("pictures", len(files)) as advance:
        for start in range(0, len(files), _TOGETHER):
            batch = files[start : start + _TOGETHER]
            for place, image in enumerate(decode_all([root / file.name for file in batch], size)):
                if isinstance(image, UserError):
                    refusals[batch[place].name] = str(image)
                else:
                    images[start + place] = image
            advance(len(batch))
    return images, refusals


def _left_out(refusals: dict[str, str], files: list[_File]) -> str:
    """The sentence that names the files that are no pictures. Raises UserError if they are too many."""
    names = some([f"{name} ({reason})" for name, reason in sorted(refusals.items())])
    told = f"{len(refusals):,} of {len(files):,} files could not be read as pictures"
    if len(refusals) > _REFUSED_SHARE * len(files):
        raise UserError(f"{told}, and {_REFUSED_SHARE:.0%} is the most that is passed over: mend or delete {names}")
    return f"{told} and were left out: {names}."


def _leaked(digests: dict[_File, bytes], trained: list[_File], tested: list[_File]) -> list[str]:
    """The sentence that names the test pictures that are training pictures too, byte for byte; none if none is."""
    known = {digests[file]: file.name for file in trained}
    pairs = [f"{file.name} is {known[digests[file]]}" for file in tested if digests[file] in known]
    if not pairs:
        return []
    told = f"{len(pairs):,} of {len(tested):,} test pictures are training pictures too, which flatters the accuracy"
    return [f"{told}: {some(pairs)}."]


# The cache: one .npz file for a folder and an image size. It holds arrays alone, and reading it executes nothing.


def _load(cache: Path, fingerprint: str, classes: tuple[str, ...]) -> Pictures | None:
    """The pictures as they were saved; None if there is no cache, a file has changed since, or it is damaged."""
    try:
        with cache.open("rb") as file, np.load(file, allow_pickle=False) as arrays:
            about = json.loads(str(arrays["about"]))
            if about["fingerprint"] != fingerprint:
                return None
            everything = Split(torch.from_numpy(arrays["images"]), torch.from_numpy(arrays["labels"]))
            return Pictures(classes, everything, about["train_size"], about["note"])
    except Exception:  # a damaged file makes numpy and zipfile stumble in any way there is
        return None


def _save(cache: Path, fingerprint: str, pictures: Pictures) -> None:
    """Save the pictures, or say that it is not possible."""
    about = {"fingerprint": fingerprint, "train_size": pictures.train_size, "note": pictures.note}
    arrays = {"images": pictures.all.images.numpy(), "labels": pictures.all.labels.numpy()}
    try:
        with replacing(cache) as partial:
            cache.parent.mkdir(parents=True, exist_ok=True)
            with partial.open("wb") as file:
                np.savez(file, about=np.array(json.dumps(about)), **arrays)
    except UserError as error:
        console.say(f"the pictures will be decoded anew at the next start: {error}")
