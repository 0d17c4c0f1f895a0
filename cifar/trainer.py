"""Training: the loop over epochs, one step, and what changes while it runs."""

import math
import time
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from cifar import console, data, device, evaluate, model, optim, pretrained, tracking, zoo
from cifar.checkpoint import Checkpointer
from cifar.config import LOCATIONS, Config
from cifar.datasets import Dataset
from cifar.errors import UserError, plural
from cifar.records import EpochRecord
from cifar.runs import Run

_WHITENING_IMAGES = 5000  # that the whitening filters are computed from
_LONG = 10  # minutes of training, from which a shorter one is offered
# What `--minutes` reaches on CIFAR-10 with TTA in these fractions of the time of `fast` (docs/experiments.md).
_SHORTER = {0.2: "89%", 0.55: "93%"}
_FAST = Config(dataset="cifar10", val_size=2000, small_size=24, crop_scale=1.0)  # resolved
_LOWEST = (-math.inf, -math.inf)  # score
_NOT_MEASURED = {"seed", "seeds", "device", "precision", "compile", "deterministic", "track", *LOCATIONS}


def fit(run: Run, dataset: Dataset) -> None:
    """Train the run's network on the dataset's training split alone; writes history.jsonl, last.pt and best.pt.

    If the run has a checkpoint, the training resumes from it. best.pt has the weights of the epoch that was best on
    validation, of equal accuracies that with the lower loss; without validation, of the last. With `ema` they are the
    averaged ones.
    Raises UserError, with epoch and step, if the loss is not finite; after saving, Interrupted for Ctrl-C and SIGTERM.
    """
    device.keep_freed_memory()
    hardware = device.choose(run.config.device)
    config = run.config.replace(precision=device.resolve_precision(run.config.precision, hardware))
    train_set, val_set = data.train_val_split(dataset.train, config.val_size or 0, config.seed)
    network, batches, criterion, optimizer = prepare(config, train_set, len(dataset.classes), hardware)
    training = Training(network, optimizer, batches)
    checkpoints = Checkpointer(run, training, dataset)
    forecaster = partial(forecast, config, hardware)
    progress = console.TrainingProgress(batches.steps_per_epoch, batches.image_sizes, forecaster)
    if checkpoints.resume():
        progress.resume(training.epoch, training.step)
    elif config.is_pretrained:
        pretrained.load(network, config)
    ddp_network = device.compiled(device.distribute(network), config.compile)  # averages gradients of several processes
    kernels = device.training_kernels(config.deterministic == "on")

    with tracking.tracking(run) as track, progress, kernels, console.deferred_interrupt() as received_signal:
        while not training.has_finished:
            model.set_training_mode(network)
            for batch in batches.epoch(training.epoch, skip=training.step):
                losses, correct = train_step(ddp_network, optimizer, batch, criterion, config.precision)
                training.record_step(batch, losses, correct)
                if progress.is_due():
                    progress.step(training.epoch, training.step, **training.running_means())
                checkpoints.save_if_due(received_signal())
            record = training.summary(evaluate.validate(training.kept, val_set, config.precision))
            is_best = training.end_epoch(_score(record, config.early_stopping))
            checkpoints.end_epoch(record, is_best)
            progress.end_epoch(record, is_best)
            track(record.model_dump(), record.epoch)
            checkpoints.save_if_due(received_signal())  # a signal during validation
    if training.epoch <= config.epochs:
        console.say(training.early_stop())


def prepare(
    config: Config, train_set: data.Split, classes: int, hardware: torch.device
) -> tuple[nn.Module, data.Batches, nn.Module, optim.ScheduledOptimizer]:
    """Make what `train_step` takes, on the device: a new network, the batches, the criterion and the optimizer.

    config: resolved.
    """
    network = new_network(config, train_set, classes).to(hardware).to(memory_format=torch.channels_last)
    batches = data.Batches(train_set, config, hardware, classes)
    criterion = nn.CrossEntropyLoss(batches.class_weights, label_smoothing=config.label_smoothing)
    return network, batches, criterion, optim.build(network, config, batches.steps_per_epoch)


def train_step(
    network: nn.Module, optimizer: optim.ScheduledOptimizer, batch: data.Batch, criterion: nn.Module, precision: str
) -> tuple[Tensor, Tensor]:
    """Forward, loss, backward, update.

    criterion: from logits (B, classes) and targets to the loss.
    Returns each image's cross-entropy without smoothing and weights, float32 (B,), and whether it was classified
    correctly, bool (B,). Both stay on the device, so that no step waits for it.
    """
    with device.autocast(batch.images.device, precision):
        logits = network(batch.images)
    logits = logits.float()
    optimizer.backward(criterion(logits, batch.targets))
    optimizer.step()
    losses = F.cross_entropy(logits.detach(), batch.targets, reduction="none")
    return losses, logits.argmax(1) == batch.labels


def forecast(config: Config, hardware: torch.device, seconds: float) -> str:
    """Say how long the training will take and, where that is long, what less time would give."""
    length = f"{seconds / 60:.0f} minutes" if seconds >= 90 else plural(max(1, round(seconds)), "second")
    where = f"in {config.precision} on {device.describe(hardware)}"
    sentence = f"{plural(config.epochs, 'epoch')} {where} will take about {length}"
    if seconds < _LONG * 60 or config.model_dump(exclude=_NOT_MEASURED) != _FAST.model_dump(exclude=_NOT_MEASURED):
        return sentence
    offers = [f"--minutes {math.ceil(part * seconds / 60)} reaches {reached}" for part, reached in _SHORTER.items()]
    return f"{sentence} and reach about 94% with test-time augmentation; {', '.join(offers)}"


def _score(record: EpochRecord, criterion: str) -> tuple[float, float] | None:
    """Return what the best epoch has most of, and what decides between equals; None without validation."""
    if record.val_accuracy is None or record.val_loss is None:
        return None
    accuracy, negative_loss = record.val_accuracy, -record.val_loss
    return (accuracy, negative_loss) if criterion == "accuracy" else (negative_loss, accuracy)


def new_network(config: Config, train_set: data.Split, classes: int) -> nn.Module:
    """Build the network with new weights and fit its input layers to the training images, or to pretrained weights.

    Seeds torch's global generator, from which the weights and, later, dropout are drawn.
    """
    torch.manual_seed(config.seed)
    network = model.build(config.model, classes, train_set.image_size, config.is_pretrained)
    if config.is_pretrained:
        head = zoo.head_names(config.model, network.get_submodule("network"), classes)
        pretrained.adapt(network, config.model, head, config.body_lr)
    else:
        images = (data.to_float(part.images) for part in train_set[:_WHITENING_IMAGES].chunks())
        model.set_input_statistics(network, images, *train_set.mean_and_std())
    if device.rank():  # so that dropout differs between processes
        torch.manual_seed(config.seed + device.rank())
    return network


class Training:
    """What changes while a network trains; `state_dict` is all that a resumed training needs beside the weights.

    `epoch`, from 1, is the current one, of which `step` steps are done.
    """

    def __init__(self, network: nn.Module, optimizer: optim.ScheduledOptimizer, batches: data.Batches):
        self.network, self.optimizer, self.batches = network, optimizer, batches
        self.device = batches.device
        self.averaged = optim.averaged(network, batches.config.ema)
        self.best_epoch, self.best_score = 0, _LOWEST
        self.started = time.perf_counter()
        self._start_epoch(1)

    @property
    def kept(self) -> nn.Module:
        """The network that is validated and kept: the averaged one, if there is one."""
        return self.network if self.averaged is None else self.averaged.module

    def _start_epoch(self, epoch: int) -> None:
        self.epoch, self.step, self.lr = epoch, 0, self.optimizer.lr
        self.losses = torch.zeros(len(self.batches), device=self.device)  # of each step
        self.correct = torch.zeros((), device=self.device)
        self.epoch_started = time.perf_counter()

    def record_step(self, batch: data.Batch, losses: Tensor, correct: Tensor) -> None:
        """Add the results of a step, gathered from all processes, to those of the epoch, and average the weights."""
        if self.averaged is not None:
            self.averaged.update_parameters(self.network)
        results = torch.stack([losses, correct.to(losses.dtype)])
        losses, correct = device.gather_slices(results, len(batch.indices))
        self.batches.record_losses(batch.indices, losses)
        self.losses[self.step] = losses.mean()
        self.correct += correct.sum()
        self.step += 1

    def running_means(self) -> dict[str, float]:
        """Return loss, accuracy (0..1) and images per second of the epoch so far.

        Raises UserError that names the first step whose loss is not finite.
        """
        losses, images = self.losses[: self.step], self.step * self.batches.config.batch_size
        loss = losses.mean().item()
        if not math.isfinite(loss):
            raise self._diverged("loss is", int(losses.isfinite().logical_not().nonzero()[0]) + 1)
        accuracy = self.correct.item() / images
        return {"loss": loss, "accuracy": accuracy, "speed": images / (time.perf_counter() - self.epoch_started)}

    def summary(self, validation: dict[str, Any]) -> EpochRecord:
        """Return the epoch's line of the history. Raises UserError if a loss or a weight is not finite.

        validation: of `evaluate.validate`.
        """
        self.check_finite()
        if not math.isfinite(validation["val_loss"] or 0):
            raise self._diverged("validation loss is", self.step)
        means = self.running_means()
        seconds = time.perf_counter() - self.epoch_started
        return EpochRecord(
            epoch=self.epoch,
            image_size=self.batches.image_sizes[self.epoch - 1],
            images=self.step * self.batches.config.batch_size,
            lr=self.lr,
            train_loss=means["loss"],
            train_accuracy=means["accuracy"],
            images_per_second=round(means["speed"], 1),
            seconds=round(seconds, 3),
            **validation,
        )

    def end_epoch(self, score: tuple[float, float] | None) -> bool:
        """Go to the next epoch; returns whether this one has the best score so far; without scores, it is the last."""
        is_best = score is None or score > self.best_score
        if is_best:
            self.best_epoch, self.best_score = self.epoch, score or _LOWEST
        self._start_epoch(self.epoch + 1)
        return is_best

    @property
    def has_finished(self) -> bool:
        """Whether all epochs are done, or the last `patience`, if that is not 0, have brought no better one."""
        config, done = self.batches.config, self.epoch - 1
        return done >= config.epochs or 0 < config.patience <= done - self.best_epoch

    def early_stop(self) -> str:
        """Say why the training has stopped before its last epoch."""
        config, done = self.batches.config, self.epoch - 1
        better = "lower validation loss" if config.early_stopping == "loss" else "higher validation accuracy"
        return (
            f"stopped after epoch {done} of {config.epochs}: no {better} for {plural(config.patience, 'epoch')} "
            f"(--patience); the weights of epoch {self.best_epoch} are kept"
        )

    def check_finite(self) -> None:
        """Raise UserError if a loss of the epoch, or a weight, is not finite."""
        self.running_means()
        tensors = self.network.state_dict().values()
        weights = [tensor for tensor in tensors if tensor.is_floating_point() and tensor.numel()]
        if not torch.stack(torch._foreach_norm(weights, math.inf)).isfinite().all():
            raise self._diverged("weights are", self.step)

    def _diverged(self, what: str, step: int) -> UserError:
        """Say where the training went wrong and what to try; at the first step no weight has changed yet."""
        config, where = self.batches.config, f"the {what} not finite at epoch {self.epoch}, step {step}"
        if (self.epoch, step, what) == (1, 1, "loss is"):
            other = "--precision float32 or " if config.precision != "float32" else ""
            return UserError(f"{where}, before any weight has changed: try {other}another network with --model")
        return UserError(f"{where}; most often the learning rate is too high: try --lr {config.lr / 4:g}")

    def state_dict(self) -> dict[str, Any]:
        """Return everything but the network's weights: numbers, and tensors in dicts."""
        return {
            "epoch": self.epoch,
            "step": self.step,
            "lr": self.lr,
            "best_epoch": self.best_epoch,
            "best_score": self.best_score,
            "seconds": time.perf_counter() - self.started,
            "epoch_seconds": time.perf_counter() - self.epoch_started,
            "losses": self.losses,
            "correct": self.correct,
            "averaged": self.averaged and self.averaged.state_dict(),
            "optimizer": self.optimizer.state_dict(),
            "batches": self.batches.state_dict(),
            "rng_state": device.random_module(self.device).get_rng_state(),
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Restore `state_dict`. Raises ValueError, KeyError, TypeError or RuntimeError if it is of another training."""
        steps = self.batches.steps_per_epoch
        epoch, step, optimizer = state["epoch"], state["step"], state["optimizer"]
        if not 1 <= epoch <= len(steps) + 1 or not 0 <= step <= sum(steps[epoch - 1 : epoch]):
            raise ValueError(f"there is no step {step} of epoch {epoch}")
        if optimizer["steps"] != sum(steps[: epoch - 1]) + step:
            raise ValueError("the optimizer is at another step")
        self.optimizer.load_state_dict(optimizer)
        self.batches.load_state_dict(state["batches"])
        if self.averaged is not None:
            self.averaged.load_state_dict(state["averaged"])
        self.epoch, self.step, self.lr = epoch, step, state["lr"]
        score = state["best_score"]  # a number in the checkpoints of earlier versions
        self.best_epoch, self.best_score = state["best_epoch"], score if isinstance(score, tuple) else (score, math.inf)
        self.started = time.perf_counter() - state["seconds"]
        self.epoch_started = time.perf_counter() - state["epoch_seconds"]
        self.losses = torch.zeros(len(self.batches), device=self.device)
        self.losses.copy_(state["losses"])
        self.correct = torch.zeros((), device=self.device)
        self.correct.copy_(state["correct"])
        device.random_module(self.device).set_rng_state(state["rng_state"])
        if device.rank():  # the file has rank 0's state
            torch.manual_seed(self.batches.config.seed + device.rank() + device.world_size() * optimizer["steps"])
