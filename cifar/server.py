"""The web server around the demo's page: local by default, and closed to everything that the page does not need.

It trusts no visitor: what arrives is counted while it arrives, and where too much is open at once, the oldest gives
way, so that nobody can occupy the server.
"""

import asyncio
import base64
import contextlib
import errno
import ipaddress
import logging
import os
import re
import secrets
import socket
import time
from collections import deque
from operator import attrgetter
from pathlib import Path
from typing import Any, NoReturn
from urllib.parse import urlsplit
from weakref import WeakValueDictionary

import gradio as gr
import uvicorn
from gradio import networking, processing_utils
from gradio.utils import LRUCache, get_upload_folder
from starlette.applications import Starlette
from starlette.datastructures import Headers
from starlette.exceptions import HTTPException
from starlette.middleware import Middleware
from starlette.requests import ClientDisconnect
from starlette.responses import PlainTextResponse, Response
from starlette.routing import Route
from starlette.types import ASGIApp, Message, Receive, Scope, Send
from uvicorn.protocols.http.h11_impl import H11Protocol

from cifar import console, device
from cifar.errors import UsageError, UserError, describe

AUTH_VARIABLE = "CIFAR_DEMO_AUTH"
_MAX_FILE = 10_000_000  # bytes
_MAX_UPLOAD = _MAX_FILE + 100_000  # bytes: a file and what the upload form adds to it
_MAX_BODY = 100_000  # bytes, of all other requests
_MAX_ARRIVING = 100_000_000  # bytes of all requests that have not arrived completely
_MAX_STORED = (100_000_000, 300)  # bytes and number of uploaded files
_MAX_CONNECTIONS = 300  # each with the file that it uploads, under the 1,024 open files that systems allow
_MAX_VISITORS = 100  # whose page, and whose messages until they are fetched, Gradio remembers
_MAX_MESSAGES = 50  # for each of them, of up to 50 kB; an answer comes with two others
_MAX_LOGGED = 20  # lines a minute
_MAX_SECONDS = 120  # until the first request of a connection has arrived
_WRONG_PASSWORD_SECONDS = 1.0
# Gradio's routes that fetch from other servers, save the state of a page or run ffmpeg.
_CLOSED = (
    "file=http{rest:path}",
    "file/http{rest:path}",
    "proxy={rest:path}",
    "deep_link",
    "process_recording",
    "dev/reload",
)


def credentials(auth: str | None) -> str | None:
    """Check USER:PASSWORD, by default from CIFAR_DEMO_AUTH in the environment. Raises UsageError."""
    auth = os.environ.get(AUTH_VARIABLE) if auth is None else auth
    if auth is not None and not (all(auth.partition(":")) and auth.isprintable()):
        raise UsageError(f"--auth and {AUTH_VARIABLE} must be USER:PASSWORD, both printable and not empty")
    return auth


def listen(host: str, port: int) -> socket.socket:
    """Open the socket that the demo listens on; port 0 picks a free one.

    Raises UserError if that is impossible; if the port is in use, the message names a free one.
    """
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    try:
        host.encode("idna")  # as `bind` does, whose error would leave a socket open
    except UnicodeError:
        raise UserError(f"cannot listen on {host}: it is not a valid name") from None
    try:
        return socket.create_server((host, port), family=family)
    except OSError as error:
        if error.errno != errno.EADDRINUSE:
            reason = (error.strerror or "").partition(" (")[0]  # without the repeated address
            raise UserError(f"cannot listen on {host}, port {port}: {reason}") from None
    with socket.create_server((host, 0), family=family) as other:
        raise UserError(f"port {port} is in use; --port {other.getsockname()[1]} is free")


def set_upload_folder(folder: str) -> None:
    """Make Gradio keep the files of its visitors in `folder`, and serve no others. Call this before building a page."""
    os.environ["GRADIO_TEMP_DIR"] = folder
    os.environ["GRADIO_EXAMPLES_CACHE"] = folder  # by default a folder in the working directory
    # Gradio keeps a record of each request, and by default summarizes all of them with pandas after each.
    os.environ["GRADIO_ANALYTICS_MAX_EVENTS"] = "1"
    os.environ["GRADIO_ANALYTICS_CACHE_FREQUENCY"] = str(10**9)


class Page(gr.Blocks):
    """A page on which nothing that a visitor sends causes a traceback."""

    async def process_api(self, *arguments: Any, **options: Any) -> dict[str, Any]:
        """Answer an event; an error becomes a sentence on the page or in the API's answer."""
        try:
            return await super().process_api(*arguments, **options)
        except UserError as error:
            message = sentence(error)
        except gr.Error as error:
            message = error.message
        except Exception as error:  # Gradio raises many kinds for data of a wrong shape
            _log(error)
            message = "This request has data of a wrong shape: see the API's documentation."
        raise gr.Error(message, print_exception=False)


def sentence(error: UserError) -> str:
    """Return the error's message with a capital letter and a full stop."""
    text = str(error)
    return f"{text[0].upper()}{text[1:]}."


def _log(error: BaseException) -> None:
    """Tell the operator, in one short line, of a request that failed; of many, only a few each minute."""
    now = time.monotonic()
    if len(_logged) < _MAX_LOGGED or _logged[0] < now - 60:
        _logged.append(now)
        console.say(f"a request failed: {describe(error)[:200]}")


_logged: deque[float] = deque(maxlen=_MAX_LOGGED)  # when the latest were


class _Messages(asyncio.Queue):
    """The messages that a visitor has not fetched yet; the oldest give way."""

    def _put(self, message: Any) -> None:
        if self.qsize() >= _MAX_MESSAGES:
            self._get()
        super()._put(message)


class _MessagesByVisitor(LRUCache):
    """The messages of the latest visitors, in place of Gradio's cache, which has no limit for each of them."""

    def __init__(self, events: dict[str, set[str]]):
        """events: Gradio's own, by visitor, of which it would forget none."""
        super().__init__(_MAX_VISITORS)
        self._events = events

    def __getitem__(self, visitor: str) -> asyncio.Queue:
        return self.get(visitor) or _Messages()  # the answer to a visitor who has given way

    def __setitem__(self, visitor: str, _: asyncio.Queue) -> None:
        super().__setitem__(visitor, _Messages())
        for gone in self._events.keys() - self.keys():
            del self._events[gone]


class _Connection(H11Protocol):
    """A connection to the server. When there are too many, the oldest is closed; so is one whose request is slow."""

    def connection_made(self, transport: Any) -> None:
        super().connection_made(transport)
        self.opened = self.loop.time()
        self.deadline = self.loop.call_later(_MAX_SECONDS, self.expire)
        if len(self.connections) > _MAX_CONNECTIONS:
            oldest = min(self.connections, key=attrgetter("opened"))
            self.connections.remove(oldest)
            oldest.transport.abort()

    def connection_lost(self, error: Exception | None) -> None:
        self.deadline.cancel()
        super().connection_lost(error)

    def expire(self) -> None:
        """Close the connection if its first request has not arrived completely."""
        if self.cycle is None or self.cycle.more_body:
            self.transport.abort()


class _Gate:
    """ASGI middleware that refuses what is not meant for the demo, lacks its password or is too large."""

    def __init__(self, app: ASGIApp, hosts: set[str], auth: str | None):
        """hosts: the demo's names, besides IP addresses. auth: USER:PASSWORD."""
        self._app, self._hosts = app, hosts
        self._password = b"Basic " + base64.b64encode(auth.encode()) if auth else None
        self._attempts: WeakValueDictionary[str, asyncio.Lock] = WeakValueDictionary()  # by the visitor's address
        self._arriving: dict[asyncio.Task, int] = {}  # bytes so far, oldest request first

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            return await self._app(scope, receive, send)
        headers = Headers(scope=scope)
        limit = _MAX_UPLOAD if scope["path"] == "/gradio_api/upload" else _MAX_BODY
        has_more = "transfer-encoding" in headers or headers.get("content-length", "0") != "0"
        task, received = asyncio.current_task(), 0
        assert task  # the server's, for this request

        async def read() -> Message:
            """Return the next part of the body. Where too much is arriving in all, the oldest request is ended."""
            nonlocal has_more, received
            message = await receive()
            has_more = message.get("more_body", False)
            received += len(message.get("body", b""))
            if received > limit:
                raise HTTPException(413, "the request is too large")
            self._arriving[task] = received
            if not has_more:
                del self._arriving[task]
            elif sum(self._arriving.values()) > _MAX_ARRIVING:
                next(iter(self._arriving)).cancel()
            return message

        async def answer(message: Message) -> None:
            if message["type"] == "http.response.start" and has_more:  # or the server would read all of it
                message["headers"] = [*message["headers"], (b"connection", b"close")]
            await send(message)

        try:
            refusal = self._refuse(headers, limit) or await self._refuse_stranger(scope, headers)
            if limit == _MAX_UPLOAD and not refusal:
                _make_room(Path(get_upload_folder()))
            await (refusal or self._app)(scope, read, answer)
        except ClientDisconnect:
            pass
        except Exception as error:  # after Gradio has answered
            _log(error)
        finally:
            self._arriving.pop(task, None)

    def _refuse(self, headers: Headers, limit: int) -> Response | None:
        """Return the response to a request that another site has sent, or that says itself that it is too large."""
        host, origin = headers.get("host", ""), headers.get("origin")
        own = {host, headers.get("x-forwarded-host")}  # behind a proxy; other sites cannot set this header
        if not self._is_own(host) or (origin is not None and origin.partition("://")[2] not in own):
            known_as = "open the demo by its IP address, or start it with this name as --host"
            return PlainTextResponse(f"this address, or the site of the request, is not allowed: {known_as}", 403)
        if int(headers.get("content-length", 0)) > limit:
            return PlainTextResponse("the request is too large", 413)
        return None

    def _is_own(self, host: str) -> bool:
        """Return whether the Host header is an IP address, which no other site's name can be, or the demo's name."""
        name = re.sub(r":\d+$", "", host).strip("[]").lower()
        with contextlib.suppress(ValueError):
            return bool(ipaddress.ip_address(name))
        return name in self._hosts

    async def _refuse_stranger(self, scope: Scope, headers: Headers) -> Response | None:
        """Return the response to a request without the password; after a wrong one, its address waits for a second."""
        if self._password is None:
            return None
        given = headers.get("authorization", "").encode()
        lock = self._attempts.setdefault(scope["client"][0], asyncio.Lock())
        async with lock:
            if secrets.compare_digest(given, self._password):
                return None
            if given:
                await asyncio.sleep(_WRONG_PASSWORD_SECONDS)
        return PlainTextResponse(
            "a password is needed", 401, {"www-authenticate": 'Basic realm="demo", charset="UTF-8"'}
        )


def _make_room(folder: Path) -> None:
    """Delete the oldest uploads, of visitors who went away too, until another one fits."""
    room, most = _MAX_STORED
    found = []
    for path in folder.rglob("*"):
        with contextlib.suppress(FileNotFoundError):  # moved by Gradio meanwhile
            status = path.stat()
            if path.is_file():
                found.append((status.st_mtime, status.st_size, path))
    for number, (_, size, path) in enumerate(sorted(found, reverse=True)):
        room -= size
        if room < _MAX_FILE or number >= most:
            path.unlink(missing_ok=True)


def make_app(page: Page, auth: str | None, hosts: set[str], **look: Any) -> Starlette:
    """Mount the page behind the limits on what visitors may send and ask for. `look` is Gradio's theme and css."""
    # Gradio downloads any address that a client sends in place of a file; this server must not.
    processing_utils.async_ssrf_protected_get = _refuse_address
    page.has_launched = True  # or Gradio lets clients name any file of this machine as an uploaded one
    page.queue(max_size=64, api_open=False)
    page.state_session_capacity = _MAX_VISITORS
    page._queue.pending_messages_per_session = _MessagesByVisitor(page._queue.pending_event_ids_session)
    refusal = PlainTextResponse("not available on this server", 403)
    app = Starlette(
        routes=[Route(f"/gradio_api/{path}", refusal) for path in _CLOSED],
        middleware=[Middleware(_Gate, hosts=hosts, auth=auth)],
    )
    off = dict.fromkeys(("show_error", "run_history", "enable_monitoring", "mcp_server", "ssr_mode"), False)
    on_error = {"exception_handlers": {Exception: _bad_request}}
    options = {"max_file_size": _MAX_FILE, "footer_links": ["api"], "app_kwargs": on_error}
    return gr.mount_gradio_app(app, page, path="/", **options, **off, **look)


def serve(page: Page, listener: socket.socket, *, host: str, auth: str | None, share: bool, **look: Any) -> None:
    """Serve the page until Ctrl-C; with `share`, at a public address. Raises UserError if Gradio provides none."""
    device.return_freed_memory()
    address, port = listener.getsockname()[:2]
    address = ipaddress.ip_address(address)
    name = "localhost" if address.is_unspecified else f"[{address}]" if address.version == 6 else str(address)
    hosts = {"localhost", host.lower(), socket.gethostname().lower()}
    app = make_app(page, auth, hosts, **look)
    url = f"http://{name}:{port}/"
    if share:
        try:
            url = networking.setup_tunnel(name, port, page.share_token, None, None).replace("http://", "https://")
        except Exception as error:  # of many kinds: from the network, the helper program or its download
            message = f"no public address from Gradio's servers ({describe(error)}); try without --share"
            raise UserError(message) from None
        hosts.add(str(urlsplit(url).hostname))
    console.say(f"demo running at {url}; press Ctrl-C to stop")
    if not address.is_loopback and not auth:
        console.banner("Anyone who can reach this machine can use the demo; --auth USER:PASSWORD asks for a password.")
    logging.disable()  # libraries quote what visitors send
    # Open pages hold a connection for good: after a second, the server stops without them.
    config = uvicorn.Config(
        app, http=_Connection, ws="none", log_level="critical", backlog=64, timeout_graceful_shutdown=1
    )
    uvicorn.Server(config).run(sockets=[listener])


async def _refuse_address(url: str) -> NoReturn:
    raise gr.Error("Upload the image itself: this server downloads nothing.", print_exception=False)


async def _bad_request(*_: Any) -> Response:
    return PlainTextResponse("this request is not one that the page or its API sends", 400, {"connection": "close"})
