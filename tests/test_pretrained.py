import os
import runpy
import zipfile
from pathlib import Path

import pytest
import torch
from PIL import Image
from torch import nn
from torchvision import models

from cifar import datasets, evaluate, export, model, optim, pipeline, pretrained, trainer
from cifar.config import MAX_IMAGE_SIZE, Config
from cifar.data import Dataset
from cifar.errors import UserError
from cifar.predict import Predictor
from handmade import Command
from image_sets import ImageSet
from processes import assert_resumes

MODEL, HEAD = "mobilenet_v3_small", ("classifier.3.weight", "classifier.3.bias")


@pytest.fixture(scope="module")
def photos(tmp_path_factory) -> Dataset:
    """A folder of three classes with 10 drawn images of each."""
    folder = ImageSet(classes=3, train=8, test=2, size=64).write(tmp_path_factory.mktemp("photos"))
    return datasets.find(str(folder), str(tmp_path_factory.mktemp("data")))


@pytest.fixture(scope="module")
def weights() -> dict[str, torch.Tensor]:
    """Random weights of the network for 1,000 classes, as torchvision's are."""
    torch.manual_seed(0)
    return models.get_model(MODEL, weights=None).state_dict()


@pytest.fixture(scope="module")
def file(weights, tmp_path_factory):
    path = tmp_path_factory.mktemp("weights") / "weights.pth"
    torch.save(weights, path)
    return path


@pytest.fixture
def finetune(make_run, photos, file):
    """A function that fine-tunes the file's weights on the photos in an epoch of 10 steps of 2 images."""
    settings = {"recipe": "finetune", "model": MODEL, "epochs": 1, "weights": str(file)}
    return lambda **changes: make_run(**{"dataset": photos, **settings, **changes})


def saved(run) -> dict[str, torch.Tensor]:
    content = torch.load(run.checkpoints / "last.pt", weights_only=True)["weights"]
    return {key.removeprefix("network."): value for key, value in content.items()}


def test_the_head_alone_learns_while_the_body_stays_as_in_the_file(finetune, weights):
    after = saved(finetune(body_lr=0.0))
    assert all(torch.equal(after[key], value) for key, value in weights.items() if key not in HEAD)
    assert [tuple(after[key].shape) for key in HEAD] == [(3, 1024), (3,)]
    assert after[HEAD[1]].abs().max() > 0
    torch.testing.assert_close(after["normalize.mean"].flatten(), torch.tensor([0.485, 0.456, 0.406]))
    torch.testing.assert_close(after["normalize.std"].flatten(), torch.tensor([0.229, 0.224, 0.225]))


def test_the_body_starts_from_the_file_and_learns_more_slowly_than_the_head(finetune, weights):
    after = saved(finetune(weight_decay=0.0))
    body = [key for key in weights if key.endswith((".weight", ".bias")) and key not in HEAD]
    moved = [(after[key] - weights[key]).abs().max() for key in body]
    assert 0 < max(moved) < 10 * 1e-4  # in 10 steps, at a tenth of 1e-3
    assert not torch.equal(after["features.0.1.running_mean"], weights["features.0.1.running_mean"])


def test_groups_have_the_learning_rates_of_head_and_body(photos, file):
    config = Config.create({"weights": str(file), "model": MODEL, "lr": 0.01, "body_lr": 0.2, "val_size": 0})
    network = trainer.new_network(config, photos.train, 3)
    head, body = optim.build(network, config, [4]).groups
    assert [head["lr"], body["lr"]] == [0.01, pytest.approx(0.002)]
    assert [parameter.shape[0] for parameter in head["params"]] == [3, 3]
    assert len(head["params"]) + len(body["params"]) == len(list(network.parameters()))


def test_frozen_batchnorm_keeps_its_statistics_in_training_and_no_other_module_changes():
    network = nn.Sequential(nn.BatchNorm2d(2), nn.BatchNorm2d(2, affine=False), nn.BatchNorm2d(2), nn.Dropout())
    network[0].requires_grad_(False)
    network[2].weight.requires_grad = False
    model.set_training_mode(network.eval())
    assert [module.training for module in network] == [False, True, True, True]


def test_a_fine_tuned_run_resumes_bit_for_bit(finetune, photos, monkeypatch):
    def hinder():
        monkeypatch.setattr(pretrained, "load", None)  # the weights are in the checkpoint

    assert_resumes(lambda: finetune(epochs=2, ema=0.5), photos, 15, hinder)  # stopped in the second epoch


def test_a_fine_tuned_run_is_evaluated_exported_and_predicts_images_of_any_size(finetune, photos, tmp_path):
    run = finetune()
    evaluate.evaluate(run, photos, "cpu")
    predictor = Predictor(run, "cpu")
    assert predictor.probabilities(photos.test.images[:2]).shape == (2, 3)
    paths = [Path(photos.key) / "test" / "class 1" / "0.png", tmp_path / "large.jpg"]
    Image.new("RGB", (700, 400)).save(paths[1])
    assert [one.error for one in predictor.predict(paths)] == [None, None]
    assert export.export(run, tmp_path / "network.pt2")
    if (folder := tmp_path / "network").exists():  # safetensors is installed
        build = runpy.run_path(str(folder / "model.py"))["build"]
        build(MODEL, 3, 32).load_state_dict(pretrained.read(folder / "model.safetensors"))


@pytest.mark.parametrize(
    ("name", "size"), [("resnet18", 224), ("efficientnet_b3", 300), ("inception_v3", 299), ("vit_b_16", 224)]
)
def test_the_preprocessing_is_that_of_the_weights(name, size):
    assert pretrained.preprocessing(name) == (size, (0.485, 0.456, 0.406), (0.229, 0.224, 0.225))


def test_a_folders_images_have_the_size_that_the_weights_expect_unless_another_is_given(photos, file, capsys):
    given = {"dataset": photos.key, "data_dir": str(file.parent), "weights": str(file), "model": MODEL}
    assert pipeline.prepare(Config.create(given))[0].image_size == min(224, MAX_IMAGE_SIZE)
    assert f"train: {len(photos.train):,} images: " in capsys.readouterr().out
    assert pipeline.prepare(Config.create({**given, "image_size": 48}))[0].image_size == 48


# Files


def test_weights_are_read_from_the_checkpoints_of_training_scripts_too(weights, tmp_path):
    wrapped = {f"module.{key}": value for key, value in weights.items()}
    torch.save({"model": wrapped, "epoch": 3}, tmp_path / "checkpoint.pth")
    assert pretrained.read(tmp_path / "checkpoint.pth").keys() == weights.keys()


def test_weights_are_read_from_safetensors(weights, tmp_path):
    pytest.importorskip("safetensors.torch").save_file(weights, tmp_path / "weights.safetensors")
    read = pretrained.read(tmp_path / "weights.safetensors")
    assert all(torch.equal(read[key], value) for key, value in weights.items())


def test_the_names_in_torchvisions_files_of_densenet_are_brought_up_to_date(tmp_path):
    old = {"features.denseblock1.denselayer2.norm.1.weight": torch.ones(1), "features.norm5.bias": torch.ones(1)}
    torch.save(old, tmp_path / "old.pth")
    names = ["features.denseblock1.denselayer2.norm1.weight", "features.norm5.bias"]
    assert list(pretrained.read(tmp_path / "old.pth")) == names


def test_a_compressed_file_is_refused_before_it_is_unpacked(weights, tmp_path):
    torch.save(weights, tmp_path / "stored.pth")
    deflated = zipfile.ZipFile(tmp_path / "packed.pth", "w", zipfile.ZIP_DEFLATED)
    with zipfile.ZipFile(tmp_path / "stored.pth") as stored, deflated as packed:
        for member in stored.infolist():
            packed.writestr(member.filename, stored.read(member))
    assert pretrained.read(tmp_path / "stored.pth").keys() == weights.keys()
    with pytest.raises(UserError, match="contains no state_dict"):
        pretrained.read(tmp_path / "packed.pth")


@pytest.mark.parametrize("content", [b"not weights", [1, 2], {}, {"weight": 3}, {"weight": Command("made")}])
@pytest.mark.parametrize("suffix", [".pt", ".safetensors"])
def test_a_file_without_weights_is_refused_and_runs_no_code(content, suffix, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    if suffix == ".safetensors":
        pytest.importorskip("safetensors")
    path = tmp_path / f"file{suffix}"
    path.write_bytes(content) if isinstance(content, bytes) else torch.save(content, path)
    with pytest.raises(UserError, match=r"^.*file\.\w+ contains no state_dict, as torch.save"):
        pretrained.read(path)
    assert os.listdir() == [path.name]


@pytest.mark.parametrize(
    ("change", "sentence"),
    [
        (lambda w: w.pop("features.0.0.weight"), "it lacks features.0.0.weight$"),
        (lambda w: w.update({"stem.weight": torch.ones(1)}), "it has stem.weight, which the network lacks$"),
        (lambda w: w.update({"features.0.0.weight": torch.ones(1, 3, 3, 3)}), "is 1x3x3x3 instead of 16x3x3x3$"),
        (lambda w: w["features.0.0.weight"].fill_(float("nan")), "are not finite"),
    ],
)
def test_a_file_that_does_not_fit_is_refused_before_there_is_a_run(finetune, weights, tmp_path, change, sentence):
    changed = {key: value.clone() for key, value in weights.items()}
    change(changed)
    torch.save(changed, tmp_path / "other.pth")
    with pytest.raises(UserError, match=sentence):
        finetune(weights=str(tmp_path / "other.pth"))
    assert not list((tmp_path / "outputs").glob("*"))


def test_a_missing_file_is_named():
    with pytest.raises(UserError, match=r"^cannot read nowhere.pth: No such file or directory$"):
        pretrained.read(Path("nowhere.pth"))


# Weights from the network


@pytest.fixture
def hub(tmp_path, monkeypatch):
    """An empty folder for torch.hub, and no way to the network."""
    monkeypatch.setattr(torch.hub, "_hub_dir", str(tmp_path / "hub"))
    for scheme in ("http", "https"):
        monkeypatch.setenv(f"{scheme}_proxy", "http://127.0.0.1:9")
    return tmp_path / "hub" / "checkpoints"


def test_without_a_network_one_sentence_says_where_the_file_goes(finetune, hub):
    url = models.get_model_weights(MODEL).DEFAULT.url
    sentence = rf"^cannot download {url} \(.*refused\): put {url.rpartition('/')[2]} into {hub}, or name it with "
    with pytest.raises(UserError, match=sentence):
        finetune(weights=None)


def test_a_file_in_torch_hubs_folder_needs_no_network(finetune, hub, weights):
    hub.mkdir(parents=True)
    torch.save(weights, hub / models.get_model_weights(MODEL).DEFAULT.url.rpartition("/")[2])
    after = saved(finetune(weights=None, body_lr=0.0))
    assert torch.equal(after["features.0.0.weight"], weights["features.0.0.weight"])


def test_timms_networks_take_a_file_of_theirs_and_say_where_it_is_to_be_had(finetune, tmp_path, monkeypatch):
    timm = pytest.importorskip("timm")
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    torch.save(timm.create_model("resnet10t").state_dict(), tmp_path / "weights.pth")
    name = "timm/resnet10t.c3_in1k"
    run = finetune(model=name, weights=str(tmp_path / "weights.pth"))
    assert saved(run)["fc.weight"].shape == (3, 512)
    with pytest.raises(
        UserError, match=f"^cannot download the weights of {name} .*: get the file from huggingface.co/"
    ):
        finetune(model=name, weights=None)
    with pytest.raises(UserError, match=r"^timm has no network resnet10: did you mean resnet10t\?"):
        model.require("timm/resnet10")
