"""A file from the first of its addresses that sends it to the disk, verified, whatever breaks in between."""

import concurrent.futures
import hashlib
import http
import http.client
import os
import re
import threading
import time
import urllib.error
import urllib.parse
import urllib.request
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import BinaryIO

from cifar import console
from cifar.errors import UsageError, UserError
from cifar.files import writing

MIRROR_VARIABLE = "CIFAR_MIRROR"
_CHUNK = 2**18  # bytes
_PAUSES = (1, 2, 4, 8, 16)  # seconds between rounds through the addresses
_ANSWER_SECONDS = 15.0  # for all addresses together to answer first: this long `auto` waits without a network
_STALL_SECONDS = 20.0  # without an answer or a byte
_SPEED_SECONDS = 15.0  # over which an address's speed is taken
# What sends less is left for the next address. The official one was down to 50 kB/s in 2026 (pytorch/vision 9536).
_SLOW = 250_000  # bytes a second
_STALLED = 1_000  # bytes a second, where there is no next address, or all have been tried


@dataclass(frozen=True)
class Archive:
    """A .tar.gz that several places have, and what proves that a file is this one."""

    name: str
    folder: str  # that it holds
    files: Mapping[str, str]  # of the folder, by any of which it is known, and their MD5
    size: int  # bytes
    unpacked: int  # bytes
    sha256: str
    urls: tuple[str, ...]  # the official one first

    def is_in(self, file: BinaryIO) -> bool:
        """Whether the open file is the archive."""
        if _length(file) != self.size:
            return False
        file.seek(0)
        return hashlib.file_digest(file, "sha256").hexdigest() == self.sha256


class UnavailableError(UserError):
    """None of its addresses gives the file."""


class _WrongFileError(Exception):
    """An address has another file."""


@dataclass
class _Source:
    """An address and how its last try went."""

    url: str
    answered: bool = False
    closed: bool = False  # for good: it has no such file, or another one
    speed: float = 0.0  # bytes a second
    reason: str = ""  # why it failed

    @property
    def host(self) -> str:
        return self.url.split("/")[2].rpartition("@")[2]


def addresses(archive: Archive, mirror: str | None = None) -> list[str]:
    """Where to look for the archive, in this order: at the mirror, in CIFAR_MIRROR, at its own addresses.

    mirror: the file's address, or its folder's with a slash at the end; several with spaces between them.
    Raises UsageError for what is no address.
    """
    given = f"{mirror or ''} {os.environ.get(MIRROR_VARIABLE, '')}".split()
    for url in given:
        if not re.match("https?://[^/]", url):
            raise UsageError(f"--mirror and {MIRROR_VARIABLE} take an http:// or https:// address, not '{url}'")
    return list(dict.fromkeys([*(url + archive.name if url.endswith("/") else url for url in given), *archive.urls]))


def partial_of(path: Path) -> Path:
    """The name of a file or folder while it is not whole."""
    return path.with_name(f"{path.name}.partial")


def fetch(archive: Archive, target: Path, urls: Sequence[str]) -> None:
    """Download the archive to `target`, which appears only when its size and SHA-256 are right.

    What has come stays beside it as .partial, where the next call goes on.
    Raises UnavailableError if no address gives the archive, UserError if it cannot be written.
    """
    partial = partial_of(target)
    with writing(partial):
        partial.touch()
        file = partial.open("r+b", buffering=0)  # a buffer that the full disk refuses would be written again at the end
    try:
        with file:
            if _length(file) >= archive.size and not archive.is_in(file):
                file.truncate(0)
            if _length(file) < archive.size:
                _fill(file, archive, [_Source(url) for url in urls])
            with writing(partial):
                os.fsync(file.fileno())
    except UnavailableError:
        if not partial.stat().st_size:
            partial.unlink()
        raise
    with writing(target):
        partial.replace(target)


def _length(file: BinaryIO) -> int:
    return os.fstat(file.fileno()).st_size


def reach(archive: Archive, urls: Sequence[str], seconds: float) -> tuple[str | None, str]:
    """The first host that would send the archive, or None, and why others would not; all are asked at once."""
    sources = [_Source(url) for url in urls]

    def asked(source: _Source) -> _Source:
        try:
            with _open(source, 0, seconds) as response:
                _first_byte(response, 0, archive)
        except (OSError, http.client.HTTPException, _WrongFileError) as error:
            source.reason = _why(error)
        return source

    with concurrent.futures.ThreadPoolExecutor() as pool:
        sources = list(pool.map(asked, sources))
    return next((source.host for source in sources if not source.reason), None), _reasons(sources)


def _fill(file: BinaryIO, archive: Archive, sources: list[_Source]) -> None:
    """Make the file the archive, going on where it ends, in rounds through the sources.

    The first round is for sources that answer soon and send fast. Later ones take what has answered, the fastest
    first, after pauses that grow as long as less than a hundredth of the archive comes.
    """
    hopeful, pauses, furthest = sources, iter(_PAUSES), _length(file)
    answer_seconds, least = _ANSWER_SECONDS / max(1, len(sources)), _SLOW
    with console.download_bar(archive.name, archive.size, furthest) as show:
        while True:
            for source, following in zip(hopeful, [*hopeful[1:], None]):
                if _try(source, file, archive, answer_seconds, least if following else _STALLED, show):
                    return
                if following:
                    console.say(f"{_reasons([source])}; trying {following.host}")
            hopeful = sorted((s for s in sources if s.answered and not s.closed), key=lambda source: -source.speed)
            if _length(file) >= furthest + archive.size / 100:
                pauses, furthest = iter(_PAUSES), _length(file)
            pause = next(pauses, None)
            if pause is None or not hopeful:
                raise UnavailableError(f"cannot download {archive.name} ({_reasons(sources)})")
            console.say(f"{_reasons(hopeful[:1])}; trying again in {pause} s")
            time.sleep(pause)
            answer_seconds, least = _STALL_SECONDS, _STALLED


def _reasons(sources: Sequence[_Source]) -> str:
    return ", ".join(f"{source.host}: {source.reason}" for source in sources if source.reason)


def _try(
    source: _Source,
    file: BinaryIO,
    archive: Archive,
    answer_seconds: float,
    least: float,
    show: Callable[[int], None],
) -> bool:
    """Whether the source made the file the archive; where not, its `reason` says why."""
    try:
        start = _append(source, file, archive, answer_seconds, least, show)
        if archive.is_in(file):
            return True
        file.truncate(0)
        if start == 0:
            raise _WrongFileError("it sent a wrong file, of another SHA-256")
    except (OSError, http.client.HTTPException, _WrongFileError) as error:
        source.reason, source.closed = _why(error), _is_final(error)
        return False
    # The part that was there may have been the wrong one.
    return _try(source, file, archive, answer_seconds, least, show)


def _append(
    source: _Source,
    file: BinaryIO,
    archive: Archive,
    answer_seconds: float,
    least: float,
    show: Callable[[int], None],
) -> int:
    """Fill the file up to the archive's size, and return at which byte the source began to.

    Raises OSError or HTTPException if the source breaks off or sends fewer than `least` bytes a second, and
    _WrongFileError if it announces another file.
    """
    with _open(source, _length(file), answer_seconds) as response:
        start = position = marked = file.seek(_first_byte(response, _length(file), archive))
        began = mark = time.monotonic()
        while position < archive.size and (chunk := response.read1(min(_CHUNK, archive.size - position))):
            _write(file, chunk)
            position += len(chunk)
            show(position)
            now = time.monotonic()
            source.speed = (position - start) / max(now - began, 1e-3)
            if now - mark >= _SPEED_SECONDS:
                if position - marked < least * (now - mark):
                    raise TimeoutError(f"it sends only {(position - marked) / (now - mark) / 1000:.0f} kB a second")
                mark, marked = now, position
    if position < archive.size:
        raise ConnectionError(f"it broke off after {position:,} of {archive.size:,} bytes")
    return start


def _write(file: BinaryIO, chunk: bytes) -> None:
    with writing(Path(file.name)):
        rest = memoryview(chunk)
        while rest:
            rest = rest[file.write(rest) :]


def _first_byte(response: http.client.HTTPResponse, wanted: int, archive: Archive) -> int:
    """The place in the archive of the answer's first byte: 0 where the server does not begin at `wanted`."""
    if response.status == http.HTTPStatus.PARTIAL_CONTENT:
        said = re.fullmatch(r"bytes (\d+)-\d+/(\d+|\*)", response.headers.get("Content-Range", ""))
        if not said or int(said[1]) > wanted or said[2] not in (str(archive.size), "*"):
            raise _WrongFileError("it sent a part of another file")
        return int(said[1])
    length = response.headers.get("Content-Length")
    if length not in (None, str(archive.size)):
        raise _WrongFileError(f"it has another file: not {archive.size:,} bytes")
    return 0


class _Redirects(urllib.request.HTTPRedirectHandler):
    """Follows redirects, but never out of encryption, nor to what is not the web."""

    def redirect_request(self, request, answer, code, message, headers, url):
        schemes = ("https",) if request.type == "https" else ("http", "https")
        if urllib.parse.urlsplit(url).scheme not in schemes:
            answer.close()
            raise _WrongFileError(f"it redirects from {request.type} to what is not {' or '.join(schemes)}")
        return super().redirect_request(request, answer, code, message, headers, url)


def _open(source: _Source, start: int, seconds: float) -> http.client.HTTPResponse:
    """The source's answer, asked for the archive from byte `start` on; OSError after a bounded time.

    A socket's timeout does not cover the name lookup, so the request runs in a thread that may be left behind.
    """
    answer: concurrent.futures.Future = concurrent.futures.Future()

    def ask():
        try:
            headers = {"User-Agent": "cifar-suite"} | ({"Range": f"bytes={start}-"} if start else {})
            request = urllib.request.Request(source.url, headers=headers)
            response = urllib.request.build_opener(_Redirects).open(request, timeout=_STALL_SECONDS)
        except urllib.error.HTTPError as error:
            error.close()
            answer.set_exception(error)
        except ValueError as error:  # of an address that cannot be read
            answer.set_exception(http.client.InvalidURL(str(error)))
        except Exception as error:
            answer.set_exception(error)
        else:
            answer.set_result(response)

    threading.Thread(target=ask, daemon=True).start()
    try:
        response = answer.result(timeout=seconds)
    except concurrent.futures.TimeoutError:
        answer.add_done_callback(lambda late: late.exception() or late.result().close())
        raise TimeoutError(f"no answer within {seconds:.0f} seconds") from None
    except (urllib.error.HTTPError, http.client.HTTPException):
        source.answered = True
        raise
    source.answered = True
    return response


def _is_final(error: Exception) -> bool:
    """Whether the same address would fail alike another time."""
    if isinstance(error, urllib.error.HTTPError):
        return error.code < 500 and error.code not in (408, 425, 429)
    return isinstance(error, (_WrongFileError, http.client.InvalidURL))


def _why(error: Exception) -> str:
    """What went wrong; where the server has a say in the words, ours."""
    if isinstance(error, urllib.error.HTTPError):
        return f"HTTP {error.code} {http.client.responses.get(error.code, '')}".rstrip()
    if isinstance(error, urllib.error.URLError) and isinstance(error.reason, Exception):
        error = error.reason
    if isinstance(error, TimeoutError) and "timed out" in str(error):
        return f"it sent nothing for {_STALL_SECONDS:.0f} seconds"
    if isinstance(error, http.client.IncompleteRead):
        return "it broke off"
    if isinstance(error, http.client.HTTPException) and not isinstance(error, (OSError, http.client.InvalidURL)):
        return "its answer is not HTTP"
    return getattr(error, "strerror", None) or str(error) or type(error).__name__
