"""Which pixels decided: the gradient of a class's logit with respect to the picture."""

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from cifar import data, device

_COPIES = 8
_NOISE = 0.1  # standard deviation, of images in 0..1
_BLUR = 3  # pixels


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
