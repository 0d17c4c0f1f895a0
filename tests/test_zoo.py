import pytest
import torch
from torch import nn

from cifar import checkpoint, evaluate, metrics, model, predict, zoo
from cifar.errors import UserError
from cifar.runs import Run


def network_of(name: str, classes: int, size: int) -> nn.Sequential:
    return nn.Sequential(*zoo.modules(name, classes, size).values())


@pytest.mark.parametrize("name", ["squeezenet1_1", "mobilenet_v3_small", "mnasnet0_5"])
@pytest.mark.parametrize("size", [32, 100])
def test_torchvisions_networks_take_pictures_of_any_size(name, size):
    assert network_of(name, 7, size).eval()(torch.rand(2, 3, size, size)).shape == (2, 7)


def sizes(network: nn.Module, size: int) -> list[int]:
    """The side of the features behind each layer, but for those that have none."""
    return [layer.output_shape[-1] for layer in model.layers(network, size) if len(layer.output_shape) == 3]


# What of 32 pixels is left before the classifier pools it: a whole network has a stride of 32 for 224 pixels.
@pytest.mark.parametrize(
    ("name", "stride"),
    [
        ("resnet34", 8),
        ("densenet121", 8),
        ("googlenet", 8),
        ("shufflenet_v2_x0_5", 8),
        ("mobilenet_v2", 16),
        ("efficientnet_b0", 16),
        ("regnet_x_400mf", 16),
    ],
)
def test_the_stem_keeps_the_resolution_of_small_pictures_alone(name, stride):
    with torch.device("meta") if "regnet" not in name else torch.device("cpu"):
        small, large = network_of(name, 10, 32), network_of(name, 10, 96)
        found = [[side for side in sizes(network, size) if side > 1] for network, size in ((small, 32), (large, 96))]
    assert found[0][-1] == 32 // stride
    assert min(found[1]) == 3


def test_a_vision_transformer_sees_eight_by_eight_patches():
    for size in (32, 100):
        with torch.device("meta"):
            network = network_of("vit_b_32", 10, size)
            patches = next(layer for layer in model.layers(network, size) if layer.kind == "Conv2d")
        assert patches.output_shape == (768, 8, 8)


@pytest.mark.parametrize(("name", "side"), [("alexnet", 64), ("inception_v3", 128), ("maxvit_t", 224)])
def test_pictures_are_enlarged_where_they_are_too_small_for_the_network(name, side):
    with torch.device("meta"):
        parts = zoo.modules(name, 10, 32)
        assert parts["enlarge"](torch.zeros(1, 3, 32, 32)).shape[-1] == side
        assert nn.Sequential(*parts.values()).eval()(torch.zeros(2, 3, 32, 32)).shape == (2, 10)


def test_an_unknown_network_lists_the_nearest_of_all():
    with pytest.raises(UserError, match=r"'resnet5': did you mean resnet50 or .*known are whitened, .*, and a class"):
        zoo.require("resnet5")


# The user's own.

NETWORK = """
from torch import nn

import parts_of_mine

limit = 3


def build(num_classes):
    return parts_of_mine.chain(num_classes)


def lacks_the_parameter(classes):
    return nn.Linear(1, classes)


def nothing(num_classes):
    return None


def untrainable(num_classes):
    return nn.Flatten()


def wrong_count(num_classes):
    return parts_of_mine.chain(num_classes + 1)


def wrong_input(num_classes):
    return nn.Linear(5, num_classes)


def two_answers(num_classes):
    class Two(nn.Module):
        def __init__(self):
            super().__init__()
            self.chain = parts_of_mine.chain(num_classes)

        def forward(self, images):
            return self.chain(images), None

    return Two()
"""
PARTS = """
from torch import nn


def chain(classes):
    features = nn.Sequential(nn.Conv2d(3, 8, 3, stride=2), nn.BatchNorm2d(8), nn.ReLU(), nn.AdaptiveAvgPool2d(4))
    return nn.Sequential(*features, nn.Flatten(), nn.Linear(128, classes))
"""


@pytest.fixture
def here(tmp_path, monkeypatch):
    """A working directory outside the project, with a user's network."""
    (tmp_path / "network_of_mine.py").write_text(NETWORK)
    (tmp_path / "parts_of_mine.py").write_text(PARTS)
    (tmp_path / "broken_network.py").write_text("import no_such_package")
    monkeypatch.chdir(tmp_path)


def test_a_users_network_trains_is_evaluated_and_answers(here, make_run, digits):
    run = make_run(recipe="plain", model="network_of_mine:build", epochs=1, val_size=1200)
    assert run.path.name.endswith("_plain-network_of_mine-build_digits")
    assert checkpoint.load(run.checkpoints / "best.pt")["model"] == "network_of_mine:build"
    measured = evaluate.evaluate(run, digits, "cpu")
    logits = predict.Predictor(Run(run.path), "cpu").logits(digits.test.images)
    assert metrics.accuracy(logits, digits.test.labels) == pytest.approx(measured["accuracy"])


@pytest.mark.parametrize(
    ("name", "sentence"),
    [
        ("no_such_module:build", r"cannot import no_such_module from .*: ModuleNotFoundError"),
        ("broken_network:build", r"cannot import broken_network .*No module named 'no_such_package'"),
        (
            "network_of_mine.py:build",
            r"as Python imports it, such as networks.mine:build, not 'network_of",
        ),
        ("dir/network_of_mine:build", r"as Python imports it"),
        ("network_of_mine:biuld", r"unknown factory of network_of_mine 'biuld': did you mean build"),
        ("network_of_mine:limit", r"unknown factory of network_of_mine 'limit'"),
        ("network_of_mine:lacks_the_parameter", r"\(num_classes=10\) fails: TypeError: .*num_classes"),
        ("network_of_mine:nothing", r"returns NoneType, and not a torch.nn.Module"),
        ("network_of_mine:untrainable", r"has nothing to train"),
        ("network_of_mine:wrong_count", r"makes \(2, 11\) of images \(2, 3, 32, 32\), and not \(2, 10\)"),
        ("network_of_mine:wrong_input", r"fails on images \(2, 3, 32, 32\): RuntimeError"),
        ("network_of_mine:two_answers", r"makes tuple of images"),
    ],
)
def test_a_users_network_that_cannot_serve_is_told_in_one_sentence(here, name, sentence):
    with pytest.raises(UserError, match=sentence) as caught:
        model.build(name, 10, 32)
    assert "\n" not in str(caught.value)


def test_trying_a_network_leaves_it_as_it_was(here):
    torch.manual_seed(0)
    network = model.build("network_of_mine:build", 10, 32)
    assert all(module.training for module in network.modules())
    assert network.network[1].num_batches_tracked == 0
