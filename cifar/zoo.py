"""Networks from elsewhere: torchvision's by their names, fitted to small pictures, and the user's own.

Of torchvision's, from random weights, with BatchNorm whose statistics follow as fast as torch's own or faster, and for
pictures of up to 64 pixels:
- ResNet, ResNeXt, Wide ResNet, DenseNet: a 3x3 stem without stride and no max-pool after it, as He et al. 2015,
  section 4.2, and Huang et al. 2017 (arXiv:1608.06993) have them for CIFAR; GoogLeNet likewise;
- EfficientNet, MNASNet, MobileNet, RegNet, ShuffleNet: the first convolution without stride, and ShuffleNet without
  its max-pool, as in kuangliu/pytorch-cifar;
- the vision transformers: 8x8 patches, of 4 pixels in pictures of 32, as Lee et al. 2021 (arXiv:2112.13492); these
  for pictures of any size;
- all others as they are, on pictures enlarged two, four or eight times, or to 224 pixels, where smaller ones are too
  small for them: AlexNet, Inception and MaxViT.
"""

import contextlib
import difflib
import importlib
import os
import sys
from collections.abc import Callable, Iterator

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from cifar.config import MODELS, OTHER_MODELS
from cifar.errors import UserError, known_name, told

_SMALL = 64  # pixels, to which the stems are adapted
_PATCHES = 8  # of a vision transformer, along each side
_LEAST_MOMENTUM = 0.1  # of BatchNorm's running statistics: torch's own
_OPTIONS = {  # their second outputs are for training alone, and their initialization takes a minute
    "googlenet": {"aux_logits": False, "init_weights": False},
    "inception_v3": {"aux_logits": False, "init_weights": False},
}


def require(name: str) -> None:
    """Raise UserError, with the nearest names, unless `modules` can build the network."""
    if ":" in name:
        _factory(name)
    elif name not in _names():
        near = difflib.get_close_matches(name, [*MODELS, *_names()], n=3)
        hint = f"did you mean {' or '.join(near)}? " if near else ""
        raise UserError(f"unknown model '{name}': {hint}known are {', '.join(MODELS)}, and {OTHER_MODELS}")


def modules(name: str, classes: int, image_size: int) -> dict[str, nn.Module]:
    """The modules that one after the other make logits (N, classes) of normalized images (N, 3, S, S), by their names.

    name: one of torchvision's, or package.module:factory, which is called with num_classes. Raises UserError for one
    that is not there, and if the factory does not return such a network.
    """
    require(name)
    if ":" in name:
        return {"network": _own(name, classes, image_size)}
    network = _vision_transformer(name, classes, image_size) if name.startswith("vit_") else _torchvision(name, classes)
    if image_size <= _SMALL:
        _keep_resolution(network)
    for module in network.modules():
        if isinstance(module, nn.BatchNorm2d):  # else MobileNet's statistics lag behind by hundreds of steps
            module.momentum = max(module.momentum, _LEAST_MOMENTUM)
    side = _least_side(network, image_size)
    return {"enlarge": Enlarge(side), "network": network} if side > image_size else {"network": network}


# torchvision's.


def _names() -> list[str]:
    from torchvision import models

    return models.list_models(module=models)


def _torchvision(name: str, classes: int, **options) -> nn.Module:
    from torchvision import models

    return models.get_model(name, weights=None, num_classes=classes, **_OPTIONS.get(name, {}), **options)


def _vision_transformer(name: str, classes: int, image_size: int) -> nn.Module:
    """torchvision fixes a transformer's patch by its name, so it is built for larger pictures and then re-cut."""
    patch = image_size // _PATCHES
    own = int(name.split("_")[2])
    network = _torchvision(name, classes, image_size=own * (image_size // patch))
    network.image_size, network.patch_size = image_size, patch
    network.conv_proj = nn.Conv2d(3, network.hidden_dim, patch, patch)
    nn.init.trunc_normal_(network.conv_proj.weight, std=(3 * patch**2) ** -0.5)  # as torchvision does
    nn.init.zeros_(network.conv_proj.bias)
    return network


def _keep_resolution(network: nn.Module) -> None:
    """Take out the strides and pools of a network's stem, which make 224 pixels 56, and would leave 8 of 32."""
    from torchvision import models

    if isinstance(network, models.ResNet):
        network.conv1, network.maxpool = _unstrided(network.conv1), nn.Identity()
    elif isinstance(network, models.DenseNet):
        network.features.conv0, network.features.pool0 = _unstrided(network.features.conv0), nn.Identity()
    elif isinstance(network, models.GoogLeNet):
        network.conv1.conv, network.maxpool1 = _unstrided(network.conv1.conv), nn.Identity()
    elif isinstance(network, models.ShuffleNetV2):
        network.conv1[0].stride, network.maxpool = (1, 1), nn.Identity()
    elif isinstance(
        network, models.EfficientNet | models.MNASNet | models.MobileNetV2 | models.MobileNetV3 | models.RegNet
    ):
        next(module for module in network.modules() if isinstance(module, nn.Conv2d)).stride = (1, 1)


def _unstrided(conv: nn.Conv2d) -> nn.Conv2d:
    """A 3x3 convolution, initialized as He et al. 2015b, in place of a strided 7x7 one."""
    small = nn.Conv2d(3, conv.out_channels, 3, padding=1, bias=False)
    nn.init.kaiming_normal_(small.weight, mode="fan_out", nonlinearity="relu")
    return small


def _least_side(network: nn.Module, image_size: int) -> int:
    """The side of the smallest pictures, as they are or enlarged, that the network can take."""
    for side in (image_size, 2 * image_size, 4 * image_size, 8 * image_size):
        with contextlib.suppress(RuntimeError, ValueError, AssertionError):  # what too small a picture makes them raise
            _try(network, side)
            return side
    return 224


class Enlarge(nn.Module):
    """Resize images (N, 3, H, W) to side x side pixels, linearly."""

    def __init__(self, side: int):
        super().__init__()
        self.side = side

    def forward(self, images: Tensor) -> Tensor:
        return F.interpolate(images, size=(self.side, self.side), mode="bilinear")


@torch.no_grad()
def _try(network: nn.Module, side: int) -> Tensor:
    """What the network makes of two black pictures; it stays as it was."""
    was_training = network.training
    try:
        return network.eval()(torch.zeros(2, 3, side, side))
    finally:
        network.train(was_training)


# The user's own.


def _own(name: str, classes: int, image_size: int) -> nn.Module:
    factory, call = _factory(name), f"{name}(num_classes={classes})"
    try:
        with _importing_from_here():
            network = factory(num_classes=classes)
    except Exception as error:
        raise UserError(f"{call} fails: {told(error)}") from None
    if not isinstance(network, nn.Module):
        raise UserError(f"{call} returns {type(network).__name__}, and not a torch.nn.Module")
    if not any(parameter.requires_grad for parameter in network.parameters()):
        raise UserError(f"{call} returns a network that has nothing to train")
    try:
        logits = _try(network, image_size)
    except Exception as error:
        raise UserError(f"{call} fails on images (2, 3, {image_size}, {image_size}): {told(error)}") from None
    shape = tuple(logits.shape) if isinstance(logits, Tensor) else type(logits).__name__
    if shape != (2, classes):
        raise UserError(f"{call} makes {shape} of images (2, 3, {image_size}, {image_size}), and not (2, {classes})")
    return network


def _factory(name: str) -> Callable[..., nn.Module]:
    """package.module:factory, imported from the working directory or an installed package: this runs its code."""
    module_name, _, attribute = name.partition(":")
    if module_name.endswith(".py") or not all(part.isidentifier() for part in module_name.split(".")):
        raise UserError(f"--model takes a module as Python imports it, such as networks.mine:build, not '{name}'")
    try:
        with _importing_from_here():
            module = importlib.import_module(module_name)
    except Exception as error:
        raise UserError(f"cannot import {module_name} from {os.getcwd()}: {told(error)}") from None
    makers = [key for key, value in vars(module).items() if callable(value) and not key.startswith("_")]
    return getattr(module, known_name(f"factory of {module_name}", attribute, makers))


@contextlib.contextmanager
def _importing_from_here() -> Iterator[None]:
    sys.path.insert(0, os.getcwd())
    try:
        yield
    finally:
        sys.path.remove(os.getcwd())
