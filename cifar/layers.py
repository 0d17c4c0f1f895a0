"""Layers with the values of torch's own, computed in ways that take the CPU less time or memory."""

from collections.abc import Iterator

import torch
from torch import Tensor, nn

from cifar import device


class Conv2d(nn.Conv2d):
    """torch's, with 3x3 filters, whose gradient on small features takes half the time or less where there is AMX."""

    def __init__(self, channels_in: int, channels_out: int, stride: int = 1):
        super().__init__(channels_in, channels_out, 3, stride, padding=1, bias=False)

    def forward(self, features: Tensor) -> Tensor:
        is_small = self.stride == (1, 1) and features.shape[-1] <= _SideBySide.MOST_PIXELS
        if is_small and self.training and features.requires_grad and device.multiplies_tiles(features.device):
            return _SideBySide.apply(features.to(torch.bfloat16), self.weight.to(torch.bfloat16))
        return super().forward(features)


class _SideBySide(torch.autograd.Function):
    """A 3x3 convolution whose weights' gradient is taken of features that lie side by side, as long rows.

    AMX multiplies 32 neighbours of a row at once, and rows of few pixels leave it idle: 2,000 images and 256 channels
    took 198, 157, 116 and 100 ms at 7, 5, 3 and 2 pixels as they are, and take 103, 41, 16 and 10 ms side by side.
    """

    MOST_PIXELS = 8
    ROW_PIXELS = 64
    HOW = ([1, 1], [1, 1], [1, 1], False, [0, 0], 1)  # stride, padding, dilation, transposed, output padding, groups

    @staticmethod
    def forward(ctx, features: Tensor, weight: Tensor) -> Tensor:
        ctx.save_for_backward(features, weight)
        return torch.ops.aten.convolution(features, weight, None, *_SideBySide.HOW)

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, gradient: Tensor) -> tuple[Tensor, Tensor]:
        features, weight = ctx.saved_tensors

        def back(gradient: Tensor, features: Tensor, *wanted: bool) -> tuple[Tensor, ...]:
            how = (None, *_SideBySide.HOW, [*wanted, False])
            return torch.ops.aten.convolution_backward(gradient, features, weight, *how)

        of_features = back(gradient, features, True, False)[0]
        of_weight = back(*map(_SideBySide.lay, (gradient, features)), False, True)[1]
        return of_features, of_weight

    @staticmethod
    def lay(images: Tensor) -> Tensor:
        """(N, C, H, W) -> (N / K, C, H, K (W + 1)): K images in a row, and after each a column of zeros."""
        count, channels, height, width = images.shape
        together = max(k for k in range(1, _SideBySide.ROW_PIXELS // (width + 1) + 1) if count % k == 0)
        rows = images.new_zeros(count // together, height, together, width + 1, channels)
        rows[:, :, :, :width] = images.permute(0, 2, 3, 1).unflatten(0, (-1, together)).transpose(1, 2)
        return rows.flatten(2, 3).permute(0, 3, 1, 2)


class MaxPool2d(nn.MaxPool2d):
    """torch's, of 2x2 pixels, which on the CPU takes less memory and time where the features are large."""

    def __init__(self):
        super().__init__(2)

    def forward(self, features: Tensor) -> Tensor:
        if features.requires_grad and features.device.type == "cpu" and features.nbytes > _PoolInParts.PART_BYTES:
            return _PoolInParts.apply(features)
        return super().forward(features)


class _PoolInParts(torch.autograd.Function):
    """torch's kernels, on parts of the batch that fit into the cache together with the places of their maxima.

    For the way back it keeps the places in two bytes each, instead of eight, and not the features.
    """

    PART_BYTES = 6_000_000
    HOW = ([2, 2], [2, 2], [0, 0], [1, 1], False)  # kernel, stride, padding, dilation, ceil_mode

    @staticmethod
    def forward(ctx, features: Tensor) -> Tensor:
        channels_last = features.is_contiguous(memory_format=torch.channels_last)
        ctx.layout = {"memory_format": torch.channels_last if channels_last else torch.contiguous_format}
        count, channels, height, width = ctx.shape = features.shape
        size = count, channels, height // 2, width // 2
        pooled = torch.empty(size, dtype=features.dtype, **ctx.layout)
        places = torch.empty_like(pooled, dtype=torch.int16)  # within one image and channel
        for part, maxima, kept in _PoolInParts._parts(features, pooled, places):
            found = torch.empty_like(maxima, dtype=torch.int64)
            torch.ops.aten.max_pool2d_with_indices.out(part, *_PoolInParts.HOW, out=maxima, indices=found)
            kept.copy_(found)
        ctx.save_for_backward(places)
        return pooled

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, gradient: Tensor) -> Tensor:
        (places,) = ctx.saved_tensors
        spread = torch.empty(ctx.shape, dtype=gradient.dtype, **ctx.layout)
        for part, own, kept in _PoolInParts._parts(spread, gradient, places):
            # Of the features the kernel wants the shape alone, which `part` has too.
            torch.ops.aten.max_pool2d_with_indices_backward.grad_input(
                own, part, *_PoolInParts.HOW, kept.to(torch.int64), grad_input=part
            )
        return spread

    @staticmethod
    def _parts(large: Tensor, *tensors: Tensor) -> Iterator[tuple[Tensor, ...]]:
        images = max(1, _PoolInParts.PART_BYTES // large[0].nbytes)
        return zip(*(tensor.split(images) for tensor in (large, *tensors)))


class GlobalAveragePool(nn.Module):
    """(N, C, H, W) -> (N, C), as a matrix product.

    The gradient of `mean` is a broadcast view, on which ReLU's backward is ten times slower, and that of avg_pool2d
    takes twice as long as this.
    """

    def forward(self, features: Tensor) -> Tensor:
        pixels = features.permute(0, 2, 3, 1).flatten(1, 2)  # (N, HW, C), a view of channels-last features
        ones = pixels.new_ones(1, pixels.shape[1])
        return (ones @ pixels).squeeze(1) / pixels.shape[1]
