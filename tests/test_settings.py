import dataclasses
import json

import pytest
import torch

from cifar import datasets, settings, train
from cifar.config import RECIPES, Config
from cifar.errors import UsageError, UserError


def file(tmp_path, content: str, name: str = "run.toml") -> str:
    (tmp_path / name).write_text(content, encoding="utf-8")
    return str(tmp_path / name)


def test_a_flag_overrules_an_assignment_and_that_the_file_and_that_the_recipe(tmp_path):
    given = file(tmp_path, "recipe = 'simple'\nepochs = 1\nseed = 1\nval-size = 100\nlr = 1")
    made = Config.create(settings.gather({"epochs": "3", "crop": None}, given, ["epochs=2", "seed = 2"]))
    assert (made.epochs, made.seed, made.val_size, made.lr, made.crop) == (3, 2, 100, 1, 4)


def test_json_and_toml_say_the_same(tmp_path):
    content = {"recipe": "mlp", "epochs": 4, "lr": 0.5, "dataset": "digits"}
    toml = "\n".join(f"{key} = {json.dumps(value)}" for key, value in content.items())
    assert settings.gather({}, file(tmp_path, toml), []) == content
    assert settings.gather({}, file(tmp_path, json.dumps(content), "run.json"), []) == content


def test_a_run_is_repeated_by_its_config_json_or_its_directory_with_the_same_weights(evaluated_run, digits, tmp_path):
    here = {"data_dir": "nowhere", "output_dir": str(tmp_path)}
    for given in (evaluated_run.path / "config.json", evaluated_run.path):
        gathered = settings.gather({}, str(given), [])
        assert gathered.keys().isdisjoint(here)  # where that run was is not where this one is to be
        assert Config.create(gathered | here) == dataclasses.replace(evaluated_run.config, **here)
    config = Config.create(settings.gather({"output_dir": str(tmp_path)}, str(evaluated_run.path), []))
    again = train.create(config, digits)
    train.fit(again, digits)
    runs = (evaluated_run, again)
    first, second = (torch.load(run.checkpoints / "best.pt", weights_only=True)["weights"] for run in runs)
    assert all(torch.equal(first[name], second[name]) for name in first)


@pytest.mark.parametrize("recipe", RECIPES)
def test_the_settled_settings_of_every_recipe_come_back_from_their_file(recipe, digits, tmp_path):
    settled = datasets.settle(Config.create({"recipe": recipe}), digits)
    given = file(tmp_path, json.dumps(dataclasses.asdict(settled)), "config.json")
    assert datasets.settle(Config.create(settings.gather({}, given, [])), digits) == settled


@pytest.mark.parametrize(
    ("text", "sentence"),
    [
        ("epoch=3", "^--set epoch=3: unknown setting 'epoch': did you mean epochs"),
        (
            "epochs=abc",
            r"^--set epochs=abc: --epochs takes a whole number, not 'abc' \(passes over the training images",
        ),
        ("lr=-1", r"--lr must be at least 0.0, not -1.0 \(peak learning rate.*default 0.24, simple 0.001"),
        ("optimizer=adm", r"unknown optimizer 'adm': did you mean adam\?.*\(update rule"),
        ("epochs", "--set takes key=value, such as lr=0.1, not 'epochs'"),
    ],
)
def test_a_wrong_assignment_is_told_with_the_settings_help(text, sentence):
    with pytest.raises(UserError, match=sentence):
        settings.gather({}, None, [text])


@pytest.mark.parametrize(
    ("name", "content", "sentence"),
    [
        ("run.toml", "epochs = = 3", r"run\.toml is not TOML: .*line 1"),
        ("run.json", "{", r"run\.json is not JSON: .*line 1"),
        ("run.json", "[1]", "does not hold settings by their names"),
        ("run.toml", "epochs = [3]", r"run\.toml: --epochs takes a whole number, not \[3\]"),
        ("run.toml", "epochs = 3.5", "--epochs takes a whole number, not 3.5"),
        ("run.toml", "[train]\nepochs = 3", "unknown setting 'train'"),
        ("run.toml", "larning_rate = 3", "unknown setting 'larning_rate'"),
        ("run.yaml", "epochs: 3", r"ends in \.toml or \.json"),
    ],
)
def test_a_wrong_file_is_told_in_one_sentence(tmp_path, name, content, sentence):
    with pytest.raises(UserError, match=sentence) as caught:
        settings.gather({}, file(tmp_path, content, name), [])
    assert "\n" not in str(caught.value)


def test_a_file_that_is_not_there_is_named(tmp_path):
    with pytest.raises(UserError, match=r"cannot read .*none\.toml: No such file"):
        settings.gather({}, str(tmp_path / "none.toml"), [])


def test_a_recipe_beside_a_file_for_another_is_refused_as_the_file_would_undo_it(tmp_path):
    given = file(tmp_path, "recipe = 'simple'")
    with pytest.raises(UsageError, match=r"run\.toml is for the recipe simple, not fast"):
        settings.gather({"recipe": "fast"}, given, [])
    assert settings.gather({"recipe": "simple"}, given, []) == {"recipe": "simple"}
