"""An archive from its address to a verified file."""

import concurrent.futures
import hashlib
import http.client
import tempfile
import threading
import urllib.error
import urllib.request
from pathlib import Path

from cifar.config import UserError
from cifar.console import download_bar

_CHUNK = 2**18  # bytes
_ANSWER_SECONDS = 12.0  # to find the host, connect and receive the first header
_STALL_SECONDS = 30.0  # without a byte


def fetch(url: str, target: Path, *, md5: str) -> None:
    """Download `url` to `target`, which appears only when it is whole and its MD5 is right.

    Raises UserError if the host does not answer, the transfer breaks or the file is another one.
    """
    try:
        target.parent.mkdir(parents=True, exist_ok=True)
        with _open(url) as response, tempfile.TemporaryDirectory(dir=target.parent) as folder:
            partial = Path(folder) / target.name
            found = _copy(response, partial)
            if found != md5:
                raise UserError(f"{url} sent a wrong file: its MD5 is {found}, not {md5}")
            partial.replace(target)
    except (OSError, http.client.HTTPException) as error:
        reason = error.reason if isinstance(error, urllib.error.URLError) else error
        raise UserError(f"cannot download {url}: {reason}") from None


def _open(url: str) -> http.client.HTTPResponse:
    """The answer to a GET, or OSError after a bounded time, whichever step of it hangs.

    A socket's timeout does not cover the name lookup, so the request runs in a thread that may be left behind.
    """
    answer: concurrent.futures.Future = concurrent.futures.Future()

    def ask():
        try:
            response = urllib.request.urlopen(url, timeout=_STALL_SECONDS)
        except urllib.error.HTTPError as error:
            error.close()
            answer.set_exception(error)
        except Exception as error:
            answer.set_exception(error)
        else:
            answer.set_result(response)

    threading.Thread(target=ask, daemon=True).start()
    try:
        return answer.result(timeout=_ANSWER_SECONDS)
    except concurrent.futures.TimeoutError:
        answer.add_done_callback(lambda late: late.exception() or late.result().close())
        raise TimeoutError(f"no answer within {_ANSWER_SECONDS:.0f} seconds") from None


def _copy(response: http.client.HTTPResponse, path: Path) -> str:
    """Write the response's body to a file under a progress bar; return its MD5."""
    digest = hashlib.md5(usedforsecurity=False)
    size = int(response.headers.get("Content-Length") or 0) or None
    with path.open("wb") as file, download_bar(path.name, size) as advance:
        while chunk := response.read(_CHUNK):
            file.write(chunk)
            digest.update(chunk)
            advance(len(chunk))
    return digest.hexdigest()
