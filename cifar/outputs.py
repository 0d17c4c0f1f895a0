"""The runs in an output folder: found by name, listed, and in groups of several seeds."""

import contextlib
from collections.abc import Iterator
from pathlib import Path

from cifar import runs
from cifar.errors import UserError
from cifar.files import lock, writing

RESUMABLE = ("interrupted", "failed", "killed")
# A directory with one of them is, or was, a run's.
_MARKS = (runs.RECORD, runs.CONFIG, runs.HISTORY, runs.METRICS)
_GROUP_LOCK = ".lock"


def find(output_dir: str, name: str | None = None) -> runs.Run:
    """The run at the path `name`, or called so in `output_dir`; without a name, the latest that has ended.

    Raises UserError if there is none, or if the directory is not a run's.
    """
    outputs = Path(output_dir)
    path = locate(output_dir, name) if name else _latest(outputs)
    if path is None:
        raise UserError(f"there is no finished run in {outputs}: make one with `python main.py`")
    if (path / runs.SUMMARY).is_file():
        raise UserError(f"{path} holds the runs of several seeds: name one of them, `ls {path}` shows which")
    if missing := [name for name in (runs.RECORD, runs.CONFIG) if not (path / name).is_file()]:
        raise UserError(f"{path} is not a run directory: it has no {' and no '.join(missing)}")
    run = runs.Run(path.resolve())
    run.status()
    return run


def find_resumable(output_dir: str, name: str | None = None) -> runs.Run:
    """The run that is named, as `find` finds it; without a name, the newest that did not come to its end."""
    if name:
        return find(output_dir, name)
    for run in map(runs.Run, directories(Path(output_dir))):
        with contextlib.suppress(UserError):
            if run.status() in RESUMABLE:
                return run
    raise UserError(f"there is no run in {output_dir} that could be resumed")


def find_all(output_dir: str, name: str) -> list[runs.Run]:
    """The run of that name, or the finished runs of the group of that name, oldest first. Raises UserError if none."""
    path = locate(output_dir, name)
    if not (path / runs.SUMMARY).is_file():
        return [find(output_dir, name)]
    if found := [runs.Run(place.resolve()) for place in reversed(directories(path)) if (place / runs.METRICS).exists()]:
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
    """The directories with the runs of several seeds, newest first by name; those that lack their summary too."""
    with_summary = (path.parent for path in outputs.glob(f"*/{runs.SUMMARY}"))
    return sorted({*with_summary, *outputs.glob("*-seeds/")}, reverse=True)


@contextlib.contextmanager
def claim_group(group: Path) -> Iterator[None]:
    """Keep other processes from working on a group. Raises UserError if one does."""
    with writing(group), (group / _GROUP_LOCK).open("ab") as file:
        if not lock(file):
            raise UserError(f"{group.name} is in use: another process works on it")
        yield


def group_status(group: Path) -> str:
    """completed, running, or killed where it says running and no process works on it."""
    status = runs.read_json(group / runs.SUMMARY)["status"]
    if status != "running":
        return status
    try:
        with (group / _GROUP_LOCK).open("rb") as file:
            return "killed" if lock(file) else "running"
    except FileNotFoundError:
        return "killed"


def directories(outputs: Path) -> list[Path]:
    """The directories of all runs, those in groups too, newest first by name; damaged ones too, and `latest` not."""
    folders = (place for folder in (outputs, *groups(outputs)) for place in folder.glob("*/") if not place.is_symlink())
    found = [place.resolve() for place in folders if any((place / mark).exists() for mark in _MARKS)]
    return sorted(found, key=lambda place: place.name, reverse=True)


def _latest(outputs: Path) -> Path | None:
    """The target of the link `latest`, else the newest run by name that has ended."""
    if (outputs / "latest").exists():
        return outputs / "latest"
    for run in map(runs.Run, directories(outputs)):
        with contextlib.suppress(UserError):
            if run.status() != "running":
                return run.path
    return None
