"""A budget of minutes: the speed of this machine, measured on some steps, and the epochs that fit into it."""

import dataclasses
import math
import time
from collections.abc import Callable, Mapping

import torch

from cifar import console, data, datasets, device, evaluate, train
from cifar.config import MOST_EPOCHS, Config, most_hard_epochs, most_small_epochs
from cifar.console import TrainingDisplay
from cifar.errors import UserError

_TIMED_SECONDS = 3.0  # of steps of each image size
_MOST_STEPS = 100
_VALIDATED = 1000  # images
_PLANNED_SHARE = 0.97  # of the budget; the rest is for steps that take longer than those that were timed


def fit(config: Config, dataset: datasets.Dataset) -> Config:
    """The settled configuration with the epochs, in the recipe's proportions, that its minutes are enough for.

    The schedule follows the epochs. Says what it chose. What it returns has no budget any more, so that another run
    with it does the same on any machine. Raises UserError if not even one epoch fits.
    """
    started = time.perf_counter()
    device.keep_freed_memory()
    config = datasets.settle(config, dataset)
    side = dataset.train.images.shape[-1]
    sides = sorted({config.small_size, side} if config.small_epochs else {side})
    seconds = {side: epoch_seconds(config, dataset, side) for side in sides}
    taken = time.perf_counter() - started
    left_out = (1 - config.hard_share) * seconds[side]

    def hard(epochs: int) -> int:
        return min(config.hard_epochs, most_hard_epochs(epochs))

    left = config.minutes * 60 * _PLANNED_SHARE - taken
    epochs, small = choose(left, seconds, config.small_epochs / config.epochs, lambda n: left_out * hard(n))
    if not epochs:
        least = (seconds[side] + taken) / _PLANNED_SHARE / 60
        raise UserError(f"--minutes {config.minutes:g} is too little for one epoch, which takes {least:.2g}")
    counts = {side: epochs - small} | ({config.small_size: small} if small else {})
    parts = [f"{count} at {side}x{side} of {seconds[side]:.1f} s" for side, count in sorted(counts.items())]
    if hard(epochs):
        parts.append(f"of which the last {hard(epochs)} take {config.hard_share:.0%} of the images")
    console.say(f"{config.minutes:g} minutes are enough for {epochs} epochs: {', '.join(parts)}")
    return dataclasses.replace(config, epochs=epochs, small_epochs=small, hard_epochs=hard(epochs), minutes=None)


def choose(
    budget: float, seconds: Mapping[int, float], small_share: float, saved: Callable[[int], float]
) -> tuple[int, int]:
    """The epochs, and how many of them small, that come nearest to the budget and not over it; zeros if none do.

    budget: in seconds. seconds: of an epoch, by the side of its images. small_share: of the epochs, in 0..1, to which
    the small ones are rounded, up or down. saved: epochs -> the seconds that the last of them take less.
    """
    small_seconds, whole_seconds = seconds[min(seconds)], seconds[max(seconds)]
    plans = [
        (epochs, min(round_to_whole(small_share * epochs), most_small_epochs(epochs)))
        for epochs in range(1, min(MOST_EPOCHS, int(max(0.0, budget) // small_seconds)) + 1)
        for round_to_whole in (math.floor, math.ceil)
    ]
    costs = {(n, small): small * small_seconds + (n - small) * whole_seconds - saved(n) for n, small in plans}
    return max((plan for plan in plans if costs[plan] <= budget), key=costs.__getitem__, default=(0, 0))


def epoch_seconds(config: Config, dataset: datasets.Dataset, side: int) -> float:
    """How long an epoch of images of that side takes, with its validation, from some steps that teach nobody."""
    train_split, val_split = data.hold_out(dataset.train, config.val_size, config.seed)
    hardware = device.choose(config.device)
    precision = device.resolve_precision(config.precision, hardware)
    network = train.fresh_network(config, train_split, len(dataset.classes))
    network.to(hardware, memory_format=torch.channels_last)

    def step_seconds(steps: int) -> float:
        state = train.fresh_state(config, network, train_split[: steps * config.batch_size])
        display = TrainingDisplay([steps], [1])
        record = train.train_epoch(state, side, config.label_smoothing, precision, display)
        return record["seconds"] / state.steps

    warm = step_seconds(2)
    steps = step_seconds(max(2, min(_MOST_STEPS, round(_TIMED_SECONDS / warm)))) * (
        len(train_split) // config.batch_size
    )
    started = time.perf_counter()
    evaluate.infer(network, val_split.images[:_VALIDATED], precision=precision)
    return steps + (time.perf_counter() - started) * max(1, len(val_split) / _VALIDATED)
