"""What the demo's server lets in: addresses, passwords, requests."""

import asyncio
import re
import socket

import gradio as gr
import httpx
import pytest
import uvicorn
from gradio import networking
from starlette.testclient import TestClient

from cifar import server
from cifar.errors import UserError


@pytest.fixture
def page(monkeypatch):
    """An empty page; afterwards the event loops are closed that Gradio makes for its locks and leaves open."""
    loops = []
    make_loop = asyncio.new_event_loop
    monkeypatch.setattr(asyncio, "new_event_loop", lambda: loops.append(make_loop()) or loops[-1])
    with gr.Blocks(analytics_enabled=False) as page:
        gr.Textbox()
    yield page
    for loop in loops:
        loop.close()


@pytest.mark.parametrize("auth", ["", "ada", ":secret", "ada:"])
def test_auth_needs_a_user_and_a_password(auth):
    with pytest.raises(UserError, match="take USER:PASSWORD") as error:
        server.credentials(auth)
    assert error.value.exit_code == 2


def test_the_environment_can_hold_the_password_which_may_contain_colons(monkeypatch):
    assert server.credentials(None) is None
    monkeypatch.setenv("CIFAR_DEMO_AUTH", "ada:with:colon")
    assert server.credentials(None) == ("ada", "with:colon")
    assert server.credentials("eve:1") == ("eve", "1")


def test_with_auth_only_who_knows_the_password_gets_in(page):
    with TestClient(server.make_app(page, ("ada", "secret"))) as client:
        assert client.get("/config").status_code == 401
        assert client.post("/gradio_api/upload", files={"files": b"x"}).status_code == 401
        assert client.post("/login", data={"username": "ada", "password": "wrong"}).status_code == 400
        assert client.post("/login", data={"username": "ada", "password": "secret"}).is_success
        assert client.get("/config").is_success


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


@pytest.mark.parametrize("auth", [None, ("ada", "secret")])
@pytest.mark.parametrize(("host", "name"), [("127.0.0.1", "127.0.0.1"), ("::1", "[::1]"), ("0.0.0.0", "localhost")])
def test_who_opens_the_demo_to_others_without_a_password_is_warned(host, name, auth, page, monkeypatch, capsys):
    monkeypatch.setattr(uvicorn.Server, "run", lambda *_, **__: None)
    if host == "::1" and not socket.has_dualstack_ipv6():
        pytest.skip("no IPv6 here")
    with server.listen(host, 0) as listener:
        server.serve(page, listener, auth=auth, share=False)
        printed = capsys.readouterr().out
        assert f"demo running at http://{name}:{listener.getsockname()[1]}/; press Ctrl-C to stop" in printed
    assert ("--auth USER:PASSWORD" in printed) == (host == "0.0.0.0" and not auth)


def test_without_a_public_address_share_is_an_error(page, monkeypatch):
    def refuse(*_):
        raise httpx.ConnectError("no network")

    monkeypatch.setattr(networking, "setup_tunnel", refuse)
    with server.listen("127.0.0.1", 0) as listener, pytest.raises(UserError, match=r"no network.*--share"):
        server.serve(page, listener, auth=None, share=True)
