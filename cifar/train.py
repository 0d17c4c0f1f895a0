"""A training: epochs, validation, history, early stopping, best checkpoint."""

import contextlib
import functools
import itertools
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, replace
from typing import Any

import torch
import torch.nn.functional as F
from torch import nn

from cifar import (
    console,
    data,
    datasets,
    device,
    distributed,
    evaluate,
    metrics,
    model,
    optim,
    outputs,
    runs,
    signals,
    whole_batch,
)
from cifar.config import PLACES, Config, flag
from cifar.console import TrainingDisplay
from cifar.errors import UsageError, UserError
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
    run = outputs.find_resumable(Config.create(given).output_dir, name)
    run.check_dataset(run.dataset["name"])
    dataset = datasets.of_run(run, given.get("data_dir"))
    record, hardware, processes = run.record, device.describe(device.choose(run.config.device)), distributed.count()
    if record["status"] != "completed":
        require_same(record.get("premises"), premises(run.config, dataset), run.path.name)
        if record.get("hardware") != hardware:
            console.say(f"begun on {record.get('hardware')}: on {hardware} the last digits come out differently")
        if (then := record.get("processes", 1)) != processes:
            console.say(f"begun with {then} processes: with {processes} the last digits come out differently")
        elif "threads" in record:
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
        processes=distributed.count(),
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
    if config.batch_size < distributed.count():
        raise UserError(f"--batch-size {config.batch_size} is too small for {distributed.count()} processes")
    hardware = device.choose(config.device)
    splits = data.hold_out(dataset.train, config.val_size, config.seed)
    network = fresh_network(config, splits[0], len(dataset.classes)).to(hardware, memory_format=torch.channels_last)
    state = fresh_state(config, network, splits[0])
    keeper = Keeper(run, dataset, state)
    display = _display(config, state)
    if keeper.restore():
        display.resume(state.epoch, state.step)
    run.update(processes=distributed.count(), threads=torch.get_num_threads())
    alike = replace(config, device=hardware.type, precision=device.resolve_precision(config.precision, hardware))
    for_all = (alike, len(dataset.classes), splits, torch.get_num_threads(), network.state_dict(), state.state_dict())
    helped = distributed.helped(_help, *for_all)
    with display, signals.held_back() as signal_number, helped:
        pause = functools.partial(keeper.pause, distributed.agreed(signal_number))
        _go_on(config, state, splits[1], display, keeper.end_epoch, pause)


def _help(
    config: Config, classes: int, splits: tuple[data.Split, data.Split], threads: int, weights: dict, content: dict
) -> None:
    """What another process does while the first is in `fit`: the same training, of which it keeps nothing."""
    device.keep_freed_memory()
    torch.set_num_threads(threads)
    network = model.build(config.model, classes, splits[0].images.shape[-1])
    network.load_state_dict(weights)
    network.to(device.choose(config.device), memory_format=torch.channels_last)
    state = fresh_state(config, network, splits[0])
    state.load_state_dict(content)
    # What ends the training here ends it in the first process too, which says so.
    with contextlib.suppress(UserError, signals.Interrupted), signals.held_back() as signal_number:
        ask = distributed.agreed(signal_number)

        def pause() -> None:
            if number := ask():
                signals.interrupt(number)

        def end_epoch(record: dict[str, Any]) -> bool:
            return state.end_epoch(record["val_accuracy"])

        _go_on(config, state, splits[1], _display(config, state), end_epoch, pause)


def _display(config: Config, state: State) -> TrainingDisplay:
    costs = [_side(config, state.batches, epoch) ** 2 for epoch in range(1, config.epochs + 1)]
    return TrainingDisplay(state.epoch_steps, costs)


def _go_on(
    config: Config,
    state: State,
    val_split: data.Split,
    display: TrainingDisplay,
    end_epoch: Callable[[dict[str, Any]], bool],
    pause: Callable[[], None],
) -> None:
    """The epochs that are left. end_epoch: takes an epoch's line of the history; whether it is the best so far."""
    precision = device.resolve_precision(config.precision, state.hardware)
    while not state.has_ended(config.epochs, config.patience):
        side = _side(config, state.batches, state.epoch)
        record = train_epoch(state, side, config.label_smoothing, precision, display, pause)
        state.check_finite()
        distributed.check_same(state.network)
        record |= _validate(state.network, val_split, precision)
        display.end_epoch(record, end_epoch(record))
        pause()


def train_epoch(
    state: State,
    side: int,
    label_smoothing: float,
    precision: str,
    display: TrainingDisplay,
    after_step: Callable[[], None] = lambda: None,
) -> dict[str, Any]:
    """One pass over the epoch's training images, or what is left of it; returns its part of the history's line.

    The losses stay on the device until the display is due, so that no step waits for them.
    """
    network, updates, batches = state.network, state.updates, state.batches
    network.train()
    hardware = batches.images.device
    started = time.perf_counter() - state.epoch_seconds
    steps = batches.epoch(state.epoch, side, state.taken)
    for images, labels, places in itertools.islice(steps, state.step, None):
        with device.autocast(hardware, precision):
            logits = network(images)
        log_probabilities = logits.float().log_softmax(1)
        share = len(labels) / batches.batch_size  # of the batch: 1, but of several processes
        loss = F.nll_loss(log_probabilities, labels) * share
        (loss * (1 - label_smoothing) - log_probabilities.mean() * share * label_smoothing).backward()
        correct = (logits.argmax(1) == labels).sum()
        each = distributed.spread(F.nll_loss(log_probabilities.detach(), labels, reduction="none"), batches.batch_size)
        loss, correct, each = distributed.add_up_gradients(network, loss.detach(), correct, each)
        updates.step()
        state.losses[state.step] = loss
        state.image_losses[places] = each
        state.correct += correct
        state.step += 1
        if display.is_due() or state.step == state.steps:
            shown = state.mean_loss(), state.accuracy()
            state.epoch_seconds = time.perf_counter() - started
            display.step(state.epoch, state.step, *shown, state.images_per_second())
        after_step()
    return {
        "epoch": state.epoch,
        "image_size": side,
        "images": state.steps * batches.batch_size,
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
    return {"val_loss": loss, "val_accuracy": metrics.accuracy(logits, split.labels)}


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


def make_updates(config: Config, network: nn.Module, steps: Sequence[int]) -> optim.Updates:
    """steps: of each epoch."""
    return optim.build(
        network,
        optimizer=config.optimizer,
        lr=config.lr,
        momentum=config.momentum,
        weight_decay=config.weight_decay,
        schedule=config.schedule,
        steps=steps,
        precision=device.resolve_precision(config.precision, next(network.parameters()).device),
    )


def _side(config: Config, batches: data.Batches, epoch: int) -> int:
    """The side in pixels of the epoch's images."""
    return config.small_size if epoch <= config.small_epochs else batches.images.shape[-1]


def fresh_state(config: Config, network: nn.Module, split: data.Split) -> State:
    """A training of the network on the split before its first step."""
    if distributed.count() > 1:
        whole_batch.convert(network, config.batch_size)
    batches = make_batches(config, split, next(network.parameters()).device)
    steps = _epoch_steps(config, len(split))
    return State(network, make_updates(config, network, steps), batches, steps)


def _epoch_steps(config: Config, images: int) -> list[int]:
    """The steps of each epoch."""
    hard = max(1, int(images * config.hard_share) // config.batch_size)
    return [images // config.batch_size] * (config.epochs - config.hard_epochs) + [hard] * config.hard_epochs


def fresh_network(config: Config, split: data.Split, classes: int) -> nn.Module:
    """The network with fresh weights, its input layers fitted on the training images.

    Seeds torch's global generator, from which the weights and, later, dropout are drawn.
    """
    torch.manual_seed(config.seed)
    network = model.build(config.model, classes, split.images.shape[-1])
    model.fit_input(network, data.to_float(split.images[:_INPUT_IMAGES]), *split.mean_and_std())
    return network
