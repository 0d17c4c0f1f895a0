"""Networks from elsewhere: torchvision's and timm's by name, adapted to small images, and the user's own.

From random weights, for images of up to 64 pixels:
- ResNet, ResNeXt, Wide ResNet (He et al. 2015, section 4.2), DenseNet (Huang et al. 2017, arXiv:1608.06993) and
  GoogLeNet get a 3x3 stem without stride or max-pooling, as the first two have for CIFAR;
- EfficientNet, MNASNet, MobileNet, RegNet and ShuffleNet get a first convolution without stride, and no max-pooling
  after it, as in kuangliu/pytorch-cifar.
Vision transformers get 8x8 patches at every image size (Lee et al. 2021, arXiv:2112.13492: 4 pixels at 32x32). AlexNet,
Inception, MaxViT and transformers of timm, which need larger images, get them enlarged.

For pretrained weights a network is as it was when they were trained. Images of up to 64 pixels are enlarged fourfold,
but not beyond the size that the weights expect; a network that takes no other size gets all images resized to it.
"""

import contextlib
import importlib
import os
import sys
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor, nn
from torchvision import models

from cifar import pretrained as weights
from cifar.config import MODELS, OTHER_MODELS, allowed_models
from cifar.errors import UserError, describe, did_you_mean

_SMALL = 64  # pixels


def require(name: str) -> None:
    """Raise UserError, with the nearest names, unless `modules` can build the network."""
    torchvision_names = models.list_models(module=models)
    if ":" in name:
        _import_factory(name)
    elif name.startswith(weights.TIMM):
        timm, timm_name = weights.optional("timm"), name.removeprefix(weights.TIMM)
        with contextlib.suppress(RuntimeError):  # raised for an unknown tag, the part after the dot
            if timm.is_model(timm_name) and timm.get_pretrained_cfg(timm_name):
                return
        hint = did_you_mean(timm_name, [*timm.list_models(), *timm.list_models(pretrained=True)])
        raise UserError(f"timm has no network {timm_name}: {hint.strip() or 'timm.list_models() lists them'}")
    elif name not in torchvision_names:
        hint = did_you_mean(name, [*MODELS, *torchvision_names])
        raise UserError(f"unknown model '{name}': {hint}choose from {', '.join(MODELS)}, {OTHER_MODELS}")


def modules(name: str, classes: int, image_size: int, pretrained: bool = False) -> dict[str, nn.Module]:
    """Build the modules that turn normalized images (N, 3, S, S) into logits (N, classes), in running order.

    name: one of torchvision's, timm/ and one of timm's, or package.module:factory, a function that is called with
    num_classes. pretrained: build it as pretrained weights need it.
    Raises UserError for an unknown name, and if the factory does not return a network that can be trained.
    """
    require(name)
    if ":" in name:
        return {"network": _users_network(name, classes, image_size)}
    is_transformer = name.startswith("vit_") and not pretrained
    network = _vision_transformer(name, classes, image_size) if is_transformer else _original(name, classes, pretrained)
    if image_size <= _SMALL and not pretrained:
        _adapt_stem(network)
    for module in network.modules():
        if isinstance(module, nn.BatchNorm2d):
            module.momentum = max(module.momentum or 0, 0.1)  # torch's default; MobileNet's lags by hundreds of steps
    size = _input_size(network, name, image_size, pretrained)
    enlarge = {"enlarge": nn.Upsample((size, size), mode="bilinear")} if size != image_size else {}
    return {**enlarge, "network": network}


def head_names(name: str, network: nn.Module, classes: int) -> frozenset[str]:
    """Return the names of a network's weights whose shapes depend on the number of classes.

    network: of `modules`, for so many classes; without its name in the chain.
    """
    with torch.random.fork_rng():
        other = _import_factory(name)(num_classes=classes + 1) if ":" in name else _original(name, classes + 1, True)
    shapes = {key: value.shape for key, value in other.state_dict().items()}
    return frozenset(key for key, value in network.state_dict().items() if value.shape != shapes.get(key))


def _original(name: str, classes: int, pretrained: bool) -> nn.Module:
    """Build a network of torchvision or timm as it is for ImageNet."""
    if name.startswith(weights.TIMM):
        return weights.optional("timm").create_model(name.removeprefix(weights.TIMM), num_classes=classes)
    options: dict[str, Any] = {}
    if name.startswith("vit_") and pretrained:
        options = {"image_size": weights.preprocessing(name).size}  # 518 pixels of vit_h_14
    if name in ("googlenet", "inception_v3"):
        # A second output only for training, an initialization of a minute, and the pretrained weights' normalization.
        options = {"aux_logits": False, "init_weights": False, "transform_input": pretrained}
    return models.get_model(name, weights=None, num_classes=classes, **options)


def _vision_transformer(name: str, classes: int, image_size: int) -> nn.Module:
    """Build a transformer for 8x8 patches; torchvision ties their size to the name, so it is changed afterwards."""
    patch_size = image_size // 8
    size = int(name.split("_")[2]) * (image_size // patch_size)
    network: models.VisionTransformer = models.get_model(name, weights=None, num_classes=classes, image_size=size)
    network.image_size, network.patch_size = image_size, patch_size
    network.conv_proj = nn.Conv2d(3, network.hidden_dim, patch_size, patch_size)
    nn.init.trunc_normal_(network.conv_proj.weight, std=(3 * patch_size**2) ** -0.5)  # as torchvision does
    nn.init.zeros_(network.conv_proj.bias)
    return network


def _adapt_stem(network: nn.Module) -> None:
    """Remove stride and max-pooling from a network's stem, which would leave 8 of 32 pixels."""
    large_filters = models.ResNet | models.DenseNet | models.GoogLeNet
    small_filters = models.EfficientNet | models.MNASNet | models.MobileNetV2 | models.MobileNetV3 | models.RegNet
    if not isinstance(network, large_filters | small_filters | models.ShuffleNetV2):
        return
    name, conv = _first(network, nn.Conv2d)
    conv.stride = (1, 1)
    if isinstance(network, large_filters):
        stem = nn.Conv2d(3, conv.out_channels, 3, padding=1, bias=False)
        nn.init.kaiming_normal_(stem.weight, mode="fan_out", nonlinearity="relu")  # He et al. 2015b
        network.set_submodule(name, stem)
    if isinstance(network, large_filters | models.ShuffleNetV2):
        network.set_submodule(_first(network, nn.MaxPool2d)[0], nn.Identity())


def _first(network: nn.Module, kind: type[nn.Module]) -> tuple[str, Any]:
    return next((name, module) for name, module in network.named_modules() if isinstance(module, kind))


def _input_size(network: nn.Module, name: str, image_size: int, pretrained: bool) -> int:
    """Return the size of the images, perhaps enlarged, that the network computes with: the first that it takes."""
    sizes, otherwise = [image_size, 2 * image_size, 4 * image_size, 8 * image_size], 224
    if pretrained or name.startswith(weights.TIMM):
        otherwise = weights.preprocessing(name).size
    if pretrained:
        sizes = [min(4 * image_size, otherwise) if image_size <= _SMALL else image_size]
    for size in sizes:
        with contextlib.suppress(RuntimeError, ValueError, AssertionError):  # raised for a size that it does not take
            _try(network, size)
            return size
    return otherwise


@torch.no_grad()
def _try(network: nn.Module, size: int, count: int = 2) -> Tensor:
    """Run the network on black images, without changing its statistics."""
    try:
        return network.eval()(torch.zeros(count, 3, size, size))
    finally:
        network.train()


@contextlib.contextmanager
def _working_directory_on_path() -> Iterator[None]:
    directory = os.getcwd()
    sys.path.insert(0, directory)
    try:
        yield
    finally:
        sys.path.remove(directory)


@_working_directory_on_path()
def _users_network(name: str, classes: int, image_size: int) -> nn.Module:
    """Call the user's factory and check what it returns. Raises UserError."""
    factory, call = _import_factory(name), f"{name}(num_classes={classes})"
    try:
        network = factory(num_classes=classes)
    except Exception as error:
        raise UserError(f"{call} fails: {describe(error)}") from None
    if not isinstance(network, nn.Module) or not any(parameter.requires_grad for parameter in network.parameters()):
        kind = type(network).__name__
        raise UserError(f"{call} returns {kind} instead of a torch.nn.Module with trainable parameters")
    for count in (2, 1):  # of one image, `squeeze` would drop the first dimension
        images = f"images of shape {(count, 3, image_size, image_size)}"
        try:
            logits = _try(network, image_size, count)
        except Exception as error:
            raise UserError(f"{call} fails on {images}: {describe(error)}") from None
        shape = tuple(logits.shape) if isinstance(logits, Tensor) else type(logits).__name__
        if shape != (count, classes):
            raise UserError(f"{call} returns {shape} for {images} instead of logits of shape {(count, classes)}")
    return network


@_working_directory_on_path()
def _import_factory(name: str) -> Callable[..., nn.Module]:
    """Import package.module:factory from the working directory or an installed package, which runs its code.

    Raises UserError unless the user has named it: a run from elsewhere must not choose what code runs here.
    """
    module_name, _, attribute = name.partition(":")
    if module_name.endswith(".py") or not all(part.isidentifier() for part in module_name.split(".")):
        raise UserError(f"--model takes a module as in an import, such as networks.mine:build, not '{name}'")
    if name not in allowed_models:
        raise UserError(
            f"{name} is code that would run on this computer: if you trust it, add --model {name} (in Python model=)"
        )
    try:
        return getattr(importlib.import_module(module_name), attribute)
    except Exception as error:
        raise UserError(f"cannot import {name} from {os.getcwd()}: {describe(error)}") from None
