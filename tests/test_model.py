import pytest
import torch
import torch.nn.functional as F
import torchvision
from torch import nn

from cifar import layers, model
from cifar.config import MODELS
from cifar.errors import UserError


def test_the_settings_know_exactly_the_networks_of_the_registry():
    assert tuple(model.NETWORKS) == MODELS


@pytest.mark.parametrize("name", MODELS)
def test_images_in_logits_out(name):
    network = model.build(name, 2, 32).eval()
    sizes = (32, 24) if name not in ("simple", "mlp") else (32,)  # the others pool globally
    assert [network(torch.rand(3, 3, size, size)).shape for size in sizes] == [(3, 2)] * len(sizes)


@pytest.mark.parametrize("function", [model.require, lambda name: model.build(name, 10, 32)])
def test_an_unknown_network_is_an_error_with_the_nearest_of_all_names(function):
    with pytest.raises(UserError, match=r"'resnet5': did you mean resnet50\? choose from airbench94, .*, a class"):
        function("resnet5")


@pytest.mark.parametrize(("name", "more", "numbers"), [("airbench94", "", "12"), ("airbench96", "more.", "123")])
def test_weights_have_the_names_that_checkpoints_of_earlier_versions_hold(name, more, numbers):
    statistics = ("weight", "bias", "running_mean", "running_var", "num_batches_tracked")
    keys = [f"{kind}{number}" for number in numbers for kind in ("conv", "norm")]
    places = [key if key.endswith("1") else f"{more}{key}" for key in keys]
    parts = [f"{place}.{value}" for place in places for value in (("weight",) if "conv" in place else statistics)]
    outside = {"normalize.mean", "normalize.std", "whiten.weight", "whiten.bias", "head.weight"}
    expected = outside | {f"groups.{group}.{part}" for group in range(3) for part in parts}
    assert model.build(name, 10, 32).state_dict().keys() == expected


def test_a_residual_adds_what_its_modules_compute():
    features = torch.rand(2, 4, 5, 5)
    torch.testing.assert_close(model.Residual(model.Scale(2.0), model.Scale(0.5))(features), 2 * features)


@pytest.mark.parametrize("is_training", [False, True])
def test_torch_compile_reads_a_network_as_one_graph(is_training, monkeypatch):
    monkeypatch.setattr(layers, "CHUNK_BYTES", 200_000)  # so that pooling takes its own path
    torch.manual_seed(0)
    network = model.build("airbench94", 10, 16).train(is_training)
    images, found = torch.rand(8, 3, 16, 16), []
    for forward in (torch.compile(network, backend="eager", fullgraph=True), network):
        network.zero_grad()
        logits = forward(images)
        logits.sum().backward()
        found.append((logits, network.groups[0].conv1.weight.grad))
    torch.testing.assert_close(*found)


# Parameters and multiply-adds by hand: a 3x3 convolution has 9 * in * out weights, BatchNorm 2 * channels. The
# airbench networks have 31 pixels after the whitening, and 15, 7 and 3 after the max-poolings.
COSTS = {
    "convnet": (
        9 * (3 * 32 + 32 * 64 + 64 * 128) + 2 * (32 + 64 + 128) + 129 * 10,
        9 * (3 * 32 * 32**2 + 32 * 64 * 16**2 + 64 * 128 * 8**2) + 1280,
    ),
    "simple": (
        9 * (3 * 32 + 32**2 + 32 * 64 + 64**2 + 64 * 128 + 128**2) + 4 * (32 + 64 + 128) + 2049 * 512 + 5130,
        9 * ((3 * 32 + 32**2) * 32**2 + (32 * 64 + 64**2) * 16**2 + (64 * 128 + 128**2) * 8**2) + 2048 * 512 + 5120,
    ),
    "mlp": (3073 * 512 + 513 * 512 + 513 * 10, 3072 * 512 + 512 * 512 + 5120),
    "airbench94": (
        24 * 12 + 24 + 9 * (24 * 64 + 64 * 64 + 64 * 256 + 3 * 256 * 256) + 2 * 2 * (64 + 256 + 256) + 2560,
        31**2 * (12 * 24 + 9 * 24 * 64) + 9 * (15**2 * (64**2 + 64 * 256) + (7**2 * 2 + 3**2) * 256**2) + 2560,
    ),
    "airbench96": (
        24 * 12 + 24 + 9 * (24 * 128 + 2 * 128**2 + 128 * 384 + 2 * 384**2 + 384 * 512 + 2 * 512**2) + 6 * 1024 + 5120,
        31**2 * (12 * 24 + 9 * 24 * 128)
        + 9 * (15**2 * (2 * 128**2 + 128 * 384) + 7**2 * (2 * 384**2 + 384 * 512) + 3**2 * 2 * 512**2)
        + 5120,
    ),
    "resnet18": (
        11_173_962,  # as kuangliu/pytorch-cifar's ResNet18 counts
        64 * 32**2 * (27 + 4 * 9 * 64) + 3 * 16**2 * (64 * 128 + 9 * 64 * 128 + 3 * 9 * 128**2) + 5120,
    ),
}


@pytest.mark.parametrize("name", MODELS)
def test_parameters_and_multiply_adds_are_counted_layer_by_layer(name):
    network = model.build(name, 10, 32)
    summary = model.layers(network, 32)
    costs = sum(layer.parameters for layer in summary), sum(layer.multiply_adds for layer in summary)
    assert costs == COSTS[name]
    assert costs[0] == sum(parameter.numel() for parameter in network.parameters())


# At 224 pixels torchvision's networks are as it defines them, and it says what they cost.
@pytest.mark.parametrize("name", ["mobilenet_v3_small", "shufflenet_v2_x0_5", "regnet_x_400mf"])
def test_torchvisions_networks_cost_what_torchvision_says(name):
    meta = torchvision.models.get_model_weights(name).IMAGENET1K_V1.meta
    summary = model.layers(model.build(name, 1000, 224), 224)
    assert sum(layer.parameters for layer in summary) == meta["num_params"]
    assert round(sum(layer.multiply_adds for layer in summary) / 1e9, 3) == meta["_ops"]


def test_attention_is_one_layer_whose_products_are_counted():
    attention = nn.TransformerEncoderLayer(8, 2, dim_feedforward=16, batch_first=True)
    network = nn.Sequential(nn.Flatten(2), nn.Linear(16, 8), attention)
    summary = model.layers(network, 4)
    assert [layer.kind for layer in summary][:3] == ["Flatten", "Linear", "MultiheadAttention"]
    # Three tokens of 8: queries, keys, values and output are 4 products of 8 x 8, and each token attends to three.
    assert summary[2].multiply_adds == 3 * 4 * 8 * 8 + 2 * 3 * 3 * 8
    assert torch.backends.mha.get_fastpath_enabled()


def test_modules_that_return_no_single_tensor_are_no_obstacle():
    class Branches(nn.Module):
        def forward(self, features):
            return {"first": features, "second": features}

    class Sum(nn.Linear):
        def forward(self, branches):
            return super().forward(branches["first"] + branches["second"])

    summary = model.layers(nn.Sequential(nn.Flatten(), Branches(), Sum(48, 2)), 4)
    assert [(layer.kind, layer.output_shape) for layer in summary] == [("Flatten", [48]), ("Sum", [2])]


def test_a_view_of_a_parameter_that_a_module_receives_is_no_obstacle():
    class Prototypes(nn.Module):
        def __init__(self):
            super().__init__()
            self.prototypes, self.score = nn.Parameter(torch.rand(1, 48)), nn.Bilinear(48, 48, 2)

        def forward(self, images):
            return self.score(self.prototypes.expand(len(images), -1), images.flatten(1))

    assert [layer.kind for layer in model.layers(Prototypes(), 4)] == ["Bilinear"]


def test_layers_are_listed_as_they_run_with_their_output_shapes():
    summary = model.layers(model.build("convnet", 10, 32), 32)
    assert [layer.kind for layer in summary[:5]] == ["Normalize", "Conv2d", "BatchNorm2d", "MaxPool2d", "ReLU"]
    assert summary[1].name == "blocks.0.0"
    assert summary[1].output_shape == [32, 32, 32]
    assert summary[-1].output_shape == [10]


def smooth_images(count: int) -> torch.Tensor:
    noise = torch.rand(count, 3, 20, 20, generator=torch.Generator().manual_seed(0))
    return F.avg_pool2d(noise, 3, stride=1)


def test_whitened_patches_are_uncorrelated_with_equal_variance_but_for_the_faintest():
    images = smooth_images(500) - 0.5
    responses = F.conv2d(images, model.whitening_filters([images], 2)).permute(1, 0, 2, 3).flatten(1)
    patches = F.unfold(images, 2).transpose(0, 1).flatten(1)
    variances = torch.linalg.eigvalsh(patches @ patches.T / patches.shape[1])
    second_moments = responses[:12] @ responses[:12].T / responses.shape[1]
    torch.testing.assert_close(second_moments, torch.diag(variances / (variances + 5e-4)), atol=1e-3, rtol=0)
    torch.testing.assert_close(responses[12:], -responses[:12])


def test_the_input_layers_are_set_from_the_images():
    images = smooth_images(500)
    mean, std = images.mean((0, 2, 3)), images.std((0, 2, 3))
    network = model.build("airbench94", 10, 18)
    model.set_input_statistics(network, [images], mean, std)
    normalized = network.normalize(images)
    torch.testing.assert_close(normalized.mean((0, 2, 3)), torch.zeros(3), atol=1e-4, rtol=0)
    torch.testing.assert_close(normalized.std((0, 2, 3)), torch.ones(3), atol=1e-4, rtol=0)
    torch.testing.assert_close(network.whiten.weight.data, model.whitening_filters([normalized], 2))
    in_chunks = model.whitening_filters(normalized.split(30), 2)  # a filter and its negative may change places
    torch.testing.assert_close(in_chunks.abs(), network.whiten.weight.data.abs(), atol=1e-3, rtol=1e-2)


@pytest.mark.parametrize("channels", [[0.2, 0.2, 0.2], [0.2, 0.0, 0.2]])
def test_rounding_errors_of_grey_images_and_of_a_constant_channel_do_not_reach_the_logits(channels):
    torch.manual_seed(0)
    grey = torch.rand(64, 1, 16, 16) * torch.tensor(channels).view(1, 3, 1, 1) + 0.5
    std, mean = torch.std_mean(grey, dim=(0, 2, 3))
    network = model.build("airbench94", 10, 16)
    model.set_input_statistics(network, [grey], mean, std.where(torch.tensor(channels) > 0, 0))
    logits = network(grey)
    assert logits.isfinite().all()
    nearly = network(grey + 1e-7 * torch.randn(64, 3, 16, 16))
    torch.testing.assert_close(nearly, logits, atol=1e-3, rtol=0)
