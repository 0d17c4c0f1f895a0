"""Layers with the values of torch's own, on which they fall back where they would not save the CPU time or memory."""

from collections.abc import Iterator

import torch
from torch import Tensor, nn

from cifar import device

CHUNK_BYTES = 6_000_000  # of features pooled at once; these and the indices of their maxima stay in the cache

# Of torch's kernels; module-level, since torch.compile does not read attributes of an autograd.Function.
_CONV_ARGS = ([1, 1], [1, 1], [1, 1], False, [0, 0], 1)  # stride, padding, dilation, transposed, output padding, groups
_POOL_ARGS = ([2, 2], [2, 2], [0, 0], [1, 1], False)  # kernel, stride, padding, dilation, ceil_mode


class Conv2d(nn.Conv2d):
    """torch's Conv2d with 3x3 filters, padding 1 and no bias."""

    def __init__(self, channels_in: int, channels_out: int, stride: int = 1):
        super().__init__(channels_in, channels_out, 3, stride, padding=1, bias=False)

    def forward(self, features: Tensor) -> Tensor:
        is_small = self.stride == (1, 1) and features.shape[-1] <= 8  # larger ones fill AMX's tiles by themselves
        if is_small and self.training and features.requires_grad and device.multiplies_tiles(features.device):
            return _SideBySideConv.apply(features.to(torch.bfloat16), self.weight.to(torch.bfloat16))
        return super().forward(features)


class _SideBySideConv(torch.autograd.Function):
    """A 3x3 convolution that computes its weights' gradient on images joined into long rows.

    AMX multiplies 32 neighbouring pixels of a row at once, so rows of a few pixels leave most of it idle. On two cores
    of an Intel Xeon the gradient of 2,000 images of 7, 5, 3 and 2 pixels and 256 channels takes 103, 41, 16 and 10 ms
    instead of 198, 157, 116 and 100.
    """

    @staticmethod
    def forward(ctx, features: Tensor, weight: Tensor) -> Tensor:
        ctx.save_for_backward(features, weight)
        return torch.ops.aten.convolution(features, weight, None, *_CONV_ARGS)

    @staticmethod
    def backward(ctx, gradient: Tensor) -> tuple[Tensor, Tensor]:
        features, weight = ctx.saved_tensors
        conv_backward = torch.ops.aten.convolution_backward
        of_features = conv_backward(gradient, features, weight, None, *_CONV_ARGS, [True, False, False])[0]
        rows = side_by_side(gradient), side_by_side(features)
        of_weight = conv_backward(*rows, weight, None, *_CONV_ARGS, [False, True, False])[1]
        return of_features, of_weight


def side_by_side(images: Tensor) -> Tensor:
    """Join K images into one, with a column of zeros after each: (N, C, H, W) -> (N / K, C, H, K (W + 1)).

    K is the largest divisor of N for which a row has at most 64 pixels.
    """
    count, channels, height, width = images.shape
    together = max(k for k in range(1, 64 // (width + 1) + 1) if count % k == 0)
    rows = images.new_zeros(count // together, height, together, width + 1, channels)
    rows[:, :, :, :width] = images.permute(0, 2, 3, 1).unflatten(0, (-1, together)).transpose(1, 2)
    return rows.flatten(2, 3).permute(0, 3, 1, 2)


class MaxPool2d(nn.MaxPool2d):
    """torch's MaxPool2d of 2x2 pixels."""

    def __init__(self):
        super().__init__(2)

    def forward(self, features: Tensor) -> Tensor:
        if features.requires_grad and features.device.type == "cpu" and features.nbytes > CHUNK_BYTES:
            return _ChunkedMaxPool.apply(features)
        return super().forward(features)


class _ChunkedMaxPool(torch.autograd.Function):
    """Max-pooling by torch's kernels, one chunk of the batch after the other.

    Keeps for the backward pass the indices of the maxima in two bytes each, instead of eight, and not the features:
    the peak memory of training the recipe `fast` is 2.8 GB instead of 3.5, in the same time within 3%.
    """

    @staticmethod
    def forward(ctx, features: Tensor) -> Tensor:
        ctx.shape, ctx.strides = features.shape, features.stride()
        pooled = torch.empty_like(features[:, :, 1::2, 1::2])  # of half the size, rounded down, in the same layout
        indices = torch.empty_like(pooled, dtype=torch.int16)  # within one image and channel
        for chunk, pooled_chunk, index_chunk in _chunks(features, pooled, indices):
            pooled_chunk[:], index_chunk[:] = torch.ops.aten.max_pool2d_with_indices(chunk, *_POOL_ARGS)
        ctx.save_for_backward(indices)
        return pooled

    @staticmethod
    def backward(ctx, gradient: Tensor) -> Tensor:
        (indices,) = ctx.saved_tensors
        of_features = torch.empty_strided(ctx.shape, ctx.strides, dtype=gradient.dtype)
        for chunk, gradient_chunk, index_chunk in _chunks(of_features, gradient, indices):
            # Of its second argument, the features, the kernel reads only the shape.
            torch.ops.aten.max_pool2d_with_indices_backward.grad_input(
                gradient_chunk, chunk, *_POOL_ARGS, index_chunk.to(torch.int64), grad_input=chunk
            )
        return of_features


def _chunks(features: Tensor, *tensors: Tensor) -> Iterator[tuple[Tensor, ...]]:
    """Split all tensors into the same runs of images, of at most CHUNK_BYTES of features each."""
    images = max(1, CHUNK_BYTES // features[0].nbytes)
    return zip(*(tensor.split(images) for tensor in (features, *tensors)))


class GlobalAveragePool(nn.Module):
    """(N, C, H, W) -> (N, C), as a matrix product.

    The gradient of `mean` is a broadcast view, on which ReLU's backward is ten times slower, and that of avg_pool2d
    takes twice as long as this.
    """

    def forward(self, features: Tensor) -> Tensor:
        pixels = features.permute(0, 2, 3, 1).flatten(1, 2)  # (N, HW, C), a view of channels-last features
        ones = pixels.new_ones(1, pixels.shape[1])
        return (ones @ pixels).squeeze(1) / pixels.shape[1]
