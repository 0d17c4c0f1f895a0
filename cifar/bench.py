"""Training speed, measured beside the usual way: a DataLoader that augments picture by picture, in float32."""

import statistics
import time
from typing import Any

import torch
import torch.nn.functional as F
from PIL import Image
from torch import Tensor
from torch.utils.data import DataLoader, RandomSampler
from torch.utils.data import Dataset as TorchDataset
from torchvision.transforms import v2 as transforms

from cifar import data, datasets, device, train
from cifar.config import Config
from cifar.console import TrainingDisplay

_WARM_STEPS = 150  # after 30 the processor is still a tenth slower than in a long training
_WORKERS = (0, 1, 2)  # of the DataLoader


def compare(config: Config, dataset: datasets.Dataset, *, steps: int = 150, rounds: int = 3) -> dict[str, Any]:
    """Images a second of the recipe in this suite and through a DataLoader, the same steps by turns.

    Both train the same network with the same batch size, augmentation and optimizer. steps: timed in each of the
    `rounds`.
    Returns the medians, the DataLoader's by its number of workers, and the ratio to its fastest.
    """
    device.keep_freed_memory()
    config = datasets.settle(config, dataset)
    needed = config.batch_size * (steps + _WARM_STEPS)
    split = dataset.train[torch.arange(needed) % len(dataset.train)]
    speeds: dict[int | None, list[float]] = {}
    for _ in range(rounds):
        speeds.setdefault(None, []).append(_suite_speed(config, split, len(dataset.classes)))
        for workers in _WORKERS:
            speeds.setdefault(workers, []).append(_loader_speed(config, split, len(dataset.classes), workers))
    medians = {way: statistics.median(values) for way, values in speeds.items()}
    suite = medians.pop(None)
    return {
        "suite_images_per_second": suite,
        "loader_images_per_second": medians,
        "ratio": suite / max(medians.values()),
    }


def _suite_speed(config: Config, split: data.Split, classes: int) -> float:
    """Images a second of one epoch of `train` at full image size, after some steps that warm up."""
    hardware = device.choose(config.device)
    precision = device.resolve_precision(config.precision, hardware)
    network = train.fresh_network(config, split, classes).to(hardware, memory_format=torch.channels_last)
    size = split.images.shape[-1]
    warm = _WARM_STEPS * config.batch_size
    for part in (split[:warm], split[warm:]):
        state = train.fresh_state(config, network, part)
        display = TrainingDisplay([state.steps], [1])
        record = train.train_epoch(state, size, config.label_smoothing, precision, display)
    return record["images_per_second"]


def _loader_speed(config: Config, split: data.Split, classes: int, workers: int) -> float:
    """Images a second of the loop that tutorials show, after some steps that warm up."""
    network = train.fresh_network(config, split, classes).train()
    network.normalize = torch.nn.Identity()  # the pictures come normalized
    pictures = _Pictures(split, config)
    order = RandomSampler(pictures)
    loader = DataLoader(pictures, config.batch_size, sampler=order, num_workers=workers, drop_last=True)
    updates = train.make_updates(config, network, [len(loader)] * config.epochs)
    for step, (images, labels) in enumerate(loader):
        if step == _WARM_STEPS:
            started = time.perf_counter()
        F.cross_entropy(network(images), labels).backward()
        updates.step()
        ended = time.perf_counter()
    return (len(loader) - _WARM_STEPS) * config.batch_size / (ended - started)


class _Pictures(TorchDataset):
    """A split as torchvision's datasets give it: one Pillow picture at a time, augmented by itself."""

    def __init__(self, split: data.Split, config: Config):
        self.arrays = split.images.permute(0, 2, 3, 1).numpy()
        self.labels = split.labels.tolist()
        size, mean_and_std = split.images.shape[-1], [values.tolist() for values in split.mean_and_std()]
        padding_mode = "constant" if config.crop_mode == "zeros" else config.crop_mode
        steps = [transforms.RandomCrop(size, padding=config.crop, padding_mode=padding_mode)]
        if config.flip != "none":
            steps.append(transforms.RandomHorizontalFlip())
        if config.jitter:
            steps.append(transforms.ColorJitter(config.jitter, config.jitter, config.jitter))
        share = (config.cutout / size) ** 2  # of the area
        cutout = [transforms.RandomErasing(1, (share, share), (1, 1))] if config.cutout else []
        self.transform = transforms.Compose(
            [
                *steps,
                transforms.ToImage(),
                transforms.ToDtype(torch.float32, scale=True),
                transforms.Normalize(*mean_and_std),
                *cutout,
            ]
        )

    def __len__(self) -> int:
        return len(self.labels)

    def __getitem__(self, index: int) -> tuple[Tensor, int]:
        return self.transform(Image.fromarray(self.arrays[index])), self.labels[index]
