import pytest
import torch
import torch.nn.functional as F
from torch import nn

from cifar import device, layers


@pytest.mark.parametrize(("count", "side"), [(1, 1), (12, 2), (7, 3), (10, 5), (16, 7), (9, 8)])
@pytest.mark.parametrize("layout", [torch.channels_last, torch.contiguous_format])
def test_a_convolution_of_images_side_by_side_has_the_gradients_of_torchs(count, side, layout):
    generator = torch.Generator().manual_seed(0)
    features, weight, factors = (
        torch.randn(shape, generator=generator, dtype=torch.float64).contiguous(memory_format=layout)
        for shape in ((count, 5, side, side), (4, 5, 3, 3), (count, 4, side, side))
    )
    found = []
    for convolve in (layers._SideBySide.apply, lambda *tensors: F.conv2d(*tensors, padding=1)):
        own = [tensor.clone().requires_grad_() for tensor in (features, weight)]
        output = convolve(*own)
        (output * factors).sum().backward()
        found.append([output, *(tensor.grad for tensor in own)])
    torch.testing.assert_close(*found)


def test_images_side_by_side_are_apart_by_a_column_of_zeros():
    images = torch.arange(1.0, 9.0).view(2, 1, 2, 2)
    assert layers._SideBySide.lay(images).tolist() == [[[[1, 2, 0, 5, 6, 0], [3, 4, 0, 7, 8, 0]]]]


@pytest.mark.parametrize(
    ("side", "settings", "has_tiles", "is_training", "is_laid"),
    [
        (8, {}, True, True, True),
        (9, {}, True, True, False),
        (8, {"stride": 2}, True, True, False),
        (8, {}, False, True, False),
        (8, {}, True, False, False),
    ],
)
def test_images_are_laid_side_by_side_in_training_on_small_features_where_it_gains(
    side, settings, has_tiles, is_training, is_laid, monkeypatch
):
    monkeypatch.setattr(torch.cpu, "get_capabilities", lambda: {"amx_bf16": has_tiles})
    conv = layers.Conv2d(5, 4, **settings).train(is_training)
    reference = nn.Conv2d(5, 4, 3, padding=1, bias=False, **settings)
    reference.load_state_dict(conv.state_dict())
    found = []
    for module in (conv, reference):
        features = torch.ones(6, 5, side, side).requires_grad_()
        with device.autocast(features.device, "bfloat16"):
            output = module(features)
        output.float().square().sum().backward()
        found.append((output, module.weight.grad, features.grad))
    assert ("SideBySide" in found[0][0].grad_fn.name()) == is_laid
    torch.testing.assert_close(*found)
    assert found[0][1].dtype == torch.float32


def test_in_float32_no_images_are_laid_side_by_side(monkeypatch):
    monkeypatch.setattr(torch.cpu, "get_capabilities", lambda: {"amx_bf16": True})
    output = layers.Conv2d(5, 4)(torch.ones(6, 5, 8, 8).requires_grad_())
    assert output.grad_fn.name() == "ConvolutionBackward0"


@pytest.mark.parametrize("layout", [torch.channels_last, torch.contiguous_format])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize(("side", "images"), [(7, 5), (8, 3), (31, 4)])
def test_pooling_in_parts_is_pooling(layout, dtype, side, images, monkeypatch):
    monkeypatch.setattr(layers._PoolInParts, "PART_BYTES", 2 * 8 * side**2 * dtype.itemsize)  # two images
    features = torch.randint(-3, 3, (images, 8, side, side), generator=torch.Generator().manual_seed(0))  # with ties
    found = []
    for pool in (layers.MaxPool2d(), nn.MaxPool2d(2)):
        own = features.to(dtype, memory_format=layout).requires_grad_()
        pooled = pool(own)
        (pooled * torch.arange(pooled.numel()).view_as(pooled)).sum().backward()
        found.append((pooled, own.grad))
    (got, got_grad), (expected, expected_grad) = found
    assert torch.equal(got, expected)
    assert torch.equal(got_grad, expected_grad)
    assert got.is_contiguous(memory_format=layout)
