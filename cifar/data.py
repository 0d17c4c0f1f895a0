"""Images in memory as uint8 tensors: splitting, augmenting, batching.

scikit-learn is imported where it is used: it takes a second, and the demo would wait for it.
"""

import hashlib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from cifar import distributed

_MOVED_TOGETHER = 2000  # images that are shifted and mirrored at once: for small batches, one by one costs twice
ITU_GREY = (0.299, 0.587, 0.114)  # ITU-R BT.601, as Pillow and torchvision weigh red, green and blue


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
        counts = torch.zeros(3, 256, dtype=torch.int64)
        for images in self.images.split(5000):  # bincount makes eight bytes of each
            counts += torch.stack([torch.bincount(channel.flatten(), minlength=256) for channel in images.unbind(1)])
        shares, values = counts.double() / counts.sum(1, keepdim=True), torch.arange(256).double() / 255
        mean, square = shares @ values, shares @ values.square()
        return mean.float(), (square - mean.square()).sqrt().float()


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
        cutout: int,
        generator: torch.Generator,
    ):
        self.images = split.images.to(generator.device)
        self.labels = split.labels.to(generator.device)
        self.batch_size, self.generator = batch_size, generator
        self.crop, self.crop_mode, self.flip, self.jitter, self.cutout = crop, crop_mode, flip, jitter, cutout
        self.mean = split.mean_and_std()[0].to(generator.device) if cutout else None
        # Alternating flip (Jordan 2024, section 3.6): a coin per image once, then every other epoch mirrored.
        self.first_flip = self._coins(len(split))

    def __len__(self) -> int:
        """Steps of an epoch of all images."""
        return len(self.labels) // self.batch_size

    def epoch(self, epoch: int, side: int, taken: Tensor | None = None) -> Iterator[tuple[Tensor, Tensor, Tensor]]:
        """The batches of the epoch, counted from 1: images (B, 3, side, side), labels (B,), places in the split (B,).

        taken: the images that the epoch has, bool (N,); default all.
        Of several processes each draws for the whole batches, and gets its share of each batch's images and labels.
        """
        order = torch.randperm(len(self.labels), generator=self.generator, device=self.generator.device)
        if taken is not None:
            order = order[taken[order]]
        together = self.batch_size * max(1, _MOVED_TOGETHER // self.batch_size)
        share = distributed.share(self.batch_size)
        is_whole = side == self.images.shape[-1]
        layout = torch.channels_last if is_whole else torch.contiguous_format  # `shrink` is twice as fast on the latter
        for chosen in order[: len(order) // self.batch_size * self.batch_size].split(together):
            own = torch.arange(len(chosen), device=chosen.device).view(-1, self.batch_size)[:, share].flatten()
            moved = self._moved(chosen, own, epoch).split(share.stop - share.start)
            answers = self.labels[chosen[own]].split(share.stop - share.start)
            for images, labels, places in zip(moved, answers, chosen.split(self.batch_size)):
                images = to_float(images, layout)
                if self.jitter:
                    factors = jitter_factors(self.batch_size, self.jitter, self.generator)
                    images = color_jitter(images, factors[:, share])
                if self.cutout:
                    corners = random_corners(self.batch_size, self.cutout, images.shape[-2:], self.generator)
                    images = cut_out(images, corners[:, share], self.cutout, self.mean)
                yield shrink(images, side), labels, places

    def _moved(self, chosen: Tensor, own: Tensor, epoch: int) -> Tensor:
        """Of the chosen images this process's `own`, shifted and mirrored; uint8."""
        shifts = random_shifts(len(chosen), self.crop, self.generator)
        images = self.images.index_select(0, chosen[own])  # twenty times as fast as by brackets
        images = shift(images, shifts[:, own], self.crop, self.crop_mode)
        return mirror(images, self._mirrored(chosen, epoch)[own]) if self.flip != "none" else images

    def _mirrored(self, chosen: Tensor, epoch: int) -> Tensor:
        return self.first_flip[chosen] ^ (epoch % 2 == 0) if self.flip == "alternating" else self._coins(len(chosen))

    def _coins(self, count: int) -> Tensor:
        return torch.rand(count, generator=self.generator, device=self.generator.device) < 0.5


def to_float(images: Tensor, layout: torch.memory_format = torch.channels_last) -> Tensor:
    """uint8 (N, 3, H, W) -> float32 in 0..1; convolutions are fastest in the channels-last layout."""
    return images.to(dtype=torch.float32, memory_format=layout).div_(255)


def random_shifts(count: int, pad: int, generator: torch.Generator) -> Tensor:
    """Places of crops, down and to the right, from 0 to 2 * pad: (2, count)."""
    return torch.randint(0, 2 * pad + 1, (2, count), generator=generator, device=generator.device)


def shift(images: Tensor, shifts: Tensor, pad: int, mode: str) -> Tensor:
    """Crop images out of what they are with a border of `pad` pixels.

    images: (N, 3, H, W), any dtype; shifts: (2, N), of `random_shifts`; mode: the border, `reflect` or `zeros`. Returns
    the same shape. Raises ValueError unless 0 <= pad < min(H, W). Source: He et al. 2015, section 4.2, for `zeros`.
    """
    height, width = images.shape[-2:]
    if not 0 <= pad < min(height, width):
        raise ValueError(f"pad {pad} must be from 0 to {min(height, width) - 1}")
    if pad == 0:
        return images
    padded = pad_border(images, pad, mode)
    windows = padded.unfold(2, height, 1).unfold(3, width, 1)  # (N, 3, 2 pad + 1, 2 pad + 1, H, W), a view
    return windows[torch.arange(len(images), device=images.device), :, shifts[0], shifts[1]]


def pad_border(images: Tensor, pad: int, mode: str) -> Tensor:
    """Widen images (N, 3, H, W), of any dtype, by `pad` pixels on each side: `reflect` or `zeros`."""
    if mode == "zeros":
        return F.pad(images, (pad,) * 4)
    for axis in (-2, -1):
        last = images.shape[axis] - 1
        before, after = images.narrow(axis, 1, pad), images.narrow(axis, last - pad, pad)
        images = torch.cat([before.flip(axis), images, after.flip(axis)], axis)  # F.pad reflects no integers
    return images


def mirror(images: Tensor, mirrored: Tensor) -> Tensor:
    """Mirror left to right the images (N, 3, H, W) where `mirrored` (N,) is true."""
    return torch.where(mirrored.view(-1, 1, 1, 1), images.flip(-1), images)


def jitter_factors(count: int, most: float, generator: torch.Generator) -> Tensor:
    """Factors from 1 - most to 1 + most of the brightness, contrast and saturation of images: (3, count)."""
    factors = torch.empty(3, count, device=generator.device)
    return factors.uniform_(1 - most, 1 + most, generator=generator)


def color_jitter(images: Tensor, factors: Tensor) -> Tensor:
    """Scale brightness, contrast and saturation of each image by its factors, (3, N).

    images: float (N, 3, H, W) in 0..1; returns the same. As torchvision's ColorJitter, with the order fixed.
    """
    brightness, contrast, saturation = factors[..., None, None, None]
    images = (images * brightness).clamp_(0, 1)
    images = torch.lerp(_grey(images).mean((2, 3), keepdim=True), images, contrast).clamp_(0, 1)
    return torch.lerp(_grey(images), images, saturation).clamp_(0, 1)


def random_corners(count: int, side: int, size: Sequence[int], generator: torch.Generator) -> Tensor:
    """Upper left corners, rows and columns, of squares of that side within images of the size (H, W): (2, count).

    Raises ValueError if the square is larger than the images.
    """
    if side > min(size):
        raise ValueError(f"a square of {side} pixels does not fit into {min(size)}")
    draws = [
        torch.randint(0, length - side + 1, (count,), generator=generator, device=generator.device) for length in size
    ]
    return torch.stack(draws)


def cut_out(images: Tensor, corners: Tensor, side: int, colour: Tensor) -> Tensor:
    """Fill the square of that side at its corner, (2, N), of each image (N, 3, H, W) with a colour (3,).

    Source: DeVries and Taylor 2017, arXiv:1708.04552.
    """
    within = []  # for the rows and for the columns, which of them the square covers: (N, H) and (N, W)
    for length, start in zip(images.shape[-2:], corners):
        place = torch.arange(length, device=images.device) - start[:, None]
        within.append((place >= 0) & (place < side))
    covered = within[0][:, None, :, None] & within[1][:, None, None, :]
    return torch.where(covered, colour.view(1, 3, 1, 1), images)


def shrink(images: Tensor, side: int) -> Tensor:
    """Resize float images (N, 3, H, W) to `side` x `side` pixels, averaging where they get smaller."""
    if images.shape[-1] == side:
        return images
    shrunken = F.interpolate(images, size=(side, side), mode="bilinear", antialias=True)
    return shrunken.contiguous(memory_format=torch.channels_last)


def _grey(images: Tensor) -> Tensor:
    weights = images.new_tensor(ITU_GREY).view(1, 3, 1, 1)
    return (images * weights).sum(1, keepdim=True)
