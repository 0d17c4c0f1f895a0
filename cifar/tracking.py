"""Curves and metrics of a training for TensorBoard, Weights & Biases or Trackio, with --track; none is a dependency."""

import contextlib
import importlib
import importlib.util
import io
import json
import warnings
from collections.abc import Callable, Iterator, Mapping
from typing import Any

from cifar import console, device
from cifar.errors import UserError, describe, display_path
from cifar.records import Metrics
from cifar.runs import Run

_PROJECT = "cifar"  # in which Weights & Biases and Trackio list the runs

Log = Callable[[Mapping[str, Any], int | None], None]  # takes values by name, and the epoch
Tracker = tuple[Log, Callable[[], Any], str]  # a function that logs, one that ends it, and how to see the curves


def require(name: str) -> None:
    """Raise UserError if the tracker's package is not installed."""
    # A folder of that name, such as the wandb/ of earlier runs, is found, too, but has no origin.
    if name != "none" and getattr(importlib.util.find_spec(name), "origin", None) is None:
        raise UserError(f"--track {name} needs a package that is not installed: `pip install {name}`")


@contextlib.contextmanager
def tracking(run: Run) -> Iterator[Log]:
    """Open the run's tracker, or the same again; yields a function that logs the numbers among some values.

    Of several processes rank 0 alone logs. Raises UserError if the tracker cannot start.
    """
    name = run.config.track
    if name == "none" or device.rank():
        yield lambda values, epoch: None
        return
    require(name)
    try:
        with _unseen_output():
            log, close, hint = _TRACKERS[name](run)
    except Exception as error:  # of many kinds: no login, no network, no space on the disk
        raise UserError(f"{name} cannot start: {describe(error)}") from None
    console.say(hint)
    try:
        yield lambda values, epoch: log(_numbers(values), epoch)
    finally:
        with _unseen_output():
            close()


def log_metrics(run: Run, metrics: Metrics) -> None:
    """Log the evaluation on the test split."""
    values = {f"test_{name}": getattr(metrics, name) for name in ("accuracy", "accuracy_tta", "loss")}
    values["test_expected_calibration_error"] = metrics.calibration.after.expected_calibration_error
    with tracking(run) as track:
        track(values, None)


def _numbers(values: Mapping[str, Any]) -> dict[str, float]:
    return {name: value for name, value in values.items() if isinstance(value, int | float)}


@contextlib.contextmanager
def _unseen_output() -> Iterator[None]:
    """Keep from the terminal what a tracker prints and warns of when it starts and ends; it cannot ask for a login."""
    unseen = io.StringIO()
    with warnings.catch_warnings(), contextlib.redirect_stdout(unseen), contextlib.redirect_stderr(unseen):
        warnings.simplefilter("ignore")
        yield


def _tensorboard(run: Run) -> Tracker:
    from torch.utils.tensorboard import SummaryWriter

    writer = SummaryWriter(str(run.path / "tensorboard"))
    writer.add_text("config", f"```json\n{json.dumps(run.config.model_dump(), indent=2)}\n```")

    def log(values: Mapping[str, Any], epoch: int | None) -> None:
        for name, value in values.items():
            writer.add_scalar(name, value, epoch)

    return log, writer.close, f"`tensorboard --logdir {display_path(run.path.parent)}` shows the curves"


def _wandb(run: Run) -> Tracker:
    wandb = importlib.import_module("wandb")
    options = {"id": run.path.name, "dir": run.path.parent, "settings": wandb.Settings(silent=True)}
    session = wandb.init(**_description(run), **options)
    offline = f"`wandb sync {display_path(session.dir)}/..` uploads the curves"
    return session.log, wandb.finish, f"curves at {session.url}" if session.url else offline


def _trackio(run: Run) -> Tracker:
    trackio = importlib.import_module("trackio")
    session = trackio.init(**_description(run), auto_log_gpu=False, auto_log_cpu=False)
    return session.log, trackio.finish, f"`trackio show --project {_PROJECT}` shows the curves"


def _description(run: Run) -> dict[str, Any]:
    """Return what both call a run: resumed if it is known."""
    return {"project": _PROJECT, "name": run.path.name, "config": run.config.model_dump(), "resume": "allow"}


_TRACKERS = {"tensorboard": _tensorboard, "wandb": _wandb, "trackio": _trackio}
