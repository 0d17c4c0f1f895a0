import pytest
import torch
import torch.nn.functional as F
from torch import nn

from cifar import device, layers


@pytest.mark.parametrize(
    ("convolution", "shape"),
    [(layers._SideBySideConv, shape) for shape in ((1, 1, 1), (12, 2, 2), (7, 3, 3), (10, 5, 5), (16, 7, 7), (9, 8, 8))]
    + [(layers._WinogradConv, shape) for shape in ((1, 1, 1), (9, 2, 2), (8, 3, 5), (6, 7, 7), (5, 8, 15), (5, 11, 9))],
)
@pytest.mark.parametrize("layout", [torch.channels_last, torch.contiguous_format])
@pytest.mark.parametrize("images", [1, 1000])  # from which tiles have two sizes
def test_a_convolution_has_the_output_and_gradients_of_torchs(convolution, shape, layout, images, monkeypatch):
    monkeypatch.setattr(layers, "WINOGRAD_IMAGES", images)
    monkeypatch.setattr(layers, "WINOGRAD_BYTES", 1)  # runs of 2 * 5 * 4 // (5 + 4) = 4 images
    count, *size = shape
    generator = torch.Generator().manual_seed(0)
    features, weight, factors = (
        torch.randn(shape, generator=generator, dtype=torch.float64).contiguous(memory_format=layout)
        for shape in ((count, 5, *size), (4, 5, 3, 3), (count, 4, *size))
    )
    found = []
    for convolve in (convolution.apply, lambda *tensors: F.conv2d(*tensors, padding=1)):
        inputs = [tensor.clone().requires_grad_() for tensor in (features, weight)]
        output = convolve(*inputs)
        (output * factors).sum().backward()
        found.append([output, *(tensor.grad for tensor in inputs)])
    torch.testing.assert_close(*found, rtol=1e-10, atol=1e-10)


@pytest.mark.parametrize(
    ("size", "two_sizes", "one_size"), [(15, 23**2, 24**2), (11, 17**2, 18**2), (7, 11**2, 12**2), (5, 9**2, 10**2)]
)
def test_tiles_of_two_sizes_need_fewer_products(size, two_sizes, one_size):
    # A side of n pixels needs n + 2 products: 15 = 4 + 4 + 4 + 3 needs 6 + 6 + 6 + 5, and four of 4 pixels 6 each.
    for are_equal, products in ((False, two_sizes), (True, one_size)):
        groups = layers.winograd_tiles(size, size, torch.float32, are_equal)
        assert sum(len(of_filters) * len(tiles) for of_filters, tiles in groups) == products


AVX512, AMX = ("avx512_bf16",), ("avx512_bf16", "amx_bf16")


def convolve(
    monkeypatch, *channels, images=128, size=7, training=True, hardware=AVX512, stride=1, precision="bfloat16"
):
    """Return the layer, its input and its output on such a processor."""
    monkeypatch.setattr(layers, "cpu_features", lambda: dict.fromkeys(hardware, True))
    conv = layers.Conv2d(*channels, stride).train(training)
    shape = images, channels[0], size, size
    features = torch.randn(shape, generator=torch.Generator().manual_seed(0)).requires_grad_()
    with device.autocast(torch.device("cpu"), precision):
        return conv, features, conv(features)


@pytest.mark.parametrize(
    ("algorithm", "channels", "changes", "bound"),
    [
        ("Winograd", (64, 64), {"images": 16, "precision": "float32"}, 1e-5),
        ("Winograd", (64, 256), {"size": 3}, 0.02),  # in tiles of 3x3
        ("Winograd", (64, 256), {"size": 7}, 0.02),  # and of 4x4
        ("SideBySide", (5, 4), {"images": 6, "size": 8, "hardware": AMX}, 0.01),
    ],
)
def test_the_error_of_output_and_gradients_is_bounded(algorithm, channels, changes, bound, monkeypatch):
    torch.manual_seed(0)
    conv, features, output = convolve(monkeypatch, *channels, **changes)
    assert algorithm in output.grad_fn.name()
    output.float().square().sum().backward()
    exact = [tensor.detach().double().requires_grad_() for tensor in (features, conv.weight)]
    expected = F.conv2d(*exact, padding=1)
    expected.square().sum().backward()
    assert features.grad.dtype == conv.weight.grad.dtype == torch.float32
    for found, wanted in ((output, expected), (features.grad, exact[0].grad), (conv.weight.grad, exact[1].grad)):
        assert (found - wanted).norm() < bound * wanted.norm()


@pytest.mark.parametrize("layout", [torch.channels_last, torch.contiguous_format])
def test_gelu_is_torchs(layout):
    features = torch.randn(2, 3, 5, 4).contiguous(memory_format=layout)
    found = layers.GELU()(features)
    torch.testing.assert_close(found, F.gelu(features.double()).float())
    assert found.is_contiguous(memory_format=layout)


@pytest.mark.parametrize(
    ("channels", "changes", "algorithm"),
    [
        ((64, 256), {}, "Winograd"),
        ((128, 128), {}, "Winograd"),
        ((64, 64), {"images": 16, "precision": "float32", "training": False}, "Winograd"),
        ((63, 512), {}, "SideBySide"),
        ((127, 128), {}, "SideBySide"),
        ((64, 256), {"images": 127}, "SideBySide"),
        ((64, 256), {"hardware": AMX}, "SideBySide"),
        ((5, 4), {"hardware": AMX, "size": 8}, "SideBySide"),
        ((5, 4), {"hardware": AMX, "size": 9}, "Convolution"),
        ((5, 4), {"size": 8}, "Convolution"),
        ((64, 256), {"hardware": ("avx2",)}, "Convolution"),
        ((64, 256), {"training": False}, "Convolution"),
        ((64, 256), {"stride": 2}, "Convolution"),
        ((64, 64), {"images": 15, "precision": "float32"}, "Convolution"),
        ((64, 63), {"precision": "float32"}, "Convolution"),
    ],
)
def test_the_algorithm_depends_on_shape_precision_and_processor(channels, changes, algorithm, monkeypatch):
    _, _, output = convolve(monkeypatch, *channels, **changes)
    assert algorithm in output.grad_fn.name()


def assert_pools_alike(pool, expected, shape, dtype, layout) -> torch.Tensor:
    """Assert that outputs and gradients are equal to the bit, also with ties; returns the output."""
    features = torch.randint(-2, 2, shape, generator=torch.Generator().manual_seed(0))
    found = []
    for layer in (pool, expected):
        inputs = features.to(dtype, memory_format=layout).requires_grad_()
        pooled = layer(inputs)
        (pooled * torch.arange(pooled.numel()).view_as(pooled)).sum().backward()
        found.append((pooled, inputs.grad))
    assert all(map(torch.equal, *found))
    return found[0][0]


@pytest.mark.parametrize("layout", [torch.channels_last, torch.contiguous_format])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize(("size", "images"), [(7, 5), (8, 3), (31, 4), (200, 3)])  # with over 2**15 pixels, too
def test_pooling_in_chunks_is_pooling(layout, dtype, size, images, monkeypatch):
    monkeypatch.setattr(layers, "CHUNK_BYTES", 2 * 8 * size**2 * dtype.itemsize)  # two images
    pooled = assert_pools_alike(layers.MaxPool2d(), nn.MaxPool2d(2), (images, 8, size, size), dtype, layout)
    assert "Chunked" in pooled.grad_fn.name()
    assert pooled.is_contiguous(memory_format=layout)


@pytest.mark.parametrize("layout", [torch.channels_last, torch.contiguous_format])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("size", [(1, 1), (2, 2), (3, 3), (7, 4)])
def test_the_global_maximum_is_that_of_torchs_layer_to_the_bit(layout, dtype, size):
    assert_pools_alike(layers.GlobalMaxPool(), nn.AdaptiveMaxPool2d(1), (5, 8, *size), dtype, layout)
