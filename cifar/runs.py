"""The run directory: create, claim, record and finish it."""

import contextlib
import dataclasses
import json
import os
import re
import shlex
import tempfile
import time
from collections.abc import Iterator
from datetime import datetime
from pathlib import Path
from typing import Any, BinaryIO

from cifar import provenance, shapes, signals
from cifar.config import FIELDS, Config
from cifar.errors import UserError, short
from cifar.files import append, lock, parse_json, replacing, writing

RECORD, CONFIG, HISTORY, METRICS = "run.json", "config.json", "history.jsonl", "metrics.json"
# The settings without which a run would be taken for another: with a default, its validation split might be one that
# it was trained on.
_DECISIVE = ("recipe", "dataset", "seed", "val_size", "model", "flip", "precision")
_CURES = {  # what makes a file anew
    **dict.fromkeys((METRICS, "analysis.json", "predictions.csv", "saliency.npz"), "invoke evaluate"),
    "corruptions.json": "invoke evaluate --corruptions",
}
SUMMARY = "summary.json"  # of a group: a directory of runs that differ in the seed alone
_PATIENCE = 1.0  # seconds that a process waits for another's lock, which may be held for a glance


@dataclasses.dataclass(frozen=True)
class Run:
    """One run's directory and what is written in it."""

    path: Path

    @property
    def checkpoints(self) -> Path:
        return self.path / "checkpoints"

    @property
    def figures(self) -> Path:
        return self.path / "figures"

    @property
    def record(self) -> dict[str, Any]:
        """run.json: status, provenance, seconds per stage."""
        return self.read(RECORD)

    @property
    def has_metrics(self) -> bool:
        """Whether it has been evaluated."""
        return (self.path / METRICS).exists()

    @property
    def metrics(self) -> dict[str, Any]:
        """metrics.json. Raises UserError if the run has not been evaluated, or if the file is damaged."""
        if not self.has_metrics:
            raise UserError(f"{self.path.name} has not been evaluated: `{_remedy(self.path / METRICS)}` does it")
        return self.read(METRICS)

    def is_complete(self) -> bool:
        """Whether it has come to its end and been measured, and says so in files that are not damaged."""
        try:
            return self.status() == "completed" and bool(self.metrics)
        except UserError:
            return False

    @property
    def dataset(self) -> dict[str, Any]:
        """Name, classes and train_sha256 of what it was trained on. Raises UserError if run.json does not say."""
        record = self.record
        if "dataset" not in record:
            raise damaged(self.path / RECORD, "it does not say what the dataset was")
        return record["dataset"]

    def check_dataset(self, name: str) -> None:
        """Raise UserError unless the run was trained on the dataset of that name."""
        trained_on = Path(self.config.dataset).name
        if name != trained_on:
            raise UserError(f"{self.path.name} was trained on {trained_on}, not on {name}")

    @property
    def config(self) -> Config:
        """config.json as a Config. Raises UserError if a setting is unknown, out of range, or missing and needed."""
        settings = self.read(CONFIG)
        if unknown := settings.keys() - set(FIELDS):
            raise UserError(f"{self.path / CONFIG} has unknown settings: {', '.join(sorted(unknown))}")
        if missing := [name for name in _DECISIVE if settings.get(name) is None]:
            raise damaged(self.path / CONFIG, f"it lacks {', '.join(missing)}")
        return Config(**settings)

    def read(self, name: str) -> dict[str, Any]:
        """A JSON file of the run. Raises UserError if it is missing or damaged."""
        return read_json(self.path / name)

    def read_if_there(self, name: str) -> dict[str, Any] | None:
        """Likewise, but None if it is missing."""
        return self.read(name) if (self.path / name).exists() else None

    def write(self, name: str, content: dict[str, Any]) -> None:
        """Replace a JSON file of the run; a reader sees the old one or the new one, never a part."""
        write_json(self.path / name, content)

    def write_text(self, name: str, content: str) -> None:
        """Replace a text file of the run, likewise."""
        with replacing(self.path / name) as partial:
            partial.write_text(content, encoding="utf-8", newline="", errors="backslashreplace")

    def update(self, **changes: Any) -> None:
        """Set keys of run.json."""
        self.write(RECORD, {**self.record, **changes})

    def append_history(self, epoch: dict[str, Any]) -> None:
        """Add one epoch's line to history.jsonl, whole or not at all."""
        append(self.path / HISTORY, (json.dumps(epoch, allow_nan=False) + "\n").encode())

    def cut_history(self, epochs: int) -> None:
        """Leave nothing in history.jsonl but its first epochs. Raises UserError if it has not so many."""
        path = self.path / HISTORY
        with writing(path):
            lines = path.read_bytes().splitlines(keepends=True) if path.exists() else []
        kept = lines[:epochs]
        if [_epoch_of(line) for line in kept] != list(range(1, epochs + 1)):
            raise damaged(path, "it lacks epochs that the checkpoint has")
        if kept != lines:
            self.write_text(HISTORY, b"".join(kept).decode())

    def history(self) -> list[dict[str, Any]]:
        """The epochs of history.jsonl, first to last; empty if none has ended. Raises UserError for a damaged file."""
        path = self.path / HISTORY
        try:
            lines = path.read_text(encoding="utf-8").splitlines() if path.exists() else []
            history = [parse_json(line) for line in lines]
        except OSError as error:
            raise UserError(f"cannot read {path}: {error.strerror}") from None
        except ValueError:
            raise damaged(path, "a line is not JSON") from None
        if problem := shapes.problem(HISTORY, history):
            raise damaged(path, problem)
        return history

    @contextlib.contextmanager
    def stage(self, name: str) -> Iterator[None]:
        """Record the seconds that a stage took, in run.json."""
        started = time.perf_counter()
        try:
            yield
        except BaseException:
            with contextlib.suppress(UserError):  # the first error is the one to tell
                self._record_seconds(name, started)
            raise
        self._record_seconds(name, started)

    def _record_seconds(self, stage: str, started: float) -> None:
        record = self.record
        taken = time.perf_counter() - started + record.get("seconds_before_resuming", {}).get(stage, 0.0)
        self.update(seconds={**record["seconds"], stage: round(taken, 3)})

    def mark_resumed(self, epoch: int, step: int, train_seconds: float) -> None:
        """Record that the training goes on, now, after that step of the epoch, and how long it has taken so far."""
        resumed = [*self.record.get("resumed", []), {"time": now(), "epoch": epoch, "step": step}]
        self.update(resumed=resumed, seconds_before_resuming={"train": train_seconds})

    @property
    def resume_command(self) -> str:
        return f"python main.py --resume {shlex.quote(short(self.path))}"

    @contextlib.contextmanager
    def claim(self) -> Iterator[None]:
        """Keep other processes from writing into the run; the system ends that with this process, however it ends.

        Raises UserError if another process has claimed it.
        """
        with self._open_lock() as file:
            deadline = time.monotonic() + _PATIENCE
            while not lock(file):
                if time.monotonic() > deadline:
                    raise UserError(f"{self.path.name} is in use: another process writes into it")
                time.sleep(0.05)
            yield

    def _open_lock(self) -> BinaryIO:
        """config.json, the one file of the run that is never replaced, open to be locked."""
        path = self.path / CONFIG
        try:
            return path.open("r+b" if os.access(path, os.W_OK) else "rb")  # network file systems lock what is writable
        except OSError as error:
            raise UserError(f"cannot read {path}: {error.strerror}") from None

    def status(self) -> str:
        """running, completed, interrupted, failed or killed.

        A run that says that it is running, while no process has claimed it, is recorded as killed.
        """
        status = self.record["status"]
        if status != "running":
            return status
        with self._open_lock() as file:
            if not lock(file):
                return status
            if (status := self.record["status"]) != "running":  # by now
                return status
            last_sign = max(path.lstat().st_mtime for path in (self.path, *self.path.iterdir()))
            with contextlib.suppress(UserError):  # of a folder that cannot be written
                self.update(status="killed", end=_time(last_sign))
        return "killed"

    @contextlib.contextmanager
    def lifetime(self) -> Iterator[None]:
        """Claim the run and record how it ended: completed, interrupted or failed; then `latest` points at it.

        Raises Interrupted, with the command that continues the run, for Ctrl-C and SIGTERM.
        """
        with self.claim():
            self._begin()
            try:
                yield
            except KeyboardInterrupt as stop:
                with contextlib.suppress(UserError):
                    self._end(status="interrupted")
                message = f"interrupted: `{self.resume_command}` goes on with it"
                raise signals.Interrupted(signals.number_of(stop), message) from None
            except BaseException as error:
                with contextlib.suppress(UserError):
                    self._end(status="failed", error=str(error) or repr(error))
                raise
            self._end(status="completed")

    def _begin(self) -> None:
        """Take back the marks of an earlier end, and what a killed process has left half written."""
        record = self.record
        if record["status"] != "running":
            record.pop("error", None)
            self.write(RECORD, {**record, "status": "running", "end": None})
        for partial in self.path.rglob("*.partial"):
            with writing(partial):
                partial.unlink()

    def _end(self, **changes: Any) -> None:
        self.update(**changes, end=now())
        _point_latest(self)


def _epoch_of(line: bytes) -> int | None:
    """The epoch of a line of history.jsonl; None if it cannot be read."""
    with contextlib.suppress(ValueError, KeyError, TypeError):
        return parse_json(line)["epoch"] if line.endswith(b"\n") else None


def read_json(path: Path) -> dict[str, Any]:
    """What a JSON file of a run holds. Raises UserError if it is missing or damaged."""
    try:
        content = parse_json(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise UserError(f"cannot read {path}: {error.strerror}") from None
    except ValueError:
        content = None
    problem = shapes.problem(path.name, content) if isinstance(content, dict) else "it does not hold a JSON object"
    if problem:
        raise damaged(path, problem)
    return content


def damaged(path: Path, problem: str) -> UserError:
    """What to raise for a damaged file of a run: the sentence, with what makes the file anew."""
    remedy = _remedy(path)
    return UserError(f"{path} is damaged: {problem}" + (f"; `{remedy}` makes it anew" if remedy else ""))


def _remedy(path: Path) -> str | None:
    command = _CURES.get(path.name)
    return command and f"{command} --run {shlex.quote(short(path.parent))}"


def write_json(path: Path, content: dict[str, Any]) -> None:
    """Replace a JSON file; a reader sees the old one or the new one, never a part."""
    with replacing(path) as partial:
        partial.write_text(json.dumps(content, indent=2, allow_nan=False) + "\n", encoding="utf-8", newline="")


def check_writable(output_dir: str) -> None:
    """Raise UserError, before anything costs time, if runs cannot be written there."""
    try:
        Path(output_dir).mkdir(parents=True, exist_ok=True)
        tempfile.TemporaryFile(dir=output_dir).close()
    except OSError as error:
        raise UserError(f"cannot write to the output folder {output_dir}: {error.strerror}") from None


def create(config: Config, **facts: Any) -> Run:
    """A new run directory with config.json and run.json, which also receives the `facts`.

    config: with `dataset` resolved. Two runs in one second get directories of their own.
    Raises UserError if the output folder cannot be written.
    """
    run = Run(make_directory(config))
    run.checkpoints.mkdir()
    run.figures.mkdir()
    run.write(CONFIG, dataclasses.asdict(config))
    begun = {"status": "running", "start": now(), "end": None, "seconds": {}}
    run.write(RECORD, {**begun, **provenance.describe(), **facts})
    return run


def _point_latest(run: Run) -> None:
    """Make `latest` in the output folder point at the run; where links cannot be made, nothing happens."""
    outputs = run.path.parent.parent if (run.path.parent / SUMMARY).exists() else run.path.parent
    link, fresh = outputs / "latest", outputs / f".latest-{os.getpid()}"
    with contextlib.suppress(OSError, NotImplementedError):
        fresh.symlink_to(run.path.relative_to(outputs), target_is_directory=True)
        fresh.replace(link)
    with contextlib.suppress(OSError):
        fresh.unlink()


def make_directory(config: Config, suffix: str = "") -> Path:
    """A new directory in the output folder, named by time, recipe, dataset and suffix. Raises UserError on failure."""
    outputs = Path(config.output_dir)
    title = re.sub(r"[^\w.-]+", "-", config.title)
    name = f"{datetime.now():%Y-%m-%d_%H-%M-%S}_{title}_{Path(config.dataset).name}{suffix}"
    try:
        outputs.mkdir(parents=True, exist_ok=True)
        for copy in range(1, 1000):
            path = outputs / (name if copy == 1 else f"{name}_{copy}")
            with contextlib.suppress(FileExistsError):
                path.mkdir()
                return path.resolve()
    except OSError as error:
        raise UserError(f"cannot write to the output folder {outputs}: {error.strerror}") from None
    raise UserError(f"{outputs} already has 999 runs called {name}")


def now() -> str:
    return _time(time.time())


def _time(seconds: float) -> str:
    """Seconds since 1970 as a local time in ISO 8601."""
    return datetime.fromtimestamp(seconds).astimezone().isoformat(timespec="seconds")
