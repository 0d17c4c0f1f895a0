"""A training: epochs, validation, history, early stopping, best checkpoint."""

import math
import time
from dataclasses import asdict
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from cifar import checkpoint, console, data, datasets, device, evaluate, model, optim, runs
from cifar.config import Config, UserError
from cifar.console import TrainingDisplay
from cifar.runs import Run

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
    dataset, note = datasets.find(config.dataset, config.data_dir, config.image_size)
    if note:
        console.banner(note)
    run = create(config, dataset)
    run.update(note=note, seconds={"data": round(time.perf_counter() - started, 3)})
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

    best.pt has the highest validation accuracy, the earlier one of equals; without validation, the last epoch.
    Raises UserError, with epoch and step, when the loss is no longer finite.
    """
    device.keep_freed_memory()
    config = run.config
    hardware = device.choose(config.device)
    precision = device.resolve_precision(config.precision, hardware)
    train_split, val_split = data.hold_out(dataset.train, config.val_size, config.seed)
    network = fresh_network(config, train_split, len(dataset.classes)).to(hardware, memory_format=torch.channels_last)
    batches = make_batches(config, train_split, hardware)
    updates = make_updates(config, network, len(batches))
    sides = [_side(config, train_split, epoch) for epoch in range(1, config.epochs + 1)]
    best_epoch, best_accuracy = 0, -1.0
    with TrainingDisplay(config.epochs, len(batches), [side**2 for side in sides]) as display:
        for epoch, side in enumerate(sides, start=1):
            record = train_epoch(network, batches, updates, epoch, side, config.label_smoothing, precision, display)
            _check_finite(network, epoch, len(batches))
            record |= _validate(network, val_split, precision)
            run.append_history(record)
            is_best = not len(val_split) or record["val_accuracy"] > best_accuracy
            if is_best:
                best_epoch, best_accuracy = epoch, record["val_accuracy"]
            for name in ("last.pt", "best.pt") if is_best else ("last.pt",):
                _save(run, name, network, dataset, epoch)
            display.end_epoch(record, is_best)
            if config.patience and epoch - best_epoch >= config.patience:
                break


def train_epoch(
    network: nn.Module,
    batches: data.Batches,
    updates: optim.Updates,
    epoch: int,
    side: int,
    label_smoothing: float,
    precision: str,
    display: TrainingDisplay,
) -> dict[str, Any]:
    """One pass over the training images; returns its part of the history's line.

    The losses stay on the device until the display is due, so that no step waits for them.
    """
    network.train()
    hardware = batches.images.device
    losses = torch.zeros(len(batches), device=hardware)
    correct = torch.zeros((), device=hardware)
    lr, started = updates.lr, time.perf_counter()
    for step, (images, labels) in enumerate(batches.epoch(epoch, side), start=1):
        with device.autocast(hardware, precision):
            logits = network(images)
        log_probabilities = logits.float().log_softmax(1)
        loss = F.nll_loss(log_probabilities, labels)
        (loss * (1 - label_smoothing) - log_probabilities.mean() * label_smoothing).backward()
        updates.step()
        losses[step - 1] = loss.detach()
        correct += (logits.argmax(1) == labels).sum()
        if display.is_due() or step == len(batches):
            mean_loss = _finite_mean(losses[:step], epoch)
            seconds, seen = time.perf_counter() - started, step * batches.batch_size
            display.step(epoch, step, mean_loss, correct.item() / seen, seen / seconds)
    return {
        "epoch": epoch,
        "image_size": side,
        "lr": lr,
        "train_loss": mean_loss,
        "train_accuracy": correct.item() / seen,
        "images_per_second": round(seen / seconds, 1),
        "seconds": round(seconds, 3),
    }


def _finite_mean(losses: Tensor, epoch: int) -> float:
    """The mean of an epoch's losses so far. Raises UserError that names the first that is not finite."""
    mean = losses.mean().item()
    if math.isfinite(mean):
        return mean
    step = int(losses.isfinite().logical_not().nonzero()[0]) + 1
    raise UserError(f"the loss is not finite at epoch {epoch}, step {step}: lower --lr")


def _check_finite(network: nn.Module, epoch: int, step: int) -> None:
    """Raise UserError if the epoch's last step, whose loss nobody has seen yet, has spoiled the weights."""
    if not all(parameter.isfinite().all() for parameter in network.state_dict().values()):
        raise UserError(f"the weights are not finite after epoch {epoch}, step {step}: lower --lr")


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


def fresh_network(config: Config, split: data.Split, classes: int) -> nn.Module:
    """The network with fresh weights, its input layers fitted on the training images.

    Seeds torch's global generator, from which the weights and, later, dropout are drawn.
    """
    torch.manual_seed(config.seed)
    network = model.build(config.model, classes, split.images.shape[-1])
    model.fit_input(network, data.to_float(split.images[:_INPUT_IMAGES]), *split.mean_and_std())
    return network


def _save(run: Run, name: str, network: nn.Module, dataset: datasets.Dataset, epoch: int) -> None:
    checkpoint.save(
        run.checkpoints / name,
        model=run.config.model,
        classes=dataset.classes,
        image_size=dataset.train.images.shape[-1],
        epoch=epoch,
        weights=network.state_dict(),
    )
