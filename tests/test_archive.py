import dataclasses
import io
import os
import resource
import signal
import subprocess
import sys
import tarfile
import tempfile
import time
from pathlib import Path

import pytest

from cifar import archive
from cifar.config import PROJECT
from cifar.download import Archive, UnavailableError
from cifar.errors import UserError
from conftest import as_nobody
from server import archive_of, send

FILES = {"data/one": b"1" * 100_000, "data/two/three": os.urandom(200_000)}


def pack(members: dict[str, bytes], *others: tarfile.TarInfo) -> bytes:
    packed = io.BytesIO()
    with tarfile.open(fileobj=packed, mode="w:gz") as tar:
        for name, content in members.items():
            member = tarfile.TarInfo(name)
            member.size = len(content)
            tar.addfile(member, io.BytesIO(content))
        for member in others:
            tar.addfile(member)
    return packed.getvalue()


def link(name: str, target: str, kind: bytes = tarfile.SYMTYPE) -> tarfile.TarInfo:
    member = tarfile.TarInfo(name)
    member.type, member.linkname = kind, target
    return member


PACKED = pack(FILES)
ARCHIVE = archive_of(PACKED)


def held(folder: Path) -> dict[str, bytes]:
    """The files in the archive's folder, which must be the only things there but for the archive and the lock."""
    assert {path.name for path in folder.iterdir()} <= {"data", "data.tar.gz", ".cifar.lock"}
    found = {path: path.read_bytes() for path in (folder / "data").rglob("*") if path.is_file()}
    return {path.relative_to(folder).as_posix(): content for path, content in found.items()}


def test_an_archive_is_fetched_and_unpacked_once(server, tmp_path):
    known = dataclasses.replace(ARCHIVE, urls=(server.play("a", send(PACKED)),))
    for _ in range(2):
        assert archive.obtain(known, tmp_path) == tmp_path / "data"
        assert held(tmp_path) == FILES
    assert len(server.asked) == 1


@pytest.mark.parametrize("name", ["with spaces", "данные 数据 é", "-rf", "a'b\"c$HOME;%s"])
def test_a_folder_may_have_any_name_and_need_not_be_there(server, tmp_path, name):
    folder = tmp_path / name / name
    archive.obtain(ARCHIVE, folder, server.play("a", send(PACKED)))
    assert held(folder) == FILES


def test_an_archive_on_another_file_system_is_unpacked_beside_itself(tmp_path):
    if not os.path.isdir("/dev/shm") or os.stat("/dev/shm").st_dev == os.stat(tmp_path).st_dev:
        pytest.skip("there is no second file system here")
    with tempfile.TemporaryDirectory(dir="/dev/shm") as elsewhere:
        (tmp_path / "linked").symlink_to(elsewhere)
        (Path(elsewhere) / "data.tar.gz").write_bytes(PACKED)
        archive.obtain(ARCHIVE, tmp_path / "linked")
        assert held(Path(elsewhere)) == FILES


OBTAIN = """
import sys, time
from pathlib import Path
from cifar import archive, console
from cifar.download import Archive
known = Archive(**eval(sys.argv[1]))
print(console.exit_code(lambda: archive.obtain(known, Path(sys.argv[2]))), flush=True)
"""


def start(known: Archive, folder: Path) -> subprocess.Popen:
    command = [sys.executable, "-c", OBTAIN, repr(dataclasses.asdict(known)), str(folder)]
    return subprocess.Popen(command, cwd=PROJECT, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)


def test_of_four_processes_that_need_the_same_archive_one_fetches_it_and_all_have_it(server, tmp_path):
    def slowly(handler):
        time.sleep(1)
        send(PACKED)(handler)

    known = dataclasses.replace(ARCHIVE, urls=(server.play("a", slowly),))
    processes = [start(known, tmp_path) for _ in range(4)]
    printed = [process.communicate(timeout=60) for process in processes]
    assert [out.splitlines()[-1] for out, _ in printed] == ["0"] * 4
    assert [err for _, err in printed] == [""] * 4
    assert len(server.asked) == 1
    everything = "".join(out for out, _ in printed)
    assert everything.count("downloading data.tar.gz") == 1
    assert everything.count("another process fetches or unpacks the dataset") == 3
    assert held(tmp_path) == FILES


def test_a_process_that_is_killed_lets_the_next_one_go_on_with_its_part(server, tmp_path):
    half = len(PACKED) // 2

    def half_of_it(handler):
        send(PACKED, until=half)(handler)
        time.sleep(3)

    known = dataclasses.replace(ARCHIVE, urls=(server.play("a", half_of_it, send(PACKED)),))
    first = start(known, tmp_path)
    partial = tmp_path / "data.tar.gz.partial"
    while not (partial.exists() and partial.stat().st_size == half) and first.poll() is None:
        time.sleep(0.01)
    second = start(known, tmp_path)
    assert "waiting for it" in second.stdout.readline()
    first.send_signal(signal.SIGKILL)
    first.communicate()
    assert second.communicate(timeout=30)[0].splitlines()[-1] == "0"
    assert server.starts("a") == [0, half]
    assert held(tmp_path) == FILES


def test_what_a_process_killed_while_unpacking_leaves_is_not_taken_for_the_data(tmp_path):
    (tmp_path / "data.tar.gz").write_bytes(PACKED)
    (tmp_path / "data.partial" / "data").mkdir(parents=True)
    (tmp_path / "data.partial" / "data" / "one").write_bytes(b"1")
    archive.obtain(ARCHIVE, tmp_path)
    assert held(tmp_path) == FILES


HOSTILE = {
    "out of the folder": pack(FILES | {"../escaped": b"x"}),
    "absolute": pack(FILES | {"/tmp/escaped by an absolute name": b"x"}),
    "symbolic link out": pack(FILES, link("data/link", "../../..")),
    "symbolic link to a file": pack(FILES, link("data/link", "/etc/passwd")),
    "hard link out": pack(FILES, link("data/link", "../../escaped", tarfile.LNKTYPE)),
    "device": pack(FILES, link("data/null", "", tarfile.CHRTYPE)),
    "no such folder": pack({"other/one": b"1"}),
    "cut short": PACKED[:-5000],
    "cut in its header": PACKED[:5],
    "no archive": b"<html>",
    "no tar in it": pack(FILES)[:10] + bytes(1000),
    "empty": b"",
}


@pytest.mark.parametrize("kind", HOSTILE)
def test_a_hostile_archive_is_never_opened_as_it_is_not_the_known_one(server, tmp_path, kind, monkeypatch):
    monkeypatch.setattr(tarfile, "open", lambda *_: pytest.fail("opened"))
    content = HOSTILE[kind]
    folder = tmp_path / "inner" / "folder"
    with pytest.raises(UnavailableError, match=r"wrong file|another file|broke off"):
        archive.obtain(ARCHIVE, folder, server.play("a", send(content)))
    folder.joinpath("data.tar.gz").write_bytes(content)
    with pytest.raises(UserError, match=r"data\.tar\.gz is damaged or another file: .*, or delete it to fetch it anew"):
        archive.obtain(ARCHIVE, folder)
    assert not (folder / "data").exists()


def test_beside_a_file_that_is_no_archive_nothing_is_written(tmp_path):
    (tmp_path / "notes.txt").write_text("")
    with pytest.raises(UserError, match=r"notes\.txt is damaged or another file"):
        archive.obtain(ARCHIVE, tmp_path / "notes.txt")
    assert [path.name for path in tmp_path.iterdir()] == ["notes.txt"]


@pytest.mark.parametrize("kind", HOSTILE)
def test_even_if_it_were_the_known_one_nothing_would_leave_the_folder(tmp_path, kind):
    folder = tmp_path / "inner" / "folder"
    folder.mkdir(parents=True)
    (folder / "data.tar.gz").write_bytes(HOSTILE[kind])
    known = archive_of(HOSTILE[kind])
    if kind == "absolute":  # the filter takes the slash away
        archive.obtain(known, folder)
    else:
        with pytest.raises(UserError, match=r"^cannot unpack .*data\.tar\.gz beside itself: [^\n]+$"):
            archive.obtain(known, folder)
        assert {path.name for path in folder.iterdir()} == {"data.tar.gz", ".cifar.lock"}
    assert [path.name for path in tmp_path.rglob("*escaped*")] == []
    assert not Path("/tmp/escaped by an absolute name").exists()


def test_a_disk_too_small_for_archive_and_content_is_told_before_anything_is_fetched(tmp_path):
    known = dataclasses.replace(ARCHIVE, unpacked=10**18)
    with pytest.raises(UserError, match=r"MB free and data\.tar\.gz takes 1000000000000 MB .*: make room, or name"):
        archive.obtain(known, tmp_path, "http://127.0.0.1:9/x")


def test_a_disk_that_is_full_while_unpacking_leaves_the_archive_and_no_half(tmp_path):
    (tmp_path / "data.tar.gz").write_bytes(PACKED)
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (150_000, before[1]))
    try:
        with pytest.raises(UserError, match=r"cannot unpack .* beside itself: File too large"):
            archive.obtain(ARCHIVE, tmp_path)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
    assert {path.name for path in tmp_path.iterdir()} == {"data.tar.gz", ".cifar.lock"}
    archive.obtain(ARCHIVE, tmp_path)
    assert held(tmp_path) == FILES


def test_a_folder_that_cannot_be_written_is_told_with_the_cure(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(UserError, match=r"cannot write to the data folder .*Not a directory; name a folder that can"):
        archive.obtain(ARCHIVE, tmp_path / "file" / "folder")


def test_a_read_only_folder_with_the_data_is_read_and_without_it_told():
    with tempfile.TemporaryDirectory() as name:  # as pytest's own folders are closed to others
        folder = Path(name)
        (folder / "data.tar.gz").write_bytes(PACKED)
        folder.chmod(0o555)
        with (
            as_nobody(),
            pytest.raises(UserError, match=r"cannot write to the data folder .*: Permission denied; name"),
        ):
            archive.obtain(ARCHIVE, folder)
        folder.chmod(0o755)
        archive.obtain(ARCHIVE, folder)
        (folder / ".cifar.lock").unlink()
        folder.chmod(0o555)
        with as_nobody():
            assert archive.obtain(ARCHIVE, folder) == folder / "data"
        folder.chmod(0o755)


def test_an_archive_that_is_named_and_not_there_is_told(tmp_path):
    with pytest.raises(UserError, match=r"there is no archive .*mine\.tar\.gz"):
        archive.obtain(ARCHIVE, tmp_path / "mine.tar.gz")
    assert list(tmp_path.iterdir()) == []
