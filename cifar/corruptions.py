"""Pictures made worse, kind by kind and step by step, and what is left of a run's accuracy and calibration.

torchvision is imported where it is used, as datasets.py says.
"""

import io
from collections.abc import Callable
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from cifar import datasets, device, evaluate, metrics
from cifar.runs import Run

_MOST = 2000  # test images
_TOGETHER = 20  # images turned, shifted or covered alike: one by one would take as long as the network
# By kind, its amount at the severities 1 to 5. Those of noise, blur, contrast, jpeg and pixelation are CIFAR-10-C's
# (Hendrycks and Dietterich 2019, arXiv:1903.12261); the others are ours.
AMOUNTS: dict[str, tuple[float, ...]] = {
    "noise": (0.04, 0.06, 0.08, 0.09, 0.10),  # standard deviation, of images in 0..1
    "blur": (0.4, 0.6, 0.7, 0.8, 1.0),  # standard deviation, in pixels of a picture of 32
    "brightness": (1.2, 1.4, 1.6, 1.8, 2.0),  # factor
    "darkness": (0.8, 0.65, 0.5, 0.35, 0.2),  # factor
    "contrast": (0.75, 0.5, 0.4, 0.3, 0.15),  # factor
    "jpeg": (80, 65, 58, 50, 40),  # quality
    "pixelation": (0.95, 0.9, 0.85, 0.75, 0.65),  # factor of the side
    "shift": (1 / 16, 2 / 16, 3 / 16, 4 / 16, 5 / 16),  # of the side, in both directions
    "rotation": (5, 10, 15, 20, 30),  # degrees
    "occlusion": (0.05, 0.1, 0.15, 0.2, 0.3),  # of the area
}
CELLS = sum(map(len, AMOUNTS.values()))


def measure(run: Run, dataset: datasets.Dataset, device_name: str, advance: Callable[[int], None]) -> dict[str, Any]:
    """Accuracy and calibration error of the run's best.pt under each corruption; write and return corruptions.json.

    At most 2,000 images of the test split are taken, drawn by the run's seed. advance: is called with 1 after each
    cell of the table. Raises UserError if the run has not been evaluated.
    """
    run.check_dataset(dataset.name)
    temperature = run.metrics["calibration"]["temperature"]
    network, _ = evaluate.load(run, dataset.classes)
    hardware = device.choose(device_name)
    network.to(hardware)
    precision = device.resolve_precision(run.config.precision, hardware)
    test, seed = dataset.test, run.config.seed
    chosen = test[torch.randperm(len(test), generator=torch.Generator().manual_seed(seed))[:_MOST]]

    def cell(images: Tensor) -> dict[str, float]:
        logits = evaluate.infer(network, images, precision=precision)
        calibration = metrics.reliability(logits.numpy() / temperature, chosen.labels.numpy())
        return {
            "accuracy": metrics.accuracy(logits, chosen.labels),
            "expected_calibration_error": calibration["expected_calibration_error"],
        }

    table: dict[str, list[dict[str, float]]] = {}
    for kind, amounts in AMOUNTS.items():
        table[kind] = []
        for severity, amount in enumerate(amounts, start=1):
            row = cell(corrupt(chosen.images, kind, amount, seed))
            table[kind].append({"severity": severity, "amount": amount, **row})
            advance(1)
    cells = [row for rows in table.values() for row in rows]
    means = {key: sum(row[key] for row in cells) / len(cells) for key in ("accuracy", "expected_calibration_error")}
    content = {
        "dataset": dataset.name,
        "split": "test",
        "n": len(chosen),
        "seed": seed,
        "temperature": temperature,
        "clean": cell(chosen.images),
        "mean": means,
        "corruptions": table,
    }
    run.write("corruptions.json", content)
    return content


def corrupt(images: Tensor, kind: str, amount: float, seed: int) -> Tensor:
    """uint8 images (N, 3, S, S) made worse: the same shape and type.

    The same seed draws the same chances for every amount; torch's own generator stays as it was.
    """
    transform = _transform(kind, amount, images.shape[-1])
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        return torch.cat([transform(group) for group in images.split(_TOGETHER)])


def _transform(kind: str, amount: float, side: int) -> Callable[[Tensor], Tensor]:
    """What torchvision does to pictures (N, 3, side, side)."""
    from torchvision.transforms import InterpolationMode, v2

    def either(made: Callable[[int], v2.Transform]) -> v2.Transform:
        return v2.RandomChoice([made(1), made(-1)])

    def moved(right: int, down: int) -> v2.Transform:
        return v2.Lambda(
            lambda images: v2.functional.affine(images, angle=0, translate=[right, down], scale=1, shear=[0, 0])
        )

    match kind:
        case "noise":
            return v2.GaussianNoise(sigma=amount)
        case "blur":
            sigma = amount * side / 32
            return v2.GaussianBlur(2 * max(1, round(3 * sigma)) + 1, (sigma, sigma))
        case "brightness" | "darkness":
            return v2.ColorJitter(brightness=(amount, amount))
        case "contrast":
            return v2.ColorJitter(contrast=(amount, amount))
        case "jpeg":
            return v2.Lambda(lambda images: torch.stack([_compressed(image, amount) for image in images]))
        case "pixelation":
            shrunken = v2.Resize(int(amount * side), antialias=True)
            return v2.Compose([shrunken, v2.Resize(side, InterpolationMode.NEAREST_EXACT)])
        case "shift":
            step = round(amount * side)
            return v2.Compose([either(lambda sign: moved(sign * step, 0)), either(lambda sign: moved(0, sign * step))])
        case "rotation":
            return either(lambda sign: v2.RandomRotation((sign * amount,) * 2, InterpolationMode.BILINEAR))
        case "occlusion":
            return v2.RandomErasing(p=1, scale=(amount, amount), ratio=(1, 1))


def _compressed(image: Tensor, quality: int) -> Tensor:
    """The picture (3, S, S) through JPEG; by Pillow, as torchvision 0.29 announces the end of its own."""
    file = io.BytesIO()
    Image.fromarray(image.permute(1, 2, 0).numpy()).save(file, "JPEG", quality=quality)
    with Image.open(file) as picture:
        return torch.from_numpy(np.array(picture)).permute(2, 0, 1)
