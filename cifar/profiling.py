"""Where a training step's time goes: seconds, arithmetic and memory traffic by operator and by convolution."""

import statistics
import sys
import time
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torch.utils.flop_counter import flop_registry

from cifar import data, datasets, device, train
from cifar.config import Config
from cifar.console import TrainingDisplay

_MATRIX_SIDE = 2048
_FORWARD, _BACKWARD = "aten.convolution", "aten.convolution_backward"


@dataclass
class Cost:
    """What the calls of one operator took together."""

    calls: int = 0
    seconds: float = 0.0
    flop: int = 0
    bytes: int = 0

    def add(self, seconds: float, flop: int, bytes: int) -> None:
        self.calls += 1
        self.seconds += seconds
        self.flop += flop
        self.bytes += bytes


@dataclass
class OperatorCosts(TorchDispatchMode):
    """Within its context every operator that PyTorch runs is timed, and its arithmetic and traffic counted.

    by_operator, by_convolution: name -> Cost. Bytes are those of the tensors that go in and come out, each counted
    once: the least that memory has to move. Accelerators are waited for after each operator.
    """

    by_operator: dict[str, Cost] = field(default_factory=dict)
    by_convolution: dict[str, Cost] = field(default_factory=dict)

    def __post_init__(self):
        super().__init__()

    def __torch_dispatch__(self, operator, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        started = time.perf_counter()
        result = operator(*args, **kwargs)
        if torch.cuda.is_initialized():
            torch.cuda.synchronize()
        seconds = time.perf_counter() - started
        packet = operator.overloadpacket
        flop = flop_registry[packet](*args, **kwargs, out_val=result) if packet in flop_registry else 0
        moved = 0 if operator.is_view else sum(map(_bytes, tree_leaves((args, kwargs, result))))
        name = str(packet)
        self.by_operator.setdefault(name, Cost()).add(seconds, flop, moved)
        if name in (_FORWARD, _BACKWARD):
            layer = _convolution(*args[:2], "forward") if name == _FORWARD else _convolution(*args[1:3], "backward")
            self.by_convolution.setdefault(layer, Cost()).add(seconds, flop, moved)
        return result


def _convolution(images: Tensor, weights: Tensor, direction: str) -> str:
    channels_out, channels_in, *kernel = weights.shape
    (height, width), (rows, columns) = kernel, images.shape[-2:]
    return f"{channels_in} to {channels_out}, {height}x{width}, on {rows}x{columns} pixels, {direction}"


def _bytes(leaf: Any) -> int:
    return leaf.numel() * leaf.element_size() if isinstance(leaf, Tensor) else 0


def matrix_rate(hardware: torch.device, precision: str, repeats: int = 100) -> float:
    """FLOP a second of a product of two square matrices of 2048: the median over some seconds, after one to warm up."""
    dtype = torch.bfloat16 if precision == "bfloat16" else torch.float32
    left, right = (torch.randn(_MATRIX_SIDE, _MATRIX_SIDE, device=hardware, dtype=dtype) for _ in range(2))
    seconds = []
    for _ in range(repeats + 1):
        started = time.perf_counter()
        left @ right
        if hardware.type == "cuda":
            torch.cuda.synchronize()
        seconds.append(time.perf_counter() - started)
    return 2 * _MATRIX_SIDE**3 / statistics.median(seconds[1:])


def profile(config: Config, dataset: datasets.Dataset, *, steps: int = 5) -> dict[str, Any]:
    """Steps from the middle of a recipe's training, at each of its image sizes, beside the matrix rate of that minute.

    By then `fast` has frozen its whitening bias, as in three quarters of its epochs.

    Returns plain numbers, per step: seconds, flop, page_faults, seconds of augmentation, and the operators and
    convolutions with their shares and rates, the slowest first.
    """
    device.keep_freed_memory()
    config = datasets.settle(config, dataset)
    hardware = device.choose(config.device)
    precision = device.resolve_precision(config.precision, hardware)
    split = dataset.train[torch.arange(config.batch_size * steps) % len(dataset.train)]
    full = split.images.shape[-1]
    sides = [full, config.small_size] if config.small_epochs else [full]
    return {
        "recipe": config.recipe,
        "batch_size": config.batch_size,
        "hardware": device.describe(hardware),
        "threads": torch.get_num_threads(),
        "precision": precision,
        "matrix_flop_per_second": matrix_rate(hardware, precision),
        "sides": {side: _profile_side(config, split, len(dataset.classes), side, precision) for side in sides},
    }


def _profile_side(config: Config, split: data.Split, classes: int, side: int, precision: str) -> dict[str, Any]:
    """The steps of one epoch on images of one size, after such an epoch that warms up."""
    hardware = device.choose(config.device)
    batches = train.make_batches(config, split, hardware)
    steps = len(batches)

    def epoch() -> tuple[float, float]:
        """Seconds and page faults a step, without those of making the network."""
        network = train.fresh_network(config, split, classes).to(hardware, memory_format=torch.channels_last)
        state = train.fresh_state(config, network, split)
        state.updates.go_to(config.epochs * steps // 2)
        display = TrainingDisplay([steps], [1])
        before = _page_faults()
        record = train.train_epoch(state, side, config.label_smoothing, precision, display)
        return record["seconds"] / steps, (_page_faults() - before) / steps

    epoch()
    seconds, faults = epoch()
    started = time.perf_counter()
    for _ in batches.epoch(1, side):
        pass
    augmentation = (time.perf_counter() - started) / steps
    with OperatorCosts() as costs:
        epoch()
    flop = sum(cost.flop for cost in costs.by_operator.values()) / steps
    return {
        "seconds": seconds,
        "augmentation_seconds": augmentation,
        "page_faults": faults,
        "flop": flop,
        "flop_per_second": flop / seconds,
        "operators": _rows(costs.by_operator, steps),
        "convolutions": _rows(costs.by_convolution, steps),
    }


def _page_faults() -> int:
    if sys.platform == "win32":  # has no such count
        return 0
    import resource

    return resource.getrusage(resource.RUSAGE_SELF).ru_minflt


def _rows(costs: dict[str, Cost], steps: int) -> list[dict[str, Any]]:
    """Per step, the slowest first."""
    ordered = sorted(costs.items(), key=lambda item: -item[1].seconds)
    return [
        {
            "name": name,
            "calls": cost.calls / steps,
            "seconds": cost.seconds / steps,
            "flop_per_second": cost.flop / cost.seconds,
            "bytes_per_second": cost.bytes / cost.seconds,
        }
        for name, cost in ordered
    ]
