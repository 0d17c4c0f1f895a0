"""The networks: float images (N, 3, H, W) in 0..1 in, logits (N, classes) out.

`zoo` is imported where it is used: torchvision, which it needs, takes a second.
"""

from collections import OrderedDict
from collections.abc import Callable, Iterable

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.nn.modules.module import register_module_forward_hook
from torch.utils.flop_counter import FlopCounterMode

from cifar.layers import GELU, Conv2d, GlobalAveragePool, GlobalMaxPool, MaxPool2d
from cifar.records import LayerRecord

# To add a network: a function (classes, image_size) -> Modules here, its name in NETWORKS below and in config.MODELS.
# `build` puts the normalization in front of the modules. The last linear layer is called `head`.

WHITENING_SIZE = 2  # pixels

Modules = dict[str, nn.Module]  # the parts of a network by their names, in running order


def airbench94(classes: int, image_size: int) -> Modules:
    """Three groups of two convolutions behind a fixed whitening convolution; the network of the recipe `fast`.

    Source: Jordan 2024, arXiv:2404.00498, section 3, as github.com/KellerJordan/cifar10-airbench trains it with Muon.
    Earlier versions called it `whitened`.
    """
    return _airbench(classes, (64, 256, 256), _airbench94_group)


def airbench96(classes: int, image_size: int) -> Modules:
    """Wider groups of three convolutions, the last two bypassed by a residual connection; the network of `best`.

    Source: as of airbench94. Earlier versions called it `whitened_deep`.
    """
    return _airbench(classes, (128, 384, 512), _airbench96_group)


def _airbench(classes: int, widths: tuple[int, ...], group: Callable[[int, int], nn.Module]) -> Modules:
    filters = 2 * 3 * WHITENING_SIZE**2
    whiten = nn.Conv2d(3, filters, WHITENING_SIZE)
    whiten.weight.requires_grad = False  # `set_input_statistics` sets it
    groups = nn.Sequential(*map(group, (filters, *widths), widths))
    head = nn.Linear(widths[-1], classes, bias=False)
    with torch.no_grad():
        head.weight.div_(head.weight.std())
    return {
        "whiten": whiten,
        "activation": GELU(),
        "groups": groups,
        "pool": GlobalMaxPool(),
        "flatten": nn.Flatten(),
        "head": head,
        "scale": Scale(1 / widths[-1]),
    }


def _airbench94_group(channels_in: int, channels_out: int) -> nn.Sequential:
    return _chain(**_airbench_layers(1, channels_in, channels_out), **_airbench_layers(2, channels_out, channels_out))


def _airbench96_group(channels_in: int, channels_out: int) -> nn.Sequential:
    first = _airbench_layers(1, channels_in, channels_out)
    second, third = (_airbench_layers(number, channels_out, channels_out) for number in (2, 3))
    activation = third.pop("activation3")  # after the addition
    return _chain(**first, more=Residual(OrderedDict(second | third)), activation3=activation)


def _airbench_layers(number: int, channels_in: int, channels_out: int) -> Modules:
    """A 3x3 convolution whose first filters start as the identity, BatchNorm without a learned scale, and GELU.

    number: of the convolution in its group; the first has max-pooling behind it.
    """
    conv = Conv2d(channels_in, channels_out)
    nn.init.dirac_(conv.weight.data[:channels_in])
    # Its statistics follow within a few batches. Jordan's eps, 1e-12 instead of 1e-5, divides the rounding errors of
    # features that do not vary by 1e-6: with it the network stayed at chance on grey images.
    norm = nn.BatchNorm2d(channels_out, momentum=0.4)
    norm.weight.requires_grad = False
    pool = {"pool": MaxPool2d()} if number == 1 else {}
    return {f"conv{number}": conv, **pool, f"norm{number}": norm, f"activation{number}": GELU()}


class Residual(nn.Sequential):
    """The features plus what the modules compute from them."""

    def forward(self, features: Tensor) -> Tensor:
        return features + super().forward(features)


class Scale(nn.Module):
    """Multiply by a constant."""

    def __init__(self, factor: float):
        super().__init__()
        self.factor = factor

    def forward(self, logits: Tensor) -> Tensor:
        return logits * self.factor


def simple(classes: int, image_size: int) -> Modules:
    """Three blocks of two convolutions, each with max-pooling and dropout, and two linear layers."""
    return {
        "blocks": nn.Sequential(_simple_block(3, 32), _simple_block(32, 64), _simple_block(64, 128)),
        "flatten": nn.Flatten(),
        "hidden": _hidden(128 * (image_size // 8) ** 2, 512),
        "head": nn.Linear(512, classes),
    }


def _simple_block(channels_in: int, channels_out: int) -> nn.Sequential:
    first, second = _conv_norm_relu(channels_in, channels_out), _conv_norm_relu(channels_out, channels_out, pool=True)
    return nn.Sequential(first, second, nn.Dropout2d(0.25))


def convnet(classes: int, image_size: int) -> Modules:
    """Three convolutions, max-pooling after the first two, global average pooling and a linear head."""
    blocks = _conv_norm_relu(3, 32, pool=True), _conv_norm_relu(32, 64, pool=True), _conv_norm_relu(64, 128)
    return {"blocks": nn.Sequential(*blocks), "pool": GlobalAveragePool(), "head": nn.Linear(128, classes)}


def mlp(classes: int, image_size: int) -> Modules:
    """Two hidden layers of 512 units on the pixels."""
    hidden = nn.Sequential(_hidden(3 * image_size**2, 512), _hidden(512, 512))
    return {"flatten": nn.Flatten(), "hidden": hidden, "head": nn.Linear(512, classes)}


def _hidden(features_in: int, features_out: int) -> nn.Sequential:
    return nn.Sequential(nn.Linear(features_in, features_out), nn.ReLU(), nn.Dropout(0.5))


def resnet18(classes: int, image_size: int) -> Modules:
    """ResNet-18 (He et al. 2015) with the usual stem for small images: one 3x3 convolution and no pooling."""
    shapes = ((64, 64, 1), (64, 128, 2), (128, 256, 2), (256, 512, 2))  # channels in, channels out, stride
    stem = _conv_norm_relu(3, 64)
    stages = [
        nn.Sequential(BasicBlock(channels_in, width, stride), BasicBlock(width, width, 1))
        for channels_in, width, stride in shapes
    ]
    head = nn.Linear(512, classes)
    return {"stem": stem, "stages": nn.Sequential(*stages), "pool": GlobalAveragePool(), "head": head}


class BasicBlock(nn.Module):
    """Two convolutions with a residual connection, which a 1x1 convolution adapts where the shape changes."""

    def __init__(self, channels_in: int, channels_out: int, stride: int):
        super().__init__()
        self.conv1 = _conv_norm_relu(channels_in, channels_out, stride)
        self.conv2 = Conv2d(channels_out, channels_out)
        self.norm2 = nn.BatchNorm2d(channels_out)
        self.shortcut: nn.Module = nn.Identity()
        if stride != 1 or channels_in != channels_out:
            conv = nn.Conv2d(channels_in, channels_out, 1, stride, bias=False)
            self.shortcut = nn.Sequential(conv, nn.BatchNorm2d(channels_out))
        self.activation = nn.ReLU(inplace=True)

    def forward(self, features: Tensor) -> Tensor:
        return self.activation(self.norm2(self.conv2(self.conv1(features))) + self.shortcut(features))


def _conv_norm_relu(channels_in: int, channels_out: int, stride: int = 1, pool: bool = False) -> nn.Sequential:
    """Convolution, BatchNorm, ReLU; with `pool`, max-pooling before ReLU: the same values for a quarter of its work."""
    conv = Conv2d(channels_in, channels_out, stride)
    pools = [MaxPool2d()] if pool else []
    return nn.Sequential(conv, nn.BatchNorm2d(channels_out), *pools, nn.ReLU(inplace=True))


NETWORKS = {network.__name__: network for network in (airbench94, airbench96, simple, convnet, mlp, resnet18)}


def require(name: str, pretrained: bool = False) -> None:
    """Raise UserError, with the nearest names, unless `build` knows the network."""
    if name not in NETWORKS or pretrained:
        from cifar import zoo

        zoo.require(name)


def build(name: str, classes: int, image_size: int, pretrained: bool = False) -> nn.Sequential:
    """Build the network `name` with random weights, drawn from torch's global generator; its first module normalizes.

    name: a key of NETWORKS, or one that `zoo` knows. pretrained: build it as pretrained weights need it.
    Raises UserError for an unknown name, and if the user's own network cannot be used.
    """
    if name in NETWORKS and not pretrained:
        return _chain(normalize=Normalize(), **NETWORKS[name](classes, image_size))
    from cifar import zoo

    return _chain(normalize=Normalize(), **zoo.modules(name, classes, image_size, pretrained))


def _chain(**modules: nn.Module) -> nn.Sequential:
    return nn.Sequential(OrderedDict(modules))


def set_training_mode(network: nn.Module) -> None:
    """Set a network to training mode, but leave BatchNorm whose parameters are frozen in eval mode."""
    network.train()
    for module in network.modules():
        parameters = list(module.parameters(recurse=False))
        is_frozen = parameters and not any(parameter.requires_grad for parameter in parameters)
        if is_frozen and isinstance(module, nn.modules.batchnorm._BatchNorm):
            module.eval()


class Normalize(nn.Module):
    """Subtract the training mean of each channel and divide by its standard deviation; both belong to the weights."""

    mean: Tensor
    std: Tensor

    def __init__(self):
        super().__init__()
        self.register_buffer("mean", torch.zeros(1, 3, 1, 1))
        self.register_buffer("std", torch.ones(1, 3, 1, 1))

    def forward(self, images: Tensor) -> Tensor:
        return torch.addcmul(-self.mean / self.std, images, self.std.reciprocal())  # one pass over the pixels


@torch.no_grad()
def set_input_statistics(network: nn.Module, images: Iterable[Tensor], mean: Tensor, std: Tensor) -> None:
    """Set a network's normalization, and its whitening convolution if it has one, from the training images.

    images: float (N, 3, H, W) in 0..1, some thousands, in chunks; mean, std: (3,), of all training images, in 0..1. A
    constant channel is divided by 1.
    """
    normalize, whiten = network.normalize, getattr(network, "whiten", None)
    assert isinstance(normalize, Normalize)
    normalize.mean.copy_(mean.view(1, 3, 1, 1))
    normalize.std.copy_(std.where(std > 0, 1).view(1, 3, 1, 1))
    if whiten is not None:
        whiten.weight.copy_(whitening_filters(map(normalize, images), WHITENING_SIZE))


def whitening_filters(images: Iterable[Tensor], size: int) -> Tensor:
    """Compute filters whose responses to image patches are uncorrelated and of equal variance, each also negated.

    Directions in which the patches vary by less than about 5e-4 get weaker responses than the others. Those in which
    they do not vary, such as the colors of grey images, would respond to rounding errors alone: the others take their
    places too.
    images: (N, 3, H, W), normalized, in chunks. Returns (2 * 3 * size**2, 3, size, size).
    """
    products: Tensor | int = 0
    count = 0
    for chunk in images:
        patches = F.unfold(chunk, size).transpose(1, 2).reshape(-1, 3 * size**2)
        products, count = products + patches.T @ patches, count + len(patches)
    variances, directions = torch.linalg.eigh(products / count)
    varying = max(1, int((variances > 5e-6).sum()))  # of the variances, which ascend
    chosen = torch.arange(len(variances)) % varying + len(variances) - varying
    filters = (directions / (variances + 5e-4).sqrt()).T[chosen].reshape(-1, 3, size, size)
    return torch.cat([filters, -filters])


def layers(network: nn.Module, image_size: int) -> list[LayerRecord]:
    """List the layers of a new network in the order in which they run, measured by running it on a black image.

    A layer is a module in which no other runs: attention, which computes with the weights of its parts, is one.
    Modules that return neither a tensor nor a sequence of them are left out.
    multiply_adds counts the convolutions and matrix products of layers with weights.
    Leaves the network in eval mode and frozen: it is not the one that is trained.
    """
    names = {module: name for name, module in network.named_modules()}
    shapes: dict[str, list[int]] = {}

    def record_shape(module: nn.Module, _, output: object) -> None:
        first = output[0] if isinstance(output, tuple | list) and output else output
        if module in names and isinstance(first, Tensor):
            shapes[names[module]] = list(first.shape[1:])

    image = torch.zeros(1, 3, image_size, image_size)
    was_fused = torch.backends.mha.get_fastpath_enabled()
    torch.backends.mha.set_fastpath_enabled(False)  # FlopCounterMode does not count the fused kernels of attention
    counter = FlopCounterMode(display=False)
    network.eval().requires_grad_(False)  # FlopCounterMode fails for a view of a parameter that a module receives
    try:
        with torch.no_grad(), counter, sdpa_kernel(SDPBackend.MATH), register_module_forward_hook(record_shape):
            network(image)
    finally:
        torch.backends.mha.set_fastpath_enabled(was_fused)
    flops = {key.partition(".")[2]: sum(counts.values()) for key, counts in counter.get_flop_counts().items()}
    inner = [name for name in shapes if name and not any(other.startswith(f"{name}.") for other in shapes)]
    return [_summarize(name, network.get_submodule(name), shapes[name], flops.get(name, 0)) for name in inner]


def _summarize(name: str, module: nn.Module, shape: list[int], flops: int) -> LayerRecord:
    parameters = sum(parameter.numel() for parameter in module.parameters())
    return LayerRecord(
        name=name.removeprefix("network."),
        kind=type(module).__name__,
        output_shape=shape,
        parameters=parameters,
        multiply_adds=flops // 2 if parameters else 0,  # GlobalAveragePool is a matrix product too
    )
