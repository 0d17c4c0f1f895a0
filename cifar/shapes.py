"""What the JSON files of a run's directory must look like before anything is made of them.

Only what is read is checked. A name that ends with "?" may be missing: earlier versions have not written it.
"""

from datetime import datetime
from itertools import chain
from typing import Any

ANY = "*"  # stands for every name
STATUSES = {"completed", "interrupted", "failed", "running", "killed"}


def share(value: Any) -> bool:
    """Whether it is a number from 0 to 1."""
    return type(value) in (int, float) and 0 <= value <= 1


def number(value: Any) -> bool:
    """Whether it is a number that can be drawn."""
    return type(value) in (int, float) and abs(value) < 1e100


def positive(value: Any) -> bool:
    """Whether it is a number over 0."""
    return number(value) and value > 0


def count(value: Any) -> bool:
    """Whether it is a whole number from 0 that a float holds too."""
    return type(value) is int and 0 <= value < 2**53


def threads(value: Any) -> bool:
    """Whether it is a number of threads that a machine may have."""
    return type(value) is int and 0 < value <= 4096


def interval(value: Any) -> bool:
    """Whether it is two shares."""
    return type(value) is list and len(value) == 2 and all(map(share, value))


def text(value: Any) -> bool:
    """Whether it is text that can be drawn, and so has no half of a character."""
    return type(value) is str and not any("\ud800" <= letter <= "\udfff" for letter in value)


def moment(value: Any) -> bool:
    """Whether it is a time in ISO 8601."""
    try:
        return bool(datetime.fromisoformat(value).astimezone())
    except (TypeError, ValueError, OverflowError):
        return False


RECORD = {
    "status": STATUSES,
    "start": moment,
    "end?": (moment, None),
    "seconds": {ANY: number},
    "error?": str,
    "note?": (str, None),
    "resumed?": list,
    "seconds_before_resuming?": {ANY: number},
    "command?": [str],
    "commit?": (str, None),
    "dirty?": bool,
    "versions?": {ANY: str},
    "platform?": str,
    "device?": str,
    "hardware?": str,
    "precision?": str,
    "threads?": threads,
    "processes?": threads,
    "premises?": (dict, None),
    "dataset?": {"name": text, "train_sha256": str, "classes": [text]},
    "model?": {
        "name": text,
        "parameters": count,
        "multiply_adds": count,
        "layers": [{"name": text, "kind": text, "output_shape": [count], "parameters": count, "multiply_adds": count}],
    },
}

_EPOCH = {
    "epoch": count,
    "image_size": count,
    "images?": count,
    "lr": number,
    "train_loss": number,
    "train_accuracy": share,
    "val_loss": (number, None),
    "val_accuracy": (share, None),
    "images_per_second": number,
    "seconds": number,
}

_MEAN = {"precision": share, "recall": share, "f1": share}
_CALIBRATION = {
    "expected_calibration_error": share,
    "negative_log_likelihood": number,
    "bins": [{"low": share, "count": count, "confidence": (share, None), "accuracy": (share, None)}],
}
_METRICS = {
    "dataset": text,
    "recipe": text,
    "split": text,
    "n": positive,
    "accuracy": share,
    "interval_95": interval,
    "accuracy_tta": share,
    "interval_95_tta": interval,
    "loss": number,
    "epoch?": count,
    "test_sha256?": (str, None),
    "per_class": {ANY: {**_MEAN, "support": count}},
    "macro_average": _MEAN,
    "most_confused": [{"true": text, "predicted": text, "count": count}],
    "confusion_matrix": [[count]],
    "average_precision?": {ANY: (share, None)},
    "selective?": {"area_under_risk_coverage": share, "coverage_at_99_accuracy": share},
    "calibration": {
        "temperature": positive,
        "threshold?": (share, None),
        "threshold_share?": share,
        "fitted_on": count,
        "before": _CALIBRATION,
        "after": _CALIBRATION,
    },
}

_PICTURE = {"index": count, "true": text, "predicted": text, "confidence": share, "true_probability": share}
_ANALYSIS = {
    "confused_pairs": [{"true": text, "predicted": text, "count": count, "pictures": [_PICTURE]}],
    "confident_mistakes": [_PICTURE],
    "suspected_labels": [_PICTURE],
    "precision_recall": {ANY: {"recall": [share], "precision": [share]}},
    "risk_coverage": {"coverage": [share], "risk": [share]},
}

_CELL = {"accuracy": share, "expected_calibration_error": share}
_CORRUPTIONS = {"n": count, "clean": _CELL, "mean": _CELL, "corruptions": {ANY: [_CELL]}}

_SPREAD = {"mean": number, "standard_deviation": number}
_SUMMARY = {
    "status": STATUSES,
    "note?": (str, None),
    "config": dict,
    "minutes?": (number, None),
    "figures?": {"accuracy": _SPREAD, "accuracy_tta": _SPREAD},
}
_SHAPES = {
    "run.json": RECORD,
    "history.jsonl": [_EPOCH],
    "metrics.json": _METRICS,
    "analysis.json": _ANALYSIS,
    "corruptions.json": _CORRUPTIONS,
    "summary.json": _SUMMARY,
}


def problem(name: str, content: Any) -> str | None:
    """What is wrong with the content of a run's file of that name, if anything is."""
    if name not in _SHAPES:
        return None
    if place := _misfit(content, _SHAPES[name], name):
        return f"its {place.removeprefix(name + '.')} is missing or not what it should be"
    return None if _AGREEMENTS.get(name, lambda _: True)(content) else "it contradicts itself"


def _epochs_agree(history: list[dict[str, Any]]) -> bool:
    """Whether it has all epochs from the first, and validation in all of them or in none."""
    unknown = {line[key] is None for line in history for key in ("val_loss", "val_accuracy")}
    return [line["epoch"] for line in history] == list(range(1, len(history) + 1)) and len(unknown) < 2


def _metrics_agree(metrics: dict[str, Any]) -> bool:
    """Whether everything has an entry for each class, and the confusion matrix comes to the accuracy."""
    matrix, classes = metrics["confusion_matrix"], metrics["per_class"].keys()
    if [len(row) for row in matrix] != [len(classes)] * len(classes):
        return False
    right = sum(row[place] for place, row in enumerate(matrix))
    bins = [metrics["calibration"][key]["bins"] for key in ("before", "after")]
    return (
        sum(map(sum, matrix)) == metrics["n"]
        and abs(right - metrics["accuracy"] * metrics["n"]) < 0.5
        and metrics.get("average_precision", metrics["per_class"]).keys() == classes
        and all(bins)
        and all(None not in bin.values() for bin in chain(*bins) if bin["count"])
    )


def _curves_agree(analysis: dict[str, Any]) -> bool:
    """Whether curves have as many points along one axis as along the other."""
    answered, curves = analysis["risk_coverage"], analysis["precision_recall"].values()
    pairs = [(answered["coverage"], answered["risk"]), *((one["recall"], one["precision"]) for one in curves)]
    return all(len(along) == len(up) > 0 for along, up in pairs)


def _table_agrees(corruptions: dict[str, Any]) -> bool:
    """Whether it is a table: each kind with the same severities."""
    lengths = {len(rows) for rows in corruptions["corruptions"].values()}
    return len(lengths) == 1 and 0 not in lengths


_AGREEMENTS = {
    "history.jsonl": _epochs_agree,
    "metrics.json": _metrics_agree,
    "analysis.json": _curves_agree,
    "corruptions.json": _table_agrees,
}


def _misfit(value: Any, shape: Any, place: str) -> str | None:
    """The place, in dots, at which a JSON value departs from a shape; None if it does nowhere.

    shape: a type or None; a set of what it may be; a function that accepts it; a tuple of shapes, one of which it must
    have; a list of the shape of each item; or a dict of the shapes of what must be there by its name.
    """
    if isinstance(shape, tuple):
        return place if all(_misfit(value, one, place) for one in shape) else None
    if isinstance(shape, list) and type(value) is list:
        parts = [(str(index), item, shape[0]) for index, item in enumerate(value)]
    elif isinstance(shape, dict) and type(value) is dict:
        parts = _parts(value, shape)
    else:
        return None if _is_of(value, shape) else place
    return next((found for name, part, inner in parts if (found := _misfit(part, inner, f"{place}.{name}"))), None)


def _parts(value: dict[str, Any], shape: dict[str, Any]) -> list[tuple[str, Any, Any]]:
    """Name, part and its shape; for a part that is missing, a shape that nothing has."""
    if ANY in shape:
        return [(name, part, shape[ANY] if text(name) else set()) for name, part in value.items()]
    named = [(name.removesuffix("?"), inner, name.endswith("?")) for name, inner in shape.items()]
    return [
        (name, value.get(name), inner if name in value else set())
        for name, inner, optional in named
        if name in value or not optional
    ]


def _is_of(value: Any, shape: Any) -> bool:
    if shape is None or isinstance(shape, type):
        return value is None if shape is None else type(value) is shape
    if isinstance(shape, set):
        return type(value) is str and value in shape
    return not isinstance(shape, list | dict) and shape(value)
