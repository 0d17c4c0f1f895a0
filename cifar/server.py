"""The web server around the demo's page: local by default, and closed to everything that the page does not need."""

import errno
import ipaddress
import os
import socket
from typing import Any

import gradio as gr
import uvicorn
from gradio import networking, processing_utils
from starlette.applications import Starlette
from starlette.middleware import Middleware
from starlette.middleware.body_limit import RequestBodyLimitMiddleware
from starlette.responses import PlainTextResponse
from starlette.routing import Route

from cifar import console
from cifar.errors import UsageError, UserError, describe

AUTH_VARIABLE = "CIFAR_DEMO_AUTH"
_MAX_FILE = 10_000_000  # bytes
_MAX_BODY = _MAX_FILE + 100_000  # bytes: a file and what the upload form adds to it
# Gradio's routes that fetch from other servers, save the state of a page or run ffmpeg.
_CLOSED = ("file=http{rest:path}", "file/http{rest:path}", "proxy={rest:path}", "deep_link", "process_recording")


def credentials(auth: str | None) -> tuple[str, str] | None:
    """Parse USER:PASSWORD, by default from CIFAR_DEMO_AUTH in the environment. Raises UsageError."""
    auth = os.environ.get(AUTH_VARIABLE) if auth is None else auth
    if auth is None:
        return None
    user, _, password = auth.partition(":")
    if not user or not password:
        raise UsageError(f"--auth and {AUTH_VARIABLE} take USER:PASSWORD, and neither part may be empty")
    return user, password


def listen(host: str, port: int) -> socket.socket:
    """Open the socket that the demo listens on; port 0 picks a free one.

    Raises UserError if that is impossible; if the port is in use, the message names a free one.
    """
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    try:
        return socket.create_server((host, port), family=family)
    except OSError as error:
        if error.errno != errno.EADDRINUSE:
            reason = error.strerror.partition(" (")[0]  # without the repeated address
            raise UserError(f"cannot listen on {host}, port {port}: {reason}") from None
    with socket.create_server((host, 0), family=family) as other:
        raise UserError(f"port {port} is in use; --port {other.getsockname()[1]} is free")


def set_upload_folder(folder: str) -> None:
    """Make Gradio keep the files of its visitors in `folder`, and serve no others. Call this before building a page."""
    os.environ["GRADIO_TEMP_DIR"] = folder
    os.environ["GRADIO_EXAMPLES_CACHE"] = folder  # by default a folder in the working directory
    # Requests after which Gradio summarizes its usage statistics with pandas; the default is to do so after each.
    os.environ["GRADIO_ANALYTICS_CACHE_FREQUENCY"] = str(10**9)


def make_app(page: gr.Blocks, auth: tuple[str, str] | None, **look: Any) -> Starlette:
    """Mount the page behind the limits on what visitors may send and ask for. `look` is Gradio's theme and css."""
    # Gradio downloads any address that a client sends in place of a file; this server must not.
    processing_utils.async_ssrf_protected_get = _refuse_address
    page.has_launched = True  # or Gradio lets clients name any file of this machine as an uploaded one
    page.queue(max_size=64, api_open=False)
    page.state_session_capacity = 100  # visitors whose page Gradio remembers
    refusal = PlainTextResponse("not available on this server", 403)
    app = Starlette(
        routes=[Route(f"/gradio_api/{path}", refusal) for path in _CLOSED],
        middleware=[Middleware(RequestBodyLimitMiddleware, max_body_size=_MAX_BODY)],
    )
    off = dict.fromkeys(("show_error", "run_history", "enable_monitoring", "mcp_server", "ssr_mode"), False)
    return gr.mount_gradio_app(
        app, page, path="/", auth=auth, max_file_size=_MAX_FILE, footer_links=["api"], **off, **look
    )


def serve(page: gr.Blocks, listener: socket.socket, *, auth: tuple[str, str] | None, share: bool, **look: Any) -> None:
    """Serve the page until Ctrl-C; with `share`, at a public address. Raises UserError if Gradio provides none."""
    app = make_app(page, auth, **look)
    host, port = listener.getsockname()[:2]
    address = ipaddress.ip_address(host)
    name = "localhost" if address.is_unspecified else f"[{host}]" if address.version == 6 else host
    url = _public_url(page, name, port) if share else f"http://{name}:{port}/"
    console.say(f"demo running at {url}; press Ctrl-C to stop")
    if not address.is_loopback and not auth:
        console.banner("Anyone who can reach this machine can use the demo; --auth USER:PASSWORD asks for a password.")
    # Open pages hold a connection for good: after a second, the server stops without them.
    config = uvicorn.Config(app, log_level="critical", timeout_graceful_shutdown=1)
    uvicorn.Server(config).run(sockets=[listener])


def _public_url(page: gr.Blocks, host: str, port: int) -> str:
    try:
        url = networking.setup_tunnel(host, port, page.share_token, None, None)
    except Exception as error:  # of many kinds: from the network, the helper program or its download
        raise UserError(f"no public address from Gradio's servers ({describe(error)}); try without --share") from None
    return url.replace("http://", "https://")


async def _refuse_address(url: str) -> None:
    raise gr.Error("Upload the image itself: this server downloads nothing.", print_exception=False)
