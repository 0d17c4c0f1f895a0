import numpy as np
import pytest
import torch
import torchvision
from torch import nn

from cifar import model
from cifar.config import MODELS
from cifar.errors import UserError


@pytest.mark.parametrize("name", MODELS)
@pytest.mark.parametrize("classes", [2, 10])
def test_images_in_logits_out(name, classes):
    network = model.build(name, classes, 32).eval()
    assert network(torch.rand(3, 3, 32, 32)).shape == (3, classes)


@pytest.mark.parametrize("name", ["whitened", "whitened_deep", "convnet", "resnet18"])
def test_networks_that_pool_globally_take_smaller_images(name):
    assert model.build(name, 10, 32).eval()(torch.rand(2, 3, 24, 24)).shape == (2, 10)


def test_an_unknown_network_is_refused():
    for refuse in (model.require, lambda name: model.build(name, 10, 32)):
        with pytest.raises(UserError, match="unknown model 'resnet81': did you mean resnet18"):
            refuse("resnet81")


# Worked out by hand: a 3x3 convolution has 9 * in * out weights, BatchNorm 2 * channels.
PARAMETERS = {
    "convnet": 9 * (3 * 32 + 32 * 64 + 64 * 128) + 2 * (32 + 64 + 128) + 129 * 10,
    "simple": 9 * (3 * 32 + 32 * 32 + 32 * 64 + 64 * 64 + 64 * 128 + 128 * 128)
    + 4 * (32 + 64 + 128)
    + 2049 * 512
    + 513 * 10,
    "mlp": 3073 * 512 + 513 * 512 + 513 * 10,
    "whitened": 24 * 12 + 24 + 9 * (24 * 64 + 64 * 64 + 64 * 256 + 3 * 256 * 256) + 2 * 2 * (64 + 256 + 256) + 2560,
    "whitened_deep": 24 * 12
    + 24
    + 9 * (24 * 128 + 2 * 128**2 + 128 * 384 + 2 * 384**2 + 384 * 512 + 2 * 512**2)
    + 2 * 3 * (128 + 384 + 512)
    + 5120,
    "resnet18": 11_173_962,  # as kuangliu/pytorch-cifar's ResNet18 counts
}
MULTIPLY_ADDS = {
    "convnet": 9 * (3 * 32 * 32**2 + 32 * 64 * 16**2 + 64 * 128 * 8**2) + 1280,
    "mlp": 3072 * 512 + 512 * 512 + 5120,
    "whitened": 31**2 * (12 * 24 + 9 * 24 * 64)
    + 9 * (15**2 * (64 * 64 + 64 * 256) + 7**2 * 2 * 256 * 256 + 3**2 * 256 * 256)
    + 2560,
}


def test_the_deep_groups_add_what_they_make_of_the_features():
    features = torch.rand(2, 4, 5, 5)
    torch.testing.assert_close(model.Added(first=model.Scale(2.0), second=model.Scale(0.5))(features), 2 * features)


@pytest.mark.parametrize("name", PARAMETERS)
def test_parameters_are_counted_layer_by_layer(name):
    network = model.build(name, 10, 32)
    layers = model.layers(network, 32)
    assert sum(layer.parameters for layer in layers) == PARAMETERS[name]
    assert sum(parameter.numel() for parameter in network.parameters()) == PARAMETERS[name]


@pytest.mark.parametrize("name", MULTIPLY_ADDS)
def test_multiply_adds_are_counted_for_one_image(name):
    layers = model.layers(model.build(name, 10, 32), 32)
    assert sum(layer.multiply_adds for layer in layers) == MULTIPLY_ADDS[name]


# At 224 pixels torchvision's networks are as it defines them, and it says what they cost.
@pytest.mark.parametrize("name", ["mobilenet_v3_small", "shufflenet_v2_x0_5", "regnet_x_400mf"])
def test_torchvisions_networks_cost_what_torchvision_says(name):
    meta = torchvision.models.get_model_weights(name).IMAGENET1K_V1.meta
    layers = model.layers(model.build(name, 1000, 224), 224)
    assert sum(layer.parameters for layer in layers) == meta["num_params"]
    assert round(sum(layer.multiply_adds for layer in layers) / 1e9, 3) == meta["_ops"]


def test_attention_is_one_layer_whose_products_are_counted():
    attention = nn.TransformerEncoderLayer(8, 2, dim_feedforward=16, batch_first=True)
    network = nn.Sequential(nn.Flatten(2), nn.Linear(16, 8), attention)
    assert [layer.kind for layer in model.layers(network, 4)][:3] == ["Flatten", "Linear", "MultiheadAttention"]
    # Three tokens of 8: queries, keys, values and output are 4 products of 8 x 8, and each token attends to three.
    assert model.layers(network, 4)[2].multiply_adds == 3 * 4 * 8 * 8 + 2 * 3 * 3 * 8
    assert torch.backends.mha.get_fastpath_enabled()


def test_layers_are_listed_as_they_run_with_the_shapes_that_leave_them():
    network = model.build("convnet", 10, 32)
    layers = model.layers(network, 32)
    assert [layer.kind for layer in layers[:4]] == ["Normalize", "Conv2d", "BatchNorm2d", "MaxPool2d"]
    assert layers[1].output_shape == (32, 32, 32)
    assert layers[-1].output_shape == (10,)
    assert network.training


def test_counting_leaves_a_network_as_it_was():
    network = model.build("whitened", 10, 32)
    before = {name: value.clone() for name, value in network.state_dict().items()}
    model.layers(network, 32)
    assert all(torch.equal(value, before[name]) for name, value in network.state_dict().items())
    assert not any(module._forward_hooks for module in network.modules())


def smooth_images(count: int) -> torch.Tensor:
    noise = torch.rand(count, 3, 20, 20, generator=torch.Generator().manual_seed(0))
    return torch.nn.functional.avg_pool2d(noise, 3, stride=1)


def test_whitened_patches_are_uncorrelated_with_equal_variance_but_for_the_faintest():
    images = smooth_images(500) - 0.5
    responses = torch.nn.functional.conv2d(images, model.whitening_filters(images, 2))
    half = responses[:, :12].permute(1, 0, 2, 3).flatten(1)
    second_moments = (half @ half.T / half.shape[1]).numpy()
    patches = images.unfold(2, 2, 1).unfold(3, 2, 1).permute(0, 2, 3, 1, 4, 5).reshape(-1, 12).numpy()
    variances = np.linalg.eigvalsh(patches.T @ patches / len(patches))
    np.testing.assert_allclose(second_moments, np.diag(variances / (variances + 5e-4)), atol=1e-3)
    np.testing.assert_allclose(responses[:, 12:], -responses[:, :12], atol=1e-5)


def test_the_input_layers_take_their_statistics_from_the_images():
    images = smooth_images(500)
    mean, std = images.mean((0, 2, 3)), images.std((0, 2, 3))
    network = model.build("whitened", 10, 18)
    model.fit_input(network, images, mean, std)
    normalized = network.normalize(images)
    torch.testing.assert_close(normalized.mean((0, 2, 3)), torch.zeros(3), atol=1e-4, rtol=0)
    torch.testing.assert_close(normalized.std((0, 2, 3)), torch.ones(3), atol=1e-4, rtol=0)
    torch.testing.assert_close(network.whiten.weight.data, model.whitening_filters(normalized, 2))


def test_pooling_before_relu_gives_the_values_of_pooling_after_it():
    block = model.build("convnet", 10, 32).eval().blocks[0]
    images = torch.rand(4, 3, 32, 32)
    conv, norm, pool, _ = block
    torch.testing.assert_close(block(images), pool(norm(conv(images)).relu()))
