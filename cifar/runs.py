"""The run directory: create, find, record and finish it."""

import contextlib
import dataclasses
import importlib.metadata
import json
import os
import platform
import re
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
        return self.read(_RECORD)

    def check_dataset(self, name: str) -> None:
        """Raise UserError unless the run was trained on the dataset of that name."""
        trained_on = Path(self.config.dataset).name
        if name != trained_on:
            raise UserError(f"{self.path.name} was trained on {trained_on}, not on {name}")

    @property
    def config(self) -> Config:
        """config.json as a Config. Raises UserError if a setting is unknown or out of range."""
        settings = self.read("config.json")
        if unknown := settings.keys() - set(FIELDS):
            raise UserError(f"{self.path / 'config.json'} has unknown settings: {', '.join(sorted(unknown))}")
        return Config(**settings)

    def read(self, name: str) -> dict[str, Any]:
        """A JSON file of the run. Raises UserError if it is missing or not an object in JSON."""
        try:
            content = json.loads((self.path / name).read_text(encoding="utf-8"))
        except OSError as error:
            raise UserError(f"cannot read {self.path / name}: {error.strerror}") from None
        except ValueError:
            content = None
        if not isinstance(content, dict):
            raise UserError(f"{self.path / name} is damaged: it does not hold a JSON object")
        return content

    def write(self, name: str, content: dict[str, Any]) -> None:
        """Replace a JSON file of the run; a reader sees the old one or the new one, never a part."""
        self.write_text(name, json.dumps(content, indent=2, allow_nan=False) + "\n")

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
        self.update(**changes, end=_now())
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
    title = re.sub(r"[^\w.-]+", "-", config.title)
    name = f"{datetime.now():%Y-%m-%d_%H-%M-%S}_{title}_{Path(config.dataset).name}"
    run = Run(_make_directory(Path(config.output_dir), name))
    run.checkpoints.mkdir()
    run.figures.mkdir()
    run.write("config.json", dataclasses.asdict(config))
    run.write(_RECORD, {"status": "running", "start": _now(), "end": None, "seconds": {}, **_provenance(), **facts})
    return run


def _point_latest(run: Run) -> None:
    """Make `latest`, beside the run, point at it; where links cannot be made, nothing happens."""
    link = run.path.parent / "latest"
    fresh = run.path.parent / f".latest-{os.getpid()}"
    with contextlib.suppress(OSError, NotImplementedError):
        fresh.symlink_to(run.path.name, target_is_directory=True)
        fresh.replace(link)
    with contextlib.suppress(OSError):
        fresh.unlink()


def find(output_dir: str, name: str | None = None) -> Run:
    """The run at the path `name`, or called so in `output_dir`; without a name, the latest that has ended.

    Raises UserError if there is none, or if the directory is not a run's.
    """
    outputs = Path(output_dir)
    path = next((path for path in (Path(name), outputs / name) if path.exists()), Path(name)) if name else None
    path = path or _latest(outputs)
    if path is None:
        raise UserError(f"there is no finished run in {outputs}: make one with `python main.py`")
    if not path.exists():
        raise UserError(f"there is no run at {path}: `ls {outputs}` shows those that are there")
    if not (path / _RECORD).is_file() or not (path / "config.json").is_file():
        raise UserError(f"{path} is not a run directory: it has no {_RECORD} and config.json")
    return Run(path.resolve())


def _latest(outputs: Path) -> Path | None:
    """The target of the link `latest`, else the newest run by name that has ended."""
    if (outputs / "latest").exists():
        return outputs / "latest"
    records = sorted(outputs.glob(f"*/{_RECORD}"), reverse=True)
    return next((path.parent for path in records if Run(path.parent).record.get("end")), None)


def _make_directory(outputs: Path, name: str) -> Path:
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


def _now() -> str:
    return datetime.now().astimezone().isoformat(timespec="seconds")
