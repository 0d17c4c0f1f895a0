"""A folder of the user's images as a dataset: listed by class, split, decoded, and cached."""

import hashlib
import json
import os
import stat
from collections import Counter, defaultdict
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from pathlib import Path
from typing import NamedTuple

import numpy as np
import PIL
import torch
from torch import Tensor

from cifar import console, device
from cifar.data import Split
from cifar.errors import UserError, listing
from cifar.files import atomic_write, open_regular, writing
from cifar.images import decode_all

_DECODED_TOGETHER = 500  # images
_SPLITS = {"train": "train", "training": "train", "test": "test", "testing": "test"}
_SPLITS |= {"val": "val", "valid": "val", "validation": "val"}
# What systems leave in folders, in lower case.
_LITTER = ("thumbs.db", "desktop.ini", "__macosx", "lost+found", "@eadir", "$recycle.bin", "system volume information")
# The extensions, or none, of images that the decoder reads, and of some that it does not.
_IMAGES = ("", ".png", ".jpg", ".jpeg", ".jpe", ".jfif", ".mpo", ".gif", ".webp", ".avif", ".bmp", ".tif", ".tiff")
_IMAGES += (".ppm", ".pgm", ".pbm", ".pnm", ".ico")
_CONVERTIBLE = (".heic", ".heif", ".jp2", ".psd", ".svg", ".dng", ".cr2", ".cr3", ".nef", ".arw")
_LEAST = {"train": 2, "test": 1, "": 3}  # images of a class; one of those in train is for validation
# Below, a note warns. With 9 test images, one is 11 points of the accuracy of its class.
_TOO_FEW = {"train": (20, "to learn"), "test": (10, "to measure")}


@dataclass(frozen=True)
class ImageFolder:
    """The images of a folder. Test images are sorted by their names, training images by their hashes."""

    classes: tuple[str, ...]
    train: Split
    test: Split
    test_files: tuple[str, ...]  # of each test image: relative to the folder, with /
    note: str | None  # what the user must not overlook


@dataclass(frozen=True)
class _File:
    name: str  # relative to the root, with /
    size: int  # bytes
    changed: int  # in nanoseconds
    label: int
    part: str  # train, test, or "" while the folder is not split
    digest: bytes = b""  # SHA-256, once it has been read


class Found(NamedTuple):
    """What a folder has, before any file is opened."""

    classes: tuple[str, ...]
    files: list[_File]  # sorted by name
    notes: list[str]  # sentences about what is left out


def load(root: Path, size: int, cache_dir: Path) -> ImageFolder:
    """Load the images of root/train/CLASS/ and root/test/CLASS/, or of root/CLASS/, at any depth below these.

    size: pixels; images are decoded and cropped to squares as by `images.decode`. cache_dir: keeps them decoded.
    Classes are named by their folders, and sorted. Without train/ and test/, the fifth of each class with the lowest
    SHA-256 is the test split: the same images for every seed and whatever their names are, so that it stays sealed over
    many runs, and copies of an image in one class are on the same side.
    Raises UserError if there are not two classes, too few images of one, too many files that cannot be read, or more
    images than fit into memory.
    """
    found = list_images(root)
    _require_memory(root, len(found.files), size)
    cache = cache_dir / ".decoded" / f"{root.name[:50]}-{_sha256(root)[:12]}-{size}.npz"
    fingerprint = _sha256([5, size, PIL.__version__, found])  # 5: of the decoder's rules and the cache's format
    if images := _read_cache(cache, fingerprint, root, found, size):
        return images
    files, pixels, note = _read(root, found, size)
    _write_cache(cache, fingerprint, files, pixels, note)
    return _assemble(found.classes, files, pixels, note)


def _assemble(classes: tuple[str, ...], files: list[_File], pixels: Tensor, note: str | None) -> ImageFolder:
    """Make the dataset of its files, those of train first, and their pixels (N, 3, size, size)."""
    everything = Split(pixels, torch.tensor([file.label for file in files]))
    test_files = tuple(file.name for file in files if file.part == "test")
    start = len(files) - len(test_files)
    return ImageFolder(classes, everything[:start], everything[start:], test_files, note)


def _sha256(content: object) -> str:
    return hashlib.sha256(repr(content).encode()).hexdigest()


# Listing


def list_images(root: Path) -> Found:
    """List the classes and their images. Raises UserError if there are not two classes with enough images each."""
    try:
        return _list(root)
    except OSError as error:
        raise UserError(f"cannot read {error.filename or root}: {error.strerror}") from None


def _list(root: Path) -> Found:
    parts = _find_splits(root)
    first, last = parts.get("train", root), parts.get("test", root)
    classes = _folders(first)
    _require_classes(root, first, classes)
    if different := sorted(set(classes) ^ set(_folders(last))):
        raise UserError(f"{root} needs each class in train and in test: only one of the two has {listing(different)}")
    passed: dict[str, list[str]] = defaultdict(list)
    files = [
        _File(name, status.st_size, status.st_mtime_ns, label, part)
        for part, folder in parts.items()
        for label, class_name in enumerate(classes)
        for name, status in _walk(root, folder / class_name, passed)
    ]
    for folder in sorted({root, first, last}):
        for entry in _entries(folder):
            if not os.path.exists(entry):
                passed["broken link"].append(entry.name)
            elif os.path.isfile(entry) and _suffix(entry.name) in _IMAGES[1:]:
                passed["loose image"].append(entry.name)
    notes = [_count(passed)] if passed else []
    if "test" in parts and (beside := sorted(set(_folders(root)) - {first.name, last.name})):
        notes.append(f"{listing(beside)} beside train and test: ignored; validation images are taken from train.")
    _require_enough(root, classes, files, tuple(parts), notes)
    return Found(tuple(classes), sorted(files, key=lambda file: file.name), notes)


def find_images(root: Path) -> tuple[list[Path], str]:
    """List the images in a folder and below it, sorted by name, and say what else is passed over."""
    passed: dict[str, list[str]] = defaultdict(list)
    try:
        names = sorted(name for name, _ in _walk(root, root, passed))
    except OSError as error:
        raise UserError(f"cannot read {error.filename or root}: {error.strerror}") from None
    return [root / name for name in names], _count(passed) if passed else ""


def _find_splits(root: Path) -> dict[str, Path]:
    """Return the folders of train and test, in any usual spelling; {"": root} if the images are not split."""
    spelled: dict[str, list[str]] = defaultdict(list)
    for name in _folders(root):
        spelled[_SPLITS.get(name.lower(), "")].append(name)
    train, test, val = spelled["train"], spelled["test"], spelled["val"]
    if len(train) == len(test) == 1:
        return {"train": root / train[0], "test": root / test[0]}
    if splits := [name for name in (*train, *test, *val) if _folders(root / name)]:  # without, it is a class
        can_rename = train and val and not test
        hint = f", so rename {val[0]} to test (validation images are taken from train)" if can_rename else ""
        raise UserError(
            f"{root} has {listing(splits)}, but needs exactly one train and one test folder{hint}; without a test "
            f"folder, use {root / splits[0]}: a fifth of it becomes the test split"
        )
    return {"": root}


def _require_classes(root: Path, folder: Path, classes: list[str]) -> None:
    """Raise UserError unless the folder has two classes or more, which have readable names and are not splits."""
    for name in (root.name, *classes):
        if name.encode(errors="replace").decode() != name:
            raise UserError(f"cannot use {root}: the name {name!a} is not valid UTF-8; rename it")
    if not classes:
        raise UserError(f"{folder} has no folders: put the images of each class into a folder of its name")
    inner = _folders(folder / classes[0])
    if len(classes) == 1:
        hint = f"; or use {folder / classes[0]}, if its folders are the classes" if len(inner) > 1 else ""
        raise UserError(f"{folder} has only one class, {classes[0]}: at least two are needed{hint}")
    if len(inner) > 1 and all(_folders(folder / name) == inner for name in classes[1:]):
        raise UserError(
            f"{listing(classes)} in {folder} all have the same folders, {listing(inner)}: if they are splits, rename "
            "them to train and test; if they are classes, put their images directly into them"
        )


def _folders(folder: Path) -> list[str]:
    return [entry.name for entry in _entries(folder) if os.path.isdir(entry)]


def _entries(folder: Path) -> list[os.DirEntry]:
    """List what is in a folder by its names, except hidden files and litter."""
    entries = (entry for entry in os.scandir(folder) if not entry.name.startswith("."))
    return sorted((entry for entry in entries if entry.name.lower() not in _LITTER), key=lambda entry: entry.name)


def _suffix(name: str) -> str:
    return os.path.splitext(name)[1].lower()


def _walk(root: Path, folder: Path, passed: dict[str, list[str]]) -> Iterator[tuple[str, os.stat_result]]:
    """Yield name and status of each image in the folder and below it; add all others to `passed`, by their kind.

    Links are followed, but no folder is entered twice, and none that holds this one.
    """
    waiting, entered = [folder], {*folder.parents, *folder.resolve().parents}
    while waiting:
        current = waiting.pop()
        prefix = "" if current == root else f"{current.relative_to(root).as_posix()}/"
        if (real := current.resolve()) in entered:
            passed["circular or repeated link"].append(prefix.removesuffix("/"))
            continue
        entered.add(real)
        for entry in _entries(current):
            name = f"{prefix}{entry.name}"
            try:
                status = entry.stat()
            except OSError:
                if not entry.is_symlink():
                    raise
                passed["broken link"].append(name)
                continue
            if stat.S_ISDIR(status.st_mode):
                waiting.append(current / entry.name)
            elif not stat.S_ISREG(status.st_mode):
                passed["special file"].append(name)
            elif (suffix := _suffix(entry.name)) not in _IMAGES:
                passed[f"{suffix} file"].append(name)
            else:
                yield name, status


def _count(passed: dict[str, list[str]]) -> str:
    """Say how many files of each kind are passed over."""
    kinds = []
    for kind, names in sorted(passed.items(), key=lambda item: -len(item[1])):
        count = f"{len(names):,} {kind}{'s' if len(names) > 1 else ''}"
        if kind.removesuffix(" file") in _CONVERTIBLE:
            count += ": convert them to JPEG"
        elif not kind.startswith("."):
            count += f" ({listing(names)})"
        kinds.append(count)
    if len(kinds) > 8:
        kinds[8:] = [f"{len(kinds) - 8} other kinds"]
    return f"Skipped: {'; '.join(kinds)}."


def _require_enough(
    root: Path, classes: Sequence[str], files: list[_File], parts: Sequence[str], notes: Sequence[str] = ()
) -> None:
    """Raise UserError if a class has not one image to train on, one to validate with and one to test."""
    counts = Counter((file.part, file.label) for file in files)
    few = [name for label, name in enumerate(classes) if any(counts[part, label] < _LEAST[part] for part in parts)]
    if few:
        needed = "each class needs at least 2 training images and 1 test image, all different"
        raise UserError(". ".join([f"{root} has too few images of {listing(few)}: {needed}", *notes]))


def _require_memory(root: Path, count: int, size: int) -> None:
    """Raise UserError if so many images of that size, and a copy of those to train on, do not fit into memory."""
    needed, free = 2 * count * 3 * size**2, device.memory()[1]
    if needed > free:
        advice = "use fewer images" + (", or a smaller --image-size" if size > 32 else "")
        raise UserError(
            f"{root} has {count:,} images, which at {size}x{size} pixels need {needed / 1e9:.1f} GB of memory, and "
            f"{free / 1e9:.1f} GB are available: {advice}"
        )


# Splitting and decoding


def _read(root: Path, found: Found, size: int) -> tuple[list[_File], Tensor, str | None]:
    """Return the files, those of train first, their pixels (N, 3, size, size), and what the user must not overlook."""
    files = _split(root, found.files)
    pixels, errors = _decode(root, files, size)
    notes = list(found.notes)
    if errors:
        notes.append(_unreadable(errors, len(files)))
        pixels = pixels[[file not in errors for file in files]]
        files = [file for file in files if file not in errors]
    _require_enough(root, found.classes, files, ("train", "test"), notes)
    notes += [*_copies(files), *_small_classes(found.classes, files)]
    return files, pixels, " ".join(notes) or None


def _split(root: Path, files: list[_File]) -> list[_File]:
    """Hash the files, choose those to test on unless they are split already, and sort them."""
    with ThreadPoolExecutor() as pool:
        digests = pool.map(lambda file: _digest(root / file.name), files)
        files = [replace(file, digest=digest) for file, digest in zip(files, digests)]
    if not files[0].part:
        by_label = defaultdict(list)
        for file in files:
            by_label[file.label].append(file.digest)
        last = {label: sorted(own)[max(1, round(len(own) / 5)) - 1] for label, own in by_label.items()}
        files = [replace(file, part="test" if file.digest <= last[file.label] else "train") for file in files]
    train, test = ([file for file in files if file.part == part] for part in ("train", "test"))
    return sorted(train, key=lambda file: (file.digest, file.name)) + test


def _digest(path: Path) -> bytes:
    try:
        with path.open("rb") as file:
            return hashlib.file_digest(file, "sha256").digest()
    except OSError:  # the decoder reports it
        return b""


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


def _copies(files: list[_File]) -> Iterator[str]:
    """Report images that are in two classes, in train and test, or twice in one of these."""
    originals: dict[bytes, _File] = {}
    classes, splits, others = [], [], []
    for file in files:
        original = originals.setdefault(file.digest, file)
        kind = classes if file.label != original.label else splits if file.part != original.part else others
        if file is not original:
            kind.append(f"{file.name} is {original.name}")
    if classes:
        yield f"In two classes: {len(classes):,} of {len(files):,} images ({listing(classes)})."
    if splits:
        count = (
            f"{len(splits):,} of {sum(file.part == 'test' for file in files):,} test images are also training images"
        )
        yield f"{count}, so the test accuracy is too high: {listing(splits)}."
    if others:
        yield f"Duplicates, which count twice: {len(others):,} of {len(files):,} images ({listing(others)})."


def _small_classes(classes: Sequence[str], files: list[_File]) -> Iterator[str]:
    """Report classes with so few images that what is learned or measured of them says little."""
    for part, (least, purpose) in _TOO_FEW.items():
        counts = Counter(file.label for file in files if file.part == part)
        few = sorted((counts[label], name) for label, name in enumerate(classes) if counts[label] < least)
        if few:
            names = listing([f"{name}: {count}" for count, name in few])
            yield f"Too few images {purpose} well, fewer than {least} in {part}: {names}."


# The cache: one .npz file for each folder and image size. It holds only arrays: reading it cannot run code.


def _read_cache(cache: Path, fingerprint: str, root: Path, found: Found, size: int) -> ImageFolder | None:
    """Read the images back; None if there is no cache, a file has changed since it was written, or it is damaged."""
    by_name = {file.name: file for file in found.files}
    try:
        with open_regular(cache) as opened, np.load(opened, allow_pickle=False) as arrays:  # compares checksums
            if sum(array.file_size for array in arrays.zip.infolist()) > len(by_name) * (3 * size**2 + 10_000) + 10_000:
                return None  # far more than these images would take, once unpacked
            about, pixels = json.loads(arrays["about"].tobytes()), arrays["pixels"]
        files = [replace(by_name.pop(name), part=part) for part in ("train", "test") for name in about[part]]
        is_complete = len(by_name) <= len(found.files) / 100 and pixels.shape == (len(files), 3, size, size)
        _require_enough(root, found.classes, files, ("train", "test"))
        if about["fingerprint"] == fingerprint and is_complete and pixels.dtype == np.uint8:
            return _assemble(found.classes, files, torch.from_numpy(pixels), about["note"] and str(about["note"]))
    except Exception:  # numpy and zipfile raise exceptions of any type for damaged files
        pass
    return None


def _write_cache(cache: Path, fingerprint: str, files: list[_File], pixels: Tensor, note: str | None) -> None:
    """Save the images, or say that it is not possible."""
    names = {part: [file.name for file in files if file.part == part] for part in ("train", "test")}
    about = json.dumps({"fingerprint": fingerprint, "note": note, **names}).encode()
    try:
        with writing(cache):
            cache.parent.mkdir(parents=True, exist_ok=True)
        with atomic_write(cache) as partial, partial.open("wb") as file:
            np.savez(file, about=np.frombuffer(about, np.uint8), pixels=pixels.numpy())
    except UserError as error:
        console.say(f"the images cannot be cached, and will be decoded again by the next run: {error}")
