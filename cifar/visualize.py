"""Which figures a run has: what it has saved, drawn into its figures/ as PNGs."""

from collections.abc import Iterator
from pathlib import Path

import matplotlib.style
from matplotlib.figure import Figure

from cifar import analysis, charts, diagram, mosaics, predictions
from cifar.datasets import Dataset
from cifar.errors import UserError
from cifar.files import replacing
from cifar.runs import Run


def visualize(run: Run, dataset: Dataset) -> list[Path]:
    """Draw what the run has saved into its figures/, leaving out what it has not, and return the files.

    The test split is opened only if the run has predictions. Raises UserError if the dataset is not the run's,
    nothing has been measured yet, predictions.csv does not fit the test split, or a file cannot be written.
    """
    run.check_dataset(dataset.name)
    with matplotlib.style.context(charts.STYLE):
        return [_save(figure, run.figures / f"{name}.png") for name, figure in _figures(run, dataset)]


def _figures(run: Run, dataset: Dataset) -> Iterator[tuple[str, Figure]]:
    """Name and figure, one after the other so that one is in memory at a time. All files are read before the first."""
    history, network, subject = run.history(), run.record.get("model"), f"{run.config.title} on {dataset.name}"
    metrics, harmed = run.read_if_there("metrics.json"), run.read_if_there("corruptions.json")
    details = analysis.read(run, metrics)
    predicted = predictions.read(run, dataset)
    if not (history or metrics or predicted):
        raise UserError(f"{run.path.name} has nothing to draw: it has neither a finished epoch nor an evaluation")
    if history:
        yield "training_history", charts.training_history(history, subject)
    if metrics:
        yield "confusion_matrix", charts.confusion_matrix(metrics, subject)
        yield "per_class_metrics", charts.per_class_metrics(metrics, subject)
    if metrics and details:
        yield "precision_recall", charts.precision_recall(details["precision_recall"], metrics, subject)
    if predicted:
        yield "misclassified", mosaics.misclassified(predicted, dataset, subject)
    yield "dataset_samples", mosaics.dataset_samples(dataset, subject)
    if predicted:
        yield "sample_predictions", mosaics.sample_predictions(predicted, dataset, subject)
    if network:
        yield "architecture", diagram.architecture(network, subject)
    if metrics:
        yield "calibration", charts.calibration(metrics["calibration"], subject)
    if metrics and details:
        yield "risk_coverage", charts.risk_coverage(details["risk_coverage"], metrics, subject)
    if harmed:
        yield "corruptions", charts.corruptions(harmed, subject)


def _save(figure: Figure, path: Path) -> Path:
    with replacing(path) as partial:
        path.parent.mkdir(exist_ok=True)
        figure.savefig(partial, format="png")
    return path
