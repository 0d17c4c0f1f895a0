"""An HTTP server on 127.0.0.1 that fails in the ways in which servers fail."""

import base64
import contextlib
import hashlib
import http.server
import random
import ssl
import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field

from cifar.download import Archive

CONTENT = random.Random(0).randbytes(600_000)
OTHER = CONTENT[::-1]
HALF = len(CONTENT) // 2
REFUSED = "http://127.0.0.1:9/x"  # nothing listens there


def archive_of(content: bytes, **changes) -> Archive:
    facts = {"name": "data.tar.gz", "folder": "data", "files": {"one": ""}, "urls": ()}
    return Archive(size=len(content), sha256=hashlib.sha256(content).hexdigest(), **{**facts, **changes})


@dataclass
class Server:
    """Answers each path with a list of behaviours, the last one for all further requests."""

    url: str = ""
    behaviours: dict[str, list[Callable]] = field(default_factory=dict)
    requests: list[tuple[str, int]] = field(default_factory=list)  # path, and the first byte of the range
    passwords: list[str | None] = field(default_factory=list)  # user:password of each request

    def play(self, path: str, *behaviours: Callable) -> str:
        """Set the behaviours for a path; returns its address."""
        self.behaviours[f"/{path}"] = list(behaviours)
        return f"{self.url}/{path}"

    def starts(self, path: str) -> list[int]:
        """List at which byte each request for the path began."""
        return [start for requested, start in self.requests if requested == f"/{path}"]


@contextlib.contextmanager
def serving(context: ssl.SSLContext | None = None) -> Iterator[Server]:
    server = Server()

    class Handler(http.server.BaseHTTPRequestHandler):
        def do_GET(self):
            self.start = int(self.headers.get("Range", "bytes=0-").removeprefix("bytes=").removesuffix("-"))
            server.requests.append((self.path, self.start))
            login = self.headers.get("Authorization")
            server.passwords.append(login and base64.b64decode(login.removeprefix("Basic ")).decode())
            behaviours = server.behaviours[self.path]
            (behaviours.pop(0) if len(behaviours) > 1 else behaviours[0])(self)

        def log_message(self, *_):
            pass

    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler) as listener:
        listener.handle_error = lambda *_: None  # clients that go away are part of the tests
        if context:
            listener.socket = context.wrap_socket(listener.socket, server_side=True)
        server.url = f"http{'s' if context else ''}://127.0.0.1:{listener.server_port}"
        threading.Thread(target=listener.serve_forever, kwargs={"poll_interval": 0.02}, daemon=True).start()
        yield server
        listener.shutdown()


# Behaviours: functions of the handler


def respond(status: int, body: bytes = b"", **headers):
    def behave(handler):
        handler.send_response(status)
        for name, value in headers.items():
            handler.send_header(name.replace("_", "-"), str(value))
        handler.end_headers()
        handler.wfile.write(body)

    return behave


def send(content: bytes = CONTENT, *, ranges: bool = True, until: int | None = None):
    """Answer well, or only up to the byte `until`."""

    def behave(handler):
        start = handler.start if ranges else 0
        headers = {"Content_Range": f"bytes {start}-{len(content) - 1}/{len(content)}"} if start else {}
        respond(206 if start else 200, content[start:until], Content_Length=len(content) - start, **headers)(handler)

    return behave


def chunked(until: int | None = None):
    """Announce no length, ignore ranges, and send no end after the byte `until`."""
    parts = [b"%x\r\n%s\r\n" % (50_000, CONTENT[at : at + 50_000]) for at in range(0, until or len(CONTENT), 50_000)]
    body = b"".join(parts) + (b"" if until else b"0\r\n\r\n")

    def behave(handler):
        handler.protocol_version = "HTTP/1.1"
        handler.close_connection = True
        respond(200, body, Transfer_Encoding="chunked")(handler)

    return behave


def crumb(handler):
    send(until=handler.start + 5_000)(handler)


def stall(handler):
    send(until=HALF)(handler)
    time.sleep(1)


def drip(handler):
    """Send 240 kB/s."""
    send(until=handler.start)(handler)
    for start in range(handler.start, len(CONTENT), 12_000):
        handler.wfile.write(CONTENT[start : start + 12_000])
        time.sleep(0.05)


def fail(status: int):
    return respond(status, b"<html><body>Back soon</body></html>")


def redirect(url: str):
    return respond(302, Location=url, Content_Length=0)


# What a server does -> how the message names it, and the most requests before that.
FAILURES = {
    "breaks off without a length": (chunked(until=HALF), "it stopped after 300,000", 4),
    "breaks off another file": (send(OTHER, until=HALF), "it stopped after 300,000", 4),
    "breaks off after each 5,000 bytes": (crumb, "it stopped after 15,000", 3),
    "stalls": (stall, "it stopped after 300,000", 4),
    "sends nothing": (lambda handler: time.sleep(1), "timed out", 1),
    "hangs up": (lambda handler: None, "it gave no valid HTTP answer", 3),
    "speaks no HTTP": (lambda handler: handler.wfile.write(b"220 ftp ready\r\n" * 9), "no valid HTTP answer", 3),
    "is busy": (fail(503), "HTTP 503 Service Unavailable", 3),
    "lacks it": (fail(404), "HTTP 404 Not Found", 1),
    "shows a page": (send(b"<html>Please log in to this network</html>"), "another file: not 600,000 bytes", 1),
    "has another file": (send(OTHER), "it sent a wrong file", 1),
    "has a longer file": (send(CONTENT + b"more"), "it has another file", 1),
    "sends another part": (respond(206, Content_Length=10), "it has another file", 1),
    "redirects to FTP": (redirect("ftp://127.0.0.1/x"), "unsupported protocol 'ftp://'", 1),
    "redirects to a file": (redirect("file:///etc/passwd"), "unsupported protocol 'file://'", 1),
    "redirects to nobody": (redirect(REFUSED), "Connection refused", 1),
    "redirects to no host": (redirect("http://a..b/x"), "label empty", 1),
    "redirects to itself": (redirect("a"), "Exceeded maximum allowed redirects", 21),
}
