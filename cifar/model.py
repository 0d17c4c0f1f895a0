"""The networks: float images (N, 3, H, W) in 0..1 in, logits (N, classes) out."""

import contextlib
from collections import OrderedDict
from collections.abc import Callable, Iterator
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode

from cifar import zoo
from cifar.config import MODELS
from cifar.layers import Conv2d, GlobalAveragePool, MaxPool2d


def require(name: str) -> None:
    """Raise UserError, with the nearest names, unless `build` knows the network."""
    if name not in MODELS:
        zoo.require(name)


def build(name: str, classes: int, image_size: int) -> nn.Sequential:
    """The network `name` with fresh weights, drawn from torch's global generator; the first module is `normalize`.

    The last linear layer of our own is `head`; those from elsewhere are `network`. Raises UserError for an unknown
    name, and for a network of the user's that cannot serve.
    """
    builders = {
        "whitened": _whitened,
        "whitened_deep": _whitened_deep,
        "simple": _simple,
        "convnet": _convnet,
        "mlp": _mlp,
        "resnet18": _resnet18,
    }
    if name in builders:
        return builders[name](classes, image_size)
    return _chain(normalize=Normalize(), **zoo.modules(name, classes, image_size))


@torch.no_grad()
def fit_input(network: nn.Module, images: Tensor, mean: Tensor, std: Tensor) -> None:
    """Set what a network's first layers take from the training images rather than from gradients.

    images: float (N, 3, H, W) in 0..1, some thousands; mean, std: (3,), of all training images, in 0..1.
    """
    network.normalize.mean.copy_(mean.view(1, 3, 1, 1))
    network.normalize.std.copy_(std.view(1, 3, 1, 1))
    if hasattr(network, "whiten"):
        network.whiten.weight.copy_(whitening_filters(network.normalize(images), WHITEN_SIDE))


class Normalize(nn.Module):
    """Per channel, images less the training mean over the training deviation; both travel with the weights."""

    def __init__(self):
        super().__init__()
        self.register_buffer("mean", torch.zeros(1, 3, 1, 1))
        self.register_buffer("std", torch.ones(1, 3, 1, 1))

    def forward(self, images: Tensor) -> Tensor:
        return torch.addcmul(-self.mean / self.std, images, 1 / self.std)  # one pass over the pixels


# The networks of the recipes `fast` and `best`: Jordan 2024, arXiv:2404.00498, section 3, in its Muon version, and his
# airbench96, which is wider and deeper.

WHITEN_SIDE = 2  # pixels


def _whitened(classes: int, image_size: int) -> nn.Sequential:
    """A fixed whitening convolution, three groups of two convolutions, global max-pooling and a linear head."""
    return _whitened_groups(classes, (64, 256, 256), _group)


def _whitened_deep(classes: int, image_size: int) -> nn.Sequential:
    """The same with wider groups of three convolutions, of which the last two are added to what the first gave."""
    return _whitened_groups(classes, (128, 384, 512), _deep_group)


def _whitened_groups(
    classes: int, widths: tuple[int, ...], group: Callable[[int, int], nn.Sequential]
) -> nn.Sequential:
    filters = 2 * 3 * WHITEN_SIDE**2
    network = _chain(
        normalize=Normalize(),
        whiten=nn.Conv2d(3, filters, WHITEN_SIDE),
        activation=nn.GELU(),
        groups=nn.Sequential(*map(group, (filters, *widths), widths)),
        pool=nn.AdaptiveMaxPool2d(1),
        flatten=nn.Flatten(),
        head=nn.Linear(widths[-1], classes, bias=False),
        scale=Scale(1 / widths[-1]),
    )
    network.whiten.weight.requires_grad = False
    with torch.no_grad():
        network.head.weight.div_(network.head.weight.std())
    return network


class Scale(nn.Module):
    """Multiply by a constant."""

    def __init__(self, factor: float):
        super().__init__()
        self.factor = factor

    def forward(self, logits: Tensor) -> Tensor:
        return logits * self.factor


def whitening_filters(images: Tensor, side: int) -> Tensor:
    """Filters whose responses to the images' patches are uncorrelated and of equal variance, each with its negative.

    Directions in which the patches hardly vary, by less than 5e-4, are left fainter than the others.
    images: (N, 3, H, W), normalized. Returns (2 * 3 * side**2, 3, side, side).
    """
    patches = images.unfold(2, side, 1).unfold(3, side, 1).permute(0, 2, 3, 1, 4, 5).reshape(-1, 3 * side**2)
    variances, directions = torch.linalg.eigh(patches.T @ patches / len(patches))
    filters = (directions / (variances + 5e-4).sqrt()).T.reshape(-1, 3, side, side)
    return torch.cat([filters, -filters])


def _group(channels_in: int, channels_out: int) -> nn.Sequential:
    return _chain(
        conv1=_identity_conv(channels_in, channels_out),
        pool=MaxPool2d(),
        norm1=_quick_norm(channels_out),
        activation1=nn.GELU(),
        conv2=_identity_conv(channels_out, channels_out),
        norm2=_quick_norm(channels_out),
        activation2=nn.GELU(),
    )


def _deep_group(channels_in: int, channels_out: int) -> nn.Sequential:
    return _chain(
        conv1=_identity_conv(channels_in, channels_out),
        pool=MaxPool2d(),
        norm1=_quick_norm(channels_out),
        activation1=nn.GELU(),
        more=Added(
            conv2=_identity_conv(channels_out, channels_out),
            norm2=_quick_norm(channels_out),
            activation2=nn.GELU(),
            conv3=_identity_conv(channels_out, channels_out),
            norm3=_quick_norm(channels_out),
        ),
        activation3=nn.GELU(),
    )


class Added(nn.Sequential):
    """What the modules make of the features, added to them."""

    def __init__(self, **modules: nn.Module):
        super().__init__(OrderedDict(modules))

    def forward(self, features: Tensor) -> Tensor:
        return features + super().forward(features)


def _identity_conv(channels_in: int, channels_out: int) -> nn.Conv2d:
    """A 3x3 convolution whose first filters pass their input on."""
    conv = Conv2d(channels_in, channels_out)
    with torch.no_grad():
        nn.init.dirac_(conv.weight[:channels_in])
    return conv


def _quick_norm(channels: int) -> nn.BatchNorm2d:
    """BatchNorm without a learned scale, whose running statistics follow within a few batches."""
    norm = nn.BatchNorm2d(channels, eps=1e-12, momentum=0.4)
    norm.weight.requires_grad = False
    return norm


# The networks of the other recipes.


def _simple(classes: int, image_size: int) -> nn.Sequential:
    """Three blocks of two convolutions, each block pooled and thinned by dropout, and two linear layers."""
    return _chain(
        normalize=Normalize(),
        blocks=nn.Sequential(_simple_block(3, 32), _simple_block(32, 64), _simple_block(64, 128)),
        flatten=nn.Flatten(),
        hidden=nn.Sequential(nn.Linear(128 * (image_size // 8) ** 2, 512), nn.ReLU(), nn.Dropout(0.5)),
        head=nn.Linear(512, classes),
    )


def _simple_block(channels_in: int, channels_out: int) -> nn.Sequential:
    first, second = _conv_norm_relu(channels_in, channels_out), _conv_norm_relu(channels_out, channels_out, pool=True)
    return nn.Sequential(first, second, nn.Dropout2d(0.25))


def _convnet(classes: int, image_size: int) -> nn.Sequential:
    """Three convolutions, the first two pooled, global average pooling and a linear head."""
    return _chain(
        normalize=Normalize(),
        blocks=nn.Sequential(
            _conv_norm_relu(3, 32, pool=True), _conv_norm_relu(32, 64, pool=True), _conv_norm_relu(64, 128)
        ),
        pool=GlobalAveragePool(),
        head=nn.Linear(128, classes),
    )


def _mlp(classes: int, image_size: int) -> nn.Sequential:
    """Two hidden layers of 512 over the pixels."""
    return _chain(
        normalize=Normalize(),
        flatten=nn.Flatten(),
        hidden=nn.Sequential(
            nn.Sequential(nn.Linear(3 * image_size**2, 512), nn.ReLU(), nn.Dropout(0.5)),
            nn.Sequential(nn.Linear(512, 512), nn.ReLU(), nn.Dropout(0.5)),
        ),
        head=nn.Linear(512, classes),
    )


def _resnet18(classes: int, image_size: int) -> nn.Sequential:
    """He et al. 2015's ResNet-18 with the stem that small pictures want: one 3x3 convolution, no pooling."""
    shapes = ((64, 64, 1), (64, 128, 2), (128, 256, 2), (256, 512, 2))
    return _chain(
        normalize=Normalize(),
        stem=_conv_norm_relu(3, 64),
        stages=nn.Sequential(
            *(
                nn.Sequential(Residual(before, width, stride), Residual(width, width, 1))
                for before, width, stride in shapes
            )
        ),
        pool=GlobalAveragePool(),
        head=nn.Linear(512, classes),
    )


class Residual(nn.Module):
    """Two convolutions, added to their input; a 1x1 convolution fits the input where the shape changes."""

    def __init__(self, channels_in: int, channels_out: int, stride: int):
        super().__init__()
        self.conv1 = _conv_norm_relu(channels_in, channels_out, stride)
        self.conv2 = Conv2d(channels_out, channels_out)
        self.norm2 = nn.BatchNorm2d(channels_out)
        self.shortcut = nn.Identity()
        if stride != 1 or channels_in != channels_out:
            conv = nn.Conv2d(channels_in, channels_out, 1, stride, bias=False)
            self.shortcut = nn.Sequential(conv, nn.BatchNorm2d(channels_out))
        self.activation = nn.ReLU(inplace=True)

    def forward(self, features: Tensor) -> Tensor:
        return self.activation(self.norm2(self.conv2(self.conv1(features))) + self.shortcut(features))


def _conv_norm_relu(channels_in: int, channels_out: int, stride: int = 1, pool: bool = False) -> nn.Sequential:
    """Convolution, BatchNorm, ReLU; with `pool` the max-pool comes before ReLU: equal values, a quarter of its work."""
    conv = Conv2d(channels_in, channels_out, stride)
    pools = [MaxPool2d()] if pool else []
    return nn.Sequential(conv, nn.BatchNorm2d(channels_out), *pools, nn.ReLU(inplace=True))


def _chain(**modules: nn.Module) -> nn.Sequential:
    """The modules one after the other, by their names."""
    return nn.Sequential(OrderedDict(modules))


# What a network is made of.


@dataclass(frozen=True)
class Layer:
    """One layer as it ran: its dotted name, its class, the shape that left it, and what it cost."""

    name: str
    kind: str
    output_shape: tuple[int, ...]  # without the batch
    parameters: int
    multiply_adds: int  # for one image


def layers(network: nn.Module, image_size: int) -> list[Layer]:
    """The network's layers in the order in which they run, measured by running it on one image.

    A layer is a module in which no other runs: attention, which computes with its parts' weights, is one.
    multiply_adds counts convolutions and matrix products of layers with weights, as torch's FlopCounterMode does.
    """
    names = {module: name for name, module in network.named_modules()}
    shapes: dict[str, tuple[int, ...]] = {}

    def note_shape(module: nn.Module, _, output: Tensor | tuple[Tensor, ...]) -> None:
        shapes[names[module]] = tuple((output[0] if isinstance(output, tuple) else output).shape[1:])

    hooks = [module.register_forward_hook(note_shape) for module in names]
    was_training = network.training
    counter = FlopCounterMode(display=False)
    device = next(network.parameters()).device
    with torch.no_grad(), counter, _countable_attention():
        network.eval()(torch.zeros(1, 3, image_size, image_size, device=device))
    network.train(was_training)
    for hook in hooks:
        hook.remove()
    root = type(network).__name__
    flops = {name: sum(counts.values()) for name, counts in counter.get_flop_counts().items()}
    outer = {name.rpartition(".")[0] for name in shapes}  # in which others ran
    outer |= {name[:place] for name in outer for place, letter in enumerate(name) if letter == "."} | {""}
    return [
        Layer(
            name=name.removeprefix("network."),
            kind=type(module).__name__,
            output_shape=shapes[name],
            parameters=sum(parameter.numel() for parameter in module.parameters()),
            # A global average has no weights.
            multiply_adds=flops.get(f"{root}.{name}", 0) // 2 if list(module.parameters()) else 0,
        )
        for name, module in ((name, network.get_submodule(name)) for name in shapes if name not in outer)
    ]


@contextlib.contextmanager
def _countable_attention() -> Iterator[None]:
    """Without torch's shortcut for attention, whose products FlopCounterMode does not see."""
    before = torch.backends.mha.get_fastpath_enabled()
    torch.backends.mha.set_fastpath_enabled(False)
    try:
        yield
    finally:
        torch.backends.mha.set_fastpath_enabled(before)
