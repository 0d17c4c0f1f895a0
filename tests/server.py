"""An HTTP server on the loopback address that misbehaves in every way that servers do."""

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


def archive_of(content: bytes, **changes) -> Archive:
    facts = {"name": "data.tar.gz", "folder": "data", "files": {"one": ""}, "unpacked": 0, "urls": ()}
    return Archive(size=len(content), sha256=hashlib.sha256(content).hexdigest(), **{**facts, **changes})


@dataclass
class Server:
    """An HTTP server that plays a list of behaviours for each path, the last one again and again."""

    url: str = ""
    plays: dict[str, list[Callable]] = field(default_factory=dict)
    asked: list[tuple[str, str | None]] = field(default_factory=list)  # path, and the range's first byte

    def play(self, path: str, *behaviours: Callable) -> str:
        self.plays[f"/{path}"] = list(behaviours)
        return f"{self.url}/{path}"

    def starts(self, path: str) -> list[int]:
        """At which byte each request for the path began."""
        return [int(start or 0) for asked, start in self.asked if asked == f"/{path}"]


@contextlib.contextmanager
def serving(context: ssl.SSLContext | None = None) -> Iterator[Server]:
    server = Server()

    class Handler(http.server.BaseHTTPRequestHandler):
        def do_GET(self):
            wanted = self.headers.get("Range")
            self.start = int(wanted.removeprefix("bytes=").removesuffix("-")) if wanted else 0
            server.asked.append((self.path, str(self.start) if wanted else None))
            plays = server.plays[self.path]
            (plays.pop(0) if len(plays) > 1 else plays[0])(self)

        def log_message(self, *_):
            pass

    class Quiet(http.server.ThreadingHTTPServer):
        def handle_error(self, *_):  # a client that goes away is what is tested
            pass

    with Quiet(("127.0.0.1", 0), Handler) as listener:
        if context:
            listener.socket = context.wrap_socket(listener.socket, server_side=True)
        server.url = f"http{'s' if context else ''}://127.0.0.1:{listener.server_port}"
        threading.Thread(target=listener.serve_forever, kwargs={"poll_interval": 0.02}, daemon=True).start()
        yield server
        listener.shutdown()


# What a server does with a request


def send(content: bytes = CONTENT, *, ranges: bool = True, until: int | None = None, length: int | None = None):
    """Answer well, or up to the byte `until` alone, or with a false length."""

    def behave(handler):
        start = handler.start if ranges else 0
        handler.send_response(206 if start else 200)
        handler.send_header("Content-Length", str(len(content) - start if length is None else length))
        if start:
            handler.send_header("Content-Range", f"bytes {start}-{len(content) - 1}/{len(content)}")
        handler.end_headers()
        handler.wfile.write(content[start:until])

    return behave


def stall(after: int):
    def behave(handler):
        send(until=after)(handler)
        time.sleep(1)

    return behave


def drip(handler):
    """Under 250 kB a second."""
    handler.send_response(206 if handler.start else 200)
    handler.send_header("Content-Range", f"bytes {handler.start}-{len(CONTENT) - 1}/{len(CONTENT)}")
    handler.end_headers()
    for place in range(handler.start, len(CONTENT), 12_000):
        handler.wfile.write(CONTENT[place : place + 12_000])
        time.sleep(0.05)


def fail(status: int):
    def behave(handler):
        page = b"<html><body>Back soon</body></html>"
        handler.send_response(status)
        handler.send_header("Content-Length", str(len(page)))
        handler.end_headers()
        handler.wfile.write(page)

    return behave


def show_a_page(handler):
    send(b"<html>Please log in to this network</html>")(handler)


def chunked(cut: bool = False):
    def behave(handler):
        handler.protocol_version = "HTTP/1.1"
        handler.close_connection = True
        handler.send_response(200)
        handler.send_header("Transfer-Encoding", "chunked")
        handler.end_headers()
        for place in range(0, HALF if cut else len(CONTENT), 50_000):
            part = CONTENT[place : place + 50_000]
            handler.wfile.write(b"%x\r\n%s\r\n" % (len(part), part))
        if not cut:
            handler.wfile.write(b"0\r\n\r\n")

    return behave


def part_of_another(handler):
    handler.send_response(206)
    handler.send_header("Content-Range", f"bytes {handler.start}-{handler.start + 9}/{len(CONTENT) + 1}")
    handler.end_headers()


def say_nothing(handler):
    time.sleep(1.5)


def hang_up(handler):
    handler.close_connection = True


def babble(handler):
    handler.wfile.write(b"220 ftp ready\r\n" * 9)


def redirect(url: str):
    def behave(handler):
        handler.send_response(302)
        handler.send_header("Location", url)
        handler.send_header("Content-Length", "0")
        handler.end_headers()

    return behave
