"""A training as it stands: what a checkpoint has to hold so that the training goes on as if it had never stopped."""

import math
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from cifar import data, device
from cifar.checkpoint import check_tensor
from cifar.errors import UserError
from cifar.optim import Updates

# The numbers of a state: type and least value.
_NUMBERS: dict[str, tuple[type, float]] = {
    "epoch": (int, 1),
    "step": (int, 0),
    "best_epoch": (int, 0),
    "best_accuracy": (float, -1.0),
    "seconds": (float, 0.0),
    "epoch_seconds": (float, 0.0),
    "lr": (float, 0.0),
}
# What an optimizer remembers of a parameter.
_MEMORY = {"Muon": {"momentum_buffer"}, "SGD": {"momentum_buffer"}, "Adam": {"step", "exp_avg", "exp_avg_sq"}}


class State:
    """The network, its optimizers and all that changes beside them while they train.

    `epoch`, from 1, is under way, and `step` of its steps are done. What the configuration says is not in here, nor
    are the rates, which are a function of the steps.
    """

    def __init__(self, network: nn.Module, updates: Updates, batches: data.Batches, epoch_steps: Sequence[int]):
        """epoch_steps: of each epoch; one of fewer steps than there are batches takes the hardest images alone."""
        self.network, self.updates, self.batches, self.epoch_steps = network, updates, batches, epoch_steps
        self.hardware = batches.images.device
        # Of each image, when it was last trained on; one that was not yet is as hard as can be.
        self.image_losses = torch.full((len(batches.labels),), torch.finfo(torch.float32).max, device=self.hardware)
        self.best_epoch, self.best_accuracy = 0, -1.0
        self.seconds = 0.0  # that the training has taken
        self._begin_epoch(1)

    def _begin_epoch(self, epoch: int) -> None:
        self.epoch, self.step = epoch, 0
        # For the epoch's line of the history.
        self.lr = self.updates.lr
        self.losses = torch.zeros(len(self.batches), device=self.hardware)
        self.correct = torch.zeros((), device=self.hardware)
        self.epoch_seconds = 0.0
        self.taken = self._hardest()
        # The epoch's order and augmentation follow from this state, so that one that is resumed draws them anew.
        self.order = self.batches.generator.get_state()

    @property
    def steps(self) -> int:
        """Of the epoch that is under way; none after the last one."""
        return self._steps_of(self.epoch)

    def _steps_of(self, epoch: int) -> int:
        return self.epoch_steps[epoch - 1] if epoch <= len(self.epoch_steps) else 0

    def _hardest(self) -> Tensor:
        """Which images the epoch takes, bool (N,): all, or as many of the highest loss as its fewer steps do."""
        if self.steps >= len(self.batches):
            return torch.ones_like(self.image_losses, dtype=torch.bool)
        hardest = torch.zeros_like(self.image_losses, dtype=torch.bool)
        hardest[self.image_losses.topk(self.steps * self.batches.batch_size).indices] = True
        return hardest

    def end_epoch(self, val_accuracy: float | None) -> bool:
        """Go on to the next epoch; whether the one that ended is the best so far or, without validation, the last."""
        is_best = val_accuracy is None or val_accuracy > self.best_accuracy
        if is_best:
            self.best_epoch, self.best_accuracy = self.epoch, -1.0 if val_accuracy is None else val_accuracy
        self._begin_epoch(self.epoch + 1)
        return is_best

    def mean_loss(self) -> float:
        """The mean of the epoch's losses so far. Raises UserError that names the first that is not finite."""
        losses = self.losses[: self.step]
        mean = losses.mean().item()
        if not math.isfinite(mean):
            step = int(losses.isfinite().logical_not().nonzero()[0]) + 1
            raise UserError(f"the loss is not finite at epoch {self.epoch}, step {step}: lower --lr")
        return mean

    def accuracy(self) -> float:
        """The share of the epoch's images so far that were classified rightly, as they came."""
        return self.correct.item() / (self.step * self.batches.batch_size)

    def images_per_second(self) -> float:
        return self.step * self.batches.batch_size / self.epoch_seconds

    def check_finite(self) -> None:
        """Raise UserError if a loss is not finite, or the last step spoiled the weights."""
        self.mean_loss()
        if not all(tensor.isfinite().all() for tensor in self.network.state_dict().values()):
            raise UserError(f"the weights are not finite after epoch {self.epoch}, step {self.step}: lower --lr")

    def has_ended(self, epochs: int, patience: int) -> bool:
        """Whether all epochs are done, or the last `patience`, unless that is 0, have brought no better one."""
        done = self.epoch - 1
        return done >= epochs or 0 < patience <= done - self.best_epoch

    def state_dict(self) -> dict[str, Any]:
        """Everything but the weights of the network: numbers, and tensors in dicts."""
        return {
            **{name: getattr(self, name) for name in _NUMBERS},
            "losses": self.losses,
            "correct": self.correct,
            "image_losses": self.image_losses,
            "taken": self.taken,
            "order": self.order,
            "dropout": device.random_module(self.hardware).get_rng_state(),
            "updates": self.updates.steps,
            "memory": [optimizer.state_dict()["state"] for optimizer in self.updates.optimizers],
        }

    def load_state_dict(self, content: dict[str, Any]) -> None:
        """Take up what `state_dict` gave for the same configuration. Raises ValueError if it is not."""
        own = self.state_dict()
        if not isinstance(content, dict) or content.keys() != own.keys():
            raise ValueError("the state of the training has other parts")
        _check_numbers(content)
        if content["step"] > self._steps_of(content["epoch"]) or content["updates"] != self._updates_at(content):
            raise ValueError("its numbers of steps do not fit")
        for name in ("losses", "correct", "image_losses", "taken", "order", "dropout"):
            check_tensor(name, content[name], own[name])
        self._remember(content["memory"])
        for name in _NUMBERS:
            setattr(self, name, content[name])
        self.updates.go_to(content["updates"])
        self.losses.copy_(content["losses"])
        self.correct.copy_(content["correct"])
        self.image_losses.copy_(content["image_losses"])
        self.taken.copy_(content["taken"])
        self.order = content["order"]
        try:
            self.batches.generator.set_state(self.order)
            device.random_module(self.hardware).set_rng_state(content["dropout"])
        except RuntimeError:
            raise ValueError("a state of a random generator is none") from None

    def _updates_at(self, content: dict[str, Any]) -> int:
        return sum(self.epoch_steps[: content["epoch"] - 1]) + content["step"]

    def _remember(self, memory: Any) -> None:
        """Give the optimizers what they remembered: for each its parameters' numbers -> names -> tensors."""
        optimizers = self.updates.optimizers
        if not isinstance(memory, list) or len(memory) != len(optimizers):
            raise ValueError("the state is of other optimizers")
        for optimizer, remembered in zip(optimizers, memory):
            parameters = dict(enumerate(parameter for group in optimizer.param_groups for parameter in group["params"]))
            names = _MEMORY[type(optimizer).__name__]
            if not isinstance(remembered, dict) or not remembered.keys() <= parameters.keys():
                raise ValueError("the state is of other parameters")
            for number, tensors in remembered.items():
                if not isinstance(tensors, dict) or tensors.keys() != names:
                    raise ValueError("an optimizer remembers other things")
                for name, tensor in tensors.items():
                    check_tensor(name, tensor, torch.zeros(()) if name == "step" else parameters[number])
            optimizer.load_state_dict({**optimizer.state_dict(), "state": remembered})


def _check_numbers(content: dict[str, Any]) -> None:
    for name, (kind, least) in _NUMBERS.items():
        most = math.inf if kind is float else 10**12
        if type(content[name]) is not kind or not least <= content[name] < most:
            raise ValueError(f"its {name} is not possible")
