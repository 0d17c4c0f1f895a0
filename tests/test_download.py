"""Downloads from real servers on 127.0.0.1 that fail in the ways in which servers fail."""

import contextlib
import dataclasses
import io
import os
import resource
import shutil
import signal
import ssl
import subprocess
import tarfile
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
from torchvision.datasets import CIFAR10, CIFAR100

import commands
from cifar import download
from cifar.download import ARCHIVES, Archive, UnavailableError
from cifar.errors import UsageError, UserError
from conftest import as_nobody
from server import CONTENT, FAILURES, HALF, OTHER, REFUSED, archive_of, chunked, drip, fail, redirect, send, serving

ARCHIVE = archive_of(CONTENT)


@pytest.fixture(autouse=True)
def short_waits(monkeypatch):
    monkeypatch.setattr(download, "_PAUSES", (0.01, 0.02))
    monkeypatch.setattr(download, "_TIMEOUT", 0.5)
    monkeypatch.setattr(download, "_SPEED_SECONDS", 0.2)
    monkeypatch.setattr(download, "_MIN_SPEED", 300_000)


def fetch(folder: Path, *urls: str) -> None:
    """Download CONTENT to the folder."""
    download._download(ARCHIVE, folder / "x", urls)
    assert (folder / "x").read_bytes() == CONTENT
    assert not (folder / "x.partial").exists()


# One address


@pytest.mark.parametrize("positions", [[0], [1], [262_144], [599_999], range(50_000, 550_000, 50_000)])
def test_a_transfer_that_breaks_off_is_resumed_there(server, tmp_path, positions):
    fetch(tmp_path, server.play("a", *(send(until=position) for position in positions), send()))
    assert server.starts("a") == [0, *positions]


def test_a_server_that_always_breaks_off_at_one_position_is_given_up_and_the_part_is_kept(server, tmp_path):
    with pytest.raises(UnavailableError, match="stopped after 300,000 of 600,000 bytes"):
        fetch(tmp_path, server.play("a", send(until=HALF)))
    assert (tmp_path / "x.partial").read_bytes() == CONTENT[:HALF]
    fetch(tmp_path, server.play("b", send()))
    assert server.starts("b") == [HALF]


@pytest.mark.parametrize("position", [HALF, 599_990])
@pytest.mark.parametrize("behaviour", [send(ranges=False), chunked()])
def test_a_server_that_ignores_ranges_sends_everything_again(server, tmp_path, behaviour, position):
    fetch(tmp_path, server.play("a", send(until=position), behaviour))
    assert server.starts("a") == [0, position]


@pytest.mark.parametrize("kind", FAILURES)
def test_a_failure_is_reported_in_one_sentence_after_a_bounded_time_or_the_next_mirror_used(server, tmp_path, kind):
    behaviour, reason, requests = FAILURES[kind]
    started = time.monotonic()
    with pytest.raises(UnavailableError, match=rf"^cannot download data\.tar\.gz \(127.*{reason}[^\n]*\); put the"):
        fetch(tmp_path, server.play("a", behaviour))
    assert time.monotonic() - started < 4
    assert len(server.requests) <= requests
    assert not (tmp_path / "x").exists()
    (tmp_path / "x.partial").unlink()
    fetch(tmp_path, server.play("bad", behaviour), server.play("good", send()))


# Several addresses


def test_a_part_from_one_mirror_is_continued_by_the_next(server, tmp_path, capsys):
    fetch(tmp_path, server.play("a", send(until=HALF)), REFUSED, server.play("b", send()))
    assert server.starts("b") == [HALF]
    host = server.url.removeprefix("http://")
    assert capsys.readouterr().out.splitlines()[1:] == [
        f"{host}: it stopped after 300,000 of 600,000 bytes",
        "127.0.0.1:9: Connection refused",
    ]


def test_wrong_bytes_from_one_mirror_cost_the_next_one_only_a_second_transfer(server, tmp_path):
    fetch(tmp_path, server.play("wrong", send(OTHER, until=HALF)), server.play("right", send()))
    assert server.starts("right") == [HALF, 0]


def test_a_slow_mirror_is_left_for_the_next_one_which_continues_but_used_if_no_other_has_the_file(
    server, tmp_path, capsys
):
    (tmp_path / "alone").mkdir()
    fetch(tmp_path, server.play("slow", drip), server.play("fast", send()))
    assert 0 < server.starts("fast")[0] < HALF
    fetch(tmp_path / "alone", server.play("slow", drip), server.play("gone", fail(404)))
    assert len(server.starts("gone")) == 1
    assert "it sends only" in capsys.readouterr().out


# Addresses


def test_mirrors_come_before_the_published_address_and_a_folder_stands_for_the_file_in_it(monkeypatch):
    archive = archive_of(CONTENT, urls=("https://official/data.tar.gz",))
    monkeypatch.setenv("CIFAR_MIRROR", "http://c/")
    assert download.addresses(archive, "http://a/file.tgz https://b/") == [
        "http://a/file.tgz",
        "https://b/data.tar.gz",
        "http://c/data.tar.gz",
        "https://official/data.tar.gz",
    ]


def test_a_link_in_place_of_the_part_leads_nowhere(server, tmp_path):
    (tmp_path / "mine").write_text("my notes")
    (tmp_path / "x.partial").symlink_to(tmp_path / "mine")
    fetch(tmp_path, server.play("a", send()))
    assert (tmp_path / "mine").read_text() == "my notes"


@pytest.mark.parametrize(
    "mirror",
    [
        *("ftp://a/x", "file:///etc/passwd", "a.tar.gz", "http:///x", "--", "http://a:x/", "http://10.0.0.256/"),
        *("http://[1:2]/", "http://u:12#secret@h/", "http://u:se?cret@h/", "http://u:se#cret@h/"),
    ],
)
def test_anything_but_a_web_address_is_a_usage_error_that_shows_no_password(mirror, monkeypatch):
    monkeypatch.setenv("CIFAR_MIRROR", mirror)
    with pytest.raises(UsageError, match=r"^--mirror (and|or) CIFAR_MIRROR (take|has)[a-z:/ ]*$"):
        download.addresses(ARCHIVE)


def test_a_password_in_a_mirror_is_sent_to_that_server_alone_and_never_shown(server, tmp_path, capsys):
    with serving() as other:
        elsewhere = redirect(other.play("b", send()))
        fetch(tmp_path, server.play("a", fail(503), elsewhere).replace("//", "//user:secret@"))
        assert (server.passwords, other.passwords) == (["user:secret"] * 2, [None])
    shown = "".join(capsys.readouterr())
    with pytest.raises(UnavailableError) as caught:
        fetch(tmp_path / "..", REFUSED.replace("//", "//user:secret@"))
    assert "secret" not in shown + str(caught.value)


def test_only_a_server_with_a_trusted_certificate_is_believed(tmp_path, monkeypatch):
    if not shutil.which("openssl"):
        pytest.skip("openssl, which makes the certificate, is not installed")
    key, certificate = str(tmp_path / "key.pem"), str(tmp_path / "certificate.pem")
    names = ["-subj", "/CN=127.0.0.1", "-addext", "subjectAltName=IP:127.0.0.1"]
    make = ["openssl", "req", "-x509", "-newkey", "rsa:2048", "-nodes", "-keyout", key, "-out", certificate, *names]
    subprocess.run(make, check=True, capture_output=True)
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    context.load_cert_chain(certificate, key)
    with serving(context) as secure:
        with pytest.raises(UnavailableError, match="certificate verify failed"):
            fetch(tmp_path, secure.play("file", send()))
        monkeypatch.setenv("SSL_CERT_FILE", certificate)
        fetch(tmp_path, secure.url + "/file")


# On disk


@pytest.mark.parametrize("part", [OTHER[:HALF], CONTENT, CONTENT + b"more"])
def test_a_part_of_another_file_is_replaced(server, tmp_path, part):
    (tmp_path / "x.partial").write_bytes(part)
    fetch(tmp_path, server.play("a", send()))


@contextlib.contextmanager
def file_size_limit(size: int) -> Iterator[None]:
    """Stands for a full disk: it too cuts a write short and refuses the next one."""
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, before[1]))
    yield
    resource.setrlimit(resource.RLIMIT_FSIZE, before)


def test_a_full_disk_is_reported_and_no_mirror_is_blamed(server, tmp_path):
    urls = [server.play("a", send()), server.play("b", send())]
    with file_size_limit(HALF), pytest.raises(UserError, match=r"cannot write .*x\.partial: File too large") as caught:
        fetch(tmp_path, *urls)
    assert not isinstance(caught.value, UnavailableError)
    assert server.starts("b") == []
    fetch(tmp_path, *urls)
    assert server.starts("a") == [0, HALF]


def pack(members: dict[str, bytes]) -> bytes:
    packed = io.BytesIO()
    with tarfile.open(fileobj=packed, mode="w:gz") as tar:
        for name, content in members.items():
            member = tarfile.TarInfo(name)
            member.size = len(content)
            tar.addfile(member, io.BytesIO(content))
    return packed.getvalue()


FILES = {"data/one": b"1" * 100_000, "data/two/three": os.urandom(200_000)}
TAR = pack(FILES)
TAR_ARCHIVE = archive_of(TAR)


def unpacked(folder: Path) -> dict[str, bytes]:
    """Read the archive's files; nothing else may be in the folder but the archive and the lock."""
    assert {path.name for path in folder.iterdir()} <= {"data", "data.tar.gz", ".cifar.lock"}
    files = [path for path in (folder / "data").rglob("*") if path.is_file()]
    return {path.relative_to(folder).as_posix(): path.read_bytes() for path in files}


def test_the_published_archives_are_those_that_torchvision_checks():
    for archive, reader in ((ARCHIVES["cifar10"], CIFAR10), (ARCHIVES["cifar100"], CIFAR100)):
        published = (archive.name, archive.folder, download.addresses(archive)[0])
        assert published == (reader.filename, reader.base_folder, reader.url)
        checked = [(reader.meta["filename"], reader.meta["md5"]), *reader.train_list, *reader.test_list]
        assert list(archive.files.items()) == [tuple(pair) for pair in checked]


@pytest.mark.parametrize("name", ["with spaces", "данные 数据 é", "-rf", "a'b\"c$HOME;%s"])
def test_an_archive_is_downloaded_to_a_folder_of_any_name_and_unpacked_once(server, tmp_path, name):
    archive = dataclasses.replace(TAR_ARCHIVE, urls=(server.play("a", send(TAR)),))
    for _ in range(2):
        assert download.ensure(archive, tmp_path / name) == tmp_path / name / "data"
        assert unpacked(tmp_path / name) == FILES
    assert len(server.requests) == 1


ENSURE = """
import sys
from pathlib import Path
from cifar import console, download
archive = download.Archive(**eval(sys.argv[1]))
print(console.exit_code(lambda: download.ensure(archive, Path(sys.argv[2]))), flush=True)
"""


def start(archive: Archive, folder: Path) -> subprocess.Popen:
    words = (repr(dataclasses.asdict(archive)), str(folder))
    return commands.start("-c", ENSURE, *words, stderr=subprocess.STDOUT)


def test_of_three_processes_one_downloads_and_a_killed_one_is_continued_by_the_next(server, tmp_path):
    half = len(TAR) // 2

    def send_half(handler):
        send(TAR, until=half)(handler)
        time.sleep(5)

    archive = dataclasses.replace(TAR_ARCHIVE, urls=(server.play("a", send_half, send(TAR)),))
    first = start(archive, tmp_path)
    partial = tmp_path / "data.tar.gz.partial"
    while not (partial.exists() and partial.stat().st_size == half) and first.poll() is None:
        time.sleep(0.01)
    others = [start(archive, tmp_path) for _ in range(2)]
    assert all("waiting for another process" in process.stdout.readline() for process in others)
    first.send_signal(signal.SIGKILL)
    first.communicate()
    outputs = [process.communicate(timeout=30)[0] for process in others]
    assert [output.splitlines()[-1] for output in outputs] == ["0", "0"]
    assert "".join(outputs).count("downloading data.tar.gz") == 1
    assert server.starts("a") == [0, half]
    assert unpacked(tmp_path) == FILES


def test_an_archive_without_the_published_hash_is_never_opened(tmp_path, monkeypatch):
    monkeypatch.setattr(tarfile, "open", lambda *_: pytest.fail("opened"))
    (tmp_path / "data.tar.gz").write_bytes(b"another file")
    for path in (tmp_path, tmp_path / "data.tar.gz"):
        with pytest.raises(UserError, match=r"data\.tar\.gz is damaged or another file: .*delete it to download it"):
            download.ensure(TAR_ARCHIVE, path)
    assert [path.name for path in tmp_path.iterdir()] == ["data.tar.gz"]


def test_an_interrupted_unpacking_is_repeated_and_one_on_a_full_disk_leaves_no_half(tmp_path):
    (tmp_path / "data.tar.gz").write_bytes(TAR)
    (tmp_path / "data.partial" / "data").mkdir(parents=True)
    (tmp_path / "data.partial" / "data" / "one").write_bytes(b"1" * 50)
    with file_size_limit(150_000), pytest.raises(UserError, match=r"cannot write .*data: File too large"):
        download.ensure(TAR_ARCHIVE, tmp_path)
    assert {path.name for path in tmp_path.iterdir()} == {"data.tar.gz", ".cifar.lock"}
    download.ensure(TAR_ARCHIVE, tmp_path)
    assert unpacked(tmp_path) == FILES


def test_a_read_only_folder_with_the_data_is_enough():
    with tempfile.TemporaryDirectory() as name:  # pytest's own folders are closed to other users
        folder = Path(name)
        folder.chmod(0o555)
        with as_nobody(), pytest.raises(UserError, match=r"^cannot write .*: Permission denied"):
            download.ensure(TAR_ARCHIVE, folder)
        (folder / "data").mkdir()
        (folder / "data" / "one").write_bytes(b"1")
        with as_nobody():
            assert download.ensure(TAR_ARCHIVE, folder) == folder / "data"
