import pytest
import torch
import torch.nn.functional as F
from torch import nn

from cifar import device, layers


@pytest.mark.parametrize(
    ("convolution", "shape"),
    [(layers._SideBySideConv, shape) for shape in ((1, 1, 1), (12, 2, 2), (7, 3, 3), (10, 5, 5), (16, 7, 7), (9, 8, 8))]
    + [(layers._WinogradConv, shape) for shape in ((1, 1, 1), (5, 2, 2), (4, 3, 5), (3, 7, 7), (3, 8, 15), (2, 11, 9))],
)
@pytest.mark.parametrize("layout", [torch.channels_last, torch.contiguous_format])
def test_a_convolution_has_the_output_and_gradients_of_torchs(convolution, shape, layout, monkeypatch):
    monkeypatch.setattr(layers, "WINOGRAD_BYTES", 2 * 36 * 9 * 8)  # tiles of 4x4 of two images
    monkeypatch.setattr(torch, "get_num_threads", lambda: 1)
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


def test_winograds_convolution_in_float32_is_exact_to_five_digits():
    torch.manual_seed(0)
    conv, features = layers.Conv2d(64, 64), torch.randn(16, 64, 7, 7)
    output, expected = conv(features), F.conv2d(features.double(), conv.weight.double(), padding=1)
    assert "Winograd" in output.grad_fn.name()
    assert (output - expected).abs().max() < 2e-5 * expected.abs().max()


@pytest.mark.parametrize(
    ("images", "channels", "precision"), [(15, 64, "float32"), (16, 63, "float32"), (16, 64, "bfloat16")]
)
def test_winograds_convolution_is_for_many_channels_and_images_in_float32(images, channels, precision):
    with device.autocast(torch.device("cpu"), precision):
        output = layers.Conv2d(64, channels)(torch.rand(images, 64, 2, 2))
    assert "Winograd" not in output.grad_fn.name()


def convolve_in_bfloat16(monkeypatch, channels=(64, 256), images=128, size=7, training=True, hardware=("avx512_bf16",)):
    """Return the layer, its input and its output on such a processor."""
    monkeypatch.setattr(torch.cpu, "get_capabilities", lambda: dict.fromkeys(hardware, True))
    conv = layers.Conv2d(*channels).train(training)
    shape = images, channels[0], size, size
    features = torch.randn(shape, generator=torch.Generator().manual_seed(0)).requires_grad_()
    with device.autocast(torch.device("cpu"), "bfloat16"):
        return conv, features, conv(features)


@pytest.mark.parametrize("size", [3, 7])  # in tiles of 3x3 and of 4x4
def test_winograds_convolution_in_bfloat16_is_exact_to_two_percent(size, monkeypatch):
    conv, features, output = convolve_in_bfloat16(monkeypatch, size=size)
    assert "Winograd" in output.grad_fn.name()
    output.float().square().sum().backward()
    exact = [tensor.detach().double().requires_grad_() for tensor in (features, conv.weight)]
    expected = F.conv2d(*exact, padding=1)
    expected.square().sum().backward()
    assert conv.weight.grad.dtype == torch.float32
    for found, wanted in ((output, expected), (features.grad, exact[0].grad), (conv.weight.grad, exact[1].grad)):
        assert (found - wanted).norm() < 0.02 * wanted.norm()


@pytest.mark.parametrize(
    "change",
    [
        {"channels": (63, 512)},
        {"channels": (127, 128)},
        {"images": 127},
        {"training": False},
        {"hardware": ("avx512_bf16", "amx_bf16")},
        {"hardware": ("avx2",)},
    ],
)
def test_winograds_convolution_in_bfloat16_is_for_training_where_it_is_faster(change, monkeypatch):
    _, _, output = convolve_in_bfloat16(monkeypatch, **change)
    assert "Winograd" not in output.grad_fn.name()


@pytest.mark.parametrize("layout", [torch.channels_last, torch.contiguous_format])
def test_gelu_is_torchs(layout):
    features = torch.randn(2, 3, 5, 4).contiguous(memory_format=layout)
    found = layers.GELU()(features)
    torch.testing.assert_close(found, F.gelu(features.double()).float())
    assert found.is_contiguous(memory_format=layout)


FAST = {"size": 7, "stride": 1, "precision": "bfloat16", "hardware": "avx512_bf16", "is_training": True}
SLOW = {"size": 8, "stride": 2, "precision": "float32", "hardware": "avx2", "is_training": False}


@pytest.mark.parametrize("changed", [None, *SLOW])
def test_images_are_joined_only_where_it_is_faster(changed, monkeypatch):
    case = {name: SLOW[name] if name == changed else value for name, value in FAST.items()}
    monkeypatch.setattr(torch.cpu, "get_capabilities", lambda: {case["hardware"]: True})
    conv = layers.Conv2d(5, 4, case["stride"]).train(case["is_training"])
    with device.autocast(torch.device("cpu"), case["precision"]):
        output = conv(torch.rand(6, 5, case["size"], case["size"]).requires_grad_())
    assert ("SideBySide" in output.grad_fn.name()) == (changed is None)


@pytest.mark.parametrize(("size", "is_joined"), [(8, True), (9, False)])
def test_amx_joins_longer_rows(size, is_joined, monkeypatch):
    monkeypatch.setattr(torch.cpu, "get_capabilities", lambda: {"avx512_bf16": True, "amx_bf16": True})
    with device.autocast(torch.device("cpu"), "bfloat16"):
        output = layers.Conv2d(5, 4)(torch.rand(6, 5, size, size).requires_grad_())
    assert ("SideBySide" in output.grad_fn.name()) == is_joined


def test_a_convolution_in_bfloat16_has_the_gradients_of_torchs_within_its_precision(monkeypatch):
    monkeypatch.setattr(torch.cpu, "get_capabilities", lambda: {"amx_bf16": True})
    torch.manual_seed(0)
    conv = layers.Conv2d(5, 4)
    features = torch.rand(6, 5, 8, 8).requires_grad_()
    with device.autocast(features.device, "bfloat16"):
        output = conv(features)
    output.float().square().sum().backward()
    exact = [tensor.detach().double().requires_grad_() for tensor in (features, conv.weight)]
    F.conv2d(*exact, padding=1).square().sum().backward()
    for tensor, expected in zip((features, conv.weight), exact):
        assert tensor.grad.dtype == torch.float32
        # bfloat16 rounds by up to 2**-9; the errors of weights, output and gradient add up.
        assert (tensor.grad - expected.grad).abs().max() < 2**-6 * expected.grad.abs().max()


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


def test_the_global_average_is_the_mean_over_the_pixels():
    features = torch.rand(2, 3, 5, 4)
    torch.testing.assert_close(layers.GlobalAveragePool()(features), features.mean((2, 3)))
