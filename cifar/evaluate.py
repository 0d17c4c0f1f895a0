"""Logits to metrics: accuracy with its interval, scores by class, calibration, test-time augmentation.

scikit-learn and SciPy's statistics are imported where they are used, as datasets.py says.
"""

import math
from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from scipy.special import log_softmax, softmax
from torch import Tensor, nn

from cifar import analysis, checkpoint, data, datasets, device, distributed, model, predictions, saliency
from cifar.config import UserError, some
from cifar.runs import Run

_BATCH_PIXELS = 500 * 32**2  # of the images computed at once; more leave the processor's caches
_BINS = 15
_UNSURE_SHARE = 0.05  # of the validation images, on which the network is called unsure
# The calibrated confidence from which views of an image are not looked at: on 25,000 validation images of five runs
# they changed no prediction. It spares four fifths of them for a network that is 94% right.
_SURE = 0.95


def evaluate(run: Run, dataset: datasets.Dataset, device_name: str) -> dict[str, Any]:
    """Measure the run's best.pt on the test split; write and return metrics.json.

    Also writes predictions.csv, classification_report.txt, analysis.json, and saliency.npz for the pictures that it
    names. The temperature is fitted on validation.
    Raises UserError if the run has no checkpoint, or the dataset is not the run's.
    """
    from sklearn.metrics import classification_report

    device.keep_freed_memory()
    run.check_dataset(dataset.name)
    if dataset.train.sha256() != run.dataset["train_sha256"]:
        raise UserError(f"the training images of {dataset.name} are not those that {run.path.name} was trained on")
    config = datasets.settle(run.config, dataset)  # what does not fit is refused
    network, content = load(run, dataset.classes)
    hardware = device.choose(device_name)
    network.to(hardware)
    precision = device.resolve_precision(config.precision, hardware)
    val, test = data.hold_out(dataset.train, config.val_size, config.seed)[1], dataset.test
    for_all = {"mirrors": config.flip != "none", "precision": precision, "val": val, "images": test.images}
    described = (config.model, len(dataset.classes), content["image_size"], hardware.type)
    with distributed.helped(_help, *described, network.state_dict(), for_all):
        calibration, logits, logits_tta = _infer_all(network, **for_all)
    labels = test.labels.numpy()
    calibration |= calibration_error(logits.numpy(), labels, calibration["temperature"])
    probabilities = softmax(logits.double().numpy() / calibration["temperature"], axis=1)
    metrics = {
        "dataset": dataset.name,
        "recipe": config.recipe,
        "split": "test",
        "epoch": content["epoch"],
        "test_sha256": test.sha256(),
        **measure(logits.numpy(), logits_tta.numpy(), labels, dataset.classes),
        **analysis.scores(probabilities, labels, dataset.classes),
        "calibration": calibration,
    }
    report = classification_report(
        labels,
        logits.argmax(1).numpy(),
        labels=range(len(dataset.classes)),
        target_names=dataset.classes,
        digits=4,
        zero_division=0,
    )
    run.write_text("classification_report.txt", report)
    predictions.write(run, probabilities, dataset)
    details = analysis.analyse(probabilities, labels, dataset.classes, metrics["most_confused"])
    run.write("analysis.json", details)
    winners = {
        picture["index"]: int(probabilities[picture["index"]].argmax()) for picture in analysis.pictures(details)
    }
    saliency.write(run, network, test.images, winners, precision=precision)
    run.write("metrics.json", metrics)
    return metrics


def _help(name: str, classes: int, image_size: int, device_name: str, weights: dict, for_all: dict) -> None:
    """What another process does while the first is in `evaluate`."""
    device.keep_freed_memory()
    network = model.build(name, classes, image_size)
    network.load_state_dict(weights)
    _infer_all(network.to(device.choose(device_name)), **for_all)


def _infer_all(
    network: nn.Module, *, val: data.Split, images: Tensor, mirrors: bool, precision: str
) -> tuple[dict[str, Any], Tensor, Tensor]:
    """The calibration on validation, and the logits of the test images as they are and over views."""
    calibration = calibrate(infer(network, val.images, precision=precision).numpy(), val.labels.numpy())
    temperature = calibration["temperature"]
    return calibration, *infer_augmented(network, images, mirrors=mirrors, temperature=temperature, precision=precision)


def load(run: Run, classes: Sequence[str]) -> tuple[nn.Module, dict[str, Any]]:
    """The network with the run's best weights, on the CPU, and what else the checkpoint says.

    Raises UserError if the weights are missing, damaged or do not fit.
    """
    path = run.checkpoints / "best.pt"
    content = checkpoint.load(path)
    if content["classes"] != list(classes):
        raise UserError(f"the checkpoint {path} is for other classes: {some(content['classes'])}")
    if content["model"] != run.config.model:  # and nothing is imported that the user has not named
        raise UserError(f"the checkpoint {path} is of a network {content['model']}, not {run.config.model}")
    network = model.build(run.config.model, len(classes), content["image_size"])
    checkpoint.put_weights(path, content, network)
    return network, content


@torch.inference_mode()
def infer(network: nn.Module, images: Tensor, *, precision: str) -> Tensor:
    """uint8 images (N, 3, H, W) -> float32 logits (N, classes) on the CPU. Leaves the network in eval mode.

    Several processes share out whole batches, so that the logits have the bits that one process gives them.
    """
    network.eval()
    hardware = next(network.parameters()).device
    shown = images if len(images) else images.new_zeros(1, *images.shape[1:])  # not every network takes none
    parts = shown.split(max(1, _BATCH_PIXELS // images.shape[-2:].numel()))
    with device.autocast(hardware, precision):
        batches = [network(data.to_float(batch.to(hardware))).float() for batch in parts[distributed.share(len(parts))]]
    return torch.cat(distributed.gather([batch.cpu() for batch in batches]))[: len(images)]


def infer_augmented(
    network: nn.Module, images: Tensor, *, mirrors: bool, temperature: float, precision: str
) -> tuple[Tensor, Tensor]:
    """The logits (N, classes) of the images as they are, and their mean over views where the network is unsure.

    temperature: what makes its confidence calibrated. The views: the image, and it shifted by one pixel up and left,
    and down and right, for a half, a quarter and a quarter; each, where `mirrors`, also mirrored.
    Source: Jordan 2024, section 3.5.
    """
    plain = infer(network, images, precision=precision)
    unsure = (plain.double() / temperature).softmax(1).amax(1) < _SURE
    size, shown = images.shape[-1], images[unsure]
    padded = data.pad_border(shown, 1, "reflect")
    mean = torch.zeros_like(plain[unsure])
    for view, weight in ((shown, 0.5), (padded[..., :size, :size], 0.25), (padded[..., 2:, 2:], 0.25)):
        logits = plain[unsure] if view is shown else infer(network, view, precision=precision)
        if mirrors:
            logits = (logits + infer(network, view.flip(-1), precision=precision)) / 2
        mean += weight * logits
    augmented = plain.clone()
    augmented[unsure] = mean
    return plain, augmented


def accuracy(logits: Tensor, labels: Tensor) -> float:
    """The share, in 0..1, of logits (N, classes) whose largest is at the label (N,)."""
    return (logits.argmax(1) == labels).float().mean().item()


def measure(logits: np.ndarray, logits_tta: np.ndarray, labels: np.ndarray, classes: Sequence[str]) -> dict[str, Any]:
    """The metrics of logits (N, classes) and of their test-time augmented form against labels (N,), shares in 0..1.

    What is not called `tta` is from the plain logits.
    """
    from sklearn.metrics import classification_report, confusion_matrix

    numbers = range(len(classes))
    predicted = logits.argmax(1)
    # By number, as a class may be called "accuracy", which is a key of the report.
    report = classification_report(labels, predicted, labels=numbers, output_dict=True, zero_division=0)
    matrix = confusion_matrix(labels, predicted, labels=numbers)
    correct, correct_tta = int((predicted == labels).sum()), int((logits_tta.argmax(1) == labels).sum())
    return {
        "n": len(labels),
        "accuracy": correct / len(labels),
        "interval_95": wilson_interval(correct, len(labels)),
        "accuracy_tta": correct_tta / len(labels),
        "interval_95_tta": wilson_interval(correct_tta, len(labels)),
        "loss": F.cross_entropy(torch.from_numpy(logits), torch.from_numpy(labels)).item(),
        "per_class": {name: _scores(report[str(number)]) for number, name in enumerate(classes)},
        "macro_average": _scores(report["macro avg"]),
        "weighted_average": _scores(report["weighted avg"]),
        "most_confused": most_confused(matrix, classes),
        "confusion_matrix": matrix.tolist(),
    }


def wilson_interval(correct: int, total: int) -> tuple[float, float]:
    """The 95% confidence interval of a share (Wilson 1927), as two numbers in 0..1."""
    from scipy.stats import binomtest

    interval = binomtest(correct, total).proportion_ci(method="wilson")
    return float(interval.low), float(interval.high)


def most_confused(matrix: np.ndarray, classes: Sequence[str]) -> list[dict[str, Any]]:
    """The ten cells off the diagonal with the largest counts, largest first, and none that is zero."""
    wrong = matrix - np.diag(np.diag(matrix))
    order = np.argsort(-wrong, axis=None, kind="stable")[:10]
    cells = [np.unravel_index(cell, wrong.shape) for cell in order]
    return [
        {"true": classes[row], "predicted": classes[column], "count": int(wrong[row, column])}
        for row, column in cells
        if wrong[row, column]
    ]


def calibrate(val_logits: np.ndarray, val_labels: np.ndarray) -> dict[str, Any]:
    """The temperature that makes confidence on validation fit accuracy, and the threshold of an answer.

    threshold: the confidence that all but `threshold_share` of the validation images reach, so that a picture
    below it is probably none of the classes. Without validation the temperature is 1 and there is no threshold.
    Source: Guo et al. 2017, arXiv:1706.04599.
    """
    temperature = fit_temperature(val_logits, val_labels) if len(val_labels) else 1.0
    confidence = softmax(val_logits / temperature, axis=1).max(1, initial=0)
    return {
        "temperature": temperature,
        "threshold": float(np.quantile(confidence, _UNSURE_SHARE)) if len(val_labels) else None,
        "threshold_share": _UNSURE_SHARE,
        "fitted_on": len(val_labels),
    }


def calibration_error(logits: np.ndarray, labels: np.ndarray, temperature: float) -> dict[str, Any]:
    """How far confidence is from accuracy, `before` and `after` the temperature, each as `reliability` gives it."""
    return {"before": reliability(logits, labels), "after": reliability(logits / temperature, labels)}


def fit_temperature(logits: np.ndarray, labels: np.ndarray) -> float:
    """The T, from 0.01 to 100, that minimizes the cross-entropy of logits (N, classes) / T against labels (N,)."""
    from scipy.optimize import minimize_scalar

    def loss(log_temperature: float) -> float:
        scaled = log_softmax(logits.astype(np.float64) / math.exp(log_temperature), axis=1)
        return -scaled[np.arange(len(labels)), labels].mean()

    return math.exp(minimize_scalar(loss, bounds=(math.log(0.01), math.log(100)), method="bounded").x)


def reliability(logits: np.ndarray, labels: np.ndarray) -> dict[str, Any]:
    """Expected calibration error, negative log-likelihood and the bins of the reliability diagram."""
    from sklearn.metrics import log_loss

    probabilities = softmax(logits.astype(np.float64), axis=1)
    confidence = probabilities.max(1)
    correct = probabilities.argmax(1) == labels
    edges = np.linspace(0, 1, _BINS + 1)
    places = np.digitize(confidence, edges[1:-1], right=True)
    bins = []
    for place, low in enumerate(edges[:-1]):
        inside = places == place
        count = int(inside.sum())
        means = [float(values[inside].mean()) if count else None for values in (confidence, correct)]
        bins.append({"low": float(low), "count": count, "confidence": means[0], "accuracy": means[1]})
    gaps = [bin["count"] * abs(bin["confidence"] - bin["accuracy"]) for bin in bins if bin["count"]]
    classes = range(probabilities.shape[1])
    likelihood = log_loss(labels, probabilities, labels=classes)
    return {"expected_calibration_error": sum(gaps) / len(labels), "negative_log_likelihood": likelihood, "bins": bins}


def _scores(row: dict[str, float]) -> dict[str, Any]:
    return {
        "precision": row["precision"],
        "recall": row["recall"],
        "f1": row["f1-score"],
        "support": int(row["support"]),
    }
