"""Layers with the values of torch's own, on which they fall back where they would not save the CPU time or memory.

Which algorithm a 3x3 convolution takes on a CPU, `Conv2d` decides; docs/experiments.md has the measurements:

    precision   input                                                        algorithm
    float32     64 channels or more, 16 images or more                       Winograd
    bfloat16    64 to 256, 128 to 128 channels or more, 128 images or more,
                in training, with AVX-512 and no AMX                         Winograd
    bfloat16    rows of few pixels (JOINED_PIXELS), gradient of weights      images joined into long rows
    otherwise                                                                torch's own
"""

import functools
import itertools
import math
from collections import defaultdict
from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from cifar.device import cpu_features

CHUNK_BYTES = 2_000_000  # of features pooled at once, which stay in the cache
WINOGRAD_BYTES = 2_000_000  # of one tile of several images, transformed, for each thread; 1 MB was slower
WINOGRAD_IMAGES = 500  # from which two sizes of tiles gain more than transforming the filters for each costs

# Where tiles are evaluated as polynomials, and at infinity, by the size of the output. In bfloat16, (0, 1, -1, 2) and
# (0, 1, -1, 2, -2), which are usual, have errors of 1.6% and 2.7% of the output's norm, these 0.9% and 1.4%.
WINOGRAD_POINTS = {1: (0, 1), 2: (0, 1, -1), 3: (0, 1, -0.5, -2), 4: (0, 0.75, -0.75, 1.5, -1.5)}

# The longest rows, in pixels, on which the kernels for bfloat16 leave much of the processor idle, by what it has.
JOINED_PIXELS = {"amx_bf16": 8, "avx512_bf16": 7}

# Of torch's kernels; module-level, since torch.compile does not read attributes of an autograd.Function.
_CONV_ARGS = ([1, 1], [1, 1], [1, 1], False, [0, 0], 1)  # stride, padding, dilation, transposed, output padding, groups
_POOL_ARGS = ([2, 2], [2, 2], [0, 0], [1, 1], False)  # kernel, stride, padding, dilation, ceil_mode
_INTEGERS = {2: torch.int16, 4: torch.int32, 8: torch.int64}  # by size in bytes


class Conv2d(nn.Conv2d):
    """torch's Conv2d with 3x3 filters, padding 1 and no bias."""

    def __init__(self, channels_in: int, channels_out: int, stride: int = 1):
        super().__init__(channels_in, channels_out, 3, stride, padding=1, bias=False)

    def forward(self, features: Tensor) -> Tensor:
        if self.stride != (1, 1) or features.device.type != "cpu" or torch.compiler.is_compiling():
            return super().forward(features)
        dtype = torch.get_autocast_dtype("cpu") if torch.is_autocast_enabled("cpu") else features.dtype
        channels = min(self.in_channels, self.out_channels)
        # With fewer channels the transforms cost more than they save, and with few images that of the filters.
        if dtype == torch.float32 and channels >= 64 and len(features) >= 16:
            return _WinogradConv.apply(features, self.weight)
        if dtype == torch.bfloat16 and self.training and features.requires_grad:
            cpu = cpu_features()
            is_avx512 = cpu.get("avx512_bf16") and not cpu.get("amx_bf16")
            products = self.in_channels * self.out_channels
            if is_avx512 and channels >= 64 and products >= 128**2 and len(features) >= 128:
                return _WinogradConv.apply(features.to(dtype), self.weight)
            if any(features.shape[-1] <= most for name, most in JOINED_PIXELS.items() if cpu.get(name)):
                return _SideBySideConv.apply(features.to(dtype), self.weight.to(dtype))
        return super().forward(features)


class _SideBySideConv(torch.autograd.Function):
    """A 3x3 convolution that computes its weights' gradient on images joined into long rows.

    The kernels work on many neighbouring pixels of a row at once, AMX on 32, so rows of a few pixels leave most of it
    idle. The gradient of 2,000 images of 7, 5, 3 and 2 pixels and 256 channels takes 103, 41, 16 and 10 ms instead of
    198, 157, 116 and 100 on two cores of an Intel Xeon with AMX, and 136, 70, 26 and 12 instead of 162, 95, 50 and 33
    on two of an AMD EPYC with AVX-512 BF16.
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
    rows = images.new_empty(count // together, height, together, width + 1, channels)
    rows[:, :, :, width] = 0
    rows[:, :, :, :width] = images.permute(0, 2, 3, 1).unflatten(0, (-1, together)).transpose(1, 2)
    return rows.flatten(2, 3).permute(0, 3, 1, 2)


class _WinogradConv(torch.autograd.Function):
    """A 3x3 convolution by Winograd's minimal filtering: two to four times fewer multiplications.

    oneDNN has no such kernel for x86. One tile of all images after the other is transformed and multiplied. On one core
    of an AMD EPYC limited to AVX2, direct convolution takes 1.3, 1.4 and 2.1 times as long for 256 to 256 channels at 7
    pixels (forward pass, gradient of the features, of the weights), 1.5, 1.3 and 1.9 times for 64 to 256 at 15, and
    1.2, 1.2 and 1.5 times for 64 to 64 at 15. The rounding error is 2e-6 of the largest value. In bfloat16 it is up to
    1.4% of the norm, a direct convolution's 0.2%, so it is for training alone; on two cores of that EPYC, with AVX-512
    BF16, direct convolution takes 1.6, 1.6 and 1.2 times as long for 256 to 256 channels at 7 pixels, and 1.2, 1.1 and
    1.4 times for 64 to 256 at 15. Tiles of two sizes, which came later, make a step of `fast` 1.1 times as fast.
    Source: Lavin and Gray 2016, arXiv:1509.09308.
    """

    @staticmethod
    def forward(ctx, features: Tensor, weight: Tensor) -> Tensor:
        ctx.save_for_backward(features, weight)
        with torch.autocast("cpu", enabled=False):  # filters are transformed in float32
            return winograd_conv(features, weight)

    @staticmethod
    def backward(ctx, gradient: Tensor) -> tuple[Tensor | None, Tensor | None]:
        features, weight = ctx.saved_tensors
        of_features, of_weight = ctx.needs_input_grad
        return (
            winograd_conv(gradient, weight.flip(2, 3).transpose(0, 1)) if of_features else None,
            winograd_weight_gradient(gradient, features) if of_weight else None,
        )


def winograd_conv(features: Tensor, weight: Tensor) -> Tensor:
    """Convolve features (N, C, H, W) with filters (K, C, 3, 3) and padding 1; returns channels-last (N, K, H, W)."""
    (count, channels, height, width), filters = features.shape, len(weight)
    output = features.new_empty(count, height, width, filters)
    for of_filters, tiles in winograd_tiles(height, width, features.dtype, count < WINOGRAD_IMAGES):
        flat = weight.permute(2, 3, 1, 0).reshape(9, -1).to(of_filters.dtype)
        transformed = (of_filters @ flat).to(features.dtype).view(-1, channels, filters)
        for chunk, output_chunk in _winograd_chunks(features, output, len(of_filters)):
            for tile in tiles:
                tile.write_outputs(torch.bmm(tile.inputs(chunk), transformed), output_chunk)
    return output.permute(0, 3, 1, 2)


def winograd_weight_gradient(gradient: Tensor, features: Tensor) -> Tensor:
    """Compute the gradient of the filters (K, C, 3, 3) from those of the outputs (N, K, H, W) and the features."""
    (count, channels, height, width), filters = features.shape, gradient.shape[1]
    # In float32 at least, as the sums are of many products.
    total = features.new_zeros(9, channels * filters, dtype=torch.promote_types(features.dtype, torch.float32))
    for of_filters, tiles in winograd_tiles(height, width, features.dtype, count < WINOGRAD_IMAGES):
        products = total.new_zeros(len(of_filters), channels, filters)
        for chunk, gradient_chunk in _winograd_chunks(features, gradient.permute(0, 2, 3, 1), len(of_filters)):
            for tile in tiles:
                inputs, outputs = tile.inputs(chunk).transpose(1, 2), tile.outputs_gradient(gradient_chunk)
                if inputs.dtype == products.dtype:
                    products.baddbmm_(inputs, outputs)
                else:
                    products += torch.bmm(inputs, outputs)
        total.addmm_(of_filters.T, products.flatten(1))
    return total.view(3, 3, channels, filters).permute(3, 2, 0, 1)


def _winograd_chunks(features: Tensor, outputs: Tensor, points: int) -> Iterator[tuple[Tensor, Tensor]]:
    """Split features (N, C, H, W) and outputs (N, H, W, K) into runs of images, (n, H, W, C) and (n, H, W, K).

    What one tile of all their images becomes stays in the cache, but is at least twice what the filters become, 9 MB
    for 256 to 256 channels in float32, because each run has to read that.
    """
    channels, filters = features.shape[1], outputs.shape[-1]
    cached = WINOGRAD_BYTES * torch.get_num_threads() // (points * features.itemsize)
    images = max(cached, 2 * channels * filters) // (channels + filters)
    return zip(features.permute(0, 2, 3, 1).split(images), outputs.split(images))


@dataclass(frozen=True)
class _Tile:
    """A rectangle of outputs, at the same place in all images, and the inputs that they depend on."""

    seen: tuple[slice, ...]  # the inputs in (n, H, W, C)
    written: tuple[slice, ...]  # the outputs in (n, H, W, K)
    of_inputs: Tensor  # (points, seen pixels)
    of_outputs: Tensor  # (written pixels, points)

    def inputs(self, images: Tensor) -> Tensor:
        """Transform the inputs in images (n, H, W, C): (points, n, C)."""
        return self._transform(self.of_inputs, images[self.seen])

    def outputs_gradient(self, gradient: Tensor) -> Tensor:
        """Transform the gradient of the outputs, in (n, H, W, K): (points, n, K)."""
        return self._transform(self.of_outputs.T, gradient[self.written])

    def write_outputs(self, products: Tensor, images: Tensor) -> None:
        """Transform products (points, n, K) to the outputs in images (n, H, W, K)."""
        outputs = images[self.written]
        matrix = self.of_outputs.expand(len(images), -1, -1)
        outputs.copy_(torch.bmm(matrix, products.transpose(0, 1)).view_as(outputs))

    @staticmethod
    def _transform(matrix: Tensor, part: Tensor) -> Tensor:
        pixels = part.flatten(1, 2)
        matrices = matrix.expand(len(pixels), -1, -1)
        if pixels.dtype != torch.bfloat16:  # MKL would copy its result into the layout below, but multiplies any
            return torch.bmm(matrices, pixels).transpose(0, 1)
        points = pixels.new_empty(len(matrix), len(pixels), pixels.shape[-1])
        torch.bmm(matrices, pixels, out=points.transpose(0, 1))
        return points


@functools.cache
def winograd_tiles(height: int, width: int, dtype: torch.dtype, are_equal: bool) -> list[tuple[Tensor, list[_Tile]]]:
    """Cut images into tiles; returns those of each size, with their transform of filters, (points, 9).

    height, width: of the features, in pixels. dtype: of the features; filters are transformed in float32 or more.
    are_equal: let all tiles have one size, so that filters are transformed once; two sizes need fewer products.
    """
    groups: dict[tuple[int, int], list[_Tile]] = defaultdict(list)
    for (top, rows), (left, columns) in itertools.product(_cuts(height, are_equal), _cuts(width, are_equal)):
        of_inputs, _, of_outputs = winograd_matrices(rows, columns)
        # A tile sees a pixel more on each side. What is outside the image is zero, or not wanted.
        y, x = np.arange(top - 1, top + rows + 1), np.arange(left - 1, left + columns + 1)
        is_seen = ((y >= 0) & (y < height))[:, None] & ((x >= 0) & (x < width))
        is_written = is_seen[1:-1, 1:-1]
        groups[rows, columns].append(
            _Tile(
                (slice(None), slice(max(0, top - 1), top + rows + 1), slice(max(0, left - 1), left + columns + 1)),
                (slice(None), slice(top, top + rows), slice(left, left + columns)),
                of_inputs[:, is_seen.ravel()].to(dtype),
                of_outputs[is_written.ravel()].to(dtype),
            )
        )
    exact = torch.promote_types(dtype, torch.float32)
    return [(winograd_matrices(*size)[1].to(exact), tiles) for size, tiles in groups.items()]


def _cuts(length: int, are_equal: bool) -> Iterator[tuple[int, int]]:
    """Cut a length into as few parts of at most 4 pixels as possible: yields where each starts, and its size.

    are_equal: let all have one size, so that the last may reach beyond the end, and not two that fill the length.
    """
    count = math.ceil(length / 4)  # larger parts would lose too much precision
    size = math.ceil(length / count)
    larger = count if are_equal else length - count * (size - 1)
    sizes = [size] * larger + [size - 1] * (count - larger)
    return zip(itertools.accumulate(sizes, initial=0), sizes)


@functools.cache
def winograd_matrices(rows: int, columns: int) -> tuple[Tensor, ...]:
    """Return the transforms of inputs, filters and outputs of tiles of so many outputs.

    Each takes flattened rectangles. With P = (rows + 2) * (columns + 2) points: (P, P), (P, 9) and (rows * columns, P),
    all float64.
    """
    pairs = zip(_winograd_matrices(rows), _winograd_matrices(columns))
    return tuple(torch.from_numpy(np.kron(*pair)) for pair in pairs)


def _winograd_matrices(size: int) -> tuple[np.ndarray, ...]:
    """Compute the transforms in one dimension (Toom and Cook's construction).

    Source: Barabasz et al. 2018, arXiv:1803.10986, which also shows how the points change the error.
    """
    points = WINOGRAD_POINTS[size]
    inputs, filters, outputs = np.zeros((size + 2, size + 2)), np.zeros((size + 2, 3)), np.zeros((size, size + 2))
    for row, point in enumerate(points):
        others = [other for other in points if other != point]
        inputs[row, :-1] = np.poly(others)[::-1]
        filters[row] = np.power(point, range(3)) / np.prod(np.subtract(point, others))
        outputs[:, row] = np.power(point, range(size))
    inputs[-1], filters[-1, -1], outputs[-1, -1] = np.poly(points)[::-1], 1, 1
    return inputs, filters, outputs


class GELU(nn.GELU):
    """torch's GELU.

    oneDNN's kernel takes only contiguous tensors, which channels-last features are if they are seen as (N, H, W, C).
    """

    def forward(self, features: Tensor) -> Tensor:
        return super().forward(features.permute(0, 2, 3, 1)).permute(0, 3, 1, 2)


class MaxPool2d(nn.MaxPool2d):
    """torch's MaxPool2d of 2x2 pixels."""

    def __init__(self):
        super().__init__(2)

    def forward(self, features: Tensor) -> Tensor:
        is_eager_on_cpu = features.device.type == "cpu" and not torch.compiler.is_compiling()
        if is_eager_on_cpu and features.requires_grad and features.nbytes > CHUNK_BYTES:
            return _ChunkedMaxPool.apply(features)
        return super().forward(features)


class _ChunkedMaxPool(torch.autograd.Function):
    """Max-pooling, one chunk of the batch after the other, that keeps the places of the maxima and not the features.

    torch's kernel for the backward pass takes their indices, in eight bytes each. Here the gradient is shared out by
    products of whole numbers, which keep all bits: on the largest features of `fast`, in bfloat16, 24 ms instead of 36.
    """

    @staticmethod
    def forward(ctx, features: Tensor) -> Tensor:
        ctx.shape, ctx.strides = features.shape, features.stride()
        pooled = torch.empty_like(features[:, :, 1::2, 1::2])  # of half the size, rounded down, in the same layout
        places = torch.empty_like(pooled, dtype=torch.int16)
        height, width = features.shape[2:]
        corners = torch.arange(0, height - 1, 2)[:, None] * width + torch.arange(0, width - 1, 2)
        for chunk, pooled_chunk, place_chunk in _chunks(features, pooled, places):
            pooled_chunk[:], indices = torch.ops.aten.max_pool2d_with_indices(chunk, *_POOL_ARGS)
            place_chunk[:] = indices.sub_(corners)  # 0 and 1 above, width and width + 1 below
        ctx.save_for_backward(places)
        return pooled

    @staticmethod
    def backward(ctx, gradient: Tensor) -> Tensor:
        (places,) = ctx.saved_tensors
        integer = _INTEGERS[gradient.itemsize]
        height, width = ctx.shape[2] // 2 * 2, ctx.shape[3] // 2 * 2
        of_features = torch.empty_strided(ctx.shape, ctx.strides, dtype=integer)
        for chunk, gradient_chunk, place_chunk in _chunks(of_features, gradient.view(integer), places):
            chunk.zero_()  # which brings it into the cache; the last row and column of an odd number are in no pool
            place = place_chunk.to(integer)
            is_below = torch.ge(place, ctx.shape[3], out=torch.empty_like(place))  # zeros and ones
            is_right = torch.sub(place, is_below, alpha=ctx.shape[3])
            below = gradient_chunk * is_below
            for row, part in enumerate((gradient_chunk - below, below)):
                right = torch.mul(part, is_right, out=chunk[:, :, row:height:2, 1::2])
                torch.sub(part, right, out=chunk[:, :, row:height:2, :width:2])
        return of_features.view(gradient.dtype)


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


class GlobalMaxPool(nn.Module):
    """(N, C, H, W) -> (N, C, 1, 1), the values and gradients of AdaptiveMaxPool2d(1).

    On a GPU, that layer starts a block of threads for each image and channel, in which only one thread works.
    """

    def forward(self, features: Tensor) -> Tensor:
        return F.max_pool2d(features, features.shape[-2:])
