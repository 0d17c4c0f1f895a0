"""Datasets as uint8 tensors in memory: reading, splitting, augmenting, batching.

torchvision and scikit-learn are imported where they are used: together they take three seconds, and the demo would
wait for them.
"""

import dataclasses
import hashlib
import os
import tarfile
import tempfile
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor

from cifar.config import Config, UserError
from cifar.download import fetch
from cifar.runs import Run

_LEAST_STEPS = 20  # steps an epoch; fewer leave the `fast` recipe's 12 epochs too short to converge
_MOVED_TOGETHER = 2000  # images that are shifted and mirrored at once: for small batches, one by one costs twice
_ITU_GREY = (0.299, 0.587, 0.114)  # ITU-R BT.601, as Pillow and torchvision weigh red, green and blue


@dataclass(frozen=True)
class Split:
    """images: uint8 (N, 3, H, W); labels: int64 (N,)."""

    images: Tensor
    labels: Tensor

    def __len__(self) -> int:
        return len(self.labels)

    def __getitem__(self, index) -> "Split":
        return Split(self.images[index], self.labels[index])

    def sha256(self) -> str:
        """SHA-256 of the images' bytes followed by the labels'."""
        digest = hashlib.sha256(self.images.contiguous().numpy())
        digest.update(self.labels.contiguous().numpy())
        return digest.hexdigest()

    def mean_and_std(self) -> tuple[Tensor, Tensor]:
        """Per channel over all pixels, in 0..1: two tensors (3,).

        Not the mean of the images' own deviations, which is where the (0.2023, ...) that circulates is from.
        """
        totals = torch.zeros(2, 3, dtype=torch.float64)
        for images in self.images.split(1000):
            pixels = images.double() / 255
            totals += torch.stack([pixels.sum((0, 2, 3)), pixels.square().sum((0, 2, 3))])
        mean, square = totals / (self.images.numel() / 3)
        return mean.float(), (square - mean.square()).sqrt().float()


@dataclass(frozen=True)
class Dataset:
    """A dataset that is there. A split is read when it is first asked for: training never opens the test split."""

    name: str
    classes: tuple[str, ...]
    folder: Path | None  # None for a dataset that a package embeds
    mirrors: bool  # whether a mirrored picture still shows its class

    @cached_property
    def train(self) -> Split:
        """All training images, those for validation among them. Raises UserError if a file is damaged."""
        return _read(self, "train")

    @cached_property
    def test(self) -> Split:
        """The test images. Raises UserError if a file is damaged."""
        return _read(self, "test")

    def check(self) -> None:
        """Compare every file with its MD5, and read none. Raises UserError that names one that is damaged."""
        from torchvision.datasets import CIFAR10

        if self.folder:
            _check_files(self.folder, CIFAR10.train_list + CIFAR10.test_list)


CIFAR10_CLASSES = ("airplane", "automobile", "bird", "cat", "deer", "dog", "frog", "horse", "ship", "truck")


def find(name: str, data_dir: str) -> tuple[Dataset, str | None]:
    """The dataset `name`, fetched if need be, and for `auto` the sentence that says why it is `digits`.

    data_dir: a folder that holds cifar-10-batches-py/, that folder itself, or the .tar.gz archive; CIFAR-10 is
    fetched into it. Raises UserError if the dataset is not there and cannot be fetched.
    """
    digits = Dataset("digits", tuple("0123456789"), folder=None, mirrors=False)
    if name == "digits":
        return digits, None
    try:
        folder = _cifar10_folder(Path(data_dir)) or _fetch_cifar10(Path(data_dir))
    except OSError as error:
        raise UserError(f"cannot read {data_dir}: {error.strerror}") from None
    except UnavailableError as error:
        if name != "auto":
            raise
        return digits, f"This is not CIFAR-10 but scikit-learn's digits, which need no network: {error}."
    return Dataset("cifar10", CIFAR10_CLASSES, folder=folder, mirrors=True), None


def of_run(run: Run, data_dir: str | None) -> Dataset:
    """The run's dataset, from the folder that is named, or else that of the environment, or else the run's own."""
    return find(run.config.dataset, data_dir or os.environ.get("CIFAR_DATA_DIR") or run.config.data_dir)[0]


def settle(config: Config, dataset: Dataset) -> Config:
    """The configuration with what depends on the dataset filled in: the settings of the run as they will be.

    Raises UserError if the validation or the training split would have fewer images than there are classes.
    """
    images, classes = len(dataset.train), len(dataset.classes)
    val_size = images // 10 if config.val_size is None else config.val_size
    if val_size and not classes <= val_size <= images - classes:
        raise UserError(
            f"--val-size {val_size} does not fit: {dataset.name} has {images} training images in {classes} classes, "
            f"so it takes 0, or {classes} to {images - classes}"
        )
    return dataclasses.replace(
        config,
        dataset=dataset.name,
        val_size=val_size,
        small_epochs=min(config.small_epochs, config.epochs // 2),
        small_size=min(config.small_size, dataset.train.images.shape[-1]),
        batch_size=min(config.batch_size, max(2, (images - val_size) // _LEAST_STEPS)),
        flip=config.flip if dataset.mirrors else "none",
    )


def hold_out(split: Split, val_size: int, seed: int) -> tuple[Split, Split]:
    """Split into training and validation, `val_size` images with each class in its share, drawn by the seed."""
    from sklearn.model_selection import train_test_split

    if val_size == 0:
        return split, split[:0]
    train, val = train_test_split(
        torch.arange(len(split)).numpy(), test_size=val_size, stratify=split.labels.numpy(), random_state=seed
    )
    return split[torch.from_numpy(train)], split[torch.from_numpy(val)]


class Batches:
    """The training batches of a split: shuffled, augmented, float32 images in 0..1, on the generator's device.

    An epoch's last images are left out where they do not fill a batch, as BatchNorm wants equal batches.
    """

    def __init__(
        self,
        split: Split,
        *,
        batch_size: int,
        crop: int,
        crop_mode: str,
        flip: str,
        jitter: float,
        generator: torch.Generator,
    ):
        self.images = split.images.to(generator.device)
        self.labels = split.labels.to(generator.device)
        self.batch_size, self.generator = batch_size, generator
        self.crop, self.crop_mode, self.flip, self.jitter = crop, crop_mode, flip, jitter
        # Alternating flip (Jordan 2024, section 3.6): a coin per image once, then every other epoch mirrored.
        self.first_flip = self._coins(len(split))

    def __len__(self) -> int:
        """Steps an epoch."""
        return len(self.labels) // self.batch_size

    def epoch(self, epoch: int, side: int) -> Iterator[tuple[Tensor, Tensor]]:
        """The batches of the epoch, counted from 1: images (B, 3, side, side) and labels (B,)."""
        order = torch.randperm(len(self.labels), generator=self.generator, device=self.generator.device)
        together = self.batch_size * max(1, _MOVED_TOGETHER // self.batch_size)
        for chosen in order[: len(self) * self.batch_size].split(together):
            moved = self._moved(chosen, epoch).split(self.batch_size)
            for images, labels in zip(moved, self.labels[chosen].split(self.batch_size)):
                images = to_float(images)
                if self.jitter:
                    images = color_jitter(images, self.jitter, self.generator)
                yield shrink(images, side), labels

    def _moved(self, chosen: Tensor, epoch: int) -> Tensor:
        """The chosen images, shifted and mirrored; uint8."""
        images = random_crop(self.images[chosen], self.crop, self.crop_mode, self.generator)
        return mirror(images, self._mirrored(chosen, epoch)) if self.flip != "none" else images

    def _mirrored(self, chosen: Tensor, epoch: int) -> Tensor:
        return self.first_flip[chosen] ^ (epoch % 2 == 0) if self.flip == "alternating" else self._coins(len(chosen))

    def _coins(self, count: int) -> Tensor:
        return torch.rand(count, generator=self.generator, device=self.generator.device) < 0.5


def to_float(images: Tensor) -> Tensor:
    """uint8 (N, 3, H, W) -> float32 in 0..1, in the channels-last layout that convolutions are fastest in."""
    return images.to(dtype=torch.float32, memory_format=torch.channels_last).div_(255)


def random_crop(images: Tensor, pad: int, mode: str, generator: torch.Generator) -> Tensor:
    """Shift each image by up to `pad` pixels in each direction.

    images: (N, 3, H, W), any dtype; mode: what a shift uncovers, `reflect` or `zeros`. Returns the same shape.
    Raises ValueError unless 0 <= pad < min(H, W). Source: He et al. 2015, section 4.2, for `zeros`.
    """
    height, width = images.shape[-2:]
    if not 0 <= pad < min(height, width):
        raise ValueError(f"pad {pad} must be from 0 to {min(height, width) - 1}")
    if pad == 0:
        return images
    padded = pad_border(images, pad, mode)
    shift = torch.randint(0, 2 * pad + 1, (2, len(images)), generator=generator, device=images.device)
    windows = padded.unfold(2, height, 1).unfold(3, width, 1)  # (N, 3, 2 pad + 1, 2 pad + 1, H, W), a view
    return windows[torch.arange(len(images), device=images.device), :, shift[0], shift[1]]


def pad_border(images: Tensor, pad: int, mode: str) -> Tensor:
    """Widen images (N, 3, H, W), of any dtype, by `pad` pixels on each side: `reflect` or `zeros`."""
    if mode == "zeros":
        return F.pad(images, (pad,) * 4)
    rows, columns = (
        F.pad(torch.arange(side, dtype=torch.float32, device=images.device)[None], (pad, pad), mode="reflect")[0].long()
        for side in images.shape[-2:]
    )
    return images[..., rows[:, None], columns]  # F.pad reflects no integers


def mirror(images: Tensor, mirrored: Tensor) -> Tensor:
    """Mirror left to right the images (N, 3, H, W) where `mirrored` (N,) is true."""
    return torch.where(mirrored.view(-1, 1, 1, 1), images.flip(-1), images)


def color_jitter(images: Tensor, most: float, generator: torch.Generator) -> Tensor:
    """Scale brightness, contrast and saturation of each image by factors drawn from 1 - most to 1 + most.

    images: float (N, 3, H, W) in 0..1; returns the same. As torchvision's ColorJitter, with the order fixed.
    """
    factors = torch.empty(3, len(images), 1, 1, 1, device=images.device).uniform_(
        1 - most, 1 + most, generator=generator
    )
    brightness, contrast, saturation = factors
    images = (images * brightness).clamp_(0, 1)
    images = torch.lerp(_grey(images).mean((2, 3), keepdim=True), images, contrast).clamp_(0, 1)
    return torch.lerp(_grey(images), images, saturation).clamp_(0, 1)


def shrink(images: Tensor, side: int) -> Tensor:
    """Resize float images (N, 3, H, W) to `side` x `side` pixels, averaging where they get smaller."""
    if images.shape[-1] == side:
        return images
    shrunken = F.interpolate(images, size=(side, side), mode="bilinear", antialias=True)
    return shrunken.contiguous(memory_format=torch.channels_last)


def _grey(images: Tensor) -> Tensor:
    weights = images.new_tensor(_ITU_GREY).view(1, 3, 1, 1)
    return (images * weights).sum(1, keepdim=True)


class UnavailableError(UserError):
    """The dataset is neither on disk nor to be had from its address."""


def _cifar10_folder(path: Path) -> Path | None:
    """The folder of CIFAR-10's seven files that `path` is, holds, or has in an archive; None if there is none."""
    from torchvision.datasets import CIFAR10

    if path.is_file():
        return _unpack(path)
    for folder in (path / CIFAR10.base_folder, path):
        if (folder / CIFAR10.meta["filename"]).exists() or (folder / CIFAR10.train_list[0][0]).exists():
            return folder
    archive = path / CIFAR10.filename
    return _unpack(archive) if archive.is_file() else None


def _fetch_cifar10(path: Path) -> Path:
    from torchvision.datasets import CIFAR10

    archive = path / CIFAR10.filename
    try:
        fetch(CIFAR10.url, archive, md5=CIFAR10.tgz_md5)
    except UserError as error:
        raise UnavailableError(
            f"{error}; put {CIFAR10.filename} into {path}, or name its place with --data-dir"
        ) from None
    return _unpack(archive)


def _unpack(archive: Path) -> Path:
    """Unpack CIFAR-10's archive beside itself, whole or not at all, and return the folder."""
    from torchvision.datasets import CIFAR10
    from torchvision.datasets.utils import check_integrity

    folder = archive.parent / CIFAR10.base_folder
    if folder.is_dir():
        return folder
    if not check_integrity(archive, CIFAR10.tgz_md5):
        raise UserError(f"{archive} is damaged or another file: its MD5 is not {CIFAR10.tgz_md5}")
    try:
        with tempfile.TemporaryDirectory(dir=archive.parent) as temporary, tarfile.open(archive) as tar:
            tar.extractall(temporary, filter="data")
            (Path(temporary) / CIFAR10.base_folder).rename(folder)
    except OSError as error:
        if not folder.is_dir():  # or else another process was faster
            raise UserError(f"cannot unpack {archive} beside itself: {error.strerror}") from None
    return folder


def _read(dataset: Dataset, part: str) -> Split:
    return _read_digits(part) if dataset.folder is None else _read_cifar10(dataset.folder, part)


def _read_cifar10(folder: Path, part: str) -> Split:
    """One split, checked and parsed by torchvision, which is shown the files of that split alone."""
    from torchvision.datasets import CIFAR10

    other = "test_list" if part == "train" else "train_list"
    reader = type("CIFAR10", (CIFAR10,), {other: [], "base_folder": folder.resolve().name})
    _check_files(folder, reader.train_list + reader.test_list)
    read = reader(folder.resolve().parent, train=part == "train")
    return Split(torch.from_numpy(read.data).permute(0, 3, 1, 2).contiguous(), torch.tensor(read.targets))


def _check_files(folder: Path, files: list) -> None:
    """Raise UserError that names the first of the files, or the list of classes, that is missing or damaged.

    files: pairs of name and MD5. torchvision checks them too, and says only that something is wrong.
    """
    from torchvision.datasets import CIFAR10
    from torchvision.datasets.utils import check_integrity

    for name, md5 in (*files, (CIFAR10.meta["filename"], CIFAR10.meta["md5"])):
        if not check_integrity(folder / name, md5):
            state = "damaged" if (folder / name).exists() else "missing"
            cure = f"put back the original, or delete {folder} to fetch it anew"
            raise UserError(f"{folder / name} is {state}: {cure}")


def _read_digits(part: str) -> Split:
    """scikit-learn's 1,797 scanned digits, 8x8 in 17 greys, as 32x32 RGB; a fixed fifth is the test split."""
    from sklearn.datasets import load_digits
    from sklearn.model_selection import train_test_split

    scans, labels = load_digits(return_X_y=True)
    chosen = train_test_split(range(len(labels)), test_size=0.2, stratify=labels, random_state=0)[part == "test"]
    pictures = torch.from_numpy(scans[chosen]).float().view(-1, 1, 8, 8) * (255 / 16)
    pictures = F.interpolate(pictures, size=(32, 32), mode="bilinear").round().to(torch.uint8)
    return Split(pictures.expand(-1, 3, -1, -1).contiguous(), torch.from_numpy(labels[chosen]).long())
