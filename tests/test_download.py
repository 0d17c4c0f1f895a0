import hashlib
import http.server
import threading
import time

import pytest

from cifar import download
from cifar.config import UserError

CONTENT = bytes(range(256)) * 5000
MD5 = hashlib.md5(CONTENT).hexdigest()


class Handler(http.server.BaseHTTPRequestHandler):
    def do_GET(self):
        if self.path == "/silent":
            time.sleep(2)
            return
        if self.path == "/missing":
            self.send_error(404)
            return
        self.send_response(200)
        self.send_header("Content-Length", str(len(CONTENT)))
        self.end_headers()
        self.wfile.write(CONTENT[: 100_000 if self.path == "/truncated" else None])

    def log_message(self, *_):
        pass


@pytest.fixture(scope="module")
def server():
    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        yield f"http://127.0.0.1:{server.server_port}"
        server.shutdown()


def test_a_verified_file_arrives_under_its_name(server, tmp_path):
    target = tmp_path / "new folder" / "archive.tar.gz"
    download.fetch(f"{server}/archive", target, md5=MD5)
    assert target.read_bytes() == CONTENT
    assert [path.name for path in target.parent.iterdir()] == ["archive.tar.gz"]


@pytest.mark.parametrize(
    ("path", "reason"),
    [
        ("/archive", "sent a wrong file"),
        ("/truncated", "sent a wrong file|IncompleteRead"),
        ("/missing", "404|Not Found"),
    ],
)
def test_what_is_not_the_file_is_refused_and_the_name_stays_free(server, tmp_path, path, reason):
    with pytest.raises(UserError, match=reason):
        download.fetch(server + path, tmp_path / "archive", md5=MD5 if path == "/truncated" else "0" * 32)
    assert not (tmp_path / "archive").exists()


def test_a_server_that_does_not_answer_is_left_in_time(server, tmp_path, monkeypatch):
    monkeypatch.setattr(download, "_ANSWER_SECONDS", 0.3)
    started = time.monotonic()
    with pytest.raises(UserError, match="no answer within"):
        download.fetch(f"{server}/silent", tmp_path / "archive", md5=MD5)
    assert time.monotonic() - started < 1.5


def test_a_refused_connection_is_told(tmp_path):
    with pytest.raises(UserError, match=r"cannot download http://127\.0\.0\.1:9/x"):
        download.fetch("http://127.0.0.1:9/x", tmp_path / "archive", md5=MD5)
