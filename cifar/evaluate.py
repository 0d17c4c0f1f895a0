"""A run's network on the test split, once: its logits with and without test-time augmentation, and what is kept.

scikit-learn is imported where it is used, as metrics.py says.
"""

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from scipy.special import softmax
from torch import Tensor, nn

from cifar import analysis, checkpoint, data, datasets, device, distributed, metrics, model, predictions, saliency
from cifar.errors import UserError, some
from cifar.runs import Run

_BATCH_PIXELS = 500 * 32**2  # of the images computed at once; more leave the processor's caches
# The calibrated confidence from which views of an image are not looked at: on 25,000 validation images of five runs
# they changed no prediction. It spares four fifths of them for a network that is 94% right.
_SURE = 0.95


def evaluate(run: Run, dataset: datasets.Dataset, device_name: str) -> dict[str, Any]:
    """Measure the run's best.pt on the test split; write and return metrics.json.

    Also writes predictions.csv, classification_report.txt, analysis.json, and saliency.npz for the pictures that it
    names. The temperature is fitted on validation.
    Raises UserError if the run has no checkpoint, or the dataset is not the run's.
    """
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
    calibration |= metrics.calibration_error(logits.numpy(), labels, calibration["temperature"])
    probabilities = softmax(logits.double().numpy() / calibration["temperature"], axis=1)
    measured = {
        "dataset": dataset.name,
        "recipe": config.recipe,
        "split": "test",
        "epoch": content["epoch"],
        "test_sha256": test.sha256(),
        **metrics.measure(logits.numpy(), logits_tta.numpy(), labels, dataset.classes),
        **analysis.scores(probabilities, labels, dataset.classes),
        "calibration": calibration,
    }
    details = analysis.analyse(probabilities, labels, dataset.classes, measured["most_confused"])
    run.write_text("classification_report.txt", _report(logits, labels, dataset.classes))
    predictions.write(run, probabilities, dataset)
    run.write("analysis.json", details)
    winners = {
        picture["index"]: int(probabilities[picture["index"]].argmax()) for picture in analysis.pictures(details)
    }
    saliency.write(run, network, test.images, winners, precision=precision)
    run.write("metrics.json", measured)
    return measured


def _report(logits: Tensor, labels: np.ndarray, classes: Sequence[str]) -> str:
    """scikit-learn's table of precision, recall and F1."""
    from sklearn.metrics import classification_report

    numbers, predicted = range(len(classes)), logits.argmax(1).numpy()
    return classification_report(labels, predicted, labels=numbers, target_names=classes, digits=4, zero_division=0)


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
    calibration = metrics.calibrate(infer(network, val.images, precision=precision).numpy(), val.labels.numpy())
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
