"""Downloads from real servers on the loopback address that misbehave in every way that servers do."""

import resource
import shutil
import signal
import ssl
import subprocess
import sys
import time
from collections.abc import Iterator

import pytest

from cifar import download
from cifar.config import PROJECT
from cifar.download import UnavailableError
from cifar.errors import UsageError, UserError
from server import (
    CONTENT,
    HALF,
    OTHER,
    Server,
    archive_of,
    babble,
    chunked,
    drip,
    fail,
    hang_up,
    part_of_another,
    redirect,
    say_nothing,
    send,
    serving,
    show_a_page,
    stall,
)

ARCHIVE = archive_of(CONTENT)


@pytest.fixture(autouse=True)
def impatient(monkeypatch):
    """Waiting times a hundredth as long."""
    monkeypatch.setattr(download, "_PAUSES", (0.01, 0.02, 0.04))
    monkeypatch.setattr(download, "_ANSWER_SECONDS", 1.0)
    monkeypatch.setattr(download, "_STALL_SECONDS", 0.3)
    monkeypatch.setattr(download, "_SPEED_SECONDS", 0.2)


# A server alone


def test_a_verified_file_arrives_under_its_name_and_alone(server, tmp_path):
    download.fetch(ARCHIVE, tmp_path / "data.tar.gz", [server.play("a", send())])
    assert (tmp_path / "data.tar.gz").read_bytes() == CONTENT
    assert [path.name for path in tmp_path.iterdir()] == ["data.tar.gz"]


@pytest.mark.parametrize("place", [0, 1, 2, 999, 100_000, HALF, 599_000, 599_998, 599_999, 262_144])
def test_a_file_that_breaks_off_is_continued_there(server, tmp_path, place):
    download.fetch(ARCHIVE, tmp_path / "x", [server.play("a", send(until=place), send())])
    assert (tmp_path / "x").read_bytes() == CONTENT
    assert server.starts("a") == [0, place]


def test_a_server_that_breaks_off_ten_times_is_asked_for_what_is_missing_each_time(server, tmp_path):
    places = list(range(50_000, 550_000, 50_000))
    download.fetch(ARCHIVE, tmp_path / "x", [server.play("a", *(send(until=place) for place in places), send())])
    assert (tmp_path / "x").read_bytes() == CONTENT
    assert server.starts("a") == [0, *places]


def test_a_server_that_always_breaks_off_at_one_place_is_given_up_and_the_part_is_kept(server, tmp_path):
    with pytest.raises(UnavailableError, match="broke off after 300,000 of 600,000 bytes"):
        download.fetch(ARCHIVE, tmp_path / "x", [server.play("a", send(until=HALF))])
    assert len(server.asked) < 9
    assert (tmp_path / "x.partial").read_bytes() == CONTENT[:HALF]
    download.fetch(ARCHIVE, tmp_path / "x", [server.play("b", send())])
    assert server.starts("b") == [HALF]
    assert [path.name for path in tmp_path.iterdir()] == ["x"]


@pytest.mark.parametrize("misbehave", [send(ranges=False), chunked()])
def test_a_server_that_ignores_ranges_sends_all_again(server, tmp_path, misbehave):
    download.fetch(ARCHIVE, tmp_path / "x", [server.play("a", send(until=HALF), misbehave)])
    assert (tmp_path / "x").read_bytes() == CONTENT
    assert server.starts("a") == [0, HALF]


@pytest.mark.parametrize("status", [408, 429, 500, 502, 503, 504])
def test_a_server_that_is_busy_is_asked_again_after_growing_pauses(server, tmp_path, status):
    download.fetch(ARCHIVE, tmp_path / "x", [server.play("a", fail(status), fail(status), send())])
    assert (tmp_path / "x").read_bytes() == CONTENT


@pytest.mark.parametrize(
    ("misbehave", "reason", "asked"),
    [
        (fail(503), "HTTP 503 Service Unavailable", 4),
        (fail(404), "HTTP 404 Not Found", 1),
        (fail(403), "HTTP 403 Forbidden", 1),
        (show_a_page, "it has another file: not 600,000 bytes", 1),
        (send(OTHER), "it sent a wrong file", 1),
        (send(CONTENT + b"more"), "it has another file", 1),
        (send(length=10), "it has another file", 1),
        (part_of_another, "it sent a part of another file", 1),
        (chunked(cut=True), "it broke off", 4),
        (stall(HALF), "it sent nothing for 0 seconds", 6),
        (hang_up, "Remote end closed connection without response", 4),
        (babble, "its answer is not HTTP", 4),
        (say_nothing, "no answer within|it sent nothing for", 1),
        (redirect("ftp://127.0.0.1/x"), "it redirects from http to what is not http or https", 1),
        (redirect("file:///etc/passwd"), "HTTP 302 Found", 1),
        (redirect("a"), "HTTP 302 Found", 1),
    ],
)
def test_what_goes_wrong_is_said_in_a_sentence_and_the_name_stays_free(server, tmp_path, misbehave, reason, asked):
    started = time.monotonic()
    with pytest.raises(UnavailableError, match=rf"^cannot download data\.tar\.gz \(127.*{reason}[^\n]*\)$"):
        download.fetch(ARCHIVE, tmp_path / "x", [server.play("a", misbehave)])
    assert time.monotonic() - started < 4
    assert not (tmp_path / "x").exists()
    if "302" not in reason:  # which urllib follows ten times
        assert len(server.asked) <= asked


# Mirrors


@pytest.mark.parametrize(
    "misbehave",
    [
        *(send(until=HALF), stall(HALF), fail(503), fail(404), show_a_page, send(OTHER), part_of_another),
        *(say_nothing, hang_up, babble, send(OTHER, until=HALF), chunked(cut=True), redirect("http://127.0.0.1:9/")),
    ],
)
def test_the_next_mirror_has_the_file_whatever_the_first_does(server, tmp_path, misbehave):
    download.fetch(ARCHIVE, tmp_path / "x", [server.play("bad", misbehave), server.play("good", send())])
    assert (tmp_path / "x").read_bytes() == CONTENT


def test_a_part_from_one_mirror_is_continued_from_the_next(server, tmp_path, capsys):
    urls = [server.play("a", send(until=HALF)), "http://127.0.0.1:9/x", server.play("b", send())]
    download.fetch(ARCHIVE, tmp_path / "x", urls)
    assert server.starts("b") == [HALF]
    host = server.url.removeprefix("http://")
    assert capsys.readouterr().out.splitlines() == [
        "downloading data.tar.gz, 1 MB",
        f"{host}: it broke off after 300,000 of 600,000 bytes; trying 127.0.0.1:9",
        f"127.0.0.1:9: Connection refused; trying {host}",
    ]


def test_wrong_bytes_from_one_mirror_cost_the_next_one_a_second_transfer_and_no_more(server, tmp_path):
    urls = [server.play("wrong", send(OTHER, until=HALF)), server.play("right", send())]
    download.fetch(ARCHIVE, tmp_path / "x", urls)
    assert (tmp_path / "x").read_bytes() == CONTENT
    assert server.starts("right") == [HALF, 0]


def test_a_slow_mirror_is_left_for_the_next_which_goes_on_where_it_was(server, tmp_path, capsys):
    download.fetch(ARCHIVE, tmp_path / "x", [server.play("slow", drip), server.play("fast", send())])
    assert (tmp_path / "x").read_bytes() == CONTENT
    assert 0 < server.starts("fast")[0] < HALF
    assert "it sends only" in capsys.readouterr().out


def test_a_slow_mirror_is_taken_where_no_other_has_the_file(server, tmp_path):
    download.fetch(ARCHIVE, tmp_path / "x", [server.play("slow", drip), server.play("gone", fail(404))])
    assert (tmp_path / "x").read_bytes() == CONTENT
    assert len(server.starts("slow")) == 2
    assert server.starts("gone") == [server.starts("slow")[1]]


def test_silent_hosts_share_the_time_to_answer(server, tmp_path):
    urls = [server.play(name, say_nothing) for name in "abc"]
    started = time.monotonic()
    with pytest.raises(UnavailableError):
        download.fetch(ARCHIVE, tmp_path / "x", urls)
    assert time.monotonic() - started < 1.5  # of _ANSWER_SECONDS 1.0


def test_refused_and_unknown_hosts_fail_at_once_and_leave_nothing(tmp_path):
    started = time.monotonic()
    with pytest.raises(UnavailableError, match=r"127\.0\.0\.1:9: Connection refused, host\.invalid: "):
        download.fetch(ARCHIVE, tmp_path / "x", ["http://127.0.0.1:9/x", "http://host.invalid/x"])
    assert time.monotonic() - started < 1.2
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    "url", ["http://a..b/", "http://[::1", "http://127.0.0.1:x/", "http://ü/ä", "http://u:p@h:1/x"]
)
def test_an_odd_address_is_a_reason_like_any_other(tmp_path, url):
    with pytest.raises(UnavailableError) as caught:
        download.fetch(ARCHIVE, tmp_path / "x", [url])
    assert "u:p" not in str(caught.value)


def test_mirrors_come_before_the_official_address_and_a_folder_stands_for_its_file(monkeypatch):
    archive = archive_of(CONTENT, urls=("https://official/data.tar.gz",))
    monkeypatch.setenv("CIFAR_MIRROR", "http://c/ https://official/data.tar.gz")
    assert download.addresses(archive, "http://a/file.tgz https://b/") == [
        "http://a/file.tgz",
        "https://b/data.tar.gz",
        "http://c/data.tar.gz",
        "https://official/data.tar.gz",
    ]


@pytest.mark.parametrize("mirror", ["ftp://a/x", "file:///etc/passwd", "a.tar.gz", "http:///x", "--", "data:,x"])
def test_what_is_no_web_address_is_a_usage_error(mirror):
    with pytest.raises(UsageError, match=f"take an http:// or https:// address, not '{mirror}'"):
        download.addresses(ARCHIVE, mirror)


# What is on the disk


@pytest.mark.parametrize("part", [OTHER[:HALF], OTHER, OTHER + b"more", CONTENT + b"more"])
def test_a_part_of_another_file_is_found_out_and_replaced(server, tmp_path, part):
    (tmp_path / "x.partial").write_bytes(part)
    download.fetch(ARCHIVE, tmp_path / "x", [server.play("a", send())])
    assert (tmp_path / "x").read_bytes() == CONTENT


def test_a_whole_part_needs_no_server(tmp_path):
    (tmp_path / "x.partial").write_bytes(CONTENT)
    download.fetch(ARCHIVE, tmp_path / "x", [])
    assert (tmp_path / "x").read_bytes() == CONTENT


FETCH = f"""
import sys
from pathlib import Path
from cifar import download
archive = download.Archive("data.tar.gz", "data", {{}}, {ARCHIVE.size}, 0, {ARCHIVE.sha256!r}, ())
download.fetch(archive, Path(sys.argv[1]), sys.argv[2:])
"""


def test_what_a_killed_process_has_fetched_is_not_fetched_again(server, tmp_path):
    url = server.play("a", stall(HALF), send())
    process = subprocess.Popen([sys.executable, "-c", FETCH, str(tmp_path / "x"), url], cwd=PROJECT)
    partial = tmp_path / "x.partial"
    while not (partial.exists() and partial.stat().st_size == HALF) and process.poll() is None:
        time.sleep(0.01)
    process.send_signal(signal.SIGKILL)
    process.wait()
    assert not (tmp_path / "x").exists()
    download.fetch(ARCHIVE, tmp_path / "x", [url])
    assert (tmp_path / "x").read_bytes() == CONTENT
    assert server.starts("a") == [0, HALF]


def test_a_disk_that_is_full_is_told_and_no_mirror_is_blamed(server, tmp_path):
    """The limit on a file's size stands for the disk's: it too cuts a write short and then refuses the next."""
    urls = [server.play("a", send()), server.play("b", send())]
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (HALF, before[1]))
    try:
        with pytest.raises(UserError, match=r"cannot write .*x\.partial: ") as caught:
            download.fetch(ARCHIVE, tmp_path / "x", urls)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
    assert not isinstance(caught.value, UnavailableError)
    assert server.starts("b") == []
    download.fetch(ARCHIVE, tmp_path / "x", urls)
    assert (tmp_path / "x").read_bytes() == CONTENT
    assert server.starts("a") == [0, HALF]


def test_a_folder_that_is_none_is_told(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(UserError, match=r"cannot write .*x\.partial: Not a directory"):
        download.fetch(ARCHIVE, tmp_path / "file" / "x", [])


# Encryption


@pytest.fixture(scope="module")
def secure(tmp_path_factory) -> Iterator[Server]:
    """A server with a certificate for 127.0.0.1 that OpenSSL trusts as long as the fixture lasts."""
    if not shutil.which("openssl"):
        pytest.skip("there is no openssl to make a certificate with")
    folder = tmp_path_factory.mktemp("certificate")
    key, certificate = str(folder / "key.pem"), str(folder / "certificate.pem")
    names = ["-subj", "/CN=127.0.0.1", "-addext", "subjectAltName=IP:127.0.0.1"]
    make = ["openssl", "req", "-x509", "-newkey", "rsa:2048", "-nodes", "-keyout", key, "-out", certificate, *names]
    subprocess.run(make, check=True, capture_output=True)
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    context.load_cert_chain(certificate, key)
    with pytest.MonkeyPatch.context() as patch, serving(context) as server:
        patch.setenv("SSL_CERT_FILE", certificate)
        yield server


def test_redirects_are_followed_into_encryption_and_never_out_of_it(server, secure, tmp_path):
    up = server.play("up", redirect(secure.play("file", send())))
    download.fetch(ARCHIVE, tmp_path / "up", [up])
    assert (tmp_path / "up").read_bytes() == CONTENT
    plain = server.play("file", send())
    for first in (secure.play("down", redirect(plain)), server.play("up%20and%20down", redirect(f"{secure.url}/down"))):
        with pytest.raises(UnavailableError, match="redirects from https to what is not https"):
            download.fetch(ARCHIVE, tmp_path / "down", [first])
    assert server.starts("file") == []


def test_a_certificate_that_nobody_vouches_for_is_refused(secure, tmp_path, monkeypatch):
    url = secure.play("file", send())
    monkeypatch.delenv("SSL_CERT_FILE")
    with pytest.raises(UnavailableError, match="certificate verify failed"):
        download.fetch(ARCHIVE, tmp_path / "x", [url])


# Asking without fetching


def test_reach_names_the_first_host_that_has_the_file_and_why_others_would_not_send_it(server, capsys):
    urls = ["http://127.0.0.1:9/x", server.play("page", show_a_page), server.play("right", send())]
    host, reasons = download.reach(ARCHIVE, urls, 1.0)
    assert host == server.url.removeprefix("http://")
    assert reasons == f"127.0.0.1:9: Connection refused, {host}: it has another file: not 600,000 bytes"
    assert capsys.readouterr().out == ""
    assert download.reach(ARCHIVE, urls[:2], 1.0)[0] is None
    assert download.reach(ARCHIVE, [], 1.0) == (None, "")
