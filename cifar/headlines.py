"""The figures by which runs are known: of one run, and of all runs of a folder, whatever state they are in."""

import functools
from datetime import datetime
from pathlib import Path
from typing import Any

from cifar import outputs, runs
from cifar.errors import UserError, known_name
from cifar.runs import Run

COLUMNS = "run", "status", "accuracy", "views", "seconds", "seed", "epochs", "loss", "calibration", "recipe", "dataset"
SHARES = "accuracy", "accuracy_tta", "expected_calibration_error"
_LARGEST_FIRST = ("accuracy", "views", "epochs", "start")
_IN_METRICS = {
    "accuracy": ("accuracy",),
    "accuracy_tta": ("accuracy_tta",),
    "loss": ("loss",),
    "expected_calibration_error": ("calibration", "after", "expected_calibration_error"),
}


def headline(run: Run) -> dict[str, float | None]:
    """The figures of a run, None those that it does not have. Raises UserError if a file of it is damaged."""
    return {**_measured(run), **_timed(run)}


def _measured(run: Run) -> dict[str, float | None]:
    metrics = run.read_if_there("metrics.json")
    return {name: metrics and functools.reduce(dict.__getitem__, path, metrics) for name, path in _IN_METRICS.items()}


def _timed(run: Run) -> dict[str, float | None]:
    seconds = run.record["seconds"]
    return {"seconds_train": seconds.get("train"), "seconds": sum(seconds.values())}


def columns(sort: str | None) -> list[str]:
    """The columns in the order of their weight; the one that is sorted by is third at least."""
    return sorted(COLUMNS, key=lambda column: 1.5 if column == sort else COLUMNS.index(column))


def table(output_dir: str, sort: str | None = None) -> list[dict[str, Any]]:
    """A row for each run of a folder and of the groups in it: COLUMNS, and `damaged`, the files that cannot be read.

    Newest first, or by a column: the best first, or by the alphabet. Raises UserError if there is no such column, or
    no run.
    """
    column = known_name("column", sort, COLUMNS) if sort else "start"
    rows = [_row(Run(place)) for place in outputs.directories(Path(output_dir))]
    if not rows:
        raise UserError(f"there is no run in {output_dir}: make one with `python main.py`")
    known = [row for row in rows if row[column] is not None]
    known.sort(key=lambda row: row[column], reverse=column in _LARGEST_FIRST)
    return known + [row for row in rows if row[column] is None]


def _row(run: Run) -> dict[str, Any]:
    row = {**dict.fromkeys((*COLUMNS, "start")), "run": run.path.name, "damaged": []}
    for file, read in _READERS.items():
        try:
            row |= read(run)
        except UserError:
            row["damaged"].append(file)
    return row


def _of_record(run: Run) -> dict[str, Any]:
    return {
        "start": datetime.fromisoformat(run.record["start"]).astimezone(),
        "status": run.status(),
        "seconds": _timed(run)["seconds"],
    }


def _of_config(run: Run) -> dict[str, Any]:
    config = run.config
    return {"recipe": config.title, "dataset": Path(config.dataset).name, "seed": config.seed}


def _of_history(run: Run) -> dict[str, Any]:
    return {"epochs": len(run.history())}


def _of_metrics(run: Run) -> dict[str, Any]:
    accuracy, views, loss, calibration = _measured(run).values()
    return {"accuracy": accuracy, "views": views, "loss": loss, "calibration": calibration}


_READERS = {
    "run.json": _of_record,
    "config.json": _of_config,
    "history.jsonl": _of_history,
    "metrics.json": _of_metrics,
}


def groups(output_dir: str) -> list[dict[str, Any]]:
    """A row for each group of seeds, newest first: name, status, mean and deviation of both accuracies."""
    return [{"group": path.name, **_of_summary(path / runs.SUMMARY)} for path in outputs.groups(Path(output_dir))]


def _of_summary(file: Path) -> dict[str, Any]:
    try:
        status, figures = outputs.group_status(file.parent), runs.read_json(file).get("figures")
        spreads = {
            name: [figures[name][key] for key in ("mean", "standard_deviation")] if figures else None
            for name in ("accuracy", "accuracy_tta")
        }
        return {"status": status, **spreads}
    except UserError:
        return {"status": f"damaged: {file.name}", "accuracy": None, "accuracy_tta": None}
