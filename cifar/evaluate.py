"""Inference, test-time augmentation (TTA), and the evaluation of a run on the test split.

scikit-learn and pandas are imported where they are used: they take a second, and `invoke predict` would wait for them.
"""

import contextlib
import io
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
import torch.nn.functional as F
from scipy.special import softmax
from torch import Tensor, nn

from cifar import checkpoint, console, data, device, metrics, model
from cifar.errors import UserError, csv_cell, listing
from cifar.files import read
from cifar.records import Calibration, Metrics, Reliability
from cifar.runs import Run, damaged

if TYPE_CHECKING:
    import pandas

# Of the images computed at once: more do not fit into a processor's caches, and fewer do not fill a GPU.
_BATCH_PIXELS, _GPU_BATCH_PIXELS = 500 * 32**2, 2000 * 32**2
# TTA is for images whose calibrated confidence is below this: on 25,000 validation images of five runs it changed no
# prediction above it. That spares four fifths of TTA for a network that is right in 94%.
_TTA_CONFIDENCE = 0.95
PREDICTIONS = "predictions.csv"
# Then come, for a folder of images, the file, and the probabilities of all classes.
_COLUMNS = {"index": int, "true": str, "predicted": str, "confidence": float}


@dataclass(frozen=True)
class Evaluation:
    """The results of `evaluate`, which the analysis takes."""

    metrics: Metrics
    probabilities: np.ndarray  # calibrated, float64 (N, classes), of the test split
    network: nn.Module  # on the device, in eval mode
    precision: str


def validate(network: nn.Module, val_set: data.Split, precision: str) -> dict[str, Any]:
    """Compute val_loss (cross-entropy) and val_accuracy (0..1); None where nothing is held out.

    Of several processes, each computes its slice of the images.
    """
    if not len(val_set):
        return {"val_loss": None, "val_accuracy": None}
    device.broadcast_buffers(network)
    own = val_set[device.rank_slice(len(val_set))]
    logits = infer_split(network, own, precision=precision)
    sums = [F.cross_entropy(logits, own.labels, reduction="sum"), (logits.argmax(1) == own.labels).sum()]
    loss, accuracy = (device.all_reduce(torch.stack([value.double() for value in sums])) / len(val_set)).tolist()
    return {"val_loss": loss, "val_accuracy": accuracy}


Advance = Callable[[float], None]  # is told how many more images are done


@torch.inference_mode()
def infer(network: nn.Module, images: Tensor, *, precision: str, advance: Advance = lambda images: None) -> Tensor:
    """Compute float32 logits (N, classes), on the CPU, of uint8 images (N, 3, H, W). Sets the network to eval mode."""
    network.eval()
    hardware = next(network.parameters()).device
    inputs = images if len(images) else images.new_zeros(1, *images.shape[1:])  # not every network takes none
    pixels = _BATCH_PIXELS if hardware.type == "cpu" else _GPU_BATCH_PIXELS
    batches = inputs.split(max(1, pixels // images.shape[-2:].numel()))
    logits = []
    with device.autocast(hardware, precision):
        for batch in batches:
            logits.append(network(data.to_float(batch.to(hardware))).float())
            advance(len(batch))
    return torch.cat(logits).cpu()[: len(images)]


def infer_split(network: nn.Module, split: data.Split, **options: Any) -> Tensor:
    """Compute the logits of a split of any size, as `infer`."""
    return torch.cat([infer(network, part.images, **options) for part in split.chunks()])


def infer_tta(
    network: nn.Module,
    images: Tensor,
    *,
    flips: bool,
    temperature: float,
    precision: str,
    advance: Advance = lambda images: None,
) -> tuple[Tensor, Tensor]:
    """Compute logits (N, classes) without and with test-time augmentation.

    TTA takes the mean over the image and two copies shifted by one pixel, up and left, and down and right, weighted
    2:1:1, and with `flips` over each one's mirror image too; only where the confidence at this temperature is low.
    Advances by two for each image in all. Source: Jordan 2024, section 3.5.
    """
    plain = infer(network, images, precision=precision, advance=advance)
    is_unsure = (plain.double() / temperature).softmax(1).amax(1) < _TTA_CONFIDENCE
    size, unsure = images.shape[-1], images[is_unsure]
    if not len(unsure):
        advance(len(images))
        return plain, plain
    padded = data.pad_border(unsure, 1, "reflect")
    mean = torch.zeros_like(plain[is_unsure])
    views = ((unsure, 0.5), (padded[..., :size, :size], 0.25), (padded[..., 2:, 2:], 0.25))
    for copies, weight in views:
        logits = plain[is_unsure] if copies is unsure else infer(network, copies, precision=precision)
        if flips:
            logits = (logits + infer(network, copies.flip(-1), precision=precision)) / 2
        mean += weight * logits
        advance(len(images) / len(views))
    augmented = plain.clone()
    augmented[is_unsure] = mean
    return plain, augmented


def evaluate(run: Run, dataset: data.Dataset, device_name: str) -> Evaluation:
    """Measure the run's best.pt on the test split; writes metrics.json, predictions.csv, classification_report.txt.

    Raises UserError as `measure` does.
    """
    from sklearn.metrics import classification_report

    evaluation = measure(run, dataset, device_name)
    is_other = False
    with contextlib.suppress(UserError):  # a damaged metrics.json is replaced
        is_other = run.has_metrics and not run.metrics.can_be_of(dataset.test.sha256())
    if is_other:
        run.remove_evaluation()
    probabilities, labels, classes = evaluation.probabilities, dataset.test.labels.numpy(), dataset.classes
    options = {"labels": range(len(classes)), "target_names": list(map(console.printable, classes))}
    report = classification_report(labels, probabilities.argmax(1), **options, digits=4, zero_division=0)
    run.write_text("classification_report.txt", report)
    write_predictions(run, probabilities, labels, classes, dataset.test_files)
    run.write("metrics.json", evaluation.metrics.model_dump(exclude_unset=True))
    return evaluation


def measure(run: Run, dataset: data.Dataset, device_name: str) -> Evaluation:
    """Measure the run's best.pt on the test split; writes nothing. The temperature is fitted on validation.

    Raises UserError if the run has no checkpoint, the dataset is not the run's, or an output is not finite.
    """
    device.keep_freed_memory()
    run.check_dataset(dataset.name)
    if dataset.train.sha256() != run.dataset.train_sha256:
        others = f"the training images of {dataset.name} are not those that {run.path.name} was trained on"
        raise UserError(f"{others}: restore those, or train again")
    config, labels = run.config, dataset.test.labels.numpy()
    network, content, precision = load_network(run, dataset.classes, device_name)
    _, val_set = data.train_val_split(dataset.train, config.val_size or 0, config.seed)
    with console.counting_bar("evaluating", len(val_set) + 2 * len(labels)) as advance:
        val_logits = infer_split(network, val_set, precision=precision, advance=advance).numpy()
        calibration = metrics.calibrate(val_logits, val_set.labels.numpy())
        temperature, flips = calibration["temperature"], config.flip != "none"
        with_tta = partial(infer_tta, flips=flips, temperature=temperature, precision=precision, advance=advance)
        parts = [with_tta(network, part.images) for part in dataset.test.chunks()]
        logits, logits_tta = (torch.cat(results).numpy() for results in zip(*parts))
    if not np.isfinite([logits, logits_tta]).all():
        raise UserError("the network's outputs for the test images are not finite: train again with a lower --lr")
    probabilities = softmax(logits.astype(np.float64) / temperature, axis=1)
    measured = Metrics(
        dataset=dataset.name,
        recipe=config.recipe,
        split="test",
        epoch=content["epoch"],
        test_sha256=dataset.test.sha256(),
        **metrics.measure(logits, logits_tta, labels, dataset.classes),
        **metrics.ranking_scores(probabilities, labels, dataset.classes),
        calibration=Calibration(
            **calibration,
            before=Reliability(**metrics.reliability(logits, labels)),
            after=Reliability(**metrics.reliability(logits / temperature, labels)),
        ),
    )
    return Evaluation(measured, probabilities, network, precision)


def learning_problems(run: Run) -> list[str]:
    """Return warnings, with advice, if an evaluated run has learned nothing, or only its training images."""
    if not run.has_metrics or run.metrics.n < 10:
        return []
    metrics, kept, problems = run.metrics, run.kept_epoch, []
    chance = max(scores.support for scores in metrics.per_class.values()) / metrics.n  # by always naming that class
    if chance == 1:
        return []
    if sum(any(column) for column in zip(*metrics.confusion_matrix)) == 1:
        problems.append(
            "The network gives every test image the same class, so it has not learned to tell the classes apart: "
            "look at figures/dataset_samples.png, or try more --epochs or another --recipe."
        )
    if kept is not None and kept.val_accuracy is not None:
        above = [(accuracy - chance) / (1 - chance) for accuracy in (kept.train_accuracy, kept.val_accuracy)]
        if above[0] >= 0.25 and above[1] <= 0.1:
            problems.append(
                f"Validation accuracy is {kept.val_accuracy:.1%}, about what guessing gives ({chance:.1%}), at a "
                f"training accuracy of {kept.train_accuracy:.1%}: the network knows its training images and nothing "
                "beyond them. Check the labels, add images, or try another --recipe."
            )
    recall, guessed = metrics.macro_average.recall, 1 / len(metrics.per_class)  # which unequal classes do not raise
    is_chance = metrics.interval_95[0] <= chance <= metrics.interval_95[1]
    if not problems and is_chance and recall - guessed <= 0.25 * (1 - guessed):
        problems.append(
            f"Test accuracy is {metrics.accuracy:.1%}, which cannot be told from guessing ({chance:.1%}): the network "
            f"has learned too little, or {metrics.n:,} test images are too few. Try more --epochs or images."
        )
    return problems


def load_network(run: Run, classes: Sequence[str], device_name: str = "cpu") -> tuple[nn.Module, dict[str, Any], str]:
    """Build the network with the run's best weights on a device; returns it, the checkpoint's content, and a precision.

    Raises UserError if the weights are missing, damaged or do not fit.
    """
    path = run.checkpoints / "best.pt"
    content = checkpoint.load(path)
    if content["classes"] != list(classes):
        raise UserError(f"the checkpoint {path} is for other classes: {listing(content['classes'])}")
    if content["model"] != run.config.model:  # so nothing is imported that config.json does not name
        raise UserError(f"the checkpoint {path} is of the network {content['model']}, not {run.config.model}")
    network = model.build(run.config.model, len(classes), content["image_size"], run.config.is_pretrained)
    checkpoint.load_weights(path, content, network)
    hardware = device.choose(device_name)
    return network.to(hardware), content, device.resolve_precision(run.config.precision, hardware)


def write_predictions(
    run: Run, probabilities: np.ndarray, labels: np.ndarray, classes: Sequence[str], files: Sequence[str] = ()
) -> None:
    """Write predictions.csv: a row per test image with its calibrated probabilities (N, classes)."""
    import pandas

    names = np.array([csv_cell(name) for name in classes], dtype=object)
    winners = probabilities.argmax(1)
    columns = {"index": range(len(labels)), "true": names[labels], "predicted": names[winners]}
    columns |= {"confidence": probabilities.max(1)}
    columns |= {"file": [csv_cell(file) for file in files]} if files else {}
    scores = {f"{name} (class)" if name in columns else name: values for name, values in zip(names, probabilities.T)}
    table = pandas.DataFrame(columns | scores)
    run.write_text(PREDICTIONS, table.to_csv(index=False, float_format="%.6f", lineterminator="\r\n"))


def read_predictions(run: Run) -> "pandas.DataFrame":
    """Read index, true, predicted and confidence (0..1) of predictions.csv, classes by name.

    Raises UserError if the file is missing or damaged.
    """
    import pandas

    path = run.path / PREDICTIONS
    content = io.BytesIO(read(path))
    try:
        table = pandas.read_csv(content, usecols=list(_COLUMNS), dtype=_COLUMNS, index_col=False, keep_default_na=False)
        for column in ("true", "predicted"):
            table[column] = table[column].map(lambda cell: cell[1:] if cell == csv_cell(cell[1:]) else cell)
        if not table["confidence"].between(0, 1).all() or list(table["index"]) != list(range(len(table))):
            raise ValueError("rows are missing")
    except Exception:  # pandas has many exceptions for a damaged file
        raise damaged(path, "rows or columns are missing or invalid") from None
    return table
