"""A run's mistakes, its likely label errors, the pixels that decided, and its robustness to corruptions.

scikit-learn, pandas and torchvision are imported inside the functions that use them: they take seconds.
"""

import functools
import io
from collections.abc import Callable, Iterator, Sequence
from itertools import chain
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image
from torch import Tensor, nn

from cifar import console, data, device, evaluate, metrics
from cifar.data import Dataset
from cifar.evaluate import Evaluation
from cifar.files import atomic_write, open_regular
from cifar.records import Analysis, Corruptions, ImageRecord, Metrics
from cifar.runs import Run, damaged

if TYPE_CHECKING:
    from pandas import DataFrame

_MAX_CORRUPTED = 2000  # test images
# The amount at severities 1 to 5. Those of noise, blur, contrast, jpeg and pixelation are CIFAR-10-C's (Hendrycks and
# Dietterich 2019, arXiv:1903.12261); the others are ours.
CORRUPTIONS: dict[str, tuple[float, ...]] = {
    "noise": (0.04, 0.06, 0.08, 0.09, 0.10),  # standard deviation, for images in 0..1
    "blur": (0.4, 0.6, 0.7, 0.8, 1.0),  # standard deviation in pixels, for images of 32x32
    "brightness": (1.2, 1.4, 1.6, 1.8, 2.0),  # factor
    "darkness": (0.8, 0.65, 0.5, 0.35, 0.2),  # factor
    "contrast": (0.75, 0.5, 0.4, 0.3, 0.15),  # factor
    "jpeg": (80, 65, 58, 50, 40),  # quality
    "pixelation": (0.95, 0.9, 0.85, 0.75, 0.65),  # fraction of the size
    "shift": (1 / 16, 2 / 16, 3 / 16, 4 / 16, 5 / 16),  # fraction of the size, in both directions
    "rotation": (5, 10, 15, 20, 30),  # degrees
    "occlusion": (0.05, 0.1, 0.15, 0.2, 0.3),  # fraction of the area
}


def write(run: Run, dataset: Dataset, evaluation: Evaluation) -> None:
    """Write analysis.json, and saliency.npz with the saliency of every image that it names."""
    probabilities, labels = evaluation.probabilities, dataset.test.labels.numpy()
    pairs = [pair.model_dump() for pair in evaluation.metrics.most_confused]
    run.write("analysis.json", analyze(probabilities, labels, dataset.classes, pairs, dataset.test_files))
    indices = list(dict.fromkeys(image.index for image in images(run.read("analysis.json"))))
    maps = np.zeros((len(indices), *dataset.test.images.shape[-2:]), np.uint8)
    for number, index in enumerate(indices):
        image, label = dataset.test.images[index], int(probabilities[index].argmax())
        maps[number] = saliency(evaluation.network, image, label, precision=evaluation.precision).mul(255).round()
    with atomic_write(run.path / "saliency.npz") as partial, partial.open("wb") as file:
        np.savez_compressed(file, index=np.array(indices, int), heat=maps)


def analyze(
    probabilities: np.ndarray,
    labels: np.ndarray,
    classes: Sequence[str],
    most_confused: Sequence[dict[str, Any]],
    files: Sequence[str] = (),
) -> dict[str, Any]:
    """Rank the mistakes and compute the precision-recall curves of probabilities (N, C): the content of analysis.json.

    most_confused: the pairs of metrics.json. files: of the images; none if they have no files of their own.
    """
    import pandas

    predicted, names = probabilities.argmax(1), np.array(classes, dtype=object)
    columns = {"index": np.arange(len(labels)), "true": names[labels], "predicted": names[predicted]}
    columns |= {"confidence": probabilities.max(1), "true_probability": probabilities[columns["index"], labels]}
    columns |= {"file": list(files)} if files else {}
    wrong = pandas.DataFrame(columns)[predicted != labels]
    # By log odds rather than confidence: of the first 30 test images of CIFAR-10 in a run of `fast`, people (CIFAR-10H,
    # Peterson et al. 2019) chose another class than the label for 9 by log odds and for 5 by confidence.
    log_odds = np.log(wrong.confidence) - np.log(wrong.true_probability.clip(np.finfo(float).tiny))
    pairs = []
    for pair in most_confused[:6]:
        is_pair = (wrong.true == pair["true"]) & (wrong.predicted == pair["predicted"])
        pairs.append({**pair, "pictures": _top(wrong[is_pair], "confidence", 8)})
    return {
        "confused_pairs": pairs,
        "confident_mistakes": _top(wrong, "confidence", 24),
        "suspected_labels": _top(wrong.assign(log_odds=log_odds), "log_odds", 30),
        "precision_recall": {
            classes[number]: _precision_recall(labels == number, probabilities[:, number])
            for number in np.unique(labels)
        },
    }


def _top(rows: "DataFrame", column: str, most: int) -> list[dict[str, Any]]:
    """Return the rows with the highest values of a column, highest first; the earlier of equal ones first."""
    return rows.sort_values(column, ascending=False, kind="stable")[:most].to_dict("records")


def _precision_recall(is_class: np.ndarray, probability: np.ndarray) -> dict[str, list[float]]:
    """Compute precision and recall of one class at the first threshold for each percent of recall, to four decimals.

    A class of few images has as few points.
    """
    from sklearn.metrics import precision_recall_curve

    precision, recall, _ = precision_recall_curve(is_class, probability)
    precision, recall = precision[::-1], recall[::-1]  # recall rises
    indices = np.unique(np.searchsorted(recall, np.arange(1, 101) / 100 - 1e-12))
    return {"recall": recall[indices].round(4).tolist(), "precision": precision[indices].round(4).tolist()}


def read(run: Run, metrics: Metrics | None) -> Analysis | None:
    """Read the run's analysis.json; None if it has none. Raises UserError if it is damaged or contradicts `metrics`."""
    analysis = run.read_if_present("analysis.json")
    if analysis and metrics:
        ranked = {name for name, score in (metrics.average_precision or {}).items() if score is not None}
        if metrics.selective is None or ranked != analysis.precision_recall.keys():
            raise damaged(run.path / "analysis.json", "it does not match metrics.json")
    return analysis


def images(analysis: Analysis) -> Iterator[ImageRecord]:
    """Yield every image that the analysis names, some of them more than once."""
    pictures = (pair.pictures for pair in analysis.confused_pairs)
    return chain(*pictures, analysis.confident_mistakes, analysis.suspected_labels)


def saliency(network: nn.Module, image: Tensor, label: int, *, precision: str) -> Tensor:
    """Measure how much each pixel changes the logit of a class: (S, S), float32 in 0..1, the largest 1.

    image: uint8 (3, S, S). The gradient's largest absolute value over the channels, averaged over 8 noisy copies of
    the image and over 3x3 pixels. Source: SmoothGrad, Smilkov et al. 2017, arXiv:1706.03825.
    """
    network.eval()
    target = next(network.parameters()).device
    noise = 0.1 * torch.randn(8, *image.shape, generator=torch.Generator().manual_seed(0))  # for images in 0..1
    copies = (data.to_float(image[None]) + noise).to(target, memory_format=torch.channels_last).requires_grad_()
    with device.autocast(target, "float32" if precision == "float16" else precision):  # else small gradients vanish
        logit = network(copies)[:, label].float().sum()
    (gradient,) = torch.autograd.grad(logit, copies)
    strength = gradient.abs().amax(1).mean(0, keepdim=True)
    smooth = F.avg_pool2d(strength, 3, stride=1, padding=1, count_include_pad=False)[0]
    return (smooth / smooth.max().clamp_min(1e-30)).cpu()


def overlay(image: np.ndarray, saliency: np.ndarray) -> np.ndarray:
    """Lay saliency (S, S) in orange over the image (S, S, 3) in grey; squared, so that the peaks stand out."""
    grey = (image @ np.asarray(data.LUMA_WEIGHTS))[..., None]
    opacity = saliency[..., None] ** 2 * 0.9
    return (grey * (1 - opacity) + np.array([0xD5, 0x5E, 0x00]) * opacity).astype(np.uint8)


def read_saliency(run: Run, size: int) -> dict[int, np.ndarray]:
    """Read saliency.npz: index in the test split -> (size, size) in 0..1; empty if there is no file.

    Raises UserError if the file is damaged or holds another size.
    """
    path = run.path / "saliency.npz"
    if not path.exists():
        return {}
    try:
        with open_regular(path) as file, np.load(file) as content:
            if sum(member.file_size for member in content.zip.infolist()) > 1e8:  # 100 maps of 128x128 take 1.6 MB
                raise ValueError("too large")
            indices, maps = content["index"], content["heat"]
        if len(indices) and (maps.shape != (len(indices), size, size) or maps.dtype != np.uint8):
            raise ValueError("wrong shape or type")
        return {int(index): saliency / 255 for index, saliency in zip(indices, maps)}
    except Exception:  # NumPy and zipfile fail on a damaged archive in many ways
        raise damaged(path, "it does not hold one saliency map per image") from None


def measure_corruptions(run: Run, dataset: Dataset, device_name: str) -> Corruptions:
    """Measure accuracy and calibration of the run's best weights under each corruption; write corruptions.json.

    Takes at most 2,000 test images, drawn by the run's seed. Raises UserError if the run has not been evaluated, or the
    dataset is not the run's.
    """
    run.check_dataset(dataset.name)
    temperature, seed = run.metrics.calibration.temperature, run.config.seed
    network, _, precision = evaluate.load_network(run, dataset.classes, device_name)
    order = torch.randperm(len(dataset.test), generator=torch.Generator().manual_seed(seed))
    split = dataset.test[order[:_MAX_CORRUPTED]]

    def measure(change: Callable[..., Tensor]) -> dict[str, float]:
        parts = (change(part.images, seed=seed + number) for number, part in enumerate(split.chunks()))
        logits = torch.cat([evaluate.infer(network, images, precision=precision) for images in parts])
        error = metrics.reliability(logits.numpy() / temperature, split.labels.numpy())["expected_calibration_error"]
        accuracy = (logits.argmax(1) == split.labels).float().mean().item()
        return {"accuracy": accuracy, "expected_calibration_error": error}

    table: dict[str, list[dict[str, float]]] = {kind: [] for kind in CORRUPTIONS}
    with console.counting_bar("corruptions", sum(map(len, CORRUPTIONS.values()))) as advance:
        for kind, amounts in CORRUPTIONS.items():
            for severity, amount in enumerate(amounts, start=1):
                measured = measure(functools.partial(corrupt, kind=kind, amount=amount))
                table[kind].append({"severity": severity, "amount": amount, **measured})
                advance(1)
    clean, cells = measure(lambda images, seed: images), list(chain(*table.values()))
    mean = {key: float(np.mean([cell[key] for cell in cells])) for key in clean}
    content = {"dataset": dataset.name, "split": "test", "n": len(split), "seed": seed, "temperature": temperature}
    run.write("corruptions.json", content | {"clean": clean, "mean": mean, "corruptions": table})
    return run.read("corruptions.json")


def corrupt(images: Tensor, kind: str, amount: float, seed: int) -> Tensor:
    """Corrupt uint8 images (N, 3, S, S); the same shape and type.

    A seed makes the same random choices for every amount, one direction or position for 20 images: one by one takes
    as long as the network. Torch's global generator is left untouched.
    """
    transform = _corruption(kind, amount, images.shape[-1])
    with data.seeded(seed):
        return torch.cat([transform(batch) for batch in images.split(20)])


def _corruption(kind: str, amount: float, size: int) -> Callable[[Tensor], Tensor]:
    """Return the torchvision transform of a corruption, for images (N, 3, size, size)."""
    from torchvision.transforms import InterpolationMode, v2

    def shift(right: float, down: float) -> Callable[[Tensor], Tensor]:
        move = [round(right * size), round(down * size)]
        return lambda images: v2.functional.affine(images, angle=0, translate=move, scale=1, shear=[0, 0])

    match kind:
        case "noise":
            return v2.GaussianNoise(sigma=amount)
        case "blur":
            sigma = amount * size / 32
            return v2.GaussianBlur(2 * max(1, round(3 * sigma)) + 1, (sigma, sigma))
        case "brightness" | "darkness":
            return v2.ColorJitter(brightness=(amount, amount))
        case "contrast":
            return v2.ColorJitter(contrast=(amount, amount))
        case "jpeg":
            return lambda images: torch.stack([_through_jpeg(image, int(amount)) for image in images])
        case "pixelation":
            smaller = v2.Resize(int(amount * size), antialias=True)
            return v2.Compose([smaller, v2.Resize(size, InterpolationMode.NEAREST_EXACT)])
        case "shift":
            sideways = v2.RandomChoice([shift(amount, 0), shift(-amount, 0)])
            return v2.Compose([sideways, v2.RandomChoice([shift(0, amount), shift(0, -amount)])])
        case "rotation":
            turns = [v2.RandomRotation((angle, angle), InterpolationMode.BILINEAR) for angle in (amount, -amount)]
            return v2.RandomChoice(turns)
        case "occlusion":
            return v2.RandomErasing(p=1, scale=(amount, amount), ratio=(1, 1))
    raise ValueError(f"unknown corruption {kind}")


def _through_jpeg(image: Tensor, quality: int) -> Tensor:
    """Compress and decompress an image (3, S, S), with Pillow: torchvision 0.29 deprecates its own JPEG transform."""
    file = io.BytesIO()
    Image.fromarray(image.permute(1, 2, 0).numpy()).save(file, "JPEG", quality=quality)
    with Image.open(file) as decoded:
        return torch.from_numpy(np.array(decoded)).permute(2, 0, 1)


def show_corruptions(corruptions: Corruptions) -> None:
    """Print accuracy by corruption and severity, the mildest corruption first."""
    rows: list[list[Any]] = []
    for kind, cells in corruptions.corruptions.items():
        accuracies = [cell.accuracy for cell in cells]
        error = np.mean([cell.expected_calibration_error for cell in cells])
        rows.append([kind, *accuracies, np.mean(accuracies), error])
    kinds, *values = zip(*sorted(rows, key=lambda row: -row[-2]))
    heads = [*map(str, range(1, len(values) - 1)), "mean", "calibration error"]
    columns = {head: [f"{value:.1%}" for value in column] for head, column in zip(heads, values)}
    title = f"accuracy by corruption and severity: {corruptions.dataset}, {corruptions.n:,} test images"
    console.out.print(console.table(title, {"corruption": kinds, **columns}))
    console.say(f"mean accuracy {corruptions.mean.accuracy:.1%}; on the clean images {corruptions.clean.accuracy:.1%}")
