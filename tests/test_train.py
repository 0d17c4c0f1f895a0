import dataclasses
import json
import pickle

import pytest
import torch

from cifar import data, datasets, evaluate, metrics, train
from cifar.config import Config
from cifar.console import TrainingDisplay
from cifar.errors import UserError

TIMES = ("seconds", "images_per_second")


def record(run) -> tuple[bytes, list]:
    """What a run should repeat: the bytes of its weights, and its history but for the times."""
    weights = torch.load(run.checkpoints / "last.pt", weights_only=True)["weights"]
    history = [{key: value for key, value in epoch.items() if key not in TIMES} for epoch in run.history()]
    return b"".join(value.contiguous().numpy().tobytes() for value in weights.values()), history


def test_the_same_seed_gives_identical_weights_and_history_and_another_seed_does_not(make_run):
    first, again, other = (record(make_run(seed=seed)) for seed in (3, 3, 4))
    assert first == again
    assert first[0] != other[0]
    assert first[1] != other[1]


@pytest.mark.parametrize("recipe", ["fast", "simple"])
def test_the_same_seed_repeats_a_recipe_with_all_its_augmentation(make_run, recipe):
    settings = {"recipe": recipe, "epochs": 1, "val_size": 1237, "batch_size": 50}
    assert record(make_run(**settings)) == record(make_run(**settings))


def test_scrambling_the_test_file_of_cifar10_changes_no_weight(small_cifar10, make_run):
    settings = {"recipe": "fast", "epochs": 1, "val_size": 50}
    before = record(make_run(dataset=datasets.find("cifar10", str(small_cifar10))[0], **settings))
    content = pickle.loads((small_cifar10 / "test_batch").read_bytes())
    scrambled = {"data": content["data"][::-1] ^ 255, "labels": content["labels"][::-1]}
    (small_cifar10 / "test_batch").write_bytes(pickle.dumps(scrambled))
    assert record(make_run(dataset=datasets.find("cifar10", str(small_cifar10))[0], **settings)) == before


def test_scrambling_the_test_set_changes_no_weight(make_run, digits):
    scrambled = dataclasses.replace(digits)
    noise = torch.randint(0, 256, digits.test.images.shape, dtype=torch.uint8)
    vars(scrambled)["test"] = data.Split(noise, digits.test.labels.flip(0))
    assert record(make_run()) == record(make_run(dataset=scrambled))


def test_training_reads_no_test_split(make_run, digits):
    fresh = dataclasses.replace(digits)
    make_run(dataset=fresh)
    assert "train" in vars(fresh)
    assert "test" not in vars(fresh)


@pytest.mark.parametrize(
    ("recipe", "lr", "images", "epochs"),
    [
        ("fast", 0.24, 32, 30),
        ("simple", 3e-3, 32, 90),
        ("convnet", 0.01, 32, 30),
        ("mlp", 3e-3, 32, 30),
        ("resnet18", 0.01, 8, 30),
    ],
)
def test_loss_falls_when_overfitting_one_batch(digits, recipe, lr, images, epochs):
    still = {"epochs": epochs, "batch_size": images, "schedule": "linear", "crop": 0, "flip": "none", "jitter": 0.0}
    config = Config.create({"recipe": recipe, "lr": lr, **still})
    batch = digits.train[:images]
    network = train.fresh_network(config, batch, 10).to(memory_format=torch.channels_last)
    state = train.fresh_state(config, network, batch)
    display = TrainingDisplay([1] * epochs, [1] * epochs)
    losses = []
    for _ in range(epochs):
        losses.append(train.train_epoch(state, 32, 0.0, "float32", display)["train_loss"])
        state.end_epoch(None)
    assert losses[-1] < 0.35 * losses[0]


def test_a_loss_that_is_not_finite_stops_the_run_with_epoch_and_step(make_run, tmp_path):
    with pytest.raises(UserError, match=r"the loss is not finite at epoch 1, step \d+"):
        make_run(recipe="mlp", optimizer="sgd", lr=1e30)
    failed = next((tmp_path / "outputs").glob("*_mlp_digits"))
    kept = json.loads((failed / "run.json").read_text(encoding="utf-8"))
    assert kept["status"] == "failed"
    assert "not finite" in kept["error"]


def test_weights_that_the_last_step_spoils_stop_the_run(make_run, monkeypatch):
    spoil = train.train_epoch

    def spoiling(state, *arguments):
        record = spoil(state, *arguments)
        next(state.network.parameters()).data[0] = float("nan")
        return record

    monkeypatch.setattr(train, "train_epoch", spoiling)
    with pytest.raises(UserError, match="the weights are not finite after epoch 1"):
        make_run(val_size=0)


def test_best_is_the_epoch_of_highest_validation_accuracy_and_last_the_last(make_run):
    run = make_run(epochs=4)
    accuracies = [epoch["val_accuracy"] for epoch in run.history()]
    best, last = (torch.load(run.checkpoints / name, weights_only=True)["epoch"] for name in ("best.pt", "last.pt"))
    assert best == accuracies.index(max(accuracies)) + 1
    assert last == 4


def test_the_recorded_validation_accuracy_is_that_of_the_saved_weights(make_run, digits):
    run = make_run(epochs=2)
    val = data.hold_out(digits.train, run.config.val_size, run.config.seed)[1]
    network, _ = evaluate.load(run, digits.classes)
    best = max(epoch["val_accuracy"] for epoch in run.history())
    logits = evaluate.infer(network, val.images, precision=run.record["precision"])
    assert metrics.accuracy(logits, val.labels) == pytest.approx(best)


def test_without_validation_all_images_train_and_the_last_weights_are_kept(make_run):
    run = make_run(val_size=0)
    assert [epoch["val_accuracy"] for epoch in run.history()] == [None, None]
    assert torch.load(run.checkpoints / "best.pt", weights_only=True)["epoch"] == 2


@pytest.mark.parametrize(
    ("begun", "said"),
    [
        ({"hardware": "an abacus"}, "begun on an abacus: on "),
        ({"processes": 2}, "begun with 2 processes: with 1 the last digits come out differently"),
    ],
)
def test_going_on_elsewhere_is_said_to_change_the_last_digits(make_run, begun, said, capsys):
    run = make_run(epochs=1)
    run.update(status="interrupted", **begun)
    train.take_up(str(run.path), {})
    assert said in capsys.readouterr().out


def test_training_stops_when_validation_has_not_improved_for_the_patience(make_run):
    # With a rate of zero no weight changes; only BatchNorm's statistics do, so mlp's accuracy stays what it is.
    run = make_run(recipe="mlp", lr=0.0, epochs=9, patience=2)
    assert len(run.history()) == 3


def test_the_learning_rate_of_the_history_is_that_of_each_epochs_first_step(make_run):
    run = make_run(epochs=3, schedule="linear", lr=0.003)
    assert [epoch["lr"] for epoch in run.history()] == pytest.approx([0.003, 0.002, 0.001])


def test_fast_trains_on_small_images_first(make_run):
    run = make_run(recipe="fast", epochs=2, val_size=1237, small_epochs=5)
    assert [epoch["image_size"] for epoch in run.history()] == [24, 32]


def test_fast_learns_real_pictures_in_a_short_training(real_cifar10, make_run):
    few = dataclasses.replace(real_cifar10)
    vars(few)["train"] = real_cifar10.train[:10_000]
    vars(few)["test"] = real_cifar10.test[:2500]
    run = make_run(dataset=few, recipe="fast", epochs=2, batch_size=250, small_size=16)
    assert evaluate.evaluate(run, few, "cpu")["accuracy"] > 0.55
