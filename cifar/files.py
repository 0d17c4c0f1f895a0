"""Files that are there whole or not at all, and that one process at a time writes."""

import contextlib
import errno
import json
import math
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any, BinaryIO

from cifar.errors import UserError

try:
    import fcntl
except ImportError:  # Windows
    fcntl = None
    import msvcrt

    _LOCKED_BYTE = 2**30  # behind the end of any file that is locked: Windows lets nobody read what is


@contextlib.contextmanager
def writing(path: Path) -> Iterator[None]:
    """Turn what the system says against writing the file into UserError."""
    try:
        yield
    except OSError as error:
        raise UserError(f"cannot write {path}: {error.strerror or error}") from None


@contextlib.contextmanager
def replacing(path: Path, previous: Path | None = None) -> Iterator[Path]:
    """A name to write to, which then takes the place of `path`, at once and even if the machine goes down.

    previous: a name that the old file gets, so that the last two are kept. Raises UserError if it cannot be written.
    """
    partial = path.with_suffix(".partial")
    with writing(path):
        try:
            yield partial
            _sync(partial)
            if previous and path.exists():
                path.replace(previous)
            partial.replace(path)
            _sync(path.parent)
        except BaseException:
            with contextlib.suppress(OSError):
                partial.unlink()
            raise


def parse_json(text: str | bytes) -> Any:
    """What the text says in JSON. Raises ValueError if it is none, or has a number that is not finite."""
    try:
        return json.loads(text, parse_constant=_finite, parse_float=_finite)
    except RecursionError:
        raise ValueError("nested too deeply") from None


def _finite(text: str) -> float:
    number = float(text)
    if not math.isfinite(number):
        raise ValueError(f"{text} is not finite")
    return number


def append(path: Path, line: bytes) -> None:
    """Add a line to a file, whole or not at all, and have it on the disk. Raises UserError if it cannot be written."""
    with writing(path), path.open("ab", buffering=0) as file:
        before = file.tell()
        try:
            if file.write(line) < len(line):
                raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
            os.fsync(file.fileno())
        except BaseException:
            file.truncate(before)
            raise


def lock(file: BinaryIO) -> bool:
    """Whether the file could be locked for this process alone, until it is closed; true where there are no locks."""
    if fcntl is None:
        file.seek(_LOCKED_BYTE)
        try:
            msvcrt.locking(file.fileno(), msvcrt.LK_NBLCK, 1)
        except OSError:
            return False
        return True
    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    except OSError:  # a file system without locks
        return True
    return True


def _sync(path: Path) -> None:
    """Have the system write a file, or a folder's list of names, to the disk."""
    if os.name != "posix":  # Windows opens no folder
        return
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
