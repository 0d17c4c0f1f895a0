import dataclasses
import os

import pytest

from cifar import config
from cifar.config import RECIPES, Config
from cifar.errors import UsageError, UserError


def test_the_defaults_are_the_recipe_fast():
    assert dataclasses.replace(Config.create({}), data_dir="data", output_dir="outputs") == Config()


@pytest.mark.parametrize("recipe", RECIPES)
def test_every_recipe_is_valid(recipe):
    assert Config.create({"recipe": recipe}).recipe == recipe


def test_a_given_setting_overrules_the_recipe_and_text_is_read_as_the_fields_type():
    made = Config.create({"recipe": "simple", "epochs": "3", "lr": "1e-2", "val_size": "7", "seed": None})
    assert (made.epochs, made.lr, made.val_size, made.seed, made.batch_size) == (3, 0.01, 7, 0, 64)


@pytest.mark.parametrize("text", ["abc", "1.5", "", "0x10"])
def test_text_that_is_no_whole_number_is_a_usage_error(text):
    with pytest.raises(UsageError, match="--epochs takes a whole number") as caught:
        Config.create({"epochs": text})
    assert caught.value.exit_code == 2


@pytest.mark.parametrize(
    ("name", "value"),
    [("epochs", "0"), ("epochs", "-3"), ("lr", "nan"), ("lr", "inf"), ("lr", "-1"), ("val_size", "-1"), ("crop", "32")],
)
def test_a_number_out_of_range_is_told_in_one_sentence(name, value):
    with pytest.raises(UserError, match=f"^--{name.replace('_', '-')} must be [^\n]*$") as caught:
        Config.create({name: value})
    assert caught.value.exit_code == 1


@pytest.mark.parametrize(
    ("name", "value", "nearest", "other"),
    [("recipe", "fats", "fast", "resnet18"), ("optimizer", "adm", "adam", "muon"), ("device", "gpu", "", "mps")],
)
def test_an_unknown_name_lists_the_known_ones_and_the_nearest(name, value, nearest, other):
    with pytest.raises(UserError, match=f"unknown {name} '{value}'.*{nearest}.*known are .*{other}"):
        Config.create({name: value})


def test_small_images_need_a_network_that_takes_any_size():
    with pytest.raises(UserError, match="mlp takes images of one size"):
        Config.create({"recipe": "mlp", "small_epochs": "1"})


@pytest.mark.parametrize(
    ("model", "recipe"),
    [
        ("whitened", "fast"),
        ("convnet", "convnet"),
        ("resnet18", "resnet18"),
        ("vit_b_16", "plain"),
        ("my:net", "plain"),
    ],
)
def test_a_model_without_a_recipe_brings_its_own(model, recipe):
    made = Config.create({"model": model})
    assert (made.model, made.recipe) == (model, recipe)
    assert Config.create({"model": model, "recipe": "simple"}).recipe == "simple"


def test_a_training_is_called_by_its_recipe_and_by_a_network_that_is_not_the_recipes():
    titles = [Config.create(given).title for given in ({}, {"recipe": "mlp"}, {"model": "resnet50"})]
    assert titles == ["fast", "mlp", "plain resnet50"]


def test_a_network_from_elsewhere_is_built_for_one_size():
    with pytest.raises(UserError, match="resnet50 takes images of one size"):
        Config.create({"model": "resnet50", "small_epochs": 1})


def test_muon_is_for_the_network_whose_rates_it_has():
    with pytest.raises(UserError, match="simple takes adam or sgd"):
        Config.create({"recipe": "simple", "optimizer": "muon"})


@pytest.mark.parametrize(
    ("name", "value"), [("epochs", None), ("epochs", "12"), ("epochs", True), ("recipe", 3), ("lr", [1])]
)
def test_a_value_of_another_type_is_refused(name, value):
    with pytest.raises(UserError):
        Config(**{name: value})


def test_the_environment_names_the_data_folder_unless_the_flag_does(monkeypatch):
    monkeypatch.setenv("CIFAR_DATA_DIR", "elsewhere")
    assert Config.create({}).data_dir == "elsewhere"
    assert Config.create({"data_dir": "here"}).data_dir == "here"


def test_default_folders_lie_in_the_project_whatever_the_working_directory(monkeypatch, tmp_path):
    monkeypatch.chdir(tmp_path)
    project = os.path.dirname(os.path.dirname(config.__file__))
    assert os.path.abspath(Config.create({}).output_dir) == os.path.join(project, "outputs")
    assert Config.create({"output_dir": "mine"}).output_dir == "mine"


@pytest.mark.parametrize("name", config.FIELDS)
def test_every_setting_has_a_help_text_with_its_defaults(name):
    text = config.help_text(name)
    assert len(text) > 10
    assert "default" in text or name in ("val_size", "mirror", "minutes")


@pytest.mark.parametrize("text", ["a\0b", "\ud800"])
def test_a_text_that_no_file_can_be_called_is_refused(text):
    with pytest.raises(UserError, match="--data-dir takes no"):
        Config.create({"data_dir": text})
