import sys

import pytest
import torch
from torch import nn

import cifar
from cifar import config, evaluate, model, zoo
from cifar.config import allow_model
from cifar.errors import UserError
from commands import invoke, main


def network_of(name: str, classes: int, size: int) -> nn.Sequential:
    return nn.Sequential(*zoo.modules(name, classes, size).values())


def test_a_network_of_timm_may_be_named_as_a_function_of_its_models():
    pytest.importorskip("timm")
    name = "timm.models:test_efficientnet"
    allow_model(name)
    assert network_of(name, 7, 32).eval()(torch.rand(2, 3, 32, 32)).shape == (2, 7)


@pytest.mark.parametrize("name", ["squeezenet1_1", "mobilenet_v3_small", "mnasnet0_5"])
@pytest.mark.parametrize("size", [32, 100])
def test_torchvisions_networks_take_images_of_any_size(name, size):
    assert network_of(name, 7, size).eval()(torch.rand(2, 3, size, size)).shape == (2, 7)


def sizes(network: nn.Module, size: int) -> list[int]:
    """Return the size of the features after each layer, except single values."""
    shapes = [layer.output_shape for layer in model.layers(network, size)]
    return [shape[-1] for shape in shapes if len(shape) == 3 and shape[-1] > 1]


# The size of the last features of 32 pixels; a whole network has a stride of 32.
@pytest.mark.parametrize(
    ("name", "size"),
    [("resnet34", 4), ("densenet121", 4), ("googlenet", 4), ("shufflenet_v2_x0_5", 4), ("efficientnet_b0", 2)],
)
def test_the_stem_keeps_the_resolution_of_small_images_only(name, size):
    with torch.device("meta"):
        assert sizes(network_of(name, 10, 32), 32)[-1] == size
        assert min(sizes(network_of(name, 10, 96), 96)) == 3


def test_a_vision_transformer_sees_eight_by_eight_patches():
    with torch.device("meta"):
        for size in (32, 100):
            summary = model.layers(network_of("vit_b_32", 10, size), size)
            assert next(layer.output_shape for layer in summary if layer.kind == "Conv2d") == [768, 8, 8]


@pytest.mark.parametrize(
    ("name", "is_pretrained", "enlarged"),  # the size of images -> that which the network gets
    [
        ("alexnet", False, {32: 64}),
        ("inception_v3", False, {32: 128}),
        ("maxvit_t", False, {32: 224}),
        ("timm/eva02_tiny_patch14_336", False, {32: 336}),
        ("mobilenet_v3_small", True, {32: 128, 64: 224, 96: 96}),
        ("vit_b_32", True, {32: 224, 256: 224}),  # a transformer with weights takes one size only
    ],
)
def test_images_that_are_too_small_for_the_network_or_its_weights_are_enlarged(name, is_pretrained, enlarged):
    if name.startswith("timm/"):
        pytest.importorskip("timm")
    with torch.device("meta"):
        for size, expected in enlarged.items():
            modules, images = zoo.modules(name, 10, size, is_pretrained), torch.zeros(2, 3, size, size)
            assert modules.get("enlarge", nn.Identity())(images).shape[-1] == expected
            assert nn.Sequential(*modules.values()).eval()(images).shape == (2, 10)


# The user's own network.

NETWORK = """
from torch import nn

import my_parts

limit = 3
build = my_parts.chain
lacks_the_parameter = lambda classes: nn.Linear(1, classes)
nothing = lambda num_classes: None
untrainable = lambda num_classes: nn.Flatten()
squeezed = lambda num_classes: my_parts.chain(num_classes, my_parts.Squeeze())
wrong_count = lambda num_classes: my_parts.chain(num_classes + 1)
wrong_input = lambda num_classes: nn.Linear(5, num_classes)


class two_outputs(nn.Linear):
    def __init__(self, num_classes):
        super().__init__(32, num_classes)

    def forward(self, images):
        return super().forward(images), None
"""
PARTS = """
from torch import nn


class Squeeze(nn.Flatten):
    def forward(self, features):
        return super().forward(features).squeeze()


def chain(num_classes, flatten=nn.Flatten()):
    features = nn.Sequential(nn.Conv2d(3, 8, 3, stride=2), nn.BatchNorm2d(8), nn.ReLU(), nn.AdaptiveAvgPool2d(4))
    return nn.Sequential(*features, flatten, nn.Linear(128, num_classes))
"""


@pytest.fixture
def user_directory(tmp_path, monkeypatch):
    """A working directory outside the project, with a user's network, which the user names."""
    (tmp_path / "my_network.py").write_text(NETWORK)
    (tmp_path / "my_parts.py").write_text(PARTS)
    (tmp_path / "broken_network.py").write_text("import no_such_package")
    monkeypatch.chdir(tmp_path)
    config.allow_model("my_network:build")


@pytest.mark.usefixtures("user_directory")
def test_a_users_network_is_imported_only_if_the_user_names_it_and_not_only_a_file(make_run, digits, tmp_path):
    run = make_run(recipe="plain", model="my_network:build", val_size=1200)
    evaluate.evaluate(run, digits, "cpu")
    (tmp_path / "my_network.py").write_text("raise SystemExit")
    sys.modules.pop("my_network")
    config.allowed_models.clear()
    (tmp_path / "settings.toml").write_text('model = "my_network:build"')
    image, at, file = str(tmp_path / "x.png"), ("--run", str(run.path)), str(tmp_path / "settings.toml")
    for command in (
        lambda: invoke("predict", image, "my_network:build", *at),
        lambda: main("--config", file, "--dataset", "digits"),
        lambda: main("--config", str(run.path)),
    ):
        assert "trust it, add --model my_network:build (in Python model=)" in command()[2]
    for call in (lambda: cifar.load(run), lambda: cifar.train(config=file, dataset="digits")):
        with pytest.raises(UserError, match="trust it"):
            call()
    with pytest.raises(UserError, match="leave out --model"):
        cifar.load(run, model="my_network:build2")
    assert "my_network" not in sys.modules
    assert run.resume_command.endswith(" --model my_network:build")
    run.allow_model("my_network:build")
    with pytest.raises(SystemExit):
        evaluate.load_network(run, digits.classes)


@pytest.mark.parametrize(
    ("name", "sentence"),
    [
        ("no_such_module:build", r"cannot import no_such_module:build from .*: ModuleNotFoundError"),
        ("broken_network:build", r"cannot import broken_network:build .*No module named 'no_such_package'"),
        ("my_network.py:build", r"a module as in an import, such as networks.mine:build, not 'my_network.py:build'"),
        ("dir/my_network:build", r"a module as in an import"),
        ("my_network:biuld", r"cannot import my_network:biuld .* has no attribute 'biuld'"),
        ("my_network:limit", r"fails: TypeError: 'int' object is not callable"),
        ("my_network:lacks_the_parameter", r"\(num_classes=10\) fails: TypeError: .*num_classes"),
        ("my_network:nothing", r"returns NoneType instead of a torch.nn.Module with trainable parameters"),
        ("my_network:untrainable", r"returns Flatten instead of a torch.nn.Module with trainable parameters"),
        ("my_network:wrong_count", r"returns \(2, 11\) for images .* instead of logits of shape \(2, 10\)"),
        ("my_network:squeezed", r"returns \(10,\) for images of shape \(1, 3, 32, 32\) instead of logits"),
        ("my_network:wrong_input", r"fails on images of shape \(2, 3, 32, 32\): RuntimeError"),
        ("my_network:two_outputs", r"returns tuple for images of shape \(2, 3, 32, 32\)"),
    ],
)
@pytest.mark.usefixtures("user_directory")
def test_a_users_network_that_cannot_be_used_is_an_error_in_one_sentence(name, sentence):
    config.allow_model(name)
    with pytest.raises(UserError, match=sentence) as caught:
        model.build(name, 10, 32)
    assert "\n" not in str(caught.value)


@pytest.mark.usefixtures("user_directory")
def test_checking_a_users_network_leaves_it_unchanged():
    network = model.build("my_network:build", 10, 32)
    assert all(module.training for module in network.modules())
    assert network.network[1].num_batches_tracked == 0
