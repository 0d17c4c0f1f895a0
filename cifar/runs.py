"""The run directory: create, find, record and finish it."""

import contextlib
import dataclasses
import importlib.metadata
import json
import os
import platform
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from datetime import datetime
from pathlib import Path
from typing import Any

from cifar.config import FIELDS, PROJECT, Config, UserError

_PACKAGES = ("torch", "torchvision", "scikit-learn", "numpy", "matplotlib", "seaborn")
_RECORD = "run.json"
_MARKS = (_RECORD, "config.json", "history.jsonl", "metrics.json")  # a directory with one of them is, or was, a run's
SUMMARY = "summary.json"  # of a group: a directory of runs that differ in the seed alone


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
    def status(self) -> str:
        """completed, interrupted, failed, running, or unfinished where its process is gone without a word."""
        return status(self.record)

    @property
    def record(self) -> dict[str, Any]:
        """run.json: status, provenance, seconds per stage."""
        return self.read(_RECORD)

    def check_dataset(self, name: str) -> None:
        """Raise UserError unless the run was trained on the dataset of that name."""
        if name != self.config.dataset:
            raise UserError(f"{self.path.name} was trained on {self.config.dataset}, not on {name}")

    @property
    def config(self) -> Config:
        """config.json as a Config. Raises UserError if a setting is unknown or out of range."""
        settings = self.read("config.json")
        if unknown := settings.keys() - set(FIELDS):
            raise UserError(f"{self.path / 'config.json'} has unknown settings: {', '.join(sorted(unknown))}")
        return Config(**settings)

    def read(self, name: str) -> dict[str, Any]:
        """A JSON file of the run. Raises UserError if it is missing or not an object in JSON."""
        return read_json(self.path / name)

    def write(self, name: str, content: dict[str, Any]) -> None:
        """Replace a JSON file of the run; a reader sees the old one or the new one, never a part."""
        write_json(self.path / name, content)

    def write_text(self, name: str, content: str) -> None:
        """Replace a text file of the run, likewise."""
        with replacing(self.path / name) as partial:
            partial.write_text(content, encoding="utf-8", newline="")

    def update(self, **changes: Any) -> None:
        """Set keys of run.json."""
        self.write(_RECORD, {**self.record, **changes})

    def append_history(self, epoch: dict[str, Any]) -> None:
        """Add one epoch's line to history.jsonl."""
        path = self.path / "history.jsonl"
        with writing(path), path.open("a", encoding="utf-8") as file:
            file.write(json.dumps(epoch, allow_nan=False) + "\n")

    def history(self) -> list[dict[str, Any]]:
        """The epochs of history.jsonl, first to last; empty if no epoch has ended."""
        path = self.path / "history.jsonl"
        try:
            lines = path.read_text(encoding="utf-8").splitlines() if path.exists() else []
            return [json.loads(line) for line in lines]
        except ValueError:
            raise UserError(f"{path} is damaged: a line is not JSON") from None

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
        self.update(seconds={**self.record["seconds"], stage: round(time.perf_counter() - started, 3)})

    @contextlib.contextmanager
    def lifetime(self) -> Iterator[None]:
        """Record how a run ended: completed, interrupted or failed; then `latest` points at it."""
        try:
            yield
        except BaseException as error:
            interrupted = isinstance(error, KeyboardInterrupt)
            how = {"status": "interrupted"} if interrupted else {"status": "failed", "error": str(error) or repr(error)}
            with contextlib.suppress(UserError):
                self._end(**how)
            raise
        self._end(status="completed")

    def _end(self, **changes: Any) -> None:
        self.update(**changes, end=now())
        _point_latest(self)


@contextlib.contextmanager
def writing(path: Path) -> Iterator[None]:
    """Turn what the system says against writing the file into UserError."""
    try:
        yield
    except OSError as error:
        raise UserError(f"cannot write {path}: {error.strerror}") from None


@contextlib.contextmanager
def replacing(path: Path) -> Iterator[Path]:
    """A name to write to, which then takes the place of `path` at once. Raises UserError if it cannot be written."""
    partial = path.with_suffix(".partial")
    with writing(path):
        yield partial
        partial.replace(path)


def read_json(path: Path) -> dict[str, Any]:
    """What a JSON file holds. Raises UserError if it is missing or not an object in JSON."""
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise UserError(f"cannot read {path}: {error.strerror}") from None
    except ValueError:
        content = None
    if not isinstance(content, dict):
        raise UserError(f"{path} is damaged: it does not hold a JSON object")
    return content


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
    run.write("config.json", dataclasses.asdict(config))
    run.write(_RECORD, {**begun(), "seconds": {}, **_provenance(), **facts})
    return run


def begun() -> dict[str, Any]:
    """The status, the times and the process of what begins now."""
    return {"status": "running", "start": now(), "end": None, "process": {"host": platform.node(), "pid": os.getpid()}}


def status(record: dict[str, Any]) -> str:
    """The record's status, or unfinished where it says running and its process is gone."""
    return "unfinished" if record["status"] == "running" and not _is_alive(record.get("process")) else record["status"]


def _is_alive(process: dict[str, Any] | None) -> bool:
    """Whether another process of this machine still runs; one of another machine is believed to."""
    if process is None or process["pid"] == os.getpid():
        return False
    if process["host"] != platform.node() or os.name == "nt":  # where os.kill(pid, 0) is Ctrl-C
        return True
    try:
        os.kill(process["pid"], 0)
    except ProcessLookupError:
        return False
    except PermissionError:
        return True
    return True


def _point_latest(run: Run) -> None:
    """Make `latest` in the output folder point at the run; where links cannot be made, nothing happens."""
    outputs = run.path.parent.parent if (run.path.parent / SUMMARY).exists() else run.path.parent
    link, fresh = outputs / "latest", outputs / f".latest-{os.getpid()}"
    with contextlib.suppress(OSError, NotImplementedError):
        fresh.symlink_to(run.path.relative_to(outputs), target_is_directory=True)
        fresh.replace(link)
    with contextlib.suppress(OSError):
        fresh.unlink()


def find(output_dir: str, name: str | None = None) -> Run:
    """The run at the path `name`, or called so in `output_dir`; without a name, the latest that has ended.

    Raises UserError if there is none, or if the directory is not a run's.
    """
    outputs = Path(output_dir)
    path = locate(output_dir, name) if name else _latest(outputs)
    if path is None:
        raise UserError(f"there is no finished run in {outputs}: make one with `python main.py`")
    if (path / SUMMARY).is_file():
        raise UserError(f"{path} holds the runs of several seeds: name one of them, `ls {path}` shows which")
    if not (path / _RECORD).is_file() or not (path / "config.json").is_file():
        raise UserError(f"{path} is not a run directory: it has no {_RECORD} and config.json")
    return Run(path.resolve())


def find_all(output_dir: str, name: str) -> list[Run]:
    """The run of that name, or the finished runs of the group of that name, oldest first. Raises UserError if none."""
    path = locate(output_dir, name)
    if not (path / SUMMARY).is_file():
        return [find(output_dir, name)]
    if found := [Run(place.resolve()) for place in reversed(directories(path)) if (place / "metrics.json").exists()]:
        return found
    raise UserError(f"none of the runs in {path} has been evaluated")


def locate(output_dir: str, name: str) -> Path:
    """The directory at the path `name`, or called so in `output_dir` or a group there. Raises UserError if none is."""
    outputs = Path(output_dir)
    places = (Path(name), *(folder / name for folder in (outputs, *groups(outputs))))
    if found := next((place for place in places if place.exists()), None):
        return found
    raise UserError(f"there is no run at {name}: `invoke compare --output-dir {outputs}` lists those that are there")


def groups(outputs: Path) -> list[Path]:
    """The directories with the runs of several seeds, newest first by name."""
    return sorted((path.parent for path in outputs.glob(f"*/{SUMMARY}")), reverse=True)


def directories(outputs: Path) -> list[Path]:
    """The directories of all runs, those in groups too, newest first by name; damaged ones too, and `latest` not."""
    folders = (place for folder in (outputs, *groups(outputs)) for place in folder.glob("*/") if not place.is_symlink())
    runs = [place for place in folders if any((place / mark).exists() for mark in _MARKS)]
    return sorted(runs, key=lambda place: place.name, reverse=True)


def _latest(outputs: Path) -> Path | None:
    """The target of the link `latest`, else the newest run by name that has ended."""
    if (outputs / "latest").exists():
        return outputs / "latest"
    return next((place for place in directories(outputs) if _has_ended(place)), None)


def _has_ended(place: Path) -> bool:
    try:
        return bool(Run(place).record.get("end"))
    except UserError:
        return False


def make_directory(config: Config, suffix: str = "") -> Path:
    """A new directory in the output folder, named by time, recipe, dataset and suffix. Raises UserError on failure."""
    outputs = Path(config.output_dir)
    name = f"{datetime.now():%Y-%m-%d_%H-%M-%S}_{config.recipe}_{config.dataset}{suffix}"
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


def _provenance() -> dict[str, Any]:
    """What made the run: command, commit, versions and machine."""
    return {
        "command": [Path(sys.argv[0]).name, *sys.argv[1:]],
        "commit": _git("rev-parse", "HEAD"),
        "dirty": bool(_git("status", "--porcelain")),
        "versions": {"python": platform.python_version()}
        | {package: importlib.metadata.version(package) for package in _PACKAGES},
        "platform": platform.platform(),
    }


def _git(*arguments: str) -> str | None:
    """The output of git on this project; None where there is no git, or no repository."""
    try:
        done = subprocess.run(["git", *arguments], cwd=PROJECT, capture_output=True, text=True, timeout=10)
    except (OSError, subprocess.TimeoutExpired):
        return None
    return done.stdout.strip() if done.returncode == 0 else None


def now() -> str:
    return datetime.now().astimezone().isoformat(timespec="seconds")
