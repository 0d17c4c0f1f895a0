"""Optimizers and learning rate schedules."""

import math
from collections.abc import Callable, Sequence

import torch
from torch import Tensor, nn

# What Muon does not train, SGD does at these rates (Jordan 2024, where the loss is a sum over 2,000 images: his
# rates times 2,000). They are large because the network `whitened` scales its logits down by its width.
_BIAS_LR = 0.053 * 2000
_HEAD_LR = 0.67 * 2000
_SGD_MOMENTUM = 0.85
_WHITEN_BIAS_EPOCHS = 3  # then it stays as it is, and no gradient has to reach the first layer


class Muon(torch.optim.Optimizer):
    """Momentum whose update is orthogonalized, on weights that start each step with rows of norm one on average.

    Each parameter is a matrix, or is taken as one of (first dimension, all others). torch.optim.Muon is the
    plain form, for matrices alone. Source: Jordan 2024, airbench94_muon.
    """

    def __init__(self, parameters, lr: float, momentum: float, dtype: torch.dtype):
        """dtype: of the matrix products that orthogonalize."""
        super().__init__(parameters, {"lr": lr, "momentum": momentum})
        self.dtype = dtype

    @torch.no_grad()
    def step(self) -> None:
        for group in self.param_groups:
            for parameter in group["params"]:
                if parameter.grad is not None:
                    self._update(parameter, group["lr"], group["momentum"])

    def _update(self, parameter: Tensor, lr: float, momentum: float) -> None:
        state = self.state[parameter]
        if not state:
            state["momentum_buffer"] = torch.zeros_like(parameter)
        buffer = state["momentum_buffer"].mul_(momentum).add_(parameter.grad)
        nesterov = parameter.grad.add(buffer, alpha=momentum)
        parameter.mul_(len(parameter) ** 0.5 / parameter.norm())
        parameter.add_(orthogonalize(nesterov.flatten(1), self.dtype).view_as(parameter), alpha=-lr)


def orthogonalize(matrix: Tensor, dtype: torch.dtype) -> Tensor:
    """The matrix (M, N) with its singular values brought near one, by Newton-Schulz iteration in `dtype`.

    Three steps of a quintic whose slope at zero is steep: values over a twentieth of the matrix's norm end between
    0.5 and 1.3, which trains as well as ones (Jordan 2024), and smaller ones stay smaller.
    """
    tall = matrix.size(0) > matrix.size(1)
    x = matrix.T if tall else matrix
    x = x.to(dtype) / (matrix.norm() + 1e-7)
    for _ in range(3):
        gram = x @ x.T
        x = 3.4445 * x + (-4.7750 * gram + 2.0315 * gram @ gram) @ x
    return (x.T if tall else x).to(matrix.dtype)


class Updates:
    """The optimizers of a network, each parameter group with its own learning rate schedule."""

    def __init__(self, optimizers: list[torch.optim.Optimizer], factors: list[list[Callable[[int], float]]]):
        """factors: for each group of each optimizer, step -> share of its peak rate; 0 means for good."""
        self.optimizers, self.factors = optimizers, factors
        for optimizer in optimizers:
            for group in optimizer.param_groups:
                group["initial_lr"] = group["lr"]
        self.go_to(0)

    @property
    def lr(self) -> float:
        """The rate of the first group, which holds most of the weights."""
        return self.optimizers[0].param_groups[0]["lr"]

    def step(self) -> None:
        """Apply the gradients, clear them, go on to the next step's rates."""
        for optimizer in self.optimizers:
            optimizer.step()
            optimizer.zero_grad(set_to_none=True)
        self.go_to(self.steps + 1)

    def go_to(self, steps: int) -> None:
        """Set the rates to those after so many steps; spare the gradients of groups whose rate has reached zero."""
        self.steps = steps
        for optimizer, factors in zip(self.optimizers, self.factors):
            for group, factor in zip(optimizer.param_groups, factors):
                group["lr"] = group["initial_lr"] * factor(steps)
                is_over = group["lr"] == 0 < group["initial_lr"]
                for parameter in group["params"]:
                    parameter.requires_grad_(not is_over)


def build(
    network: nn.Module,
    *,
    optimizer: str,
    lr: float,
    momentum: float,
    weight_decay: float,
    schedule: str,
    steps: Sequence[int],
    precision: str,
) -> Updates:
    """The optimizers and schedules of a recipe, for parameters that require a gradient. steps: of each epoch."""
    decay = _factor(schedule, sum(steps))
    if optimizer == "muon":
        dtype = torch.bfloat16 if precision == "bfloat16" else torch.float32
        return _muon(network, lr, momentum, weight_decay, decay, _WHITEN_BIAS_EPOCHS * steps[0], dtype)
    parameters = [parameter for parameter in network.parameters() if parameter.requires_grad]
    if optimizer == "adam":
        rule = torch.optim.Adam(parameters, lr=lr, weight_decay=weight_decay, fused=True)
    else:
        rule = torch.optim.SGD(parameters, lr=lr, momentum=momentum, weight_decay=weight_decay, fused=True)
    return Updates([rule], [[decay]])


def _muon(network, lr, momentum, weight_decay, decay, whiten_steps, dtype) -> Updates:
    """For the network `whitened`: Muon on the hidden layers' weights; SGD on the head and on what is a vector."""
    trained = {name: parameter for name, parameter in network.named_parameters() if parameter.requires_grad}
    whiten_bias = [trained.pop("whiten.bias")]
    head = [trained.pop("head.weight")]
    vectors = [parameter for parameter in trained.values() if parameter.ndim == 1]
    matrices = [parameter for parameter in trained.values() if parameter.ndim > 1]
    whiten_decay = _factor("linear", whiten_steps)
    groups = [(vectors, _BIAS_LR, decay), (head, _HEAD_LR, decay), (whiten_bias, _BIAS_LR, whiten_decay)]
    # SGD multiplies weight_decay by the rate, so a decay of the same share of each weight is divided by it.
    sgd = torch.optim.SGD(
        [{"params": params, "lr": rate, "weight_decay": weight_decay / rate} for params, rate, _ in groups],
        momentum=_SGD_MOMENTUM,
        nesterov=True,
        fused=True,
    )
    return Updates([Muon(matrices, lr, momentum, dtype), sgd], [[decay], [factor for _, _, factor in groups]])


def _factor(schedule: str, steps: int) -> Callable[[int], float]:
    """step, from 0 -> the share of the peak rate, which is zero after `steps`."""
    if schedule == "linear":
        return lambda step: max(0.0, 1 - step / steps)
    return lambda step: 0.5 * (1 + math.cos(math.pi * min(1.0, step / steps)))
