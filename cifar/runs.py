"""The run directory: create, claim, record and finish a run; find runs in an output folder.

All raise UserError for a file that is missing, damaged or cannot be written. On Windows there are no locks: nothing
keeps a second process out of a run, and a run in progress is taken for killed.
"""

import contextlib
import functools
import importlib.metadata
import itertools
import json
import platform
import re
import shlex
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from datetime import datetime
from pathlib import Path
from typing import Any

from cifar import __version__, console, files, records
from cifar.config import IS_CLONE, PIPELINE, PROJECT, STAGES, Config, allow_model, known_spelling
from cifar.console import ENDING, Interrupted, handled, signal_number
from cifar.errors import UserError, display_path, plural
from cifar.records import DatasetRecord, EpochRecord, Metrics, RunRecord

RECORD, CONFIG, HISTORY, METRICS = "run.json", "config.json", "history.jsonl", "metrics.json"
SHIPPED = Path(__file__).resolve().parent / "weights"  # the runs that come with the program
LOG = "log.txt"  # what was printed
SUMMARY = "summary.json"  # of a group: a directory of runs that differ only in the seed
RESUMABLE = ("interrupted", "failed", "killed")
_ENDED = ("completed", *RESUMABLE)
_EVALUATION = (METRICS, "analysis.json", "predictions.csv", "saliency.npz", "corruptions.json")
GROUP_SUFFIX = "-seeds"  # of a group's name
_GROUP_LOCK = ".lock"
_MAX_NAME = 200  # bytes, of the 255 that file systems allow


@dataclass(frozen=True)
class Run:
    """A run directory and the files in it."""

    path: Path

    @property
    def is_shipped(self) -> bool:
        """Whether the run comes with the program, which does not change it."""
        return self.path.parent == SHIPPED

    @property
    def checkpoints(self) -> Path:
        return self.path / "checkpoints"

    @property
    def figures(self) -> Path:
        return self.path / "figures"

    @property
    def record(self) -> RunRecord:
        """run.json: status, provenance, seconds per stage."""
        return self.read(RECORD)

    @property
    def has_metrics(self) -> bool:
        """Whether the run has been evaluated."""
        return (self.path / METRICS).exists()

    @property
    def metrics(self) -> Metrics:
        """metrics.json."""
        if not self.has_metrics:
            if (status := self.status()) in RESUMABLE and not (self.checkpoints / "best.pt").exists():
                problem = f"{self.path.name} is {status} and has no weights to evaluate"
                raise UserError(f"{problem}; resume it with `{self.resume_command}`")
            raise UserError(f"{self.path.name} has not been evaluated; run `{self.command('evaluate')}`")
        return self.read(METRICS)

    @property
    def config(self) -> Config:
        """config.json, the settings as resolved."""
        settings = self.read(CONFIG)
        try:
            return Config.from_file(settings)
        except UserError as error:
            raise damaged(self.path / CONFIG, str(error)) from None

    @property
    def dataset(self) -> DatasetRecord:
        """The dataset that the run was trained on."""
        dataset = self.record.dataset
        if dataset is None:
            raise damaged(self.path / RECORD, "dataset is missing")
        return dataset

    @property
    def is_in_group(self) -> bool:
        """Whether it is one of the runs of several seeds."""
        return (self.path.parent / SUMMARY).exists()

    @property
    def resume_command(self) -> str:
        """The command that resumes the run, or the group that it belongs to."""
        if self.is_in_group and self.record.command:
            words, place = self.record.command[1:], display_path(self.path.parent.parent)
            return shlex.join([*PIPELINE.split(), *words, *([] if place in words else ["--output-dir", place])])
        return shlex.join([*PIPELINE.split(), "--resume", display_path(self.path), *self._own_network])

    def command(self, task: str) -> str:
        """Return the command line of a task for this run, such as `invoke evaluate --run outputs/RUN`."""
        own_network = [] if task == "visualize" else self._own_network  # which it does not need
        return shlex.join([STAGES, *task.split(), "--run", display_path(self.path), *own_network])

    @property
    def _own_network(self) -> list[str]:
        """The flags that allow the code of the run's network, if it is the user's own."""
        with contextlib.suppress(UserError):  # a damaged config.json
            if ":" in self.config.model:
                return ["--model", self.config.model]
        return []

    def is_complete(self) -> bool:
        """Return whether the run was completed and evaluated; false if its files are damaged."""
        try:
            return self.record.status == "completed" and bool(self.metrics)
        except UserError:
            return False

    def check_dataset(self, name: str) -> None:
        """Raise UserError unless the run was trained on the dataset of that name."""
        trained_on = self.record.dataset.name if self.record.dataset else Path(self.config.dataset).name
        if name != trained_on:
            raise UserError(f"{self.path.name} was trained on {trained_on}, not on {name}")

    def allow_model(self, name: str | None) -> None:
        """Allow the network that the user names to be imported. Raises UserError if it is not the run's."""
        if name and known_spelling("model", name) != self.config.model:
            raise UserError(f"the network of {self.path.name} is {self.config.model}, not {name}: leave out --model")
        allow_model(name)

    def read(self, name: str) -> Any:
        """Read a JSON file of the run as `read_json` does."""
        return read_json(self.path / name)

    def read_if_present(self, name: str) -> Any:
        """Read a JSON file of the run as `read_json` does, None if it is missing."""
        return self.read(name) if (self.path / name).exists() else None

    def write(self, name: str, content: dict[str, Any]) -> None:
        """Replace a JSON file of the run atomically."""
        files.write_json(self.path / name, content)

    def write_text(self, name: str, content: str) -> None:
        """Replace a text file of the run atomically."""
        with files.atomic_write(self.path / name) as partial:
            partial.write_text(content, encoding="utf-8", newline="", errors="backslashreplace")

    def update(self, **changes: Any) -> None:
        """Set keys of run.json."""
        self.write(RECORD, self.record.model_dump(exclude_unset=True) | changes)

    def history(self, first: int | None = None) -> list[EpochRecord]:
        """Read the epochs of history.jsonl; none if it is missing. first: read so many, which it must have."""
        path = self.path / HISTORY
        lines = files.read(path).splitlines()[:first] if path.exists() else []
        try:
            if len(lines) < (first or 0):
                raise ValueError(f"it has fewer than {plural(first or 0, 'epoch')}")
            return records.parse(HISTORY, [files.parse_json(line) for line in lines]).root
        except ValueError as error:
            raise damaged(path, str(error)) from None

    def write_history(self, epochs: Sequence[EpochRecord]) -> None:
        """Replace history.jsonl by a line for each epoch."""
        lines = (json.dumps(epoch.model_dump(exclude_unset=True), allow_nan=False) for epoch in epochs)
        self.write_text(HISTORY, "".join(f"{line}\n" for line in lines))

    @property
    def kept_epoch(self) -> EpochRecord | None:
        """The epoch whose weights were evaluated; None if the run's files do not name it."""
        epoch, history = self.metrics.epoch or 0, self.history()
        return history[epoch - 1] if 0 < epoch <= len(history) else None

    @contextlib.contextmanager
    def stage(self, name: str) -> Iterator[None]:
        """Record in run.json how many seconds a stage took, with those before it was resumed."""
        started = time.perf_counter()
        try:
            yield
        finally:
            with contextlib.suppress(UserError):  # what the stage raises is the error to report
                record = self.record
                before = (record.seconds_before_resuming or {}).get(name, 0.0)
                seconds = round(time.perf_counter() - started + before, 3)
                self.update(seconds={**record.seconds, name: seconds})

    def remove_evaluation(self) -> None:
        """Delete the results of other weights, or of other test images, than those of now."""
        names = (*_EVALUATION, "classification_report.txt", "report.html")
        for path in (*(self.path / name for name in names), *self.figures.glob("*.png")):
            with files.writing(path):
                path.unlink(missing_ok=True)

    def mark_resumed(self, epoch: int, step: int, train_seconds: float) -> None:
        """Record that training resumes now, after that step of the epoch, and how long it has taken so far."""
        earlier = self.record.model_dump()["resumed"] or []
        resumed = [*earlier, {"time": now(), "epoch": epoch, "step": step}]
        self.update(resumed=resumed, seconds_before_resuming={"train": train_seconds})

    @contextlib.contextmanager
    def claim(self) -> Iterator[None]:
        """Keep other processes from writing into the run; the system releases it when this process ends, however.

        From then on, log.txt receives what this process prints.
        Raises UserError if another process has claimed it, if it has a symbolic link, which could lead elsewhere, if
        its log is a pipe, which could wait for ever, or if it comes with the program.
        """
        if self.is_shipped:
            place = display_path(self.path)
            raise UserError(f"{self.path.name} comes with this program and is read-only: copy {place} and use the copy")
        for path in self.path.rglob("*"):
            if path.is_symlink() or (path.name == LOG and path.is_fifo()):  # the other files are replaced
                kind = "symbolic link" if path.is_symlink() else "pipe"
                raise UserError(f"remove the {kind} {display_path(path)}: a run writes to its own files only")
        with files.claimed(self.path / CONFIG):
            console.log_to(self.path / LOG)
            yield

    def status(self) -> str:
        """Return running, completed, interrupted, failed or killed.

        A run that says running, while no process has claimed it, is recorded as killed.
        """
        if self.record.status == "running":
            with files.open_lock(self.path / CONFIG) as file:
                if files.lock(file) and self.record.status == "running":  # it may have ended in the meantime
                    last_sign = datetime.fromtimestamp(max(path.lstat().st_mtime for path in self.path.iterdir()))
                    with contextlib.suppress(UserError):  # the folder may be read-only
                        self.update(status="killed", end=last_sign.astimezone().isoformat(timespec="seconds"))
                    return "killed"
        return self.record.status

    @contextlib.contextmanager
    def lifetime(self) -> Iterator[None]:
        """Claim the run and record how it ended: completed, interrupted or failed; then `latest` points at it.

        Raises Interrupted, with the command that resumes the run, after Ctrl-C, SIGTERM and SIGHUP.
        """
        with self.claim():
            if self.record.status != "running":
                self.update(status="running", end=None, error=None)
            for partial in self.path.rglob("*.partial"):  # left by a process that was killed
                with files.writing(partial):
                    partial.unlink()
            ignored = handled(signal.SIGINT, *ENDING, by=lambda *_: None)  # the process ends anyway
            try:
                yield
                self._end(status="completed")
            except KeyboardInterrupt as stop:
                with ignored, contextlib.suppress(UserError):
                    self._end(status="interrupted")
                message = f"interrupted; resume with `{self.resume_command}`"
                raise Interrupted(signal_number(stop), message) from None
            except BaseException as error:
                with ignored, contextlib.suppress(UserError):
                    self._end(status="failed", error=str(error) or repr(error))
                raise

    def _end(self, **changes: Any) -> None:
        self.update(**changes, end=now())
        outputs = self.path.parent
        link = (outputs.parent if self.is_in_group else outputs) / "latest"
        with contextlib.suppress(OSError):  # the file system may have no links, and a copy a directory of this name
            if link.is_symlink():  # not a file of the user's
                link.unlink()
            link.symlink_to(self.path.relative_to(link.parent), target_is_directory=True)


# Making a run.


def create(config: Config, **facts: Any) -> Run:
    """Make a run directory; run.json also receives the facts."""
    run = Run(make_directory(config))
    run.checkpoints.mkdir()
    run.figures.mkdir()
    run.write(CONFIG, config.model_dump())
    state = {"status": "running", "start": now(), "end": None}
    run.write(RECORD, {**state, "seconds": {}, **provenance(), **facts})
    return run


def make_directory(config: Config, suffix: str = "") -> Path:
    """Make a directory named by time, recipe, dataset and suffix."""
    check_writable(config.output_dir)
    title = re.sub(r"[^\w.-]+", "-", config.title)
    name = f"{datetime.now():%Y-%m-%d_%H-%M-%S}_{title}_{Path(config.dataset).name}"
    name = name.encode()[:_MAX_NAME].decode(errors="ignore") + suffix
    numbered = (f"{name}_{number}" for number in itertools.count(2))
    for unused in itertools.chain([name], numbered):
        path = Path(config.output_dir) / unused
        with contextlib.suppress(FileExistsError):
            path.mkdir()
            break
    return path.resolve()


def check_writable(output_dir: str) -> None:
    """Raise UserError, before anything costs time, if runs cannot be written there."""
    try:
        Path(output_dir).mkdir(parents=True, exist_ok=True)
        tempfile.TemporaryFile(dir=output_dir).close()
    except OSError as error:
        raise UserError(f"cannot write to the output folder {output_dir}: {error.strerror}") from None


def provenance() -> dict[str, Any]:
    """Describe what makes a run, as in run.json."""
    packages = ("torch", "torchvision", "scikit-learn", "numpy", "matplotlib")
    versions = {package: importlib.metadata.version(package) for package in packages}
    # Not the password of a demo, and what follows it.
    words = itertools.takewhile(lambda word: not word.replace("_", "-").lower().startswith("--auth"), sys.argv[1:])
    return {
        "command": [Path(sys.argv[0]).name, *words],
        "commit": _git("rev-parse", "HEAD"),
        "dirty": bool(_git("status", "--porcelain")),
        "versions": {"cifar-suite": __version__, "python": platform.python_version(), **versions},
        "platform": platform.platform(),
    }


@functools.cache  # the code that runs is that of the start
def _git(*arguments: str) -> str | None:
    """Return the output of git on this project; None without git or where it is not a clone."""
    if not IS_CLONE:
        return None  # the repository around an installed package is somebody else's
    command = ["git", "-C", str(PROJECT), *arguments]
    try:
        return subprocess.check_output(command, stderr=subprocess.DEVNULL, timeout=10).decode(errors="replace").strip()
    except (OSError, subprocess.SubprocessError):
        return None


def now() -> str:
    """Return the local time in ISO 8601, in seconds."""
    return datetime.now().astimezone().isoformat(timespec="seconds")


# Finding runs.


def find(output_dir: str, name: str | None = None) -> Run:
    """Return the run at the path `name`, or called so in `output_dir`; without a name, the latest that has ended."""
    last = latest(output_dir)
    if not name and not last:
        if run := _newest(output_dir, _ENDED):
            return run
        raise UserError(f"there is no finished run in {output_dir}; `{PIPELINE}` makes one")
    path = last if last and not name else _locate(output_dir, str(name))
    if (path / SUMMARY).is_file():
        raise UserError(f"{path} holds the runs of several seeds; name one of them (`ls {path}` lists them)")
    if missing := [name for name in (RECORD, CONFIG) if not (path / name).is_file()]:
        raise UserError(f"{path} is not a run directory: it has no {' and no '.join(missing)}")
    run = Run(path.resolve())
    run.status()
    return run


def find_evaluated(output_dir: str) -> Run:
    """Return the latest run if it is evaluated, or else the newest that is, the latest, or the one in the program."""
    last = latest(output_dir)
    if last and (last / METRICS).exists():
        return find(output_dir)
    evaluated = (run for run in map(Run, directories(Path(output_dir))) if run.has_metrics)
    if run := next(evaluated, None):
        return run
    return find(output_dir) if last else _newest(output_dir, _ENDED) or Run(SHIPPED / "fast")


def find_resumable(output_dir: str, name: str | None = None) -> Run:
    """Return the run of that name as `find` does; without a name, the newest that was not completed."""
    if name:
        return find(output_dir, name)
    if run := _newest(output_dir, RESUMABLE):
        return run
    raise UserError(f"there is no run in {output_dir} that can be resumed")


def find_all(output_dir: str, name: str) -> list[Run]:
    """Return the run of that name, or the evaluated runs of the group of that name, oldest first."""
    path = _locate(output_dir, name)
    if not (path / SUMMARY).is_file():
        return [find(output_dir, name)]
    members = list(map(Run, reversed(directories(path))))
    for run in members:
        if not run.has_metrics:
            console.say(f"{run.path.name} has not been evaluated: left out")
    if found := [run for run in members if run.has_metrics]:
        return found
    raise UserError(f"none of the runs in {path} has been evaluated")


def _locate(output_dir: str, name: str) -> Path:
    """Return the directory at the path `name`, or called so in `output_dir`, in a group there or in the program."""
    outputs = Path(output_dir)
    places = [Path(name), *(folder / name for folder in (outputs, *groups(outputs), SHIPPED))]
    found = [path for path in places if path.exists()]
    runs_first = [path for path in found if (path / RECORD).exists() or (path / SUMMARY).exists()] + found
    if runs_first:
        return runs_first[0]
    raise UserError(f"there is no run named '{name}'; `{STAGES} compare --output-dir {outputs}` lists the runs")


def latest(output_dir: str) -> Path | None:
    """Return the directory of the run that ended last; None without the link, as in a copy that made it a directory."""
    link = Path(output_dir) / "latest"
    return link.resolve() if link.is_symlink() and link.exists() else None


def _newest(output_dir: str, statuses: Sequence[str]) -> Run | None:
    """Return the newest run with one of the statuses."""
    for run in map(Run, directories(Path(output_dir))):
        with contextlib.suppress(UserError):  # a damaged one is passed over
            if run.status() in statuses:
                return run
    return None


def directories(outputs: Path) -> list[Path]:
    """List the directories of all runs, those in groups and damaged ones too, the one that was started last first."""
    marks = (RECORD, CONFIG, HISTORY, METRICS)  # a directory with one of them is, or was, a run's
    found = (path for folder in (outputs, *groups(outputs)) for path in folder.glob("*/*") if path.name in marks)
    places = {path.parent.resolve() for path in found if path.parent.name != "latest"}  # a link, or a copy of one
    return sorted(places, key=lambda place: (_start(place), place.name), reverse=True)


def _start(run: Path) -> float:
    """Return when a run was started, in seconds since 1970; of a damaged one, when its directory has last changed."""
    try:
        return datetime.fromisoformat(read_json(run / RECORD).start or "").timestamp()
    except (UserError, ValueError):
        return run.stat().st_mtime if run.exists() else 0.0


def groups(outputs: Path) -> list[Path]:
    """List the directories with the runs of several seeds, newest first by name, even if they lack summary.json."""
    with_summary = (path.parent for path in outputs.glob(f"*/{SUMMARY}"))
    named_so = outputs.glob(f"*{GROUP_SUFFIX}/")
    named_so = (path for path in named_so if not (path / RECORD).exists())  # not a run of such a name
    return sorted({*with_summary, *named_so}, reverse=True)


def claim_group(group: Path) -> contextlib.AbstractContextManager[None]:
    """Keep other processes from working on a group. Raises UserError if one does."""
    return files.claimed(group / _GROUP_LOCK, create=True)


def group_status(group: Path) -> str:
    """Return completed, running, or killed if it says running and no process works on it."""
    status = read_json(group / SUMMARY).status
    if status != "running":
        return status
    with contextlib.suppress(UserError), files.open_lock(group / _GROUP_LOCK) as file:
        if not files.lock(file):
            return "running"
    return "killed"


# Reading records.


def damaged(path: Path, problem: str) -> UserError:
    """Return the error for a damaged file of a run; it names the command that writes the file again, if any."""
    task = "evaluate --corruptions" if path.name == "corruptions.json" else "evaluate"
    hint = f"; `{Run(path.parent).command(task)}` writes it again" if path.name in _EVALUATION else ""
    return UserError(f"{display_path(path)} is damaged: {problem}{hint}")


def read_json(path: Path) -> Any:
    """Read a JSON file as its model in `records`, or as a dict."""
    content = files.read(path)
    try:
        parsed = files.parse_json(content)
        if not isinstance(parsed, dict):
            raise ValueError("it is not a JSON object")
        return records.parse(path.name, parsed) if path.name in records.RECORDS else parsed
    except ValueError as error:
        raise damaged(path, str(error)) from None
