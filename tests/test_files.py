"""What the disk and the system refuse: a line that does not fit, locks that are not there."""

import errno
import fcntl
import os
import resource
from types import SimpleNamespace

import pytest

from cifar import files
from cifar.errors import UserError


def test_a_line_that_fits_in_part_is_taken_back(tmp_path):
    path = tmp_path / "history.jsonl"
    files.append(path, b"0123456789")
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (15, limits[1]))
    try:
        with pytest.raises(UserError, match=r"history\.jsonl: No space left on device"):
            files.append(path, b"0123456789")
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert path.read_bytes() == b"0123456789"


def test_a_line_that_does_not_reach_the_disk_is_taken_back(tmp_path, monkeypatch):
    path = tmp_path / "history.jsonl"
    files.append(path, b"first\n")

    def fails(_):
        raise OSError(errno.EIO, os.strerror(errno.EIO))

    monkeypatch.setattr(os, "fsync", fails)
    with pytest.raises(UserError, match=r"history\.jsonl: Input/output error"):
        files.append(path, b"second\n")
    assert path.read_bytes() == b"first\n"


def test_where_the_file_system_has_no_locks_nobody_is_kept_out(tmp_path, monkeypatch):
    def fails(*_):
        raise OSError(errno.ENOLCK, os.strerror(errno.ENOLCK))

    monkeypatch.setattr(fcntl, "flock", fails)
    with (tmp_path / "lock").open("wb") as file:
        assert files.lock(file)


def test_windows_locks_a_byte_behind_the_end_of_what_others_read(tmp_path, monkeypatch):
    locked = set()

    def locking(descriptor: int, mode: int, count: int) -> None:
        place = os.lseek(descriptor, 0, os.SEEK_CUR)
        if (mode, place, count) in locked:
            raise PermissionError(errno.EACCES, "Permission denied")
        locked.add((mode, place, count))

    monkeypatch.setattr(files, "fcntl", None)
    monkeypatch.setattr(files, "msvcrt", SimpleNamespace(locking=locking, LK_NBLCK=2), raising=False)
    monkeypatch.setattr(files, "_LOCKED_BYTE", 2**30, raising=False)
    path = tmp_path / "config.json"
    path.write_bytes(b"{}")
    with path.open("rb") as first, path.open("rb") as second:
        assert files.lock(first)
        assert not files.lock(second)
    assert locked == {(2, 2**30, 1)}
