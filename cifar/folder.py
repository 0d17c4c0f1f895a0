"""A folder of the user's images as a dataset: listed by class, split, decoded, and cached."""

import csv
import hashlib
import io
import os
import shutil
import stat
import tempfile
import unicodedata
from collections import Counter, defaultdict
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path
from typing import Any, NamedTuple

import PIL
import torch
from torch import Tensor

from cifar import cache, console
from cifar.config import MAX_CLASSES
from cifar.data import Dataset
from cifar.errors import UserError, listing, plural
from cifar.files import claimed, open_regular, writing
from cifar.images import MAX_BYTES, decode_all

_DECODED_TOGETHER = 500  # images
_ORDER = ("train", "val", "test")
_SPLITS = {"train": "train", "training": "train", "test": "test", "testing": "test"}
_SPLITS |= {"val": "val", "valid": "val", "validation": "val"}
# What systems leave in folders, in lower case.
_LITTER = (
    *("thumbs.db", "desktop.ini", "icon\r", "__macosx", "lost+found", "@eadir", "#recycle", "$recycle.bin"),
    "system volume information",
)
# The extensions, or none, of images that the decoder reads, and of some that it does not.
_IMAGES = (
    *("", ".png", ".jpg", ".jpeg", ".jpe", ".jfif", ".mpo", ".gif", ".webp", ".avif", ".bmp", ".tif", ".tiff"),
    *(".ppm", ".pgm", ".pbm", ".pnm", ".ico"),
)
_CONVERTIBLE = (".heic", ".heif", ".jp2", ".psd", ".svg", ".dng", ".cr2", ".cr3", ".nef", ".arw")
# Below, a note warns. With 9 test images, one is 11 points of the accuracy of its class.
_TOO_FEW = {"train": (20, "to learn"), "test": (10, "to measure")}


class _File(NamedTuple):
    name: str  # relative to the root, with /
    size: int  # bytes
    changed: int  # in nanoseconds
    label: int
    part: str  # train, val, test, or "" while the folder is not split
    digest: bytes = b""  # SHA-256, once it has been read


class Found(NamedTuple):
    """What a folder has, before any file is opened."""

    classes: tuple[str, ...]
    files: list[_File]  # sorted by name
    notes: list[str]  # sentences about what is left out


def load(root: Path, size: int, cache_dir: Path, labels: Path | None = None) -> Dataset:
    """Load the images of root/train/CLASS/, root/val/CLASS/ and root/test/CLASS/, or of root/CLASS/, at any depth.

    size: pixels; images are decoded and cropped to squares as by `images.decode`. cache_dir: keeps them decoded.
    labels: a CSV file that says which images there are and of which class, instead of the folders.
    Classes are named by their folders, and sorted. Without test images, the fifth of each class with the lowest SHA-256
    is the test split: the same images for every seed and whatever their names are, so that it stays sealed over many
    runs, and copies of an image in one class are on the same side. Training images are sorted by their hashes, those of
    val/ and of the test split by their names; those of val/ are the last ones of `train`, which says how many they are.
    Raises UserError if there are not two classes, too few images of one, too many files that cannot be read, or more
    images than fit onto the disk.
    """
    found = list_images(root, labels)
    place = cache_dir / ".decoded" / f"{root.name[:50]}-{_sha256([root, labels])[:12]}-{size}"
    fingerprint = _sha256([7, size, PIL.__version__, found])  # 7: of the decoder's rules and the cache's format
    images = _read_cache(place, fingerprint, root, found, size)
    # Why a file could not be read before may have been the disk, a missing permission, or a machine at its limits.
    left_out = [root / name for name in images.left_out[:20]] if images else []
    if images and not any(isinstance(image, Tensor) for image in decode_all(left_out, size)):
        return images
    try:
        with writing(place):
            place.mkdir(parents=True, exist_ok=True)
            tempfile.TemporaryFile(dir=place).close()
    except UserError as error:
        console.say(f"the images cannot be cached, and will be decoded again by the next run: {error}")
        with tempfile.TemporaryDirectory(ignore_cleanup_errors=True) as temporary:  # stays mapped after its end
            return _write_cache(Path(temporary), fingerprint, root, found, size)
    with claimed(place / "lock", create=True, waiting_for="decoding these images"):
        written = None if images else _read_cache(place, fingerprint, root, found, size)  # by another process
        return written or _write_cache(place, fingerprint, root, found, size)


def _sha256(content: object) -> str:
    return hashlib.sha256(repr(content).encode()).hexdigest()


# Listing


def list_images(root: Path, labels: Path | None = None) -> Found:
    """List the classes and their images. Raises UserError if there are not two classes with enough images each."""
    try:
        return _list_table(root, labels) if labels else _list(root)
    except OSError as error:
        raise UserError(f"cannot read {error.filename or root}: {error.strerror}") from None


def _list(root: Path) -> Found:
    parts = find_splits(root)
    first = parts.get("train", root)
    own = {folder: _class_folders(folder) for folder in parts.values()}
    classes = sorted(own[first])
    _require_classes(root, first, list(own[first].values()))
    for folder, names in own.items():
        if unknown := sorted(names.keys() - own[first].keys()):
            raise UserError(f"{folder} has classes that {first} lacks, so they cannot be learned: {listing(unknown)}")
    skipped: dict[str, list[str]] = defaultdict(list)
    files = [
        _File(name, status.st_size, status.st_mtime_ns, label, part)
        for part, folder in parts.items()
        for label, class_name in enumerate(classes)
        if class_name in own[folder]
        for name, status in _walk(root, folder / own[folder][class_name], skipped)
    ]
    for folder in sorted({root, *parts.values()}):
        for entry in _entries(folder):
            if not os.path.exists(entry):
                skipped["broken link"].append(entry.name)
            elif os.path.isfile(entry) and os.path.splitext(entry.name)[1].lower() in _IMAGES[1:]:
                skipped["loose image"].append(entry.name)
    notes = [_count(skipped)] if skipped else []
    if parts.keys() != {""} and (beside := sorted(set(_folders(root)) - {folder.name for folder in parts.values()})):
        notes.append(f"{listing(beside)} beside {first.name}: ignored.")
    return _found(root, classes, files, notes)


def _found(root: Path, classes: Sequence[str], files: list[_File], notes: list[str]) -> Found:
    """Check that there are enough images, and sort them by their names."""
    if len(classes) > MAX_CLASSES:
        raise UserError(f"{root} has {len(classes):,} classes: at most {MAX_CLASSES:,} are possible")
    _require_enough(root, classes, files, notes)
    spelled: dict[str, list[str]] = defaultdict(list)
    for name in classes:
        spelled[name.strip().casefold()].append(name)
    if alike := [" and ".join(names) for names in spelled.values() if len(names) > 1]:
        notes.append(f"Classes whose names differ only in case or spaces: {listing(alike)}.")
    if "train" in (parts := {file.part for file in files}) and "test" not in parts:
        notes.append("Without test images of their own, a fifth of the training images is the test split.")
    return Found(tuple(classes), sorted(files, key=lambda file: file.name), notes)


def find_images(root: Path) -> tuple[list[Path], str]:
    """List the images in a folder and below it, sorted by name, and say what else is passed over."""
    skipped: dict[str, list[str]] = defaultdict(list)
    try:
        names = sorted(name for name, _ in _walk(root, root, skipped))
    except OSError as error:
        raise UserError(f"cannot read {error.filename or root}: {error.strerror}") from None
    return [root / name for name in names], _count(skipped) if skipped else ""


def find_splits(root: Path) -> dict[str, Path]:
    """Return the folders of train and perhaps val and test, in any usual spelling; {"": root} if there are none."""
    spelled: dict[str, list[str]] = defaultdict(list)
    for name in _folders(root):
        if part := _SPLITS.get(name.lower()):
            spelled[part].append(name)
    parts = {part: root / names[0] for part, names in spelled.items()}
    with_classes = [name for names in spelled.values() for name in names if _folders(root / name)]
    if not with_classes:  # a class may be called train
        folders = _folders(root)
        if len(folders) > 1 and all(name.lower() in _SPLITS for name in folders):
            raise UserError(
                f"{listing(folders)} in {root} have no folders of classes: put the images of each class into a folder "
                "of its name there"
            )
        return {"": root}
    if "train" not in parts or any(len(names) > 1 for names in spelled.values()):
        raise UserError(
            f"{root} has {listing(with_classes)}, but needs exactly one train folder and at most one val and one test; "
            f"to use the images of one alone, use {root / with_classes[0]}: a fifth of it becomes the test split"
        )
    for path in parts.values():
        if not _folders(path):
            raise UserError(
                f"{path} has no folders of classes, as {with_classes[0]} has: move its images into such folders or, if "
                f"their classes are not known, move it out of {root}"
            )
    return parts


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


def _class_folders(folder: Path) -> dict[str, str]:
    """Return the names of the folders in a folder, by class: the same name with composed accents, as most write it."""
    found: dict[str, str] = {}
    for name in _folders(folder):
        if other := found.get(composed := unicodedata.normalize("NFC", name)):
            raise UserError(f"{folder} has two folders whose names look the same, {other!a} and {name!a}: rename one")
        found[composed] = name
    return found


def _folders(folder: Path) -> list[str]:
    return [entry.name for entry in _entries(folder) if os.path.isdir(entry)]


def _entries(folder: Path) -> list[os.DirEntry]:
    """List what is in a folder by its names, except hidden files and litter."""
    entries = (entry for entry in os.scandir(folder) if not entry.name.startswith("."))
    return sorted((entry for entry in entries if entry.name.lower() not in _LITTER), key=lambda entry: entry.name)


def _walk(root: Path, folder: Path, skipped: dict[str, list[str]]) -> Iterator[tuple[str, os.stat_result]]:
    """Yield name and status of each image in the folder and below it; add all others to `skipped`, by their kind.

    Links are followed, but no folder is entered twice, and none that holds this one.
    """
    waiting, entered = [folder], {*folder.parents, *folder.resolve().parents}
    while waiting:
        current = waiting.pop()
        prefix = "" if current == root else f"{current.relative_to(root).as_posix()}/"
        if (real := current.resolve()) in entered:
            skipped["circular or repeated link"].append(prefix.removesuffix("/"))
            continue
        entered.add(real)
        for entry in _entries(current):
            name = f"{prefix}{entry.name}"
            try:
                status = entry.stat()
            except OSError:
                if not entry.is_symlink():
                    raise
                skipped["broken link"].append(name)
                continue
            if stat.S_ISDIR(status.st_mode):
                waiting.append(current / entry.name)
            elif not stat.S_ISREG(status.st_mode):
                skipped["special file"].append(name)
            elif (suffix := os.path.splitext(entry.name)[1].lower()) not in _IMAGES:
                skipped[f"{suffix} file"].append(name)
            else:
                yield name, status


def _count(skipped: dict[str, list[str]]) -> str:
    """Say how many files of each kind are passed over."""
    kinds = []
    for kind, names in sorted(skipped.items(), key=lambda item: -len(item[1])):
        count = f"{len(names):,} {kind}{'s' if len(names) > 1 else ''}"
        if kind.removesuffix(" file") in _CONVERTIBLE:
            count += ": convert them to JPEG"
        elif not kind.startswith("."):
            count += f" ({listing(names)})"
        kinds.append(count)
    if len(kinds) > 8:
        kinds[8:] = [f"{len(kinds) - 8} other kinds"]
    return f"Skipped: {'; '.join(kinds)}."


def _require_enough(root: Path, classes: Sequence[str], files: list[_File], notes: Sequence[str] = ()) -> None:
    """Raise UserError if a class has not one image to train on, one to validate with and one to test.

    Where the folder says which images are for validation or to test, it may lack some of a class, but not all.
    """
    parts = {file.part for file in files}
    least = {"train": 1 if "val" in parts else 2, "test": 0 if "test" in parts else 1}
    counts = Counter(file.label for file in files if file.part in ("train", ""))
    few = [name for label, name in enumerate(classes) if counts[label] < sum(least.values())]
    if few:
        needed = f"each class needs at least {plural(least['train'], 'training image')}"
        needed += " and 1 test image, all different" if least["test"] else ", all different"
        raise UserError(". ".join([f"{root} has too few images of {listing(few)}: {needed}", *notes]))


# A table of labels


def _list_table(root: Path, table: Path) -> Found:
    """List the images that a CSV file names, with their labels; those that are missing are counted."""
    rows = list(_read_table(root, table))
    classes = sorted({label for _, label, _ in rows})
    if len(classes) < 2:
        raise UserError(f"{table} needs at least two different labels: it has {listing(classes) or 'none'}")
    labels = {name: label for label, name in enumerate(classes)}
    files: dict[str, _File] = {}
    missing = []
    for name, label, part in rows:
        if (other := files.get(name)) and (other.label, other.part) != (labels[label], part):
            raise UserError(f"{table} names {name} twice, with different labels or splits")
        try:
            status = os.stat(root / name)
        except (OSError, ValueError):  # a name that no file can have
            missing.append(name)
            continue
        if not stat.S_ISREG(status.st_mode):
            raise UserError(f"{table} names {name}, which is not a file")
        files[name] = _File(name, status.st_size, status.st_mtime_ns, labels[label], part)
    if len(missing) > len(rows) / 100:
        raise UserError(
            f"{len(missing):,} of {len(rows):,} files that {table} names cannot be found in {root} (at most 1% may be "
            f"missing): {listing(missing)}"
        )
    notes = [f"Missing {len(missing):,} of {plural(len(rows), 'file')}: {listing(missing)}."] if missing else []
    parts = {file.part for file in files.values()}
    if "" in parts and len(parts) > 1:
        raise UserError(f"{table} must give a split to each image or to none: {listing(sorted(parts - {''}))}")
    return _found(root, classes, list(files.values()), notes)


def _read_table(root: Path, table: Path) -> Iterator[tuple[str, str, str]]:
    """Yield the path of each image, relative to the root and with /, its label, and its split or ""."""
    try:
        with io.TextIOWrapper(open_regular(table), encoding="utf-8-sig", newline="") as file:
            rows = csv.DictReader(file, restval="", skipinitialspace=True)
            columns = rows.fieldnames = [name.strip().lower() for name in rows.fieldnames or []]
            if not {"path", "label"} <= set(columns):
                raise UserError(
                    f"the first line of {table} must name the columns path and label, and may name split: it has "
                    f"{listing(columns, 10) or 'none'}"
                )
            if twice := [name for name in ("path", "label", "split") if columns.count(name) > 1]:
                raise UserError(f"the first line of {table} names the column {twice[0]} twice")
            for row in rows:
                values = [row.get(column, "").strip() for column in ("path", "label", "split")]
                label, part = unicodedata.normalize("NFC", values[1]), values[2].lower()
                if not values[0] or not label:
                    raise UserError(f"line {rows.line_num} of {table} has no path or no label")
                if "\n" in "".join(values):
                    raise UserError(f"a quote before line {rows.line_num} of {table} is not closed")
                if any(cell.strip() for cell in row.get(None, ())):  # what is beyond the columns
                    raise UserError(f"line {rows.line_num} of {table} has too many cells: quote what has a comma")
                path = _path(root, values[0])
                if not path.is_relative_to(root):
                    raise UserError(f"line {rows.line_num} of {table} names {values[0]}, which is not in {root}")
                if part and part not in _SPLITS:
                    raise UserError(f"line {rows.line_num} of {table}: the split is train, val or test, not {part}")
                yield path.relative_to(root).as_posix(), label, _SPLITS.get(part, "")
    except (UnicodeDecodeError, csv.Error) as error:
        raise UserError(f"{table} is not a CSV file in UTF-8: {error}") from None


def _path(root: Path, name: str) -> Path:
    """Return the path that a table means: macOS decomposes accents, Windows writes backslashes, links lead to roots."""
    spellings = [name, *(unicodedata.normalize(form, name) for form in ("NFC", "NFD")), name.replace("\\", "/")]
    path = root / next((spelling for spelling in spellings if os.path.lexists(root / spelling)), name)
    normal = Path(os.path.normpath(path))
    return normal if normal.is_relative_to(root) or "\0" in name else Path(os.path.realpath(path.parent), path.name)


# Splitting and decoding


def _split(root: Path, files: list[_File]) -> list[_File]:
    """Hash the files, choose those to test on unless they are split already, and sort them: train, val, test."""
    with ThreadPoolExecutor() as pool:
        digests = pool.map(lambda file: _digest(root / file.name) if file.size <= MAX_BYTES else b"", files)
        files = [file._replace(digest=digest) for file, digest in zip(files, digests)]
    parts = {part: [file for file in files if (file.part or "train") == part] for part in _ORDER}
    if not parts["test"]:
        by_label = defaultdict(list)
        for file in parts["train"]:
            by_label[file.label].append(file.digest)
        last = {label: sorted(own)[max(1, round(len(own) / 5)) - 1] for label, own in by_label.items()}
        parts["test"] = [file for file in parts["train"] if file.digest <= last[file.label]]
        parts["train"] = [file for file in parts["train"] if file.digest > last[file.label]]
    parts["train"].sort(key=lambda file: (file.digest, file.name))
    return [file._replace(part=part) for part, own in parts.items() for file in own]


def _digest(path: Path) -> bytes:
    try:
        with path.open("rb") as file:
            return hashlib.file_digest(file, "sha256").digest()
    except OSError:  # the decoder reports it
        return b""


def _decode(
    root: Path, files: list[_File], size: int, errors: dict[_File, UserError]
) -> Iterator[tuple[_File, Tensor]]:
    """Yield the files that are images with their pixels, (3, size, size); adds the errors of the others to `errors`.

    Raises UserError as soon as there are too many of these.
    """
    console.say(f"decoding {len(files):,} images of {root}")
    with console.counting_bar("images", len(files)) as advance:
        for start in range(0, len(files), _DECODED_TOGETHER):
            batch = files[start : start + _DECODED_TOGETHER]
            for file, image in zip(batch, decode_all([root / file.name for file in batch], size)):
                if isinstance(image, UserError):
                    errors[file] = image
                else:
                    yield file, image
            if len(errors) > len(files) / 100:
                names = _name_errors(errors)
                failed = f"{len(errors):,} of {start + len(batch):,} files"
                raise UserError(f"cannot read {failed} as images (at most 1% may fail): fix or delete {names}")
            advance(len(batch))


def _name_errors(errors: dict[_File, UserError]) -> str:
    return listing(sorted(f"{file.name} ({error})" for file, error in errors.items()))


def _copies(files: list[_File]) -> Iterator[str]:
    """Report images that are in two classes, in two splits, or twice in one of these."""
    originals: dict[bytes, _File] = {}
    classes: list[str] = []
    others: list[str] = []
    splits: dict[str, list[str]] = {"val": [], "test": []}
    for file in files:
        original = originals.setdefault(file.digest, file)
        kind = classes if file.label != original.label else splits[file.part] if file.part != original.part else others
        if file is not original:
            kind.append(f"{file.name} is {original.name}")
    if classes:
        yield f"In two classes: {len(classes):,} of {len(files):,} images ({listing(classes)})."
    for part, pairs in splits.items():
        if pairs:
            count = f"{len(pairs):,} of {sum(file.part == part for file in files):,} {part} images are in another split"
            yield f"{count} too, so the {part} accuracy is too high: {listing(pairs)}."
    if others:
        yield f"Duplicates, which count twice: {len(others):,} of {len(files):,} images ({listing(others)})."


def _small_classes(classes: Sequence[str], files: list[_File]) -> Iterator[str]:
    """Report classes with so few images that what is learned or measured of them says little, or nothing."""
    counts = Counter((file.part, file.label) for file in files)
    for part in {file.part: None for file in files}:
        if missing := [name for label, name in enumerate(classes) if not counts[part, label]]:
            yield f"Classes without images in {part}, so they are not measured there: {listing(missing)}."
    for part, (least, purpose) in _TOO_FEW.items():
        own = [(counts[part, label], name) for label, name in enumerate(classes)]
        if few := sorted((count, name) for count, name in own if 0 < count < least):
            names = listing([f"{name}: {count}" for count, name in few])
            yield f"Too few images {purpose} well, fewer than {least} in {part}: {names}."


# The cache


def _read_cache(place: Path, fingerprint: str, root: Path, found: Found, size: int) -> Dataset | None:
    """Map the images; None if there is no cache, a file has changed since it was written, or it is damaged."""
    by_name = {file.name: file for file in found.files}
    try:
        about = cache.read_about(place)
        if about["fingerprint"] != fingerprint:
            return None
        files = {part: [by_name.pop(name) for name in about[part]] for part in cache.PARTS}
        train, test = (cache.read(place, part, _labels(own), size, about) for part, own in files.items())
        if len(by_name) <= len(found.files) / 100 and 0 <= about["own_val"] < len(train):
            return Dataset(
                key=str(root),
                classes=found.classes,
                location=str(root),
                can_flip=True,
                read={"train": replace(train, own_val=about["own_val"]), "test": test}.__getitem__,
                test_files=tuple(file.name for file in files["test"]),
                left_out=tuple(by_name),
                note=about["note"] and str(about["note"]),
            )
    except Exception:  # a damaged file can make anything fail
        pass
    return None


def _write_cache(place: Path, fingerprint: str, root: Path, found: Found, size: int) -> Dataset:
    """Decode the images into files, and map these. Raises UserError if there are too few images, or no room."""
    needed, free = 3 * size**2 * len(found.files), shutil.disk_usage(place).free
    if needed > free:
        raise UserError(
            f"the {len(found.files):,} images of {root} need, at {size}x{size} pixels, {needed / 1e9:.1f} GB on the "
            f"disk of {place.parent}, which has {free / 1e9:.1f} GB free: make room, name another place with "
            "--data-dir, or use fewer images or a smaller --image-size"
        )
    files = _split(root, found.files)
    errors: dict[_File, UserError] = {}
    decoded = _decode(root, files, size, errors)
    digests = cache.write(place, (("test" if file.part == "test" else "train", image) for file, image in decoded))
    notes = list(found.notes)
    if errors:
        failed = f"{len(errors):,} of {len(files):,} files could not be read as images and were left out"
        notes.append(f"{failed}: {_name_errors(errors)}.")
    files = [file for file in files if file not in errors]
    _require_enough(root, found.classes, files, notes)
    if files[-1].part != "test":
        raise UserError(f"{root} has no test image that can be read: {' '.join(notes)}")
    notes += [*_copies(files), *_small_classes(found.classes, files)]
    test = [file for file in files if file.part == "test"]
    parts = {"train": files[: len(files) - len(test)], "test": test}
    about: dict[str, Any] = {part: [file.name for file in own] for part, own in parts.items()}
    about |= {"fingerprint": fingerprint, "note": " ".join(notes) or None}
    about |= {"own_val": sum(file.part == "val" for file in files)}
    cache.seal(place, digests, {part: _labels(own) for part, own in parts.items()}, about)
    written = _read_cache(place, fingerprint, root, found, size)
    if written is None:
        raise UserError(f"the decoded images in {place} changed while they were written: start again")
    return written


def _labels(files: Sequence[_File]) -> Tensor:
    return torch.tensor([file.label for file in files])
