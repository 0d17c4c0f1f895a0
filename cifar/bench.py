"""Training speed: epochs for a budget of minutes, the comparison with a DataLoader, and the profile of a step.

What is timed trains a network that is thrown away. torchvision is imported where it is used: it takes a second.
"""

import contextlib
import math
import os
import statistics
import time
from collections import defaultdict
from collections.abc import Callable, Generator, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
import torch.nn.functional as F
from PIL import Image
from torch import nn
from torch.autograd import DeviceType
from torch.utils.data import DataLoader, RandomSampler, default_collate
from torch.utils.flop_counter import FlopCounterMode

from cifar import checkpoint, console, data, datasets, device, files, model, optim, runs, trainer
from cifar.config import LOCATIONS, MAX_EPOCHS, Config, epoch_limits
from cifar.errors import UserError, display_path, plural

if TYPE_CHECKING:
    from torchvision.transforms import v2 as transforms

_SECONDS = 3.0  # to time a step, and as long to warm up: at first a processor is faster or slower than later
_PLANNED_FRACTION = 0.97  # of the minutes; the rest is for steps that take longer than those that were timed
_TIMED_FRACTION = 0.015  # of the minutes, to time the steps of one image size, but at most half of _SECONDS
# Images per step that a CPU is timed with, at 32x32 pixels: 500 are as fast as 2,000 (measured with AMX), unless they
# take longer than _SLOW seconds; 32 are then nearly as fast (float32). A GPU needs all.
_FEW_IMAGES, _TIMED_IMAGES, _SLOW = 32, 500, 2.0
_SAVE_SECONDS = 0.06  # to write two checkpoints; measured with `fast`
_EPOCH_SECONDS = 0.02  # for an epoch's line in the history and on the terminal; measured with six images
_WORKERS = (0, 2)  # of the DataLoader
_ROUNDS = 2
_MATRIX_SIZE, _GPU_MATRIX_SIZE = 2048, 8192  # a product of 2048x2048 takes a GPU no longer than its launch
_SHOWN_FRACTION = 0.005  # of a step's time, from which an operator or a kernel is shown


def run(config: Config) -> torch.device:
    """Profile a step of `fast`, compare `simple` and `convnet` with a DataLoader, print both, and write bench.json.

    Of the settings it uses dataset, device, precision, compile and locations; the recipes have the others.
    Returns the device that it has measured.
    """
    used = {*LOCATIONS, "dataset", "labels", "image_size", "device", "precision", "compile"}
    settings = config.model_dump(include=used)
    datasets.check_output_dir(config)
    runs.check_writable(config.output_dir)
    dataset = datasets.of_config(config)
    fast, *others = (
        datasets.resolve(Config.create({**settings, "recipe": recipe}), dataset)
        for recipe in ("fast", "simple", "convnet")
    )
    console.say(f"this takes about {_run_seconds(fast, dataset) / 60:.1f} minutes")
    profiled = profile(fast, dataset)
    show_profile(profiled)
    speeds = {config.recipe: compare(config, dataset) for config in others}
    show_speeds(dataset.name, speeds)
    path = Path(config.output_dir) / "bench.json"
    files.write_json(path, {"profile": profiled, "speeds": speeds})
    console.say(f"all values: {display_path(path)}")
    return device.choose(config.device)


def _run_seconds(config: Config, dataset: data.Dataset) -> float:
    """Estimate how long `run` takes, from the time of a few images."""
    step = image_seconds(config, dataset, dataset.train.image_size, 0.1) * config.batch_size
    profiles = 2 * (2 * max(step, _SECONDS) + 3 * step)
    return 2 * _SECONDS + profiles + 2 * _ROUNDS * (1 + len(_WORKERS)) * (2 * _SECONDS + 1)  # 1: to start the workers


def step_seconds(step: Callable[[], Any], hardware: torch.device, seconds: float = 0.0) -> float:
    """Return the mean time of a step, in seconds: repeated for so many, at least once, after as long to warm up."""
    for _ in range(2):
        started, steps = time.perf_counter(), 0
        while not steps or time.perf_counter() - started < seconds:
            step()
            steps += 1
        if hardware.type != "cpu":
            torch.get_device_module(hardware).synchronize()
    return (time.perf_counter() - started) / steps


def training_steps(config: Config, dataset: data.Dataset, image_size: int) -> Generator[nn.Module, None, None]:
    """Train a new network on images of one size, as in the middle of a training; yields it at each step, without end.

    config: resolved. By then `fast` has frozen its whitening bias, as in three quarters of its epochs.
    """
    device.keep_freed_memory()
    hardware = device.choose(config.device)
    precision = device.resolve_precision(config.precision, hardware)
    config = config.replace(precision=precision, warmup_epochs=0)  # of `--minutes`, it may be longer than the training
    network, batches, criterion, optimizer = trainer.build(config, dataset.train, len(dataset.classes), hardware)
    model.set_training_mode(network)
    compiled = device.compiled(network, config.compile)
    with device.training_kernels(config.deterministic == "on"):
        while True:
            for batch in batches.epoch(1, image_size):
                optimizer.set_step(config.epochs * len(batches) // 2)
                trainer.train_step(compiled, optimizer, batch, criterion, config.precision)
                yield network


def image_seconds(config: Config, dataset: data.Dataset, image_size: int, seconds: float) -> float:
    """Return the time that training takes per image, measured for so many seconds after as many to warm up.

    config: resolved. On a slow CPU it is measured on few images, so that it takes seconds there, too.
    """
    hardware = device.choose(config.device)

    def measure(images: int, seconds: float) -> float:
        steps = training_steps(config.replace(batch_size=images), dataset, image_size)
        return step_seconds(partial(next, steps), hardware, seconds) / images

    if hardware.type != "cpu":
        return measure(config.batch_size, seconds)
    few, many = (
        max(min(4, len(dataset.train)), device.world_size(), min(config.batch_size, n * 32**2 // image_size**2))
        for n in (_FEW_IMAGES, _TIMED_IMAGES)
    )
    estimate = measure(few, 0.1)
    return estimate if estimate * many > _SLOW else measure(many, seconds)


# A budget of minutes


def plan_epochs(config: Config, dataset: data.Dataset) -> Config:
    """Choose the number of epochs, small ones in their proportion, that takes `config.minutes`; says what it chose.

    config: resolved. The result has no `minutes`, so that it means the same training on any machine.
    Raises UserError if not even one epoch fits.
    """
    started, minutes = time.perf_counter(), config.minutes
    assert minutes is not None
    length = f"{minutes:g} minute{'s' * (minutes != 1)}"
    console.say(f"timing a few steps to plan {length} of training")
    steps, ending = epoch_seconds(config, dataset)
    timing, full_size = time.perf_counter() - started, max(steps)
    epochs, small, hard = choose_epochs(config, minutes * 60 * _PLANNED_FRACTION - timing, steps, ending)
    if not epochs:
        least = math.ceil((steps[full_size] + ending + timing) / _PLANNED_FRACTION / 60 * 100) / 100
        raise UserError(f"--minutes {minutes:g} is too short: one epoch takes about {least:g} minutes")
    counts = [(small, config.small_size or full_size), (epochs - small, full_size)]
    parts = [f"{count} at {size}x{size} ({steps[size] + ending:.1f} s each)" for count, size in counts if count]
    if hard:
        parts.append(f"the last {hard} on the hardest {config.hard_share:.0%} of the images")
    warmup = min(config.warmup_epochs, epoch_limits(epochs)["warmup_epochs"])
    if config.warmup_epochs:
        parts.append(f"{warmup} of warm-up")
    console.say(f"{plural(epochs, 'epoch')} in {length}: {', '.join(parts)}")
    plan = {"epochs": epochs, "small_epochs": small, "hard_epochs": hard, "warmup_epochs": warmup}
    return config.replace(**plan, minutes=None)


def choose_epochs(config: Config, budget: float, steps: Mapping[int, float], ending: float) -> tuple[int, int, int]:
    """Return the longest plan within the budget, in seconds: its epochs, small ones and hard ones; zeros if none fits.

    steps and ending: see `epoch_seconds`. The number of small epochs is rounded up or down.
    """
    small_steps, full_steps = steps[min(steps)], steps[max(steps)]

    def cost(plan: tuple[int, int, int]) -> float:
        epochs, small, hard = plan
        return small * small_steps + (epochs - small - hard * (1 - config.hard_share)) * full_steps + epochs * ending

    small_share = min(config.small_epochs, epoch_limits(config.epochs)["small_epochs"]) / config.epochs
    longest = min(MAX_EPOCHS, int(max(0.0, budget) // (small_steps * config.hard_share + ending)))
    plans = []
    for epochs in range(1, longest + 1):
        most, small = epoch_limits(epochs), small_share * epochs
        hard = min(config.hard_epochs, most["hard_epochs"])
        plans += [(epochs, min(n, most["small_epochs"]), hard) for n in (int(small), math.ceil(small))]
    return max((plan for plan in plans if cost(plan) <= budget), key=cost, default=(0, 0, 0))


def epoch_seconds(config: Config, dataset: data.Dataset) -> tuple[dict[int, float], float]:
    """Measure how long an epoch's steps take, by image size, and estimate its validation and checkpoints.

    config: resolved.
    """
    full_size = dataset.train.image_size
    seconds = min(_SECONDS / 2, _TIMED_FRACTION * 60 * (config.minutes or math.inf))
    sizes, val_size = _image_sizes(config, full_size), config.val_size or 0
    per_image = {size: image_seconds(config, dataset, size, seconds) for size in sizes}
    trained = len(dataset.train) - val_size
    trained -= trained % config.batch_size
    steps = {size: value * trained for size, value in per_image.items()}
    saving = _SAVE_SECONDS * min(1.0, steps[full_size] / checkpoint.EPOCH_SECONDS)  # not after each of short epochs
    validation = val_size * per_image[full_size] / 3  # the forward pass is a third of the work
    return steps, _EPOCH_SECONDS + saving + validation


# The comparison with a DataLoader


def compare(config: Config, dataset: data.Dataset) -> dict[str, Any]:
    """Measure the images per second of this suite and of a DataLoader loop with the same settings, by turns.

    config: resolved, of `simple` or `convnet`. Returns the means of some rounds, the DataLoader's by its number of
    workers, and the ratio to its fastest.
    """
    hardware, full_size = device.choose(config.device), dataset.train.image_size
    speeds: dict[int | None, list[float]] = defaultdict(list)
    for workers in (None, *_WORKERS) * _ROUNDS:
        steps: Generator[nn.Module | None, None, None] = (
            training_steps(config, dataset, full_size) if workers is None else _loader_steps(config, dataset, workers)
        )
        with contextlib.closing(steps):
            speeds[workers].append(config.batch_size / step_seconds(partial(next, steps), hardware, _SECONDS))
    means = {workers: statistics.mean(values) for workers, values in speeds.items()}
    suite = means.pop(None)
    return {"suite_images_per_second": suite, "loader_images_per_second": means, "ratio": suite / max(means.values())}


def _loader_steps(config: Config, dataset: data.Dataset, workers: int) -> Generator[None, None, None]:
    """Train in float32 with the loop that tutorials show: a step at each `next`, without end."""
    hardware = device.choose(config.device)
    network = trainer.new_network(config, dataset.train, len(dataset.classes)).to(hardware).train()
    network.normalize = nn.Identity()  # the images come normalized
    batches = data.Batches(dataset.train, config, hardware, len(dataset.classes))
    optimizer = optim.build(network, config, batches.steps_per_epoch)
    split = next(dataset.train.chunks())  # all need not fit into memory
    images = map(Image.fromarray, split.images.permute(0, 2, 3, 1).numpy())
    samples = list(zip(images, split.labels.tolist()))
    loader: DataLoader = DataLoader(
        samples,  # type: ignore[arg-type]  # any sequence will do, whatever the annotation says
        config.batch_size,
        sampler=RandomSampler(samples, replacement=True, num_samples=2**40),
        num_workers=workers,
        pin_memory=hardware.type == "cuda",
        collate_fn=partial(_collate, _augmentation(config, dataset.train)),
    )
    for images, labels in loader:
        images, labels = images.to(hardware, non_blocking=True), labels.to(hardware, non_blocking=True)
        F.cross_entropy(network(images), labels).backward()
        optimizer.set_step(0)
        optimizer.step()
        yield


def _augmentation(config: Config, split: data.Split) -> "transforms.Compose":
    """Return torchvision's transforms, from a Pillow image to a normalized tensor, that `simple` or `convnet` needs."""
    from torchvision.transforms import v2 as transforms

    crop: transforms.Transform = transforms.RandomCrop(split.image_size, padding=config.crop)
    if config.crops_resized:
        crop = transforms.RandomResizedCrop(split.image_size, (config.crop_scale, 1))
    steps = [crop]
    if config.flip != "none":
        steps.append(transforms.RandomHorizontalFlip())
    if config.jitter:
        steps.append(transforms.ColorJitter(config.jitter, config.jitter, config.jitter))
    normalize = transforms.Normalize(*(values.tolist() for values in split.mean_and_std))
    return transforms.Compose([*steps, transforms.ToImage(), transforms.ToDtype(torch.float32, scale=True), normalize])


def _collate(augment: "transforms.Compose", samples: list) -> list:
    return default_collate([(augment(image), label) for image, label in samples])


def show_speeds(dataset: str, speeds: Mapping[str, Mapping[str, Any]]) -> None:
    """Print the results of `compare`, by recipe."""
    for recipe, speed in speeds.items():
        suite, loaders = speed["suite_images_per_second"], speed["loader_images_per_second"]
        others = ", ".join(f"{value:,.0f} with {workers} workers" for workers, value in loaders.items())
        ratio = f"{speed['ratio']:.2f} times the fastest DataLoader's ({others})"
        console.say(f"{recipe} on {dataset}: {suite:,.0f} images a second, {ratio}")


# The profile of a step


def profile(config: Config, dataset: data.Dataset) -> dict[str, Any]:
    """Profile a training step at each of the recipe's image sizes, beside the rate of a large matrix product.

    config: resolved. Returns, per image size, the seconds of a step, its FLOP, its operators and, of a GPU, kernels.
    """
    hardware = device.choose(config.device)
    sizes = _image_sizes(config, dataset.train.image_size)
    precision = device.resolve_precision(config.precision, hardware)
    return {
        "recipe": config.recipe,
        "batch_size": config.batch_size,
        "hardware": device.describe(hardware),
        "threads": torch.get_num_threads(),
        "precision": precision,
        "matrix_flop_per_second": matrix_rate(hardware, precision),
        "image_sizes": {size: _profile_step(config, dataset, size, hardware) for size in sizes},
    }


def _image_sizes(config: Config, full_size: int) -> list[int]:
    """Return the sizes that a recipe trains at, the full one first."""
    return [full_size, config.small_size] if config.small_epochs and config.small_size else [full_size]


def matrix_rate(hardware: torch.device, precision: str) -> float:
    """Measure the FLOP per second of a product of two large square matrices."""
    size = _MATRIX_SIZE if hardware.type == "cpu" else _GPU_MATRIX_SIZE
    left, right = torch.randn(2, size, size, device=hardware, dtype=device.DTYPES[precision])
    return 2 * size**3 / step_seconds(partial(torch.matmul, left, right), hardware, _SECONDS)


def _profile_step(config: Config, dataset: data.Dataset, size: int, hardware: torch.device) -> dict[str, Any]:
    eager = training_steps(config.replace(compile="off"), dataset, size)  # else FlopCounterMode sees no operator
    with contextlib.closing(eager):
        next(eager)  # builds the network
        with FlopCounterMode(display=False) as counter:
            next(eager)
    steps = training_steps(config, dataset, size)
    seconds = step_seconds(partial(next, steps), hardware, _SECONDS)
    os.environ.setdefault("KINETO_LOG_LEVEL", "99")  # keeps the profiler's log off the terminal
    with torch.profiler.profile(record_shapes=True, acc_events=True) as profiler:
        next(steps)
    clock = "device" if hardware.type == "cuda" else "cpu"
    operators, kernels = [], []
    for row in profiler.key_averages(group_by_input_shape=True):
        if row.device_type == DeviceType.CPU:  # without the time of other operators that it calls
            operators.append((_operator_name(row), row.count, getattr(row, f"self_{clock}_time_total") / 1e6))
        elif row.device_type == DeviceType.CUDA and not row.is_user_annotation:
            kernels.append((row.key, row.count, row.self_device_time_total / 1e6))
    times = {"operators": _add_up(operators), "kernels": _add_up(kernels)}
    return {"seconds": seconds, "flop": counter.get_total_flops(), **times}


def _add_up(rows: Sequence[tuple[str, int, float]]) -> list[dict[str, Any]]:
    """Add up calls and seconds by name; returns name, calls and seconds, the longest first."""
    import pandas

    table = pandas.DataFrame(rows, columns=["name", "calls", "seconds"]).groupby("name", as_index=False).sum()
    return table.sort_values("seconds", ascending=False).to_dict("records")


def _operator_name(row: Any) -> str:
    """Name an operator and, of a convolution, the shapes of its images and weights."""
    name = row.key.removeprefix("aten::")
    if "convolution" not in name:
        return name
    inputs = row.input_shapes[1:3] if "backward" in name else row.input_shapes[:2]  # first comes the output's gradient
    return f"{name} {' * '.join('x'.join(map(str, shape)) for shape in inputs)}"


def show_profile(profiled: Mapping[str, Any]) -> None:
    """Print where the time of a step goes, from `profile`."""
    rate = profiled["matrix_flop_per_second"]
    console.say(
        f"{profiled['recipe']}, {profiled['batch_size']} images a step, {profiled['precision']}, "
        f"{profiled['hardware']}, threads: {profiled['threads']}; matrix product: {rate / 1e12:.2f} TFLOP/s"
    )
    for size, step in profiled["image_sizes"].items():
        seconds, reached = step["seconds"], step["flop"] / step["seconds"]
        title = f"{size}x{size} pixels: {seconds:.3g} s a step, {reached / 1e12:.2f} TFLOP/s"
        _show_times(f"{title}, {reached / rate:.0%} of the matrix product's", "operator", step["operators"], seconds)
        if kernels := step["kernels"]:
            launches, busy = (sum(row[name] for row in kernels) for name in ("calls", "seconds"))
            title = f"{size}x{size} pixels: {launches} kernels a step, which take {busy / seconds:.0%} of its time"
            _show_times(title, "kernel", [row | {"name": _short(row["name"])} for row in kernels], seconds)


def _short(kernel: str) -> str:
    """Shorten the C++ name of a kernel so that a terminal has room for its times."""
    return kernel.removeprefix("void ").replace("at::native::", "").replace("(anonymous namespace)::", "")[:45]


def _show_times(title: str, name: str, rows: Sequence[Mapping[str, Any]], seconds: float) -> None:
    """Print a table of the operators or kernels of a step that takes so many seconds."""
    shown = [row for row in rows if row["seconds"] > _SHOWN_FRACTION * seconds]
    columns = {
        name: [row["name"] for row in shown],
        "calls": [str(row["calls"]) for row in shown],
        "ms": [f"{row['seconds'] * 1e3:.2f}" for row in shown],
        "of the step": [f"{row['seconds'] / seconds:.1%}" for row in shown],
    }
    console.out.print(console.table(title, columns))
