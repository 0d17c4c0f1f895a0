"""Which pixels decided: the gradient of a class's logit with respect to the picture."""

from collections.abc import Mapping

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from cifar import data, device
from cifar.files import replacing
from cifar.runs import Run, damaged

_COPIES = 8
_NOISE = 0.1  # standard deviation, of images in 0..1
_BLUR = 3  # pixels
_ORANGE = np.array([0xD5, 0x5E, 0x00])  # as in the figures
_FILE = "saliency.npz"
_MOST_BYTES = 100_000_000  # unpacked: it holds a hundred pictures, of 16 KB at most


def saliency(network: nn.Module, image: Tensor, label: int, *, precision: str) -> Tensor:
    """How much each pixel moves the logit of the class: (S, S), float32 in 0..1, the largest 1.

    image: uint8 (3, S, S). The gradient's largest absolute value over the channels, averaged over noisy copies of
    the picture and over neighbouring pixels. Source: SmoothGrad, Smilkov et al. 2017, arXiv:1706.03825.
    """
    network.eval()
    hardware = next(network.parameters()).device
    noise = torch.randn(_COPIES, *image.shape, generator=torch.Generator().manual_seed(0)) * _NOISE
    copies = (data.to_float(image[None]) + noise).to(hardware, memory_format=torch.channels_last).requires_grad_()
    with device.autocast(hardware, precision):
        logit = network(copies)[:, label].float().sum()
    (gradient,) = torch.autograd.grad(logit, copies)
    strength = gradient.abs().amax(1).mean(0)
    smooth = F.avg_pool2d(strength[None], _BLUR, stride=1, padding=_BLUR // 2, count_include_pad=False)[0]
    return (smooth / smooth.max().clamp_min(1e-30)).cpu()


def overlay(image: np.ndarray, heat: np.ndarray) -> np.ndarray:
    """The picture (S, S, 3) in greys, with the heat (S, S) over it in orange; squared, so that the peaks stand out."""
    grey = (image @ data.ITU_GREY)[..., None]
    share = heat[..., None] ** 2 * 0.9
    return (grey * (1 - share) + _ORANGE * share).astype(np.uint8)


def write(run: Run, network: nn.Module, images: Tensor, labels: Mapping[int, int], *, precision: str) -> None:
    """saliency.npz: of some of the images (N, 3, S, S), for each the class given with its index."""
    heats = [saliency(network, images[index], label, precision=precision) for index, label in labels.items()]
    levels = torch.stack(heats).mul(255).round().byte() if heats else images[:0, 0]
    with replacing(run.path / _FILE) as partial, partial.open("wb") as file:
        np.savez_compressed(file, index=np.array(list(labels), int), heat=levels.numpy())


def read(run: Run, side: int) -> dict[int, np.ndarray]:
    """Index in the split -> heat (side, side) in 0..1, of the run's saliency.npz; empty if there is none.

    Raises UserError if it is damaged, or of pictures of another size.
    """
    path = run.path / _FILE
    if not path.exists():
        return {}
    try:
        with path.open("rb") as file, np.load(file) as content:
            if sum(member.file_size for member in content.zip.infolist()) > _MOST_BYTES:
                raise ValueError("too large")
            indices, heats = content["index"], content["heat"]
        if heats.shape != (len(indices), side, side) or (len(indices) and heats.dtype != np.uint8):
            raise ValueError("not as it was written")
        return {int(index): heat / 255 for index, heat in zip(indices, heats)}
    except Exception:  # a damaged archive makes its readers stumble in any way there is
        raise damaged(path, "it does not hold what was written") from None
