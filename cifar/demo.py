"""The demo's server: on this machine alone unless told otherwise, and closed to all that the page does not need."""

import contextlib
import errno
import ipaddress
import os
import re
import socket
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import gradio as gr
from gradio import processing_utils
from starlette.datastructures import Headers
from starlette.middleware import Middleware
from starlette.responses import PlainTextResponse

from cifar import console, demo_page
from cifar.demo_runs import DemoRuns
from cifar.errors import UsageError, UserError
from cifar.runs import Run

AUTH_VARIABLE = "CIFAR_DEMO_AUTH"
_FILE_LIMIT = 10_000_000  # bytes
_FORM_LIMIT = _FILE_LIMIT + 100_000  # bytes; what a request adds to its file is under this
_WAITING = 64  # requests
_SESSIONS = 100  # visitors whose page Gradio remembers
_PORTS_TRIED = 100


def serve(run: Run | None = None, *, host: str = "127.0.0.1", **options: Any) -> None:
    """Serve the demo until interrupted. The parameters are those of `running`."""
    with running(run, host=host, **options) as page:
        console.say(f"the demo is at {page.share_url or page.local_url}, Ctrl-C ends it")
        if not _is_loopback(host) and not page.auth:
            console.banner(f"Whoever reaches {host} can use the demo: --auth USER:PASSWORD asks who they are.")
        while page.is_running:
            time.sleep(1)


@contextlib.contextmanager
def running(
    run: Run | None = None,
    *,
    output_dir: str,
    data_dir: str,
    host: str = "127.0.0.1",
    port: int = 7860,
    share: bool = False,
    auth: str | None = None,
    device: str = "auto",
) -> Iterator[gr.Blocks]:
    """The demo, answering at the page's `local_url` while the context lasts.

    run: shown first; the newest evaluated one of output_dir if None. auth: USER:PASSWORD, which CIFAR_DEMO_AUTH in
    the environment stands for. share: ask Gradio's servers for a public address.
    Raises UserError if no run can answer, nothing can listen on host and port, or no public address is to be had.
    """
    credentials = _credentials(auth or os.environ.get(AUTH_VARIABLE))
    _require_free(host, port)
    with tempfile.TemporaryDirectory(prefix="cifar-demo-") as name, _environment(Path(name) / "uploads", host):
        runs = DemoRuns(run, output_dir, data_dir, device, Path(name) / "examples")
        page = demo_page.build(runs, Path(name) / "uploads")
        _launch(page, host=f"[{host}]" if ":" in host else host, port=port, share=share, auth=credentials)
        try:
            if share and not page.share_url:
                raise UserError("no public address could be had from Gradio's servers: try again, or leave out --share")
            yield page
        finally:
            page.close(verbose=False)


def _launch(page: gr.Blocks, *, host: str, port: int, share: bool, auth: tuple[str, str] | None) -> None:
    # Gradio fetches whatever address a client names as its file; this server fetches nothing.
    processing_utils.async_ssrf_protected_get = _refuse_address
    page.queue(max_size=_WAITING, api_open=False)
    page.launch(
        server_name=host,
        server_port=port,
        share=share,
        auth=auth,
        theme=demo_page.THEME,
        css=demo_page.CSS,
        footer_links=["api"],
        max_file_size=_FILE_LIMIT,
        state_session_capacity=_SESSIONS,
        app_kwargs={"middleware": [Middleware(Gate)]},
        prevent_thread_lock=True,
        quiet=True,
        inline=False,
        enable_monitoring=False,
        run_history=False,
        mcp_server=False,
        ssr_mode=False,
        num_workers=0,
        pwa=False,
    )


class Gate:
    """Turns away what Gradio would do and the demo does not need: fetching addresses, ffmpeg, saved states, floods."""

    _CLOSED = re.compile(r"/gradio_api/(file[=/]https?:|proxy=|deep_link|process_recording|vibe|undo-vibe)")

    def __init__(self, app):
        self.app = app

    async def __call__(self, scope, receive, send) -> None:
        app = self.app
        if scope["type"] == "http":
            size = Headers(scope=scope).get("content-length", "0")
            if self._CLOSED.match(scope["path"]):
                app = PlainTextResponse("not served here", 403)
            elif not size.isdecimal() or int(size) > _FORM_LIMIT:
                app = PlainTextResponse(f"over the limit of {_FILE_LIMIT // 10**6} MB", 413)
        await app(scope, receive, send)


async def _refuse_address(url: str) -> None:
    raise gr.Error("Send the picture itself: this server fetches nothing from elsewhere.", print_exception=False)


@contextlib.contextmanager
def _environment(uploads: Path, host: str) -> Iterator[None]:
    """The settings that Gradio takes from the environment alone, put back afterwards."""
    settings = {
        "GRADIO_TEMP_DIR": str(uploads),
        "GRADIO_EXAMPLES_CACHE": str(uploads),  # else files under .gradio in the working directory could be read
        "GRADIO_ANALYTICS_ENABLED": "False",
        "GRADIO_ANALYTICS_MAX_EVENTS": "1",  # kept in memory
        "GRADIO_ANALYTICS_CACHE_FREQUENCY": str(10**9),  # events until Gradio makes a table of them
        "NO_PROXY": f"{host},localhost",  # Gradio asks itself whether it is up, which a proxy cannot answer
        "no_proxy": f"{host},localhost",
    }
    before = {name: os.environ.get(name) for name in settings}
    os.environ.update(settings)
    try:
        yield
    finally:
        for name, value in before.items():
            if value is None:
                del os.environ[name]
            else:
                os.environ[name] = value


def _credentials(auth: str | None) -> tuple[str, str] | None:
    if not auth:
        return None
    user, _, password = auth.partition(":")
    if not user or not password:
        raise UsageError(f"--auth and {AUTH_VARIABLE} take USER:PASSWORD, and neither may be empty")
    return user, password


def _require_free(host: str, port: int) -> None:
    """Raise UserError, with a free port, unless the demo can listen on this one."""
    if not 1 <= port <= 65535:
        raise UserError(f"--port must be from 1 to 65535, not {port}")
    if not _is_free(host, port):
        others = range(port + 1, min(port + _PORTS_TRIED, 65536))
        free = next((other for other in others if _is_free(host, other)), None)
        raise UserError(f"port {port} is taken: " + (f"--port {free} is free" if free else "name another with --port"))


def _is_free(host: str, port: int) -> bool:
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    try:
        socket.create_server((host, port), family=family).close()
    except OSError as error:
        if error.errno == errno.EADDRINUSE:
            return False
        raise UserError(f"cannot listen on {host}, port {port}: {error.strerror}") from None
    return True


def _is_loopback(host: str) -> bool:
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return host == "localhost"
