import copy
from pathlib import Path

import pytest
import torch

from cifar import checkpoint, data, datasets, train
from cifar.console import TrainingDisplay
from cifar.errors import UserError
from cifar.state import State
from conftest import flat, quick_config

STEPS = 20  # of an epoch


@pytest.fixture
def make_state(tmp_path, digits):
    """A function that gives the state of a training of the recipe, on 200 digits, after so many steps."""

    def make(recipe: str = "convnet", steps: int = 0) -> State:
        few = {"epochs": 4, "val_size": 1237, "small_epochs": 0, "hard_epochs": int(recipe == "fast")}
        config = datasets.settle(quick_config(tmp_path, recipe=recipe, **few), digits)
        split = data.hold_out(digits.train, config.val_size, config.seed)[0]
        network = train.fresh_network(config, split, len(digits.classes)).to(memory_format=torch.channels_last)
        return advance(train.fresh_state(config, network, split), steps)

    return make


class EnoughError(Exception):
    pass


def advance(state: State, steps: int) -> State:
    """The state after so many more steps, from epoch to epoch."""
    target = state.updates.steps + steps

    def stop_in_time():
        if state.updates.steps == target:
            raise EnoughError

    while state.updates.steps < target:
        try:
            train.train_epoch(state, 32, 0.1, "float32", TrainingDisplay(state.epoch_steps, [1] * 4), stop_in_time)
            state.end_epoch(None)
        except EnoughError:
            break
    return state


def save(state: State, path: Path) -> None:
    description = {"model": "mlp", "classes": ("a",), "image_size": 32, "epoch": 0}
    checkpoint.save(path, **description, weights=state.network.state_dict(), training=state.state_dict())


@pytest.mark.parametrize(
    ("recipe", "steps"),
    [("fast", 18), ("fast", 3 * STEPS + 5), ("simple", 18), ("convnet", STEPS), ("mlp", STEPS + 3), ("mlp", STEPS - 1)],
)
def test_a_state_that_was_saved_goes_on_as_the_one_that_never_stopped(make_state, tmp_path, recipe, steps):
    save(make_state(recipe, steps), tmp_path / "last.pt")
    content = checkpoint.load(tmp_path / "last.pt")
    uninterrupted = make_state(recipe, steps + 4)
    expected = [flat(part) for part in (uninterrupted.network.state_dict(), uninterrupted.state_dict())]
    resumed = make_state(recipe)
    resumed.network.load_state_dict(content["weights"])
    resumed.load_state_dict(content["training"])
    advance(resumed, 4)
    assert [flat(part) for part in (resumed.network.state_dict(), resumed.state_dict())] == expected


def test_a_step_notes_the_loss_of_each_of_its_images(make_state):
    before, after = make_state("fast"), make_state("fast", 1)
    images, labels, places = next(before.batches.epoch(1, 32))
    expected = torch.nn.functional.cross_entropy(before.network(images), labels, reduction="none")
    torch.testing.assert_close(after.image_losses[places], expected.detach(), rtol=1e-3, atol=1e-4)
    noted = after.image_losses < before.image_losses
    assert noted.nonzero().flatten().tolist() == sorted(places.tolist())


def test_the_last_epochs_take_the_images_of_the_highest_loss(make_state):
    state = make_state("fast", 3 * STEPS)
    state.end_epoch(None)
    assert state.epoch_steps == [20, 20, 20, 12]
    assert (state.epoch, state.steps, state.taken.sum()) == (4, 12, 120)
    assert state.image_losses[state.taken].min() >= state.image_losses[~state.taken].max()
    before, taken = state.image_losses.clone(), state.taken
    advance(state, 12)
    assert torch.equal(state.image_losses != before, taken)


def test_the_first_step_whose_loss_is_not_finite_is_named(make_state):
    state = make_state()
    state.epoch, state.step = 7, 4
    state.losses[:5] = torch.tensor([1.0, 2.0, float("inf"), float("nan"), 1.0])
    with pytest.raises(UserError, match="epoch 7, step 3"):
        state.mean_loss()


def test_the_best_epoch_is_the_first_of_the_highest_accuracy_and_patience_counts_from_it(make_state):
    state = make_state()
    assert [state.end_epoch(accuracy) for accuracy in (0.5, 0.75, 0.75, 0.7)] == [True, True, False, False]
    assert (state.best_epoch, state.best_accuracy, state.epoch) == (2, 0.75, 5)
    assert [state.has_ended(9, patience) for patience in (0, 1, 2, 3)] == [False, True, True, False]
    assert [state.has_ended(epochs, 0) for epochs in (4, 5)] == [True, False]


def test_without_validation_the_last_epoch_is_the_best(make_state):
    state = make_state()
    assert [state.end_epoch(None), state.end_epoch(None), state.best_epoch] == [True, True, 2]


def change(*path, to):
    """A damage: the entry of a state at the path is replaced by `to`, or by what it makes of the entry."""

    def damage(content: dict) -> None:
        for key in path[:-1]:
            content = content[key]
        content[path[-1]] = to(content[path[-1]]) if callable(to) else to

    return damage


DAMAGES = {
    "an entry is missing": ("the state of the training has other parts", lambda content: content.pop("order")),
    "an entry is new": ("the state of the training has other parts", lambda content: content.update(colour=1)),
    "the epoch is a text": ("its epoch is not possible", change("epoch", to="1")),
    "the epoch is true": ("its epoch is not possible", change("epoch", to=True)),
    "the epoch is zero": ("its epoch is not possible", change("epoch", to=0)),
    "the epoch is another": ("its numbers of steps do not fit", change("epoch", to=3)),
    "the step is beyond the epoch": (
        "its numbers of steps do not fit",
        lambda content: content.update(step=STEPS + 1, updates=STEPS + 1),
    ),
    "the rate is not finite": ("its lr is not possible", change("lr", to=float("nan"))),
    "the losses are fewer": ("its losses is not possible", change("losses", to=lambda losses: losses[:-1])),
    "a loss is not finite": ("its losses is not possible", change("losses", 0, to=float("inf"))),
    "the losses are of another type": (
        "its losses is not possible",
        change("losses", to=lambda losses: losses.double()),
    ),
    "the losses are one, repeated": ("its losses is not possible", change("losses", to=torch.zeros(1).expand(STEPS))),
    "the losses are a list": ("its losses is not possible", change("losses", to=lambda losses: losses.tolist())),
    "the order is no generator's": (
        "a state of a random generator is none",
        change("order", to=lambda order: order * 0 + 255),
    ),
    "the order is shorter": ("its order is not possible", change("order", to=lambda order: order[:-1])),
    "the memory is a dict": ("the state is of other optimizers", change("memory", to={})),
    "the memory is of two optimizers": (
        "the state is of other optimizers",
        change("memory", to=lambda memory: memory * 2),
    ),
    "the memory has a parameter more": ("the state is of other parameters", change("memory", 0, 99, to={})),
    "the memory of a parameter is a list": ("an optimizer remembers other things", change("memory", 0, 0, to=[])),
    "the memory lacks a tensor": (
        "an optimizer remembers other things",
        lambda content: content["memory"][0][0].pop("exp_avg"),
    ),
    "the memory is of another shape": (
        "its exp_avg is not possible",
        change("memory", 0, 0, "exp_avg", to=lambda average: average[:1]),
    ),
    "the memory is not finite": (
        "its exp_avg is not possible",
        change("memory", 0, 0, "exp_avg", to=lambda average: average / 0),
    ),
}


@pytest.fixture
def saved_state(make_state) -> dict:
    return copy.deepcopy(make_state(steps=2).state_dict())


@pytest.mark.parametrize(("sentence", "damage"), DAMAGES.values(), ids=DAMAGES)
def test_a_state_with_anything_else_in_it_is_refused(make_state, saved_state, sentence, damage):
    damage(saved_state)
    with pytest.raises(ValueError, match=f"^{sentence}$"):
        make_state().load_state_dict(saved_state)
