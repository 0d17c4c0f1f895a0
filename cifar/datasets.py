"""The datasets: found on disk or fetched, checked, and read when first asked for.

torchvision and scikit-learn are imported where they are used: together they take three seconds, and the demo would
wait for them.
"""

import dataclasses
import pickle
import tarfile
import tempfile
from collections.abc import Callable
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

import torch
import torch.nn.functional as F

from cifar import folder
from cifar.config import A_FOLDER, DATASETS, Config, UserError, known_name
from cifar.data import Split
from cifar.download import fetch

_LEAST_STEPS = 20  # steps an epoch; fewer leave the `fast` recipe's 12 epochs too short to converge
_STEP_PIXELS = 2000 * 32**2  # that images of more than 32x32 have in a step at most: `fast` takes 3 GB for them


@dataclass(frozen=True, kw_only=True)
class Dataset:
    """A dataset that is there. A split is read when it is first asked for: training never opens the test split."""

    key: str  # what --dataset finds it by: its name, or the absolute path of a folder
    classes: tuple[str, ...]
    place: str  # where its files are
    mirrors: bool  # whether a mirrored picture still shows its class
    read: Callable[[str], Split]  # "train" or "test" -> that split
    check: Callable[[], None] = lambda: None  # raises UserError that names a damaged file, and reads none

    @property
    def name(self) -> str:
        """What a person calls it."""
        return Path(self.key).name

    @cached_property
    def train(self) -> Split:
        """All training images, those for validation among them. Raises UserError if a file is damaged."""
        return self.read("train")

    @cached_property
    def test(self) -> Split:
        """The test images. Raises UserError if a file is damaged."""
        return self.read("test")


def find(name: str, data_dir: str, image_size: int = Config.image_size) -> tuple[Dataset, str | None]:
    """The dataset `name`, fetched if need be, and what must not be overlooked about it.

    name: one of DATASETS, or the path of a folder of pictures. data_dir: a folder that holds cifar-10-batches-py/ or
    cifar-100-python/, that folder itself, or the .tar.gz archive; what is missing is fetched into it, and pictures
    are kept decoded in it. image_size: to which the pictures of a folder are brought, in pixels.
    Raises UserError if the dataset is not there and cannot be fetched, or if the folder cannot serve as one.
    """
    if name == "digits":
        return _digits(), None
    if name not in DATASETS:
        return _folder(name, data_dir, image_size)
    try:
        return _cifar("cifar10" if name == "auto" else name, Path(data_dir)), None
    except OSError as error:
        raise UserError(f"cannot read {data_dir}: {error.strerror}") from None
    except UnavailableError as error:
        if name != "auto":
            raise
        return _digits(), f"This is not CIFAR-10 but scikit-learn's digits, which need no network: {error}."


def settle(config: Config, dataset: Dataset) -> Config:
    """The configuration with what depends on the dataset filled in: the settings of the run as they will be.

    Raises UserError if the images have another size, or if the validation or the training split would have fewer
    images than there are classes.
    """
    images, classes, size = len(dataset.train), len(dataset.classes), dataset.train.images.shape[-1]
    if config.image_size != size:
        raise UserError(f"--image-size is for folders of pictures: those of {dataset.name} are {size}x{size}")
    val_size = max(images // 10, classes) if config.val_size is None else config.val_size
    if val_size and not classes <= val_size <= images - classes:
        raise UserError(
            f"--val-size {val_size} does not fit: {dataset.name} has {images} training images in {classes} classes, "
            f"so it takes 0, or {classes} to {images - classes}"
        )
    batch_size = min(config.batch_size, max(2, (images - val_size) // _LEAST_STEPS))
    return dataclasses.replace(
        config,
        dataset=dataset.key,
        val_size=val_size,
        small_epochs=min(config.small_epochs, config.epochs // 2),
        small_size=min(config.small_size or size * 3 // 4, size),
        batch_size=min(batch_size, _STEP_PIXELS // size**2) if size > 32 else batch_size,
        flip=config.flip if dataset.mirrors else "none",
    )


# A folder of the user's pictures.


def _folder(name: str, data_dir: str, image_size: int) -> tuple[Dataset, str | None]:
    root = Path(name).expanduser().resolve()
    if not root.is_dir():
        known_name("dataset", name, DATASETS, others=A_FOLDER)
    cache = Path(data_dir)
    pictures = folder.load(root, image_size, cache.parent if cache.is_file() else cache)
    splits = {"train": pictures.train, "test": pictures.test}
    dataset = Dataset(key=str(root), classes=pictures.classes, place=str(root), mirrors=True, read=splits.__getitem__)
    return dataset, pictures.note


# CIFAR-10 and CIFAR-100, each as torchvision's class of it says: its address, files, their MD5s and its layout.


class UnavailableError(UserError):
    """The dataset is neither on disk nor to be had from its address."""


def _cifar(name: str, data_dir: Path) -> Dataset:
    from torchvision.datasets import CIFAR10, CIFAR100

    kind = {"cifar10": CIFAR10, "cifar100": CIFAR100}[name]
    files = _cifar_folder(kind, data_dir) or _fetch_cifar(kind, data_dir)
    meta = kind.meta["filename"], kind.meta["md5"]
    _check_files(files, [meta])
    return Dataset(
        key=name,
        classes=tuple(pickle.loads((files / meta[0]).read_bytes(), encoding="latin1")[kind.meta["key"]]),
        place=str(files),
        mirrors=True,
        read=lambda part: _read_cifar(kind, files, part),
        check=lambda: _check_files(files, kind.train_list + kind.test_list),
    )


def _cifar_folder(kind, path: Path) -> Path | None:
    """The folder of the dataset's files that `path` is, holds, or has in an archive; None if there is none."""
    if path.is_file():
        return _unpack(kind, path)
    for files in (path / kind.base_folder, path):
        if (files / kind.meta["filename"]).is_file() or (files / kind.train_list[0][0]).is_file():
            return files
    archive = path / kind.filename
    return _unpack(kind, archive) if archive.is_file() else None


def _fetch_cifar(kind, path: Path) -> Path:
    archive = path / kind.filename
    try:
        fetch(kind.url, archive, md5=kind.tgz_md5)
    except UserError as error:
        raise UnavailableError(f"{error}; put {kind.filename} into {path}, or name its place with --data-dir") from None
    return _unpack(kind, archive)


def _unpack(kind, archive: Path) -> Path:
    """Unpack the dataset's archive beside itself, whole or not at all, and return the folder."""
    from torchvision.datasets.utils import check_integrity

    files = archive.parent / kind.base_folder
    if files.is_dir():
        return files
    if not check_integrity(archive, kind.tgz_md5):
        raise UserError(f"{archive} is damaged or another file: its MD5 is not {kind.tgz_md5}")
    try:
        with tempfile.TemporaryDirectory(dir=archive.parent) as temporary, tarfile.open(archive) as tar:
            tar.extractall(temporary, filter="data")
            (Path(temporary) / kind.base_folder).rename(files)
    except OSError as error:
        if not files.is_dir():  # or else another process was faster
            raise UserError(f"cannot unpack {archive} beside itself: {error.strerror}") from None
    return files


def _read_cifar(kind, files: Path, part: str) -> Split:
    """One split, checked and parsed by torchvision, which is shown the files of that split alone."""
    other = "test_list" if part == "train" else "train_list"
    reader = type(kind.__name__, (kind,), {other: [], "base_folder": files.resolve().name})
    _check_files(files, reader.train_list + reader.test_list)
    read = reader(files.resolve().parent, train=part == "train")
    return Split(torch.from_numpy(read.data).permute(0, 3, 1, 2).contiguous(), torch.tensor(read.targets))


def _check_files(folder: Path, files: list) -> None:
    """Raise UserError that names the first of the files that is missing or damaged.

    files: pairs of name and MD5. torchvision checks them too, and says only that something is wrong.
    """
    from torchvision.datasets.utils import check_integrity

    for name, md5 in files:
        if not check_integrity(folder / name, md5):
            state = "damaged" if (folder / name).exists() else "missing"
            cure = f"put back the original, or delete {folder} to fetch it anew"
            raise UserError(f"{folder / name} is {state}: {cure}")


# scikit-learn's digits.


def _digits() -> Dataset:
    classes = tuple("0123456789")
    return Dataset(key="digits", classes=classes, place="scikit-learn", mirrors=False, read=_read_digits)


def _read_digits(part: str) -> Split:
    """scikit-learn's 1,797 scanned digits, 8x8 in 17 greys, as 32x32 RGB; a fixed fifth is the test split."""
    from sklearn.datasets import load_digits
    from sklearn.model_selection import train_test_split

    scans, labels = load_digits(return_X_y=True)
    chosen = train_test_split(range(len(labels)), test_size=0.2, stratify=labels, random_state=0)[part == "test"]
    pictures = torch.from_numpy(scans[chosen]).float().view(-1, 1, 8, 8) * (255 / 16)
    pictures = F.interpolate(pictures, size=(32, 32), mode="bilinear").round().to(torch.uint8)
    return Split(pictures.expand(-1, 3, -1, -1).contiguous(), torch.from_numpy(labels[chosen]).long())
