"""A training: epochs, validation, history, early stopping, best checkpoint."""

import functools
import itertools
import time
from collections.abc import Callable, Mapping
from dataclasses import asdict
from typing import Any

import torch
import torch.nn.functional as F
from torch import nn

from cifar import console, data, datasets, device, evaluate, model, optim, runs, signals
from cifar.config import PLACES, Config, UsageError, flag
from cifar.console import TrainingDisplay
from cifar.resume import Keeper, premises, require_same
from cifar.runs import Run
from cifar.state import State

_INPUT_IMAGES = 5000  # that the whitening layer is fitted on


def begin(config: Config) -> tuple[Run, datasets.Dataset]:
    """Find the dataset, settle the configuration on it and make the run's directory, ready for `fit`.

    Raises UserError for a setting that does not fit the machine or the dataset, if the dataset or the network cannot
    be had, or if the directory cannot be made.
    """
    started = time.perf_counter()
    device.choose(config.device)
    model.require(config.model)
    runs.check_writable(config.output_dir)
    dataset, note = datasets.find(config.dataset, config.data_dir, config.image_size, config.mirror)
    if note:
        console.banner(note)
    if config.minutes is not None:
        from cifar import budget

        config = budget.fit(config, dataset)
    run = create(config, dataset)
    run.update(note=note, seconds={"data": round(time.perf_counter() - started, 3)})
    return run, dataset


def take_up(name: str, given: Mapping[str, Any]) -> tuple[Run, datasets.Dataset]:
    """The run of that name, or for "" the newest that did not come to its end, and its dataset, ready for `fit`.

    given: the settings that the command line names, of which only places may be there.
    Raises UserError if there is no such run, or if it was begun with other settings, images, code or PyTorch and
    its training has not come to its end.
    """
    if others := [flag(field) for field, value in given.items() if value is not None and field not in PLACES]:
        raise UsageError(f"--resume goes on with the settings of the run: leave out {', '.join(others)}")
    run = runs.find_resumable(Config.create(given).output_dir, name)
    run.check_dataset(run.dataset["name"])
    dataset = datasets.of_run(run, given.get("data_dir"))
    record, hardware = run.record, device.describe(device.choose(run.config.device))
    if record["status"] != "completed":
        require_same(record.get("premises"), premises(run.config, dataset), run.path.name)
        if record.get("hardware") != hardware:
            console.say(f"begun on {record.get('hardware')}: on {hardware} the last digits come out differently")
    if "threads" in record:
        torch.set_num_threads(record["threads"])  # another number of threads sums in another order
    return run, dataset


def create(config: Config, dataset: datasets.Dataset) -> Run:
    """The run's directory, with the configuration settled on the dataset and what is known before training."""
    config = datasets.settle(config, dataset)
    hardware = device.choose(config.device)
    image_size = dataset.train.images.shape[-1]
    network = model.build(config.model, len(dataset.classes), image_size)
    layers = model.layers(network, image_size)
    return runs.create(
        config,
        device=hardware.type,
        hardware=device.describe(hardware),
        precision=device.resolve_precision(config.precision, hardware),
        threads=torch.get_num_threads(),
        seed=config.seed,
        premises=premises(config, dataset),
        dataset={"name": dataset.name, "train_sha256": dataset.train.sha256(), "classes": list(dataset.classes)},
        model={
            "name": config.model,
            "parameters": sum(parameter.numel() for parameter in network.parameters()),
            "multiply_adds": sum(layer.multiply_adds for layer in layers),
            "layers": [asdict(layer) for layer in layers],
        },
    )


def fit(run: Run, dataset: datasets.Dataset) -> None:
    """Train the run's network on the dataset's training split alone; write history.jsonl, last.pt and best.pt.

    Where the run has a last.pt, the training goes on from there, as if it had never stopped. best.pt has the highest
    validation accuracy, the earlier one of equals; without validation, the last epoch.
    Raises UserError, with epoch and step, when the loss is no longer finite, and Interrupted, once the step under way
    has ended and is saved, for Ctrl-C and SIGTERM.
    """
    device.keep_freed_memory()
    config = run.config
    hardware = device.choose(config.device)
    precision = device.resolve_precision(config.precision, hardware)
    train_split, val_split = data.hold_out(dataset.train, config.val_size, config.seed)
    network = fresh_network(config, train_split, len(dataset.classes)).to(hardware, memory_format=torch.channels_last)
    state = fresh_state(config, network, train_split)
    sides = [_side(config, train_split, epoch) for epoch in range(1, config.epochs + 1)]
    keeper = Keeper(run, dataset, state)
    display = TrainingDisplay(config.epochs, len(state.batches), [side**2 for side in sides])
    if keeper.restore():
        display.resume(state.epoch, state.step)
    with display, signals.held_back() as signal_number:
        while not state.has_ended(config.epochs, config.patience):
            side = sides[state.epoch - 1]
            pause = functools.partial(keeper.pause, signal_number)
            record = train_epoch(state, side, config.label_smoothing, precision, display, pause)
            state.check_finite()
            record |= _validate(state.network, val_split, precision)
            display.end_epoch(record, keeper.end_epoch(record))
            pause()


def train_epoch(
    state: State,
    side: int,
    label_smoothing: float,
    precision: str,
    display: TrainingDisplay,
    after_step: Callable[[], None] = lambda: None,
) -> dict[str, Any]:
    """One pass over the training images, or what is left of it; returns its part of the history's line.

    The losses stay on the device until the display is due, so that no step waits for them.
    """
    network, updates, batches = state.network, state.updates, state.batches
    network.train()
    hardware = batches.images.device
    started = time.perf_counter() - state.epoch_seconds
    for images, labels in itertools.islice(batches.epoch(state.epoch, side), state.step, None):
        with device.autocast(hardware, precision):
            logits = network(images)
        log_probabilities = logits.float().log_softmax(1)
        loss = F.nll_loss(log_probabilities, labels)
        (loss * (1 - label_smoothing) - log_probabilities.mean() * label_smoothing).backward()
        updates.step()
        state.losses[state.step] = loss.detach()
        state.correct += (logits.argmax(1) == labels).sum()
        state.step += 1
        if display.is_due() or state.step == len(batches):
            shown = state.mean_loss(), state.accuracy()
            state.epoch_seconds = time.perf_counter() - started
            display.step(state.epoch, state.step, *shown, state.images_per_second())
        after_step()
    return {
        "epoch": state.epoch,
        "image_size": side,
        "lr": state.lr,
        "train_loss": state.mean_loss(),
        "train_accuracy": state.accuracy(),
        "images_per_second": round(state.images_per_second(), 1),
        "seconds": round(state.epoch_seconds, 3),
    }


def _validate(network: nn.Module, split: data.Split, precision: str) -> dict[str, Any]:
    """The validation part of the history's line; nulls where nothing was held out."""
    if not len(split):
        return {"val_loss": None, "val_accuracy": None}
    logits = evaluate.infer(network, split.images, precision=precision)
    loss = F.cross_entropy(logits, split.labels).item()
    return {"val_loss": loss, "val_accuracy": evaluate.accuracy(logits, split.labels)}


def make_batches(config: Config, split: data.Split, hardware: torch.device) -> data.Batches:
    return data.Batches(
        split,
        batch_size=config.batch_size,
        crop=config.crop,
        crop_mode=config.crop_mode,
        flip=config.flip,
        jitter=config.jitter,
        cutout=config.cutout,
        generator=torch.Generator(hardware).manual_seed(config.seed),
    )


def make_updates(config: Config, network: nn.Module, steps_per_epoch: int) -> optim.Updates:
    return optim.build(
        network,
        optimizer=config.optimizer,
        lr=config.lr,
        momentum=config.momentum,
        weight_decay=config.weight_decay,
        schedule=config.schedule,
        epochs=config.epochs,
        steps_per_epoch=steps_per_epoch,
        precision=device.resolve_precision(config.precision, next(network.parameters()).device),
    )


def _side(config: Config, split: data.Split, epoch: int) -> int:
    """The side in pixels of the epoch's images."""
    return config.small_size if epoch <= config.small_epochs else split.images.shape[-1]


def fresh_state(config: Config, network: nn.Module, split: data.Split) -> State:
    """A training of the network on the split before its first step."""
    batches = make_batches(config, split, next(network.parameters()).device)
    return State(network, make_updates(config, network, len(batches)), batches)


def fresh_network(config: Config, split: data.Split, classes: int) -> nn.Module:
    """The network with fresh weights, its input layers fitted on the training images.

    Seeds torch's global generator, from which the weights and, later, dropout are drawn.
    """
    torch.manual_seed(config.seed)
    network = model.build(config.model, classes, split.images.shape[-1])
    model.fit_input(network, data.to_float(split.images[:_INPUT_IMAGES]), *split.mean_and_std())
    return network
