import json
import os
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

from cifar import config
from cifar.config import PROJECT, RECIPES, Config, resolve
from cifar.data import Split
from cifar.errors import UsageError, UserError
from cifar.flags import load_settings


def dataset(name: str, images: int, classes: int, size: int = 32, can_flip: bool = True, own_val: int = 0):
    pixels = torch.empty(images, 3, size, size, device="meta")
    train = Split(pixels, torch.empty(images, device="meta"), own_val=own_val)
    return SimpleNamespace(
        key=f"/my/{name}", name=name, train=train, classes=tuple(map(str, range(classes))), can_flip=can_flip
    )


DIGITS = dataset("digits", 1437, 10, can_flip=False)
PETS = dataset("pets", 20_000, 2)


def write(tmp_path, content: str, name: str = "run.toml") -> str:
    (tmp_path / name).write_text(content, encoding="utf-8")
    return str(tmp_path / name)


def test_a_given_setting_overrides_the_recipe_and_text_is_parsed():
    made = Config.create({"recipe": "simple", "epochs": "3", "lr": "1e-2", "val_size": "7", "seed": None})
    assert (made.epochs, made.lr, made.val_size, made.seed, made.batch_size) == (3, 0.01, 7, 0, 64)
    assert Config.create({}).replace(data_dir="data", output_dir="outputs") == Config() == Config(**RECIPES["fast"])


@pytest.mark.parametrize(
    ("given", "sentence"),
    [
        ({"seeds": "0"}, "--seeds must be at least 1, not 0"),
        ({"mixup": "1e-300"}, "--mixup must be 0 or at least 0.01, not 1e-300"),
        ({"epochs": 10**400}, "--epochs must be at most 100000, not 1000000000"),
        ({"lr": "nan"}, "--lr must be finite, not nan"),
        ({"epochs": 3.5}, "--epochs takes a whole number, not 3.5"),
        ({"epochs": True}, "--epochs does not take True"),
        ({"output_dir": " "}, "--output-dir does not take ' '"),
        ({"lr": {}}, "--lr takes a number, not {}"),
        ({"lr": "\udcff"}, "--lr does not take '\\udcff'"),
        ({"data_dir": 3}, "--data-dir takes text, not 3"),
        ({"data_dir": "a\0b"}, "--data-dir does not take 'a\\x00b'"),
        ({"output_dir": "\ud800"}, "--output-dir does not take '\\ud800'"),
        ({"recipe": "fats"}, "unknown recipe 'fats': did you mean fast?"),
        ({"recipe": ["fast"]}, "unknown recipe '['fast']'"),
        ({"optimizer": "adm"}, "unknown optimizer 'adm': did you mean adam? choose from muon, "),
        ({"epoch": 3}, "unknown setting 'epoch': did you mean epochs?"),
        ({"self": 3}, "unknown setting 'self': "),
        ({"seed": 2**32 - 1, "seeds": 2}, "--seed 4294967295 with --seeds 2 exceeds the largest seed, 4294967295"),
        ({"pretrained": True, "model": "a:b"}, "there are no pretrained weights for a:b: name its --weights"),
        ({"seeds": 1001}, "--seeds must be at most 1000, not 1001"),
        (
            {"recipe": "simple", "optimizer": "muon"},
            "muon is for airbench94 and airbench96 only: leave out --optimizer muon for simple",
        ),
        ({"recipe": "fast", "optimizer": "adam"}, "--optimizer adam needs --lr, too: 0.17 of fast is for muon"),
        ({"recipe": "fast", "model": "vgg11"}, "muon is for airbench94 and airbench96 only: leave out --recipe fast"),
        ({"model": "resnet50", "small_epochs": 1}, "--small-epochs is for airbench94, "),
    ],
)
def test_a_wrong_value_is_one_sentence(given, sentence):
    with pytest.raises(UserError) as caught:
        Config.create(given)
    assert str(caught.value).startswith(sentence)
    assert "\n" not in str(caught.value)
    assert caught.value.exit_code == 1


@pytest.mark.parametrize("text", ["abc", "1.5", "9" * 5000])
def test_text_that_is_no_number_is_a_usage_error(text):
    with pytest.raises(UsageError, match=r"^--epochs takes a whole number, not '.{0,40}'$"):
        Config.create({"epochs": text})


def test_known_names_are_taken_in_any_case_but_not_over_a_folder_of_that_name(tmp_path, monkeypatch):
    given = {"recipe": "Best", "dataset": "CIFAR10", "device": "GPU", "optimizer": "Adam", "model": "ResNet18"}
    made = Config.create({**given, "precision": "BFloat16", "lr": 1e-3})
    assert (made.recipe, made.dataset, made.device) == ("best", "cifar10", "cuda")
    assert (made.optimizer, made.model, made.precision) == ("adam", "resnet18", "bfloat16")
    monkeypatch.chdir(tmp_path)
    (tmp_path / "Digits").mkdir()
    assert Config.create({"dataset": "Digits"}).dataset == "Digits"
    assert Config.create({"model": "My.Net:Build"}).model == "My.Net:Build"


@pytest.mark.parametrize(
    ("model", "recipe", "title"),
    [
        ("airbench96", "best", "best"),
        ("whitened_deep", "best", "best"),
        ("my:net", "plain", "plain my:net"),
        ("mobilenet_v3_large", "plain", "plain mobilenet_v3_large"),
    ],
)
def test_a_model_without_a_recipe_brings_its_own_under_its_old_name_too(model, recipe, title):
    made = Config.create({"model": model})
    assert (made.model, made.recipe, made.title) == (config.known_spelling("model", model), recipe, title)
    assert Config.create({"model": model, "recipe": "simple"}).recipe == "simple"


def test_the_config_of_an_older_run_is_filled_in_from_its_recipe():
    path = PROJECT / "tests" / "old_run" / "config.json"
    content = json.loads(path.read_text(encoding="utf-8"))
    assert "hard_epochs" not in content
    made = Config.from_file({**content, "model": "whitened"})
    assert (made.model, made.hard_epochs, made.epochs, made.title) == ("airbench94", 0, 20, "convnet airbench94")
    with pytest.raises(UserError, match=r"^it lacks recipe, seed$"):
        Config.from_file({**content, "seed": None, "recipe": None})


def test_default_folders_lie_in_the_project_unless_a_flag_or_the_environment_names_another(monkeypatch, tmp_path):
    monkeypatch.chdir(tmp_path)
    assert os.path.abspath(Config.create({}).output_dir) == str(PROJECT / "outputs")
    monkeypatch.setenv("CIFAR_DATA_DIR", "elsewhere")
    assert Config.create({}).data_dir == "elsewhere"
    assert Config.create({"data_dir": "here"}).data_dir == "here"


def test_a_help_text_has_the_choices_the_default_and_the_recipes_with_another_one():
    assert config.help_text("crop_mode").startswith("what fills the padding of random crops; one of reflect, zeros; ")
    defaults = "default 11 (best: 40, simple: 40, convnet: 20, mlp: 20, resnet18: 200, plain: 30, finetune: 10)"
    assert config.help_text("epochs") == f"passes over the training images; {defaults}"
    without_default = {name for name in config.FIELDS if "default" not in config.help_text(name)}
    assert without_default == {"labels", "mirror", "minutes", "weights"}


# Settings files.


def test_a_home_directory_is_understood_everywhere(monkeypatch):
    monkeypatch.setenv("HOME", "/home/me")
    made = Config.create(dict.fromkeys(("dataset", "data_dir", "labels", "output_dir", "weights"), "~/x"))
    assert {made.dataset, made.data_dir, made.labels, made.output_dir, made.weights} == {"/home/me/x"}


@pytest.mark.parametrize(
    ("value", "recipe"), [(False, "resnet18"), ("no", "resnet18"), (True, "finetune"), ("1", "finetune")]
)
def test_weights_from_imagenet_bring_their_recipe_only_if_they_are_wanted(value, recipe):
    assert Config.create({"model": "resnet18", "pretrained": value}).recipe == recipe


def test_flags_override_the_file_and_the_file_overrides_the_recipe(tmp_path):
    file = write(tmp_path, "recipe = 'simple'\nepochs = 1\nval-size = 100\nlr = 1")
    made = Config.create(load_settings({"epochs": "3", "crop": None}, file))
    assert (made.epochs, made.val_size, made.lr, made.crop) == (3, 100, 1, 4)
    with pytest.raises(UsageError, match=r"run\.toml is for the recipe simple: leave out --recipe fast"):
        load_settings({"recipe": "fast"}, file)
    assert load_settings({"recipe": "Simple"}, file)["epochs"] == 1
    assert load_settings({}, write(tmp_path, '\ufeff{"epochs": 2, "recipe": null}', "RUN.JSON")) == {"epochs": 2}
    assert load_settings({"lr": "0.1"}, write(tmp_path, "optimizer = 'sgd'\nrecipe = 'plain'"))["lr"] == "0.1"
    assert load_settings({"epochs": "2"}, write(tmp_path, "minutes = 3")) == {"epochs": "2"}
    assert load_settings({"minutes": "3"}, write(tmp_path, "epochs = 2")) == {"epochs": 2, "minutes": "3"}


def test_a_runs_own_config_gives_what_it_was_and_not_where(tmp_path):
    write(tmp_path, json.dumps(Config(recipe="mlp", epochs=7, output_dir="there").model_dump()), "config.json")
    assert load_settings({}, str(tmp_path))["output_dir"] == "there"
    write(tmp_path, "{}", "run.json")
    for file in (tmp_path, tmp_path / "config.json"):
        settings = load_settings({}, str(file))
        assert settings.keys().isdisjoint(config.LOCATIONS)
        assert Config(**settings) == Config(recipe="mlp", epochs=7)


@pytest.mark.parametrize(
    ("name", "content", "sentence"),
    [
        ("run.toml", "epochs = = 3", r"run\.toml is not valid TOML: .*line 1"),
        ("run.json", "[" * 10**5, r"run\.json is not valid JSON"),
        ("run.json", "[1]", "must contain settings by name"),
        ("run.toml", "epochs = 3\nminutes = 1", r"run\.toml: --minutes chooses the number of epochs"),
        ("run.toml", "optimizer = 'sgd'", r"run\.toml: --optimizer sgd needs --lr, too"),
        ("run.yaml", "epochs: 3", r"ends in \.toml or \.json"),
    ],
)
def test_a_wrong_file_is_one_sentence_that_names_it(tmp_path, name, content, sentence):
    with pytest.raises(UserError, match=f"^[^\n]*{sentence}[^\n]*$"):
        load_settings({}, write(tmp_path, content, name))


@pytest.mark.parametrize("content", ["recipe = 'fast'\nlr = 0.1", "optimizer = 'SGD'\nlr = 0.1"])
def test_an_optimizer_of_another_kind_than_that_of_the_file_needs_a_learning_rate(tmp_path, content):
    file = write(tmp_path, content, "run.toml")
    with pytest.raises(UserError, match=r"^--optimizer adam needs --lr, too: 0\.1 of .*run\.toml is for (muon|sgd)$"):
        load_settings({"optimizer": "adam"}, file)
    assert load_settings({"optimizer": "adam", "lr": 1e-3}, file)["lr"] == 1e-3
    assert load_settings({"optimizer": "sgd", "recipe": "plain"}, write(tmp_path, "lr = 0.1", "lr.toml"))["lr"] == 0.1


# Fitting the settings to a dataset.


def test_settings_without_an_effect_are_named_unless_they_are_the_recipes_own():
    given = {"recipe": "plain", "momentum": 0.5, "decay_rate": 0.5, "small_size": 16, "body_lr": 0.5, "hard_share": 0.5}
    _, sentences = resolve(Config(**given, early_stopping="loss", val_size=0), DIGITS)
    idle = [sentence.split()[0] for sentence in sentences if "has no effect with the other settings" in sentence]
    flags = ["body-lr", "decay-rate", "early-stopping", "hard-share", "momentum", "small-size"]
    assert idle == [f"--{name}" for name in flags]
    of_recipes = [sentence for name in RECIPES for sentence in resolve(Config(recipe=name), DIGITS)[1]]
    assert not any("no effect" in sentence for sentence in of_recipes)


def test_a_path_is_text_and_a_mirror_without_a_scheme_is_not_repeated():
    assert Config(dataset=Path("a") / "b", output_dir=Path("c")).dataset == os.path.join("a", "b")
    for mirror in ("user:secret@mirror/x", "https://user:p/w@host/", "https://u:a b@h/", "ftp://u:secret@h/"):
        with pytest.raises(
            UsageError, match=r"^--mirror and CIFAR_MIRROR take addresses that begin with http:// or https://$"
        ):
            Config(mirror=mirror)
    assert Config(mirror="https://u:p@[::1]:80/a?b http://h").mirror


def test_what_the_dataset_does_not_allow_is_changed_and_every_change_is_reported():
    resolved, sentences = resolve(Config(epochs=3, cutout=20, small_size=40), DIGITS)
    assert (resolved.dataset, resolved.val_size) == ("/my/digits", 143)
    assert sentences == [
        "--small-epochs 2 instead of 6: at most two thirds of the epochs may use small images",
        "--hard-epochs 0 instead of 2: at most a quarter of the epochs may leave out easy images",
        "--batch-size 64 instead of 1000: an epoch of 1,294 images needs at least 20 steps",
        "--small-size 32 instead of 40: the images are 32x32",
        "--cutout 16 instead of 20: at most half of 32x32 images may be cut out",
        "--flip none instead of alternating: a flipped image of digits may show another class",
    ]
    assert resolve(resolved, DIGITS) == (resolved, [])
    assert (resolved.small_epochs, resolved.batch_size, resolved.cutout, resolved.flip) == (2, 64, 16, "none")


def test_large_images_come_in_smaller_batches():
    resolved, sentences = resolve(Config(image_size=128), dataset("pets", 20_000, 2, size=128))
    assert (resolved.dataset, resolved.batch_size, resolved.small_size) == ("/my/pets", 125, 96)  # 2000 / 4^2
    assert sentences == ["--batch-size 125 instead of 1000: a step of 128x128 images needs too much memory"]


def test_images_above_64_pixels_get_random_resized_crops_unless_it_is_said_otherwise():
    for size, scale in ((32, 1), (64, 1), (65, 0.35), (384, 0.35)):
        assert resolve(Config(image_size=size), dataset("pets", 20_000, 2, size=size))[0].crop_scale == scale
    config = resolve(Config(image_size=96, crop_scale=1), dataset("pets", 20_000, 2, size=96))[0]
    assert (config.crop_scale, "crop" in config.unused) == (1, False)
    assert {"crop", "crop_mode"} <= config.replace(crop_scale=0.9).unused


def test_the_epochs_that_fit_into_the_minutes_have_their_own_limits():
    settings = {"small_epochs": 20, "hard_epochs": 9, "warmup_epochs": 9}
    assert len(resolve(Config(**settings), PETS)[1]) == 3 + len(resolve(Config(**settings, minutes=60), PETS)[1])


def test_validation_images_of_the_dataset_itself_are_used():
    own = dataset("pets", 200, 3, own_val=40)
    assert resolve(Config(), own)[0].val_size == resolve(Config(val_size=40), own)[0].val_size == 40
    with pytest.raises(UserError, match="leave out --val-size 20: pets has 40 validation images of its own"):
        resolve(Config(val_size=20), own)


@pytest.mark.parametrize("fitted", [DIGITS, PETS], ids=["digits", "pets"])
def test_resolving_again_changes_nothing_nor_does_a_way_through_a_file(fitted, tmp_path):
    for recipe in RECIPES:
        resolved, _ = resolve(Config(recipe=recipe), fitted)
        loaded = Config(**load_settings({}, write(tmp_path, json.dumps(resolved.model_dump()), "config.json")))
        assert resolve(loaded, fitted) == (resolved, [])


@pytest.mark.parametrize(
    ("batch_size", "processes", "resolved", "reason"),
    [(64, 3, 63, "it must be a multiple of the 3 processes"), (99, 3, 63, "needs at least 20 steps"), (64, 2, 64, "")],
)
def test_the_batch_size_is_a_multiple_of_the_processes(batch_size, processes, resolved, reason):
    config, sentences = resolve(Config(recipe="mlp", flip="none", batch_size=batch_size), DIGITS, processes)
    assert config.batch_size == resolved
    assert [reason in sentence for sentence in sentences] == [True] * bool(reason)


def test_a_batch_too_small_for_the_processes_is_refused():
    with pytest.raises(UserError, match="a step of 64 images is too small for 65 processes"):
        resolve(Config(), DIGITS, 65)


@pytest.mark.parametrize(
    ("images", "classes", "patience", "val_size"),
    [(1437, 10, 0, 143), (1437, 300, 0, 300), (50_000, 10, 0, 2000), (50_000, 10, 5, 5000)],
)
def test_a_tenth_is_for_validation_with_room_for_every_class_and_more_if_training_stops_by_it(
    images, classes, patience, val_size
):
    assert resolve(Config(patience=patience), dataset("some", images, classes))[0].val_size == val_size


@pytest.mark.parametrize("size", [5, 1430])
def test_a_validation_split_that_the_dataset_does_not_allow_is_refused(size):
    with pytest.raises(UserError, match=f"--val-size {size} does not fit: digits has 1,437 .*use 0, or 10 to 1427"):
        resolve(Config(val_size=size), DIGITS)
