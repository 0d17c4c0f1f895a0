"""The datasets: found on disk or fetched, checked, and read when first asked for.

torchvision and scikit-learn are imported where they are used: together they take three seconds, and the demo would
wait for them.
"""

import dataclasses
import os
import pickle
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

import torch
import torch.nn.functional as F

from cifar import archive, folder
from cifar.archive import ARCHIVES
from cifar.config import A_FOLDER, DATASETS, Config, most_hard_epochs, most_small_epochs
from cifar.data import Split
from cifar.download import Archive, UnavailableError
from cifar.errors import UserError, known_name
from cifar.runs import Run

_LEAST_STEPS = 20  # steps an epoch; fewer leave the `fast` recipe's epochs too short to converge
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


def find(
    name: str, data_dir: str, image_size: int = Config.image_size, mirror: str | None = None
) -> tuple[Dataset, str | None]:
    """The dataset `name`, fetched if need be, and what must not be overlooked about it.

    name: one of DATASETS, or the path of a folder of pictures. data_dir: a folder that holds cifar-10-batches-py/ or
    cifar-100-python/, that folder itself, or the .tar.gz archive; what is missing is fetched into it, and pictures
    are kept decoded in it. image_size: to which the pictures of a folder are brought, in pixels. mirror: as
    `download.addresses` takes it.
    Raises UserError if the dataset is not there and cannot be fetched, or if the folder cannot serve as one.
    """
    if name == "digits":
        return _digits(), None
    if name not in DATASETS:
        return _folder(name, data_dir, image_size)
    try:
        return _cifar("cifar10" if name == "auto" else name, Path(data_dir), mirror), None
    except OSError as error:
        raise UserError(f"cannot read {data_dir}: {error.strerror}") from None
    except UnavailableError as error:
        reason = f"{error}; put the archive into {data_dir}, or name its place with --data-dir"
        if name != "auto":
            raise UserError(reason) from None
        return _digits(), f"This is not CIFAR-10 but scikit-learn's digits, which need no network: {reason}."


def of_run(run: Run, data_dir: str | None) -> Dataset:
    """The run's dataset, from the folder that is named, or else that of the environment, or else the run's own."""
    config = run.config
    place = data_dir or os.environ.get("CIFAR_DATA_DIR") or config.data_dir
    return find(config.dataset, place, config.image_size, config.mirror)[0]


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
        small_epochs=min(config.small_epochs, most_small_epochs(config.epochs)),
        hard_epochs=min(config.hard_epochs, most_hard_epochs(config.epochs)),
        small_size=min(config.small_size or size * 3 // 4, size),
        batch_size=min(batch_size, _STEP_PIXELS // size**2) if size > 32 else batch_size,
        flip=config.flip if dataset.mirrors else "none",
        cutout=min(config.cutout, size // 2),
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


# CIFAR-10 and CIFAR-100: archive.py has their addresses and hashes, torchvision parses them.

_META = {"cifar10": ("batches.meta", "label_names"), "cifar100": ("meta", "fine_label_names")}


def _cifar(name: str, data_dir: Path, mirror: str | None) -> Dataset:
    kind = ARCHIVES[name]
    files = archive.obtain(kind, data_dir, mirror)
    meta, key = _META[name]
    _check_files(kind, files, [meta])
    return Dataset(
        key=name,
        classes=tuple(pickle.loads((files / meta).read_bytes(), encoding="latin1")[key]),
        place=str(files),
        mirrors=True,
        read=lambda part: _read_cifar(name, files, part),
        check=lambda: _check_files(kind, files, kind.files),
    )


def _read_cifar(name: str, files: Path, part: str) -> Split:
    """One split, parsed by torchvision, which is shown the files of that split alone."""
    from torchvision.datasets import CIFAR10, CIFAR100

    parser = {"cifar10": CIFAR10, "cifar100": CIFAR100}[name]
    other = "test_list" if part == "train" else "train_list"
    reader = type(parser.__name__, (parser,), {other: [], "base_folder": files.resolve().name})
    _check_files(ARCHIVES[name], files, [file for file, _ in reader.train_list + reader.test_list])
    read = reader(files.resolve().parent, train=part == "train")
    return Split(torch.from_numpy(read.data).permute(0, 3, 1, 2).contiguous(), torch.tensor(read.targets))


def _check_files(kind: Archive, folder: Path, names: Iterable[str]) -> None:
    """Raise UserError that names the first of the files that is missing or damaged."""
    if trouble := archive.trouble(kind, folder, names):
        raise UserError(": ".join(trouble))


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
