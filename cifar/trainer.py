"""Training: the loop over epochs, one step, and what changes while it runs."""

import math
import time
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from joblib import cpu_count
from torch import Tensor, nn

from cifar import console, data, device, evaluate, model, optim, pretrained, tracking
from cifar.checkpoint import Checkpointer
from cifar.config import LOCATIONS, Config
from cifar.console import TrainingProgress
from cifar.data import Dataset
from cifar.errors import UserError, plural
from cifar.records import EpochRecord
from cifar.runs import Run

_WHITENING_IMAGES = 5000  # that the whitening filters are computed from
_LOWEST = (-math.inf, -math.inf)  # score
_BUSY = 0.7  # on_core of `forecast` on a busy machine; measured: 0.9 to 1 on an idle one, 0.2 to 0.3 beside two loops
_OFFERED_FROM = 10  # minutes of training, above which shorter trainings are offered
# Fraction of the time of `fast` -> its accuracy on CIFAR-10 with TTA in so many --minutes (docs/experiments.md).
_ACCURACY_OF_SHORTER = {0.25: "89%", 0.65: "93%"}
_MEASURED = Config(dataset="cifar10", val_size=2000, small_size=24, crop_scale=1.0)  # `fast`, as resolved for CIFAR-10
_MAY_DIFFER = {"seed", "seeds", "device", "precision", "compile", "deterministic", "track", *LOCATIONS}


def fit(run: Run, dataset: Dataset) -> None:
    """Train the run's network on the dataset's training split alone; writes history.jsonl, last.pt and best.pt.

    Resumes from the run's checkpoint, if there is one. best.pt has the weights, with `ema` the averaged ones, of the
    epoch that was best on validation, by `early_stopping`, or without validation of the last.
    Raises UserError, with epoch and step, if the loss is not finite; after saving, Interrupted for a signal.
    """
    device.keep_freed_memory()  # or glibc returns it to the system, and getting it back takes a third of a step
    hardware = device.choose(run.config.device)
    config = run.config.replace(precision=device.resolve_precision(run.config.precision, hardware))
    train_set, val_set = data.train_val_split(dataset.train, config.val_size or 0, config.seed)
    network, batches, criterion, optimizer = build(config, train_set, len(dataset.classes), hardware)
    training = Training(network, optimizer, batches)
    checkpoints = Checkpointer(run, training, dataset)
    progress = TrainingProgress(batches.steps_per_epoch, batches.image_sizes, partial(forecast, config, hardware))
    if checkpoints.resume():
        progress.resume(training.epoch, training.step)
    elif config.is_pretrained:
        pretrained.load(network, config)
    wrapped = device.compiled(device.distribute(network), config.compile)  # the same weights
    kernels = device.training_kernels(config.deterministic == "on")

    with tracking.tracking(run) as track, progress, kernels, console.deferred_interrupt() as received_signal:
        while not training.has_finished:
            model.set_training_mode(network)
            for batch in batches.epoch(training.epoch, skip=training.step):
                losses, correct = train_step(wrapped, optimizer, batch, criterion, config.precision)
                training.update_ema()
                training.record_step(batch, losses, correct)
                if progress.is_due():
                    progress.step(training.epoch, training.step, **training.running_means())
                checkpoints.save_if_due(received_signal())
            record = training.summary(evaluate.validate(training.kept, val_set, config.precision))
            is_best = training.end_epoch(_score(record, config.early_stopping))  # the next epoch is now the current one
            checkpoints.end_epoch(record, is_best)
            progress.end_epoch(record, is_best)
            track(record.model_dump(), record.epoch)
            checkpoints.save_if_due(received_signal())  # a signal during validation
    if training.epoch <= config.epochs:
        console.say(training.early_stop_message())


def build(
    config: Config, train_set: data.Split, classes: int, hardware: torch.device
) -> tuple[nn.Module, data.Batches, nn.Module, optim.ScheduledOptimizer]:
    """Make what `train_step` takes, on the device: a new network, the batches, the criterion and the optimizer.

    config: resolved.
    """
    network = new_network(config, train_set, classes).to(hardware).to(memory_format=torch.channels_last)
    batches = data.Batches(train_set, config, hardware, classes)
    criterion = nn.CrossEntropyLoss(batches.class_weights, label_smoothing=config.label_smoothing)
    return network, batches, criterion, optim.build(network, config, batches.steps_per_epoch)


def new_network(config: Config, train_set: data.Split, classes: int) -> nn.Module:
    """Build the network with new weights and fit its input layers to the training images, or to pretrained weights.

    Seeds torch's global generator, from which the weights and, later, dropout are drawn.
    """
    torch.manual_seed(config.seed)
    network = model.build(config.model, classes, train_set.image_size, config.is_pretrained)
    if config.is_pretrained:
        from cifar import zoo  # its import takes a second

        head = zoo.head_names(config.model, network.get_submodule("network"), classes)
        pretrained.adapt(network, config.model, head, config.body_lr)
    else:
        images = (data.to_float(part.images) for part in train_set[:_WHITENING_IMAGES].chunks())
        model.set_input_statistics(network, images, *train_set.mean_and_std)
    if device.rank():  # so that dropout differs between processes
        torch.manual_seed(config.seed + device.rank())
    return network


def train_step(
    network: nn.Module, optimizer: optim.ScheduledOptimizer, batch: data.Batch, criterion: nn.Module, precision: str
) -> tuple[Tensor, Tensor]:
    """Forward, loss, backward, update.

    criterion: from logits (B, classes) and targets to the loss.
    `optimizer.backward` scales the loss in float16; `optimizer.step` clips and clears the gradients and sets the
    next learning rate.
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


class Training:
    """All that changes during training; `state_dict` is what resuming needs beside the network's weights.

    `epoch` is the current one, from 1, and `step` the number of its steps that are done.
    """

    def __init__(self, network: nn.Module, optimizer: optim.ScheduledOptimizer, batches: data.Batches):
        self.network, self.optimizer, self.batches = network, optimizer, batches
        self.device = batches.device
        self.ema = optim.build_ema(network, batches.config.ema)
        self.best_epoch, self.best_score = 0, _LOWEST
        self.started = time.perf_counter()
        self._start_epoch(1)

    @property
    def kept(self) -> nn.Module:
        """The network that is validated and kept: the averaged one, if there is one."""
        return self.network if self.ema is None else self.ema.module

    def _start_epoch(self, epoch: int) -> None:
        self.epoch, self.step, self.lr = epoch, 0, self.optimizer.lr
        self.losses = torch.zeros(len(self.batches), device=self.device)  # of each step; an epoch may have fewer
        self.correct = torch.zeros((), device=self.device)
        self.epoch_started = time.perf_counter()

    def update_ema(self) -> None:
        """Average the weights, if there is an average."""
        if self.ema is not None:
            self.ema.update_parameters(self.network)

    def record_step(self, batch: data.Batch, losses: Tensor, correct: Tensor) -> None:
        """Add the results of a step, gathered from all processes, to those of the epoch."""
        results = torch.stack([losses, correct.to(losses.dtype)])
        losses, correct = device.gather_slices(results, len(batch.indices))
        self.batches.image_losses[batch.indices] = losses
        self.losses[self.step] = losses.mean()
        self.correct += correct.sum()
        self.step += 1

    def running_means(self) -> dict[str, float]:
        """Return loss, accuracy (0..1) and images per second of the epoch so far.

        Raises UserError that names the first step whose loss is not finite.
        """
        losses, images = self.losses[: self.step], self.step * self.batches.config.batch_size
        loss = losses.cpu().double().mean().item()  # float32 could overflow where no loss does
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
        """Advance to the next epoch; returns whether the finished one is the best so far. Without a score it is."""
        is_best = score is None or score > self.best_score
        if is_best:
            self.best_epoch, self.best_score = self.epoch, score or _LOWEST
        self._start_epoch(self.epoch + 1)
        return is_best

    @property
    def has_finished(self) -> bool:
        """Whether all epochs are done, or `patience` (0: never) epochs in a row have brought no improvement."""
        config, done = self.batches.config, self.epoch - 1
        return done >= config.epochs or 0 < config.patience <= done - self.best_epoch

    def early_stop_message(self) -> str:
        """Say why the training has stopped before its last epoch."""
        config, done = self.batches.config, self.epoch - 1
        better = "lower validation loss" if config.early_stopping == "loss" else "higher validation accuracy"
        return (
            f"stopped after epoch {done} of {config.epochs}: no {better} for {plural(config.patience, 'epoch')} "
            f"(--patience); the weights of epoch {self.best_epoch} are kept"
        )

    def check_finite(self) -> None:
        """Raise UserError if a loss of the epoch, or a weight, is not finite."""
        self.running_means()  # raises if a loss is not
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
            "averaged": self.ema and self.ema.state_dict(),
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
        if self.ema is not None:
            self.ema.load_state_dict(state["averaged"])
        self.epoch, self.step, self.lr = epoch, step, state["lr"]
        self.best_epoch, self.best_score = state["best_epoch"], tuple(state["best_score"])
        self.started = time.perf_counter() - state["seconds"]
        self.epoch_started = time.perf_counter() - state["epoch_seconds"]
        self.losses.copy_(state["losses"])
        self.correct.copy_(state["correct"])
        device.random_module(self.device).set_rng_state(state["rng_state"])
        if device.rank():  # the file has rank 0's state
            torch.manual_seed(self.batches.config.seed + device.rank() + device.world_size() * optimizer["steps"])


def _score(record: EpochRecord, metric: str) -> tuple[float, float] | None:
    """Return (accuracy, -loss) on validation or, for the metric loss, (-loss, accuracy); None without validation."""
    if record.val_accuracy is None or record.val_loss is None:
        return None
    accuracy, negative_loss = record.val_accuracy, -record.val_loss
    return (accuracy, negative_loss) if metric == "accuracy" else (negative_loss, accuracy)


def forecast(config: Config, hardware: torch.device, seconds: float, on_core: float) -> str:
    """Say how long the training will take, what less time would give where that is long, and whether others slow it.

    on_core: the fraction of the time so far in which the main thread had a core; it waits for nothing but the others
    of several processes.
    """
    length = f"{seconds / 60:.0f} minutes" if seconds >= 90 else plural(max(1, round(seconds)), "second")
    where = f"in {config.precision} on {device.describe(hardware)}"
    sentence = f"{plural(config.epochs, 'epoch')} {where} will take about {length}"
    if hardware.type == "cpu" and device.world_size() == 1 and on_core < _BUSY:
        sentence += f" on this busy machine ({device.advice_when_busy(torch.get_num_threads(), cpu_count())})"
    is_measured = config.model_dump(exclude=_MAY_DIFFER) == _MEASURED.model_dump(exclude=_MAY_DIFFER)
    if seconds < _OFFERED_FROM * 60 or not is_measured:
        return sentence
    offers = [
        f"--minutes {math.ceil(part * seconds / 60)} reaches {accuracy}"
        for part, accuracy in _ACCURACY_OF_SHORTER.items()
    ]
    reached = "reach a test accuracy of about 94% with test-time augmentation"
    return f"{sentence} and {reached}; {', '.join(offers)}"
