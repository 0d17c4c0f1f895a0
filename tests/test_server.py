"""What the demo's server lets in: addresses, passwords, requests; and what it does with too many of them."""

import asyncio
import contextlib
import logging
import re
import socket
import threading
import time
from collections import deque
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import gradio as gr
import httpx
import pytest
import uvicorn
from gradio import networking

from cifar import server
from cifar.errors import UserError

ANALYTICS = ("GRADIO_ANALYTICS_MAX_EVENTS", "GRADIO_ANALYTICS_CACHE_FREQUENCY")
CLOSED = b""  # what is read from a connection that the server has closed


@pytest.fixture
def page(monkeypatch, tmp_path):
    """An empty page; afterwards the event loops are closed that Gradio makes for its locks and leaves open."""
    loops = []
    make_loop = asyncio.new_event_loop
    monkeypatch.setattr(asyncio, "new_event_loop", lambda: loops.append(make_loop()) or loops[-1])
    for name in ("GRADIO_TEMP_DIR", "GRADIO_EXAMPLES_CACHE", *ANALYTICS):
        monkeypatch.setenv(name, "")
    server.set_upload_folder(str(tmp_path))
    with server.Page(analytics_enabled=False) as page:
        gr.Textbox()
    yield page
    for loop in loops:
        loop.close()


@pytest.fixture
def serve(page, monkeypatch):
    """A function that serves the page from a thread, until the test ends, and returns an HTTP client for it."""
    started, stack = [], contextlib.ExitStack()

    class Server(uvicorn.Server):
        def __init__(self, config):
            super().__init__(config)
            started.append(self)

    def start(auth: str | None = None) -> httpx.Client:
        listener = stack.enter_context(server.listen("127.0.0.1", 0))
        options = {"host": "127.0.0.1", "auth": auth, "share": False}
        thread = threading.Thread(target=server.serve, args=(page, listener), kwargs=options)
        thread.start()
        while not (started and started[0].started):
            time.sleep(0.01)
        stack.callback(thread.join)
        stack.callback(lambda: setattr(started[0], "should_exit", True))
        url = f"http://127.0.0.1:{listener.getsockname()[1]}"
        return stack.enter_context(httpx.Client(base_url=url, timeout=30, trust_env=False))

    monkeypatch.setattr(uvicorn, "Server", Server)
    monkeypatch.setattr(logging, "disable", lambda: None)
    with stack:
        yield start


def connect(http: httpx.Client, request: str) -> socket.socket:
    """Open a connection and send the beginning of a request."""
    connection = socket.create_connection(("127.0.0.1", http.base_url.port), timeout=10)
    connection.sendall(request.replace("\n", "\r\n").encode())
    return connection


def read(connection: socket.socket) -> bytes:
    """Read what comes next; CLOSED if the server has closed the connection."""
    try:
        return connection.recv(1000)
    except ConnectionError:
        return CLOSED


@pytest.mark.parametrize("auth", ["", "ada", ":secret", "ada:"])
def test_auth_needs_a_user_and_a_password(auth):
    with pytest.raises(UserError, match="must be USER:PASSWORD") as error:
        server.credentials(auth)
    assert error.value.exit_code == 2


def test_the_environment_can_hold_the_password_which_may_contain_colons(monkeypatch):
    assert server.credentials(None) is None
    monkeypatch.setenv("CIFAR_DEMO_AUTH", "ada:with:colon")
    assert server.credentials(None) == "ada:with:colon"
    assert server.credentials("eve:1") == "eve:1"


def test_with_auth_only_who_knows_the_password_gets_in(serve):
    http = serve("ada:s:é")
    for path in ("/", "/config", "/theme.css", "/gradio_api/heartbeat/x", "/nothing"):
        reply = http.get(path)
        assert (reply.status_code, reply.headers["www-authenticate"][:5]) == (401, "Basic")
    assert http.post("/gradio_api/upload", files={"files": b"x"}).status_code == 401
    assert http.get("/config", auth=("ada", "wrong")).status_code == 401
    assert http.get("/config", auth=("ada", "s:é")).is_success


def test_wrong_passwords_wait_for_each_other_and_keep_no_other_address_waiting(serve, monkeypatch):
    monkeypatch.setattr(server, "_WRONG_PASSWORD_SECONDS", 0.3)
    http = serve("ada:secret")
    started = time.monotonic()
    with ThreadPoolExecutor(10) as pool, httpx.HTTPTransport(local_address="127.0.0.2") as elsewhere:
        guesses = [pool.submit(http.get, "/config", auth=("ada", str(number))) for number in range(10)]
        time.sleep(0.2)
        other = httpx.Client(transport=elsewhere, base_url=http.base_url)
        assert other.get("/config", auth=("ada", "secret")).is_success
        assert time.monotonic() - started < 2
        assert {guess.result().status_code for guess in guesses} == {401}
    assert time.monotonic() - started >= 3


REQUESTS = {
    200: [
        {},
        {"Host": "localhost:1"},
        {"Host": "192.0.2.7"},  # one of this machine's addresses, for all that the server knows
        {"Host": "[::1]:7860", "Origin": "http://[::1]:7860"},
        {"Host": "127.0.0.1:7860", "Origin": "https://demo.org", "X-Forwarded-Host": "demo.org"},  # through a proxy
    ],
    403: [
        {"Host": "evil.com"},
        {"Host": "evil.com:7860", "Origin": "http://evil.com:7860"},
        {"Host": "127.0.0.1.evil.com"},
        {"Host": "["},
        {"Host": ""},
        {"Origin": "http://evil.com"},
        {"Host": "localhost", "Origin": "http://localhost:8000"},  # another server on this machine
        {"Origin": "null"},
        {"Origin": ""},
    ],
}


def test_only_the_demos_own_page_gets_an_answer(serve):
    http = serve()
    for status, headers in ((status, headers) for status, cases in REQUESTS.items() for headers in cases):
        headers = {**headers, "Connection": "close"}  # or a connection that is about to be closed is taken again
        assert http.get("/config", headers=headers).status_code == status, headers
        assert http.post("/gradio_api/upload", files={"files": b"x"}, headers=headers).status_code == status, headers


@pytest.mark.parametrize("auth", [None, "ada:secret"])
def test_a_body_is_counted_while_it_arrives(serve, page, auth):
    http = serve(auth)
    routes = {path: "POST" for path, methods in page.app.openapi()["paths"].items() if "post" in methods}
    assert {"/login", "/gradio_api/upload", "/gradio_api/queue/join", "/gradio_api/reset"} < routes.keys()
    for path, method in {**routes, "/config": "GET", "/nothing": "POST"}.items():
        kind = "multipart/form-data; boundary=x" if path.endswith("/upload") else "application/json"
        head = f"{method} {path} HTTP/1.1\nHost: localhost\nContent-Type: {kind}\nTransfer-Encoding: chunked\n\n"
        with connect(http, head) as connection:
            sent, chunk = 0, b"10000\r\n" + b"[" * 0x10000 + b"\r\n"
            with contextlib.suppress(ConnectionError):
                while sent < 30_000_000:
                    connection.sendall(chunk)
                    sent += len(chunk)
            assert sent < 20_000_000, path  # which includes what waits in the system's buffers
            assert re.match(rb"HTTP/1.1 4\d\d|$" if method == "POST" else b"HTTP/1.1 [24]", read(connection))


def test_a_body_that_says_that_it_is_too_large_is_not_read(serve):
    http = serve()
    for path, length in (("/gradio_api/upload", 10_200_000), ("/gradio_api/queue/join", 200_000)):
        with connect(http, f"POST {path} HTTP/1.1\nHost: localhost\nContent-Length: {length}\n\n") as connection:
            assert connection.makefile("rb").read().startswith(b"HTTP/1.1 413")  # until the server closes it


HALF_A_REQUEST = {
    "no request": "",
    "half a header": "GET / HTTP/1.1\nHost: local",
    "half a body": "POST /gradio_api/queue/join HTTP/1.1\nHost: localhost\nContent-Length: 100\n\n{",
}


@pytest.mark.parametrize("start", HALF_A_REQUEST.values(), ids=HALF_A_REQUEST)
def test_half_open_connections_keep_nobody_out(serve, monkeypatch, start):
    monkeypatch.setattr(server, "_MAX_CONNECTIONS", 20)
    http = serve()
    with contextlib.ExitStack() as stack:
        connections = [stack.enter_context(connect(http, start)) for _ in range(60)]
        started = time.monotonic()
        assert http.get("/config").is_success
        assert time.monotonic() - started < 3
        assert {read(connection) for connection in connections[:40]} == {CLOSED}  # the oldest have given way


@pytest.mark.parametrize("start", HALF_A_REQUEST.values(), ids=HALF_A_REQUEST)
def test_a_request_that_takes_too_long_is_given_up(serve, monkeypatch, start):
    monkeypatch.setattr(server, "_MAX_SECONDS", 0.3)
    with connect(serve(), start) as connection:
        assert read(connection) == CLOSED


def test_uploads_have_a_total_and_the_oldest_give_way(serve, monkeypatch, tmp_path):
    monkeypatch.setattr(server, "_MAX_FILE", 1_000_000)
    monkeypatch.setattr(server, "_MAX_STORED", (3_000_000, 5))
    http = serve()
    for size in (900_000, 10):
        paths = []
        for number in range(8):
            content = bytes([number]) * size
            (path,) = http.post("/gradio_api/upload", files={"files": ("image.png", content)}).json()
            paths.append(Path(path))
        deadline = time.monotonic() + 10
        while not paths[-1].exists() and time.monotonic() < deadline:  # Gradio moves it after its answer
            time.sleep(0.01)
        assert paths[-1].exists()
        assert sum(path.stat().st_size for path in tmp_path.rglob("*") if path.is_file()) <= 3_000_000
        assert sum(path.exists() for path in paths) <= 6


def test_uploads_that_do_not_end_make_room_for_others(serve, monkeypatch):
    monkeypatch.setattr(server, "_MAX_ARRIVING", 1_500_000)
    http = serve()
    head = (
        "POST /gradio_api/upload HTTP/1.1\nHost: localhost\nContent-Type: multipart/form-data; boundary=b\n"
        'Content-Length: 9000000\n\n--b\nContent-Disposition: form-data; name="files"; filename="a.png"\n\n'
    )
    for _ in range(3):
        with connect(http, head + "-" * 700_000):  # one that breaks off counts no more
            time.sleep(0.1)
    with connect(http, head + "x" * 700_000) as oldest:
        time.sleep(0.3)  # or the server may read the other one first
        with connect(http, head + "y" * 700_000) as other:
            assert http.post("/gradio_api/upload", files={"files": ("image.png", bytes(900_000))}).is_success
            assert b"HTTP/1.1 200" not in read(oldest)  # it is closed, perhaps after an error
            other.settimeout(0.2)
            with pytest.raises(TimeoutError):
                other.recv(1)


def test_messages_wait_for_the_latest_visitors_only_and_of_each_only_the_latest(page):
    server.make_app(page, None, set())
    messages, events = page._queue.pending_messages_per_session, page._queue.pending_event_ids_session
    for visitor in map(str, range(150)):
        messages[visitor] = asyncio.Queue()
        events[visitor] = {"an event"}
        for number in range(200):
            messages[visitor].put_nowait(number)
    assert events.keys() == messages.keys() == set(map(str, range(50, 150)))
    assert [messages["149"].get_nowait() for _ in range(50)] == [*range(150, 200)]
    messages["0"].put_nowait("an answer that comes too late")


def test_many_failures_are_a_few_lines(monkeypatch, capsys):
    monkeypatch.setattr(server, "_logged", deque(maxlen=server._MAX_LOGGED))
    for _ in range(100):
        server._log(ValueError("\33]0;title\7" * 1000))
    assert 10 < len(lines := capsys.readouterr().out.splitlines()) < 30
    assert all(line.isprintable() and len(line) < 500 for line in lines)


def test_a_port_in_use_is_reported_with_a_free_one():
    with server.listen("127.0.0.1", 0) as listener:
        port = listener.getsockname()[1]
        with pytest.raises(UserError) as error:
            server.listen("127.0.0.1", port)
    free = int(re.fullmatch(rf"port {port} is in use; --port (\d+) is free", str(error.value))[1])
    server.listen("127.0.0.1", free).close()


@pytest.mark.parametrize("host", ["256.1.1.1", "192.0.2.1"])  # no address, and one that is reserved for documentation
def test_an_impossible_address_is_one_sentence(host):
    with pytest.raises(UserError, match=rf"^cannot listen on {host}, port 7860: [^(]+$"):
        server.listen(host, 7860)


@pytest.mark.parametrize("auth", [None, "ada:secret"])
@pytest.mark.parametrize(("host", "name"), [("127.0.0.1", "127.0.0.1"), ("::1", "[::1]"), ("0.0.0.0", "localhost")])
def test_who_opens_the_demo_to_others_without_a_password_is_warned(host, name, auth, page, monkeypatch, capsys):
    monkeypatch.setattr(logging, "disable", lambda: None)
    monkeypatch.setattr(uvicorn.Server, "run", lambda *_, **__: None)
    if host == "::1" and not socket.has_dualstack_ipv6():
        pytest.skip("no IPv6 here")
    with server.listen(host, 0) as listener:
        server.serve(page, listener, host=host, auth=auth, share=False)
        printed = capsys.readouterr().out
        assert f"demo running at http://{name}:{listener.getsockname()[1]}/; press Ctrl-C to stop" in printed
    assert ("--auth USER:PASSWORD" in printed) == (host == "0.0.0.0" and not auth)


def test_without_a_public_address_share_is_an_error(page, monkeypatch):
    def refuse(*_):
        raise httpx.ConnectError("no network")

    monkeypatch.setattr(networking, "setup_tunnel", refuse)
    with server.listen("127.0.0.1", 0) as listener, pytest.raises(UserError, match=r"no network.*--share"):
        server.serve(page, listener, host="127.0.0.1", auth=None, share=True)
