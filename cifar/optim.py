"""Optimizers and learning-rate schedules.

A new optimizer is a function and a line in OPTIMIZERS; a new schedule is a line in SCHEDULES. Both also need their name
in Config.optimizer or Config.schedule (config.py).
"""

import itertools
import math
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn

from cifar import device

# Schedules, counted from the end of the warm-up: progress through the training, 0..1; periods of --decay-epochs that
# have passed; --decay-rate -> the fraction of the peak learning rate.
SCHEDULES: dict[str, Callable[[float, float, float], float]] = {
    "linear": lambda progress, periods, rate: 1 - progress,
    "cosine": lambda progress, periods, rate: 0.5 * (1 + math.cos(math.pi * progress)),
    "exponential": lambda progress, periods, rate: rate**periods,
    "step": lambda progress, periods, rate: rate ** math.floor(periods),
}

# The learning rates of what Muon does not train, for batches of 2,000 (Jordan 2024, where the loss is a sum over them:
# his learning rates times 2,000). They are large because airbench94 scales its logits down by its width. For smaller
# batches, whose gradients are noisier, they are scaled by the square root: 600 images of CIFAR-10 in batches of 27
# reached 57.3% instead of 56.5, in grey 57.4 instead of 53.4; images of 128x128 pixels in batches of 4 learned nothing.
_BATCH_SIZE = 2000
_BIAS_LR = 0.053 * _BATCH_SIZE
_HEAD_LR = 0.67 * _BATCH_SIZE
_SGD_MOMENTUM = 0.85
_WHITEN_BIAS_EPOCHS = 3  # then it is frozen, and no gradient has to reach the first layer


def build(network: nn.Module, config, steps_per_epoch: Sequence[int]) -> "ScheduledOptimizer":
    """Build the optimizer and its schedule for the network's parameters that require a gradient.

    config: a config.Config, whose `precision` is resolved.
    """
    optimizer = OPTIMIZERS[config.optimizer](network, config, steps_per_epoch)
    if config.precision == "float16":
        optimizer.scaler = torch.amp.GradScaler(next(network.parameters()).device.type)
        for own in optimizer.optimizers:  # else fused SGD, when it leaves out its first step, keeps a momentum of noise
            own._step_supports_amp_scaling = False  # type: ignore[attr-defined]  # which GradScaler asks for
    return optimizer


def _adam(network: nn.Module, config, steps_per_epoch: Sequence[int]) -> "ScheduledOptimizer":
    kind = torch.optim.AdamW if config.optimizer == "adamw" else torch.optim.Adam
    optimizer = kind(_groups(network, config), lr=config.lr, weight_decay=config.weight_decay, fused=True)
    return ScheduledOptimizer([optimizer], config, steps_per_epoch)


def _sgd(network: nn.Module, config, steps_per_epoch: Sequence[int]) -> "ScheduledOptimizer":
    settings = {"lr": config.lr, "momentum": config.momentum, "weight_decay": config.weight_decay}
    optimizer = torch.optim.SGD(_groups(network, config), **settings, fused=True)
    return ScheduledOptimizer([optimizer], config, steps_per_epoch)


def _muon(network: nn.Module, config, steps_per_epoch: Sequence[int]) -> "ScheduledOptimizer":
    """For airbench94 and airbench96: Muon on the hidden layers' weights, SGD on the head and on the biases."""
    parameters = {name: parameter for name, parameter in network.named_parameters() if parameter.requires_grad}
    whiten_bias, head = [parameters.pop("whiten.bias")], [parameters.pop("head.weight")]
    vectors = [parameter for parameter in parameters.values() if parameter.ndim == 1]
    matrices = [parameter for parameter in parameters.values() if parameter.ndim > 1]
    scale = math.sqrt(config.batch_size / _BATCH_SIZE)
    groups = [
        {"params": vectors, "lr": _BIAS_LR * scale},
        {"params": head, "lr": _HEAD_LR * scale},
        {
            "params": whiten_bias,
            "lr": _BIAS_LR * scale,
            "schedule": "linear",
            "schedule_steps": sum(steps_per_epoch[config.warmup_epochs :][:_WHITEN_BIAS_EPOCHS]),
        },
    ]
    for group in groups:  # SGD multiplies the weight decay by the learning rate; here it is a fraction of the weight
        group["weight_decay"] = config.weight_decay / group["lr"]
    muon = Muon(matrices, config.lr, config.momentum, device.DTYPES[config.precision])
    sgd = torch.optim.SGD(groups, momentum=_SGD_MOMENTUM, nesterov=True, fused=True)
    return ScheduledOptimizer([muon, sgd], config, steps_per_epoch)


OPTIMIZERS: dict[str, Callable[..., "ScheduledOptimizer"]] = {
    "muon": _muon,
    "adam": _adam,
    "adamw": _adam,
    "sgd": _sgd,
}


def _groups(network: nn.Module, config) -> list[dict[str, Any]]:
    """Group the parameters that require a gradient: the head's and, with --body-lr, those of a pretrained body."""
    parameters = {name: parameter for name, parameter in network.named_parameters() if parameter.requires_grad}
    head_names = getattr(network, "head_names", parameters.keys())
    head = [parameter for name, parameter in parameters.items() if name in head_names]
    body = [parameter for name, parameter in parameters.items() if name not in head_names]
    groups = [{"params": head, "lr": config.lr}, {"params": body, "lr": config.lr * config.body_lr}]
    return [group for group in groups if group["params"]]


def build_ema(network: nn.Module, decay: float) -> AveragedModel | None:
    """Return the exponential moving average (EMA) of a network's weights and buffers; None for a decay of zero.

    After n steps the decay is (1 + n) / (10 + n) at most, as in TensorFlow: the first weights are soon forgotten.
    """
    if not decay:
        return None

    def update(averages: Any, values: Any, count: Any) -> None:
        steps = int(ema.n_averaged)  # as `count`, but on the CPU
        get_ema_multi_avg_fn(min(decay, (1 + steps) / (10 + steps)))(averages, values, count)

    ema = AveragedModel(network, multi_avg_fn=update, use_buffers=True)
    return ema


class ScheduledOptimizer:
    """Optimizers and their learning-rate schedule behind one `step`.

    The learning rates rise linearly in the warm-up and then follow the schedule.
    A parameter group may have its own `schedule` and `schedule_steps`, from the end of the warm-up. When that has
    ended at a learning rate of zero, its parameters are frozen, which spares their gradients. The learning rates are a
    function of the steps done (torch's LambdaLR has no way to go to a step), so the state is the step and what the
    optimizers keep.
    In float16, `scaler` multiplies the loss, so that small gradients are not rounded to zero, and leaves out a step
    whose gradients are too large.
    """

    def __init__(self, optimizers: list[torch.optim.Optimizer], config, steps_per_epoch: Sequence[int]):
        self.optimizers, self.config = optimizers, config
        self.scaler = torch.amp.GradScaler(enabled=False)
        steps = sum(steps_per_epoch)
        self.warmup_steps = sum(steps_per_epoch[: config.warmup_epochs])
        self.epoch_ends = [0, *itertools.accumulate(steps_per_epoch)]
        for group in self.groups:
            group["initial_lr"] = group["lr"]
            group.setdefault("schedule", config.schedule)
            group.setdefault("schedule_steps", steps - self.warmup_steps)
        self.set_step(0)

    @property
    def groups(self) -> list[dict[str, Any]]:
        """The parameter groups of all optimizers; load_state_dict replaces them."""
        return [group for optimizer in self.optimizers for group in optimizer.param_groups]

    @property
    def lr(self) -> float:
        """The learning rate of the first group: of most of the weights or, in fine-tuning, of the head."""
        return self.groups[0]["lr"]

    def backward(self, loss: Tensor) -> None:
        """Compute the gradients of the loss."""
        self.scaler.scale(loss).backward()

    def step(self) -> None:
        """Clip the gradients, apply and clear them, and go to the next step's learning rates."""
        for optimizer in self.optimizers:
            self.scaler.unscale_(optimizer)
        if self.config.clip_grad:
            parameters = [parameter for group in self.groups for parameter in group["params"]]
            nn.utils.clip_grad_norm_(parameters, self.config.clip_grad)
        for optimizer in self.optimizers:
            self.scaler.step(optimizer)
            optimizer.zero_grad(set_to_none=True)
        self.scaler.update()
        self.set_step(self.steps + 1)

    def set_step(self, steps: int) -> None:
        """Set the learning rates to those after so many steps."""
        self.steps = steps
        warmup = min(1.0, (steps + 1) / (self.warmup_steps + 1))
        decaying = max(0, steps - self.warmup_steps)
        epochs = float(np.interp(steps, self.epoch_ends, range(len(self.epoch_ends))))
        periods = max(0.0, epochs - self.config.warmup_epochs) / (self.config.decay_epochs or self.config.epochs / 3)
        periods = round(periods, 9)  # or rounding would end some a step late
        for group in self.groups:
            progress = min(1.0, decaying / group["schedule_steps"])
            fraction = SCHEDULES[group["schedule"]](progress, periods, self.config.decay_rate)
            group["lr"] = group["initial_lr"] * warmup * fraction
            has_ended = progress == 1 and group["lr"] == 0 < group["initial_lr"]
            for parameter in group["params"]:
                parameter.requires_grad_(not has_ended)

    def state_dict(self) -> dict[str, Any]:
        """Return the steps done, each optimizer's state of its parameters (momentum and the like), and the scaler's."""
        states = [optimizer.state_dict()["state"] for optimizer in self.optimizers]
        return {"steps": self.steps, "optimizers": states, "scaler": self.scaler.state_dict()}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Restore `state_dict`. Raises ValueError, KeyError or the like if it is not of these optimizers."""
        for optimizer, own in zip(self.optimizers, state["optimizers"], strict=True):
            optimizer.load_state_dict({**optimizer.state_dict(), "state": own})
        if scaler := state.get("scaler"):  # else the training was in another precision
            self.scaler.load_state_dict(scaler)
        self.set_step(state["steps"])


class Muon(torch.optim.Optimizer):
    """Momentum whose update is orthogonalized, on weights that are first scaled to rows of norm one on average.

    Each parameter is a matrix, or is taken as one of (first dimension, all others). torch.optim.Muon is for matrices
    alone and does not normalize the weights. Source: Jordan 2024, airbench94_muon.
    """

    def __init__(self, parameters, lr: float, momentum: float, dtype: torch.dtype):
        """dtype: of the matrix products that orthogonalize."""
        super().__init__(parameters, {"lr": lr, "momentum": momentum})
        self.dtype = dtype

    @torch.no_grad()
    def step(self, closure=None):  # without annotations, as torch's own: Optimizer declares two signatures
        """Update all parameters that have a gradient, with few operations, since each takes a GPU's launch."""
        for group in self.param_groups:
            parameters = [parameter for parameter in group["params"] if parameter.grad is not None]
            gradients = [parameter.grad for parameter in parameters]
            for parameter in parameters:
                if not self.state[parameter]:
                    self.state[parameter]["momentum_buffer"] = torch.zeros_like(parameter)
            buffers = [self.state[parameter]["momentum_buffer"] for parameter in parameters]
            torch._foreach_mul_(buffers, group["momentum"])
            torch._foreach_add_(buffers, gradients)
            nesterov = torch._foreach_add(gradients, buffers, alpha=group["momentum"])
            norms = torch._foreach_norm([*parameters, *nesterov])
            torch._foreach_div_(norms, [len(parameter) ** 0.5 for parameter in parameters] + [1.0] * len(nesterov))
            torch._foreach_add_(norms, 1e-7)
            for tensor, norm in zip([*parameters, *nesterov], norms):
                tensor.div_(norm)
            torch._foreach_add_(parameters, _orthogonalize_all(nesterov, self.dtype), alpha=-group["lr"])


def _orthogonalize_all(tensors: Sequence[Tensor], dtype: torch.dtype) -> list[Tensor]:
    """Orthogonalize each tensor in `dtype`, as a matrix of (first dimension, all others); neighbours alike together."""
    rows = [tensor.movedim(1, -1) for tensor in tensors]  # as channels-last weights lie in memory
    flat, results = torch.cat([row.flatten() for row in rows]).to(dtype), []
    for shape, alike in itertools.groupby((len(row), row[0].numel()) for row in rows):
        count = len(list(alike))
        batch, flat = flat.tensor_split([count * math.prod(shape)])
        results.append(orthogonalize(batch.view(count, *shape)).flatten())
    pieces = torch.cat(results).to(tensors[0].dtype).split([row.numel() for row in rows])
    return [piece.view_as(row).movedim(-1, 1) for piece, row in zip(pieces, rows)]


def orthogonalize(matrices: Tensor) -> Tensor:
    """Bring the singular values of each matrix, (B, M, N) of norm one, near one, by Newton-Schulz iteration.

    Three steps of a quintic whose slope at zero is steep: values over a twentieth end between 0.5 and 1.3, which
    trains as well as ones (Jordan 2024), and smaller ones stay smaller.
    """
    is_tall = matrices.size(1) > matrices.size(2)
    x = matrices.mT if is_tall else matrices
    if x.itemsize < 4:
        for _ in range(3):
            x = torch.baddbmm(x, _higher_terms(x @ x.mT), x, beta=3.4445)
    else:  # the product of all steps first: half the operations, but 16 bits would round too much away
        gram, first_term = x @ x.mT, 3.4445 * torch.eye(x.size(1), dtype=x.dtype, device=x.device)
        product = step = first_term + _higher_terms(gram)
        for _ in range(2):
            gram = step @ gram @ step
            step = first_term + _higher_terms(gram)
            product = step @ product
        x = product @ x
    return x.mT if is_tall else x


def _higher_terms(gram: Tensor) -> Tensor:
    """Return the matrix by which the cubic and the quintic term multiply; gram: of the rows of what they multiply."""
    return torch.baddbmm(gram, gram, gram, beta=-4.7750, alpha=2.0315)
