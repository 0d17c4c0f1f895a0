"""Files: read if they are regular ones, written atomically, and locked for one process.

What opens, reads or writes a file raises UserError if it is missing or that is impossible. On Windows there are no
locks.
"""

import contextlib
import json
import math
import os
import re
import stat
import time
from collections.abc import Iterator
from pathlib import Path
from typing import IO, Any

from cifar import console
from cifar.errors import UserError, display_path

_PATIENCE = 1.0  # seconds to wait for a lock, which `Run.status` in another process holds for milliseconds
_URL = re.compile(r'://(?:[^\s"\\]|\\.)+')  # from its colon on, as text in JSON
_CREDENTIALS = re.compile(r"(?<=^://)([^/\\]|\\.)*@|\?[^=]+=.*")  # user:password@ and ?token=secret


# Reading.


def open_regular(path: Path, mode: str = "rb") -> IO[bytes]:
    """Open a file, but no pipe or device: opening one may wait for its other end, and it may never end."""
    try:
        if stat.S_ISREG(path.stat().st_mode):
            return path.open(mode)
    except OSError as error:
        raise UserError(f"cannot read {display_path(path)}: {error.strerror or error}") from None
    raise UserError(f"{display_path(path)} is not a file")


def read(path: Path) -> bytes:
    """Read a file as `open_regular` opens it."""
    try:
        with open_regular(path) as file:
            return file.read()
    except OSError as error:
        raise UserError(f"cannot read {display_path(path)}: {error.strerror or error}") from None


def parse_json(text: bytes) -> Any:
    """Parse JSON of finite numbers. Raises ValueError, whose message is for the user."""
    try:
        content = json.loads(text)
        json.dumps(content, allow_nan=False)
    except (ValueError, RecursionError):
        raise ValueError("it is not valid JSON, or has a number that is not finite") from None
    return content


# Writing.


def write_json(path: Path, content: dict[str, Any]) -> None:
    """Replace a JSON file atomically, without the credentials of URLs in it."""
    text = json.dumps(content, indent=2, allow_nan=False) + "\n"
    with atomic_write(path) as partial:
        partial.write_text(_URL.sub(lambda url: _CREDENTIALS.sub("", url[0]), text), encoding="utf-8", newline="")


@contextlib.contextmanager
def writing(path: Path) -> Iterator[None]:
    """Turn an OSError from writing the file into a UserError."""
    try:
        yield
    except OSError as error:
        raise UserError(f"cannot write {display_path(path)}: {error.strerror or error}") from None


@contextlib.contextmanager
def atomic_write(path: Path, previous: Path | None = None) -> Iterator[Path]:
    """Yield a new file to write to, which then replaces `path` at once, even if the machine loses power.

    previous: the name that the old file gets, to keep the last two.
    """
    partial = path.with_name(f"{path.name}.partial")
    with writing(path):
        partial.unlink(missing_ok=True)  # a link of that name would lead elsewhere
        try:
            yield partial
            _sync(partial)
            if previous and path.exists():
                path.replace(previous)
            partial.replace(path)
            with contextlib.suppress(OSError):  # some network file systems cannot sync a folder
                _sync(path.parent)
        except BaseException:
            with contextlib.suppress(OSError):
                partial.unlink()
            raise


def _sync(path: Path) -> None:
    """Write a file, or the list of names in a folder, to the disk."""
    if os.name == "posix":  # Windows cannot open folders
        descriptor = os.open(path, os.O_RDONLY)
        try:
            os.fsync(descriptor)
        finally:
            os.close(descriptor)


# Locks.


def lock(file: IO[bytes]) -> bool:
    """Return whether the file could be locked for this process until it is closed; true on systems without locks."""
    with contextlib.suppress(ImportError, OSError):  # Windows, or a file system without locks
        import fcntl

        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            return False
    return True


@contextlib.contextmanager
def claimed(path: Path, create: bool = False, waiting_for: str = "") -> Iterator[None]:
    """Lock a file as `open_lock` opens it. If another process has locked it, wait: for a second, then raise UserError.

    waiting_for: what the other process is doing; then say so after the second, and wait until it ends.
    """
    with open_lock(path, create) as opened:
        deadline = time.monotonic() + _PATIENCE
        while not lock(opened):
            if time.monotonic() > deadline:
                if not waiting_for:
                    raise UserError(f"{path.parent.name} is in use by another process: wait until it ends")
                console.say(f"waiting for another process that is {waiting_for}")
                deadline = math.inf
            time.sleep(0.05)
        yield


def open_lock(path: Path, create: bool = False) -> IO[bytes]:
    """Open a file that is never replaced, to be locked. create: make it if it is missing, but not through a link."""
    if create:
        flags = getattr(os, "O_NOFOLLOW", 0) | getattr(os, "O_NONBLOCK", 0)  # which Windows does not have
        with writing(path):
            os.close(os.open(path, os.O_CREAT | flags, 0o666))
    return open_regular(path, "r+b" if os.access(path, os.W_OK) else "rb")  # NFS locks only what is open for writing
