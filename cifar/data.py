"""Images as uint8 tensors: datasets, the split into training and validation, augmentation, and batches.

torchvision and scikit-learn are imported where they are used: that takes a second, and the demo would wait for it.
"""

import collections
import contextlib
import functools
import hashlib
import itertools
import math
import mmap
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from cifar import device

_AUGMENTED_TOGETHER = 2000  # images that are cropped and flipped at once: batch by batch, small batches cost twice
_AUGMENTED_PIXELS = 2000 * 128**2  # and their pixels at most, which take 100 MB
_CHUNK_PIXELS = 10_000 * 32**2  # of the images of `Split.chunks`, which take 30 MB
# Neighbours in a batch to which --auto-augment does the same: for one 32x32 image alone torchvision's RandAugment takes
# 198 us and TrivialAugment 92 us, of four together 62 and 38 us; `convnet` trains on it in 200 us (one core).
_ALIKE = 4
LUMA_WEIGHTS = (0.299, 0.587, 0.114)  # ITU-R BT.601, as Pillow and torchvision weigh red, green and blue


@dataclass(frozen=True)
class Split:
    """Labelled images, in memory or in a file of any size, of which only what is asked for is read."""

    source: Tensor  # uint8 (M, 3, H, W)
    labels: Tensor  # int64 (N,)
    rows: Tensor | None = None  # int64 (N,): which images of the source belong to the split; None: all, in their order
    own_val: int = 0  # number of the last images that the dataset itself keeps for validation
    mapping: mmap.mmap | None = None  # the file of the source, if it is in one
    digest: str | None = None  # the SHA-256, if it is known

    def __len__(self) -> int:
        return len(self.labels)

    def __getitem__(self, index: slice | Tensor) -> "Split":
        """Return some of the images, none of which is copied."""
        rows = torch.arange(len(self), device=self.source.device) if self.rows is None else self.rows
        return Split(self.source, self.labels[index], rows[index], mapping=self.mapping)

    @property
    def images(self) -> Tensor:
        """All images, uint8 (N, 3, H, W): copied, unless they are the whole source."""
        return self.source if self.rows is None else self.source.index_select(0, self.rows)

    @property
    def image_size(self) -> int:
        """The width of the images, in pixels."""
        return self.source.shape[-1]

    def to(self, hardware: torch.device) -> "Split":
        """Return the split with its images on the device; itself if that is the CPU, or has no room for them."""
        if hardware.type == "cpu" or self.source.nbytes > device.free_memory(hardware) / 2:
            return self
        rows = None if self.rows is None else self.rows.to(hardware)
        return Split(self.source.to(hardware), self.labels.to(hardware), rows)

    def gather(self, indices: Tensor) -> Tensor:
        """Copy the images at these indices (B,) into memory: uint8 (B, 3, H, W)."""
        indices = indices if self.rows is None else self.rows[indices]
        images = self.source.index_select(0, indices)  # twenty times as fast as indexing with brackets
        if self.mapping and hasattr(mmap, "MADV_DONTNEED"):  # Windows needs none
            self.mapping.madvise(mmap.MADV_DONTNEED)  # or what was read would count as this program's memory
        return images

    def prefetch(self, indices: Tensor) -> None:
        """Let the system read the images at these indices (B,) from their file, if they are in one, in the meantime."""
        if self.mapping and hasattr(mmap, "MADV_WILLNEED"):
            size = math.prod(self.source.shape[1:])
            for row in (indices if self.rows is None else self.rows[indices.to(self.rows.device)]).tolist():
                start = row * size // mmap.PAGESIZE * mmap.PAGESIZE
                self.mapping.madvise(mmap.MADV_WILLNEED, start, (row + 1) * size - start)

    def chunks(self) -> Iterator["Split"]:
        """Yield the split in parts that fit into memory, whose images are in memory."""
        count = max(1, _CHUNK_PIXELS // math.prod(self.source.shape[-2:]))
        for indices in torch.arange(len(self)).split(count):
            yield Split(self.gather(indices), self.labels[indices])

    def sha256(self) -> str:
        """Return the SHA-256 of the images' bytes followed by the labels', which is computed once."""
        return self.digest or self._sha256

    @functools.cached_property
    def _sha256(self) -> str:
        digest = hashlib.sha256()
        for part in self.chunks():
            digest.update(part.images.numpy().data)
        digest.update(self.labels.contiguous().numpy().data)
        return digest.hexdigest()

    @functools.cached_property
    def mean_and_std(self) -> tuple[Tensor, Tensor]:
        """Mean and standard deviation of each channel over all pixels, in 0..1: two tensors (3,).

        Not the mean of each image's standard deviation, which is where the (0.2023, ...) that circulates comes from.
        """
        counts = torch.zeros(3, 256, dtype=torch.int64)
        for part in self.chunks():
            channels = part.images.unbind(1)
            counts += torch.stack([torch.bincount(channel.flatten(), minlength=256) for channel in channels])
        fractions, values = counts.double() / counts.sum(1, keepdim=True), torch.arange(256).double() / 255
        mean, mean_square = fractions @ values, fractions @ values.square()
        return mean.float(), (mean_square - mean.square()).sqrt().float()


@dataclass(frozen=True, kw_only=True)
class Dataset:
    """A dataset on disk. A split is read when it is first used: training never opens the test split."""

    key: str  # what --dataset finds it by: its name, or the absolute path of a folder
    classes: tuple[str, ...]
    location: str  # where its files are, for people
    can_flip: bool  # whether a mirrored image still shows its class
    read: Callable[[str], Split]  # takes "train" or "test"; raises UserError that names a damaged file
    verify: Callable[[], None] = lambda: None  # raises UserError that names a damaged file, without reading images
    test_files: tuple[str, ...] = ()  # of a folder: the path of each test image, relative to it, with /
    left_out: tuple[str, ...] = ()  # of a folder: the files that could not be read
    note: str | None = None  # what the user must not overlook

    @property
    def name(self) -> str:
        """Its name, for people."""
        return Path(self.key).name

    @functools.cached_property
    def train(self) -> Split:
        """All training images, including those for validation. Raises UserError if a file is damaged."""
        return self.read("train")

    @functools.cached_property
    def test(self) -> Split:
        """The test images. Raises UserError if a file is damaged."""
        return self.read("test")


def train_val_split(split: Split, val_size: int, seed: int) -> tuple[Split, Split]:
    """Split into training and validation: `val_size` images drawn by the seed, stratified by class.

    If the dataset has validation images of its own, they are the validation split, and val_size is their number.
    """
    if val_size in (0, split.own_val):
        return split[: len(split) - val_size], split[len(split) - val_size :]
    from sklearn.model_selection import train_test_split

    rows = torch.arange(len(split))
    train, val = train_test_split(rows, test_size=val_size, stratify=split.labels, random_state=seed)
    return split[train], split[val]


@dataclass(frozen=True)
class Batch:
    """One training batch. With several processes, images and labels are this process's slice of it."""

    images: Tensor  # float32 (B, 3, S, S) in 0..1
    labels: Tensor  # int64 (B,)
    targets: Tensor  # the labels, or class probabilities (B, classes) for augmentations such as mixup
    indices: Tensor  # of all images of the batch, in the training split


class Batches:
    """The training batches of a split: which images an epoch takes, in which order, at which size, and augmented.

    The last images of an epoch that do not fill a batch are left out, as BatchNorm needs batches of one size.
    """

    def __init__(self, split: Split, config, hardware: torch.device, classes: int):
        """config: a config.Config. All random numbers come from a generator that its seed starts."""
        self.classes = classes
        self.config, self.device = config, hardware
        self.generator = torch.Generator(hardware).manual_seed(config.seed)
        self.split, self.labels = split.to(hardware), split.labels.to(hardware)
        self.class_weights = class_weights(self.labels, classes) if config.balance == "loss" else None
        self.mean = split.mean_and_std[0].to(hardware) if config.cutout else None
        # Alternating flip (Jordan 2024, section 3.6): a coin per image once, then flipped in every other epoch.
        self.first_flip = self._coins(len(split))
        # Each image's loss when it was last trained on; one that was not yet is as hard as can be.
        self.image_losses = torch.full((len(split),), torch.finfo(torch.float32).max, device=hardware)
        self.selected = torch.ones(len(split), dtype=torch.bool, device=hardware)
        self.rng_state = self.generator.get_state()  # at the start of the epoch

    def __len__(self) -> int:
        """Return the number of steps in an epoch of all images."""
        return len(self.labels) // self.config.batch_size

    @property
    def steps_per_epoch(self) -> list[int]:
        """The number of steps of each epoch; the last `hard_epochs` take fewer images."""
        hard = max(1, int(len(self.labels) * self.config.hard_share) // self.config.batch_size)
        return [len(self)] * (self.config.epochs - self.config.hard_epochs) + [hard] * self.config.hard_epochs

    @property
    def image_sizes(self) -> list[int]:
        """The size of each epoch's images, in pixels (progressive resizing)."""
        small, full = self.config.small_epochs, self.split.image_size
        return [self.config.small_size] * small + [full] * (self.config.epochs - small)

    def epoch(self, epoch: int, image_size: int | None = None, skip: int = 0) -> Iterator[Batch]:
        """Yield the batches of an epoch, counted from 1.

        image_size: in pixels, instead of the epoch's. skip: batches that have been trained on before an interruption.
        """
        if not skip:
            self.rng_state = self.generator.get_state()
            self.selected = self._hardest(self.steps_per_epoch[epoch - 1] * self.config.batch_size)
        batches = self._augmented(self._order(epoch), epoch, image_size or self.image_sizes[epoch - 1])
        # Batches are skipped by augmenting them again, which must not use up torch's global random numbers.
        with torch.random.fork_rng([self.device] if self.device.type == "cuda" else []):
            collections.deque(itertools.islice(batches, skip), maxlen=0)
        yield from batches
        self.rng_state = self.generator.get_state()

    def state_dict(self) -> dict[str, Any]:
        """Return what an interrupted epoch needs to resume with the same batches."""
        return {"rng_state": self.rng_state, "selected": self.selected, "image_losses": self.image_losses}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Restore `state_dict`. Raises ValueError, RuntimeError or KeyError if it is not from such batches."""
        for name in ("selected", "image_losses"):
            if state[name].shape != self.labels.shape:
                raise ValueError(f"{name} is of other images")
            getattr(self, name).copy_(state[name])
        self.rng_state = state["rng_state"]
        self.generator.set_state(self.rng_state)

    def _order(self, epoch: int) -> Tensor:
        """Draw the order of an epoch's images: each once or, for balanced sampling, all classes alike, with repeats."""
        if self.config.balance == "sampling":
            weights = class_weights(self.labels[self.selected], self.classes)[self.labels] * self.selected
            count = self.steps_per_epoch[epoch - 1] * self.config.batch_size
            return torch.multinomial(weights, count, replacement=True, generator=self.generator)
        order = torch.randperm(len(self.labels), generator=self.generator, device=self.generator.device)
        return order[self.selected[order]]

    def _hardest(self, count: int) -> Tensor:
        """Select the images with the highest losses: `count` of them, or all if an epoch has them all; bool (N,)."""
        if count >= len(self) * self.config.batch_size:
            return torch.ones_like(self.selected)
        selected = torch.zeros_like(self.selected)
        selected[self.image_losses.topk(count).indices] = True
        return selected

    def _augmented(self, order: Tensor, epoch: int, image_size: int) -> Iterator[Batch]:
        config, batch_size = self.config, self.config.batch_size
        most = min(_AUGMENTED_TOGETHER, _AUGMENTED_PIXELS // self.split.image_size**2)
        together = batch_size * max(1, most // batch_size)
        rank_slice = device.rank_slice(batch_size)  # random numbers are drawn for the whole batch by every process
        rank_size = rank_slice.stop - rank_slice.start
        is_full_size = image_size == self.split.image_size
        layout = torch.channels_last if is_full_size else torch.contiguous_format  # `resize` is twice as fast on this
        groups = order[: len(order) // batch_size * batch_size].split(together)
        for indices, following in itertools.zip_longest(groups, groups[1:]):
            if following is not None:
                self.split.prefetch(following)
            in_rank = torch.arange(len(indices), device=indices.device).view(-1, batch_size)[:, rank_slice].flatten()
            augmented = self._cropped_and_flipped(indices, in_rank, epoch)
            if config.auto_augment != "none":
                from torchvision.transforms import v2 as transforms

                randaugment = config.auto_augment == "randaugment"  # arXiv:1909.13719; trivialaugment: arXiv:2103.10158
                auto_augment = transforms.RandAugment() if randaugment else transforms.TrivialAugmentWide()
                seeds = self._seeds(len(indices) // _ALIKE + 1)[in_rank // _ALIKE]
                augmented = transform_by_seed(auto_augment, augmented, seeds)
            parts = augmented.split(rank_size), self.labels[indices[in_rank]].split(rank_size)
            for images, labels, batch_indices in zip(*parts, indices.split(batch_size)):
                images = to_float(images, layout)
                if config.jitter:
                    factors = torch.empty(3, batch_size, device=self.device)
                    factors.uniform_(1 - config.jitter, 1 + config.jitter, generator=self.generator)
                    images = color_jitter(images, factors[:, rank_slice])
                if self.mean is not None:
                    places = self.split.image_size - config.cutout + 1
                    corners = torch.stack([self._integers(places, batch_size) for _ in range(2)])
                    images = cutout(images, corners[:, rank_slice], config.cutout, self.mean)
                targets = labels
                if config.mixup or config.cutmix:
                    alphas = {"mixup": config.mixup, "cutmix": config.cutmix}
                    images, targets = mix(images, labels, self.classes, **alphas, seed=int(self._seeds(1)))
                yield Batch(resize(images, image_size), labels, targets, indices=batch_indices)

    def _cropped_and_flipped(self, indices: Tensor, in_rank: Tensor, epoch: int) -> Tensor:
        """Crop and flip the images of some batches; returns those at `in_rank`, uint8."""
        images = self.split.gather(indices[in_rank].to(self.split.source.device)).to(self.device)
        if self.config.crops_resized:
            from torchvision.transforms import v2 as transforms

            crop = transforms.RandomResizedCrop(images.shape[-2:], (self.config.crop_scale, 1.0))
            images = transform_by_seed(crop, images, self._seeds(len(indices))[in_rank])
        else:
            offsets = self._integers(2 * self.config.crop + 1, 2, len(indices))
            images = random_crop(images, offsets[:, in_rank], self.config.crop, self.config.crop_mode)
        if self.config.flip == "none":
            return images
        if self.config.flip == "alternating":
            return horizontal_flip(images, (self.first_flip[indices] ^ (epoch % 2 == 0))[in_rank])
        return horizontal_flip(images, self._coins(len(indices))[in_rank])

    def _coins(self, count: int) -> Tensor:
        return torch.rand(count, generator=self.generator, device=self.generator.device) < 0.5

    def _seeds(self, count: int) -> Tensor:
        return self._integers(2**62, count)

    def _integers(self, bound: int, *shape: int) -> Tensor:
        return torch.randint(bound, shape, generator=self.generator, device=self.generator.device)


def class_weights(labels: Tensor, classes: int) -> Tensor:
    """Return weights (classes,) with which all classes count alike, 1 on average over the labels (N,).

    As scikit-learn's `balanced`; a class without labels has the weight of one with a single label.
    """
    return len(labels) / (classes * labels.bincount(minlength=classes).clamp(min=1))


def to_float(images: Tensor, layout: torch.memory_format = torch.channels_last) -> Tensor:
    """Convert uint8 (N, 3, H, W) to float32 in 0..1; convolutions are fastest in the channels-last layout."""
    return images.to(dtype=torch.float32, memory_format=layout).div_(255)


def random_crop(images: Tensor, offsets: Tensor, padding: int, mode: str) -> Tensor:
    """Crop images to their own size after padding them on each side.

    images: (N, 3, H, W), any dtype; offsets: (2, N), down and to the right, from 0 to 2 * padding; mode: `reflect` or
    `zeros`. Returns the same shape. Raises ValueError unless 0 <= padding < min(H, W). Source: He et al. 2015,
    section 4.2, for `zeros`.
    """
    height, width = images.shape[-2:]
    if not 0 <= padding < min(height, width):
        raise ValueError(f"padding {padding} must be from 0 to {min(height, width) - 1}")
    if padding == 0:
        return images
    padded = pad_border(images, padding, mode)
    windows = padded.unfold(2, height, 1).unfold(3, width, 1)  # (N, 3, 2 padding + 1, 2 padding + 1, H, W), no copy
    return windows[torch.arange(len(images), device=images.device), :, offsets[0], offsets[1]]


def pad_border(images: Tensor, padding: int, mode: str) -> Tensor:
    """Pad images (N, 3, H, W), any dtype, by `padding` pixels on each side; mode: `reflect` or `zeros`."""
    if mode == "zeros":
        return F.pad(images, (padding,) * 4)
    for axis in (-2, -1):
        last = images.shape[axis] - 1
        before, after = images.narrow(axis, 1, padding), images.narrow(axis, last - padding, padding)
        images = torch.cat([before.flip(axis), images, after.flip(axis)], axis)  # F.pad cannot reflect integers
    return images


def horizontal_flip(images: Tensor, flipped: Tensor) -> Tensor:
    """Flip the images (N, 3, H, W) left to right where `flipped` (N,) is true."""
    return torch.where(flipped.view(-1, 1, 1, 1), images.flip(-1), images)


def color_jitter(images: Tensor, factors: Tensor) -> Tensor:
    """Scale brightness, contrast and saturation of each image by its factors, (3, N).

    images: float (N, 3, H, W) in 0..1; returns the same. As torchvision's ColorJitter, with the order fixed.
    """
    brightness, contrast, saturation = factors[..., None, None, None]
    images = (images * brightness).clamp_(0, 1)
    images = torch.lerp(_grey(images).mean((2, 3), keepdim=True), images, contrast).clamp_(0, 1)
    return torch.lerp(_grey(images), images, saturation).clamp_(0, 1)


def cutout(images: Tensor, corners: Tensor, size: int, color: Tensor) -> Tensor:
    """Fill a square of each image (N, 3, H, W), at its corner (2, N), with a color (3,).

    Source: DeVries and Taylor 2017, arXiv:1708.04552.
    """
    within = []  # for the rows and for the columns, which of them the square covers: (N, H) and (N, W)
    for length, start in zip(images.shape[-2:], corners):
        offset = torch.arange(length, device=images.device) - start[:, None]
        within.append((offset >= 0) & (offset < size))
    covered = within[0][:, None, :, None] & within[1][:, None, None, :]
    return torch.where(covered, color.view(1, 3, 1, 1), images)


@contextlib.contextmanager
def seeded(seed: int) -> Iterator[None]:
    """Seed the CPU's global generator, from which torchvision draws, and restore it afterwards."""
    with torch.random.fork_rng([]):
        torch.default_generator.manual_seed(seed)
        yield


def transform_by_seed(transform: Callable[[Tensor], Tensor], images: Tensor, seeds: Tensor) -> Tensor:
    """Apply a random transform of torchvision to uint8 images (N, 3, H, W), with random numbers from their seeds (N,).

    Neighbours with the same seed are transformed together, and alike.
    """
    parts = []
    seeds, counts = seeds.unique_consecutive(return_counts=True)
    for seed, part in zip(seeds.tolist(), images.split(counts.tolist())):
        with seeded(seed):
            parts.append(transform(part))
    return torch.cat(parts)


def mix(
    images: Tensor, labels: Tensor, classes: int, *, mixup: float, cutmix: float, seed: int
) -> tuple[Tensor, Tensor]:
    """Mix each image with the one before it, by torchvision's MixUp or CutMix: by either if both have alphas.

    images: float (N, 3, H, W); labels: (N,). Returns images and class probabilities (N, classes).
    Source: Zhang et al. 2017, arXiv:1710.09412; Yun et al. 2019, arXiv:1905.04899.
    """
    from torchvision.transforms import v2 as transforms

    alphas = {transforms.MixUp: mixup, transforms.CutMix: cutmix}
    kinds = [kind(alpha=alpha, num_classes=classes) for kind, alpha in alphas.items() if alpha]
    with seeded(seed):
        return transforms.RandomChoice(kinds)(images, labels)


def resize(images: Tensor, size: int) -> Tensor:
    """Resize float images (N, 3, H, W) to size x size pixels, with antialiasing."""
    if images.shape[-1] == size:
        return images
    resized = F.interpolate(images, size=(size, size), mode="bilinear", antialias=True)
    return resized.contiguous(memory_format=torch.channels_last)


def _grey(images: Tensor) -> Tensor:
    weights = images.new_tensor(LUMA_WEIGHTS).view(1, 3, 1, 1)
    return (images * weights).sum(1, keepdim=True)
