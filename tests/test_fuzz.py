"""What is drawn at random from near what is valid is answered or refused in one sentence, soon and in little memory.

Needs hypothesis (`pip install hypothesis`). The suite draws a few inputs, always the same ones; `invoke test --slow`
draws others, for ten minutes a target. An input that failed once stays as an example.
"""

import copy
import functools
import gc
import io
import json
import os
import shutil
import sys
import time
import zlib
from pathlib import Path
from types import SimpleNamespace

import pytest

import commands
import image_files
from cifar import console, datasets, download, images
from cifar.config import FIELDS, MODELS, RECIPES, flag
from cifar.errors import UserError
from commands import reached
from processes import slowly
from server import archive_of
from test_hostile import COMMANDS, call, outputs, quick  # noqa: F401

pytest.importorskip("hypothesis")
from hypothesis import HealthCheck, given, seed, settings
from hypothesis import strategies as st

SECONDS = pytest.mark.parametrize("seconds", [0, *slowly([600])])
pytestmark = pytest.mark.filterwarnings("ignore:Generating overly large repr")  # by hypothesis, of a failure
BATCH = 50  # examples, after which the time is looked at
MOST = 60e6  # bytes that may be kept
ESCAPES = "\33]0;title\7"
ODD_TEXTS = ["", " ", "-", "--", "~", "~nobody/x", "%s", "a\nb", ESCAPES, "\u202eabc", "\udcff", "é", "x" * 5000, "[b]"]
ODD_NUMBERS = [0, 1, -1, 2, 0.5, 1e-320, 1e308, float("nan"), float("inf"), 2**31, 2**64, 10**400]


def fuzz(check, inputs, seconds: float, count: int) -> None:
    """Check inputs drawn from the strategy: the same `count` of them, or others for so many seconds."""
    options = {"database": None, "deadline": None, "suppress_health_check": list(HealthCheck)}
    if not seconds:
        settings(max_examples=count, derandomize=True, **options)(given(inputs)(check))()
        return
    started, drawn, before = time.monotonic(), 0, resident()
    while time.monotonic() < started + seconds:
        seed(drawn)(settings(max_examples=BATCH, **options)(given(inputs)(check)))()
        drawn += BATCH
        gc.collect()
        if time.monotonic() < started + seconds / 10:  # allocators and caches grow at first
            before = resident()
    print(f"{drawn} examples, memory {before / 1e6:.0f} -> {resident() / 1e6:.0f} MB", file=sys.__stderr__)
    assert resident() < before + MOST


def resident() -> int:
    """Return the memory of this process and its children in bytes."""
    children = [int(pid) for file in Path("/proc/self/task").glob("*/children") for pid in file.read_text().split()]
    pages = (Path(f"/proc/{pid}/statm").read_text().split()[1] for pid in (os.getpid(), *children))
    return sum(map(int, pages)) * os.sysconf("SC_PAGE_SIZE")


def check_printed(code: int, out: str, err: str) -> None:
    assert code in (0, 1, 2)
    assert all(letter.isprintable() or letter == "\n" for letter in out + err), (out, err)
    assert not err or (err.startswith("error: ") and err.endswith("\n") and err.count("\n") == 1), err


# Bytes


def bytes_near(originals, parts=None):
    """Draw one of the originals with a few places replaced, removed or repeated, or with numbers or parts inserted."""
    number = st.sampled_from([0, 1, 0x7F, 0xFF, 0x7FFF, 0xFFFF, 0x7FFFFFFF, 0xFFFFFFFF, 2**63 - 1, 10**5, 10**6])
    coded = st.builds(
        lambda value, size, order: (value % 256**size).to_bytes(size, order),
        *(number, st.sampled_from([1, 2, 4, 8]), st.sampled_from(["little", "big"])),
    )
    place = st.one_of(st.integers(0, 60), st.integers(0, 1000), st.integers(0, 2**20))
    change = st.tuples(
        st.sampled_from(["replace", "insert", "remove", "repeat", "end"]),
        place,
        coded | (st.binary(max_size=8) if parts is None else parts),
    )
    return st.builds(changed, originals, st.lists(change, max_size=5))


def changed(content: bytes, changes: list[tuple[str, int, bytes]]) -> bytes:
    for kind, place, part in changes:
        start = place % (len(content) + 1)
        stop = start + max(1, len(part))
        content = {
            "replace": content[:start] + part + content[stop:],
            "insert": content[:start] + part + content[start:],
            "remove": content[:start] + content[stop:],
            "repeat": content[:start] + content[start : start + 50] * 9 + content[start:],
            "end": content[:start] + part,
        }[kind]
    return content


# Images


def with_checksums(content: bytes) -> bytes:
    """Return a PNG file whose chunks have the right checksums, as far as its lengths can be followed."""
    content, start = bytearray(content), 8
    while start + 12 <= len(content):
        end = start + 8 + int.from_bytes(content[start : start + 4])
        content[end : end + 4] = zlib.crc32(content[start + 4 : end]).to_bytes(4)
        start = end + 4
    return bytes(content)


def decode(image: tuple[bytes, int, str]) -> None:
    content, size, fit = image
    content = with_checksums(content) if content.startswith(b"\x89PNG") else content
    (result,) = images.decode_all([content], size, fit)
    if isinstance(result, UserError):
        check_printed(1, "", f"error: {result}\n")
        assert "crash" not in str(result)
    else:
        assert result.shape == (3, size, size)


@SECONDS
def test_image_files(seconds):
    originals = [make() for make, _ in (*image_files.GOOD.values(), *image_files.REFUSED.values())]
    contents, sizes = bytes_near(st.sampled_from(originals)), st.sampled_from([1, 32, 64])
    fuzz(decode, st.tuples(contents, sizes, st.sampled_from(images.FITS)), seconds, count=150)


# The JSON files of a run


RECORDS = ("run.json", "config.json", "metrics.json", "history.jsonl", "analysis.json", "corruptions.json")
ODD_VALUES = [None, True, *ODD_NUMBERS, *ODD_TEXTS, "\ud800", "\0", [], [[]], {}, {"": None}, {ESCAPES: ESCAPES}, ...]


def places(content, path=()):
    """Yield the paths of the values in a JSON document; of lists, only the first item."""
    yield path
    items = dict(enumerate(content[:1])) if isinstance(content, list) else content
    for key, value in items.items() if isinstance(items, dict) else ():
        yield from places(value, (*path, key))


def with_odd_values(lines: list, changes: list[tuple[int, object]]) -> bytes:
    """Replace values of JSON documents, one a line, or remove them."""
    lines = json.loads(json.dumps(lines))
    for number, value in changes:
        if paths := list(places(lines))[1:]:
            *path, last = paths[number % len(paths)]
            place = functools.reduce(lambda inner, key: inner[key], path, lines)
            if value is ...:
                del place[last]
            else:
                place[last] = copy.deepcopy(value)  # else a list could be put into itself
    return "\n".join(map(json.dumps, lines)).encode()


def records_near(folder: Path):
    """Draw the name of a JSON file of a run and odd content for it."""
    changes = st.lists(st.tuples(st.integers(0, 2**16), st.sampled_from(ODD_VALUES)), min_size=1, max_size=2)

    def near(name: str):
        content = (folder / name).read_bytes()
        lines = list(map(json.loads, content.splitlines() if name.endswith("l") else [content]))
        odd = st.builds(with_odd_values, st.just(lines), changes)
        return st.tuples(st.just(name), odd | bytes_near(st.just(content), st.sampled_from([b'"', b"{", b"[" * 9999])))

    return st.sampled_from(RECORDS).flatmap(near)


@SECONDS
def test_records(outputs, seconds, monkeypatch):  # noqa: F811
    from cifar import trainer

    monkeypatch.setattr(trainer, "fit", reached)
    whole, image = shutil.copytree(outputs / "run", outputs.parent / "whole"), outputs.parent / "image.png"
    lines = [*COMMANDS, "compare", "doctor --run run"]

    def read(drawn: tuple[str, tuple[str, bytes]]) -> None:
        command, (name, content) = drawn
        shutil.rmtree(outputs / "run")
        shutil.copytree(whole, outputs / "run")
        (outputs / "run" / name).write_bytes(content)
        code, out, err = call(outputs, *command.format(image=image).split())
        check_printed(code, out, err)
        assert command != "compare" or (code == 0 and "2 runs" in out)

    fuzz(read, st.tuples(st.sampled_from(lines), records_near(whole)), seconds, count=20)


# Command lines


TASKS = ("train", "evaluate", "visualize", "predict", "demo", "export", "compare", "data", "doctor", "bench", "list")
WORDS = [
    *("--run", "--corruptions", "--resume", "--config", "--fit", "--output", "--host", "--port", "--auth", "--share"),
    *("--sort", "--pairs", "--help", "-h", "-x", "--epoch", "--Batch_Size", "settings.json", "settings.toml", "run"),
    *("good", "crop", "x.csv", "image.png", "auto", "digits", "cifar10", "true", "1e-3", "1,5", "0x10", "1_000"),
    *map(flag, FIELDS),
    *RECIPES,
    *MODELS,
    *ODD_TEXTS,
    *map(str, ODD_NUMBERS),
]


def words():
    text = st.text(st.characters(exclude_characters="\0*?["), max_size=20)  # a pattern may match any number of files
    word = st.sampled_from(WORDS) | text | st.integers().map(str) | st.floats().map(str)
    flags = st.builds("{}={}".format, st.sampled_from([*map(flag, FIELDS), "--run", "--port", "--config"]), word)
    return st.lists(word | flags, max_size=6)


def settings_files():
    """Draw what a settings file may contain."""
    values = st.sampled_from([value for value in ODD_VALUES if value is not ...]) | st.sampled_from(WORDS)
    named = st.dictionaries(st.sampled_from([*FIELDS, "batch-size", ESCAPES]), values | st.integers() | st.floats())
    toml = st.lists(st.tuples(st.sampled_from(FIELDS), st.integers() | st.booleans() | st.sampled_from(ODD_TEXTS)))
    as_toml = toml.map(lambda rows: "\n".join(f"{name} = {json.dumps(value)}" for name, value in rows))
    return (named.map(json.dumps) | as_toml).map(str.encode) | st.binary(max_size=50)


@SECONDS
def test_command_lines(outputs, seconds, monkeypatch):  # noqa: F811
    from cifar import bench, doctor, predict, server

    for module, name in ((datasets, "find"), (datasets, "of_run"), (doctor, "examine"), (server, "listen")):
        monkeypatch.setattr(module, name, reached)
    monkeypatch.setattr(bench, "run", reached)
    monkeypatch.setattr(predict, "Predictor", lambda run, device: SimpleNamespace(stream=reached))
    monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO(b"not an image")))
    folder = outputs.parent

    def type_in(drawn: tuple[str, list[str], bytes]) -> None:
        command, given_words, content = drawn
        for name in ("settings.json", "settings.toml"):
            (folder / name).write_bytes(content)
        if command == "main.py":
            check_printed(*commands.main(*given_words, cwd=folder))
        else:
            check_printed(*commands.invoke(command, *given_words, cwd=folder))

    fuzz(type_in, st.tuples(st.sampled_from(["main.py", *TASKS]), words(), settings_files()), seconds, count=60)


# Servers of a download


CONTENT = bytes(range(256)) * 8
ARCHIVE = archive_of(CONTENT)


def give(answer: bytes, stays_open: bool):
    """Return the behaviour of a server that sends this, and perhaps waits for the client to go."""

    def behave(handler):
        content = CONTENT[handler.start :]
        handler.wfile.write(answer.replace(b"CONTENT", content).replace(b"LENGTH", b"%d" % len(content)))
        handler.connection.settimeout(1)
        while stays_open and handler.rfile.read(1):
            pass

    return behave


def answers():
    """Draw what a server sends, in which CONTENT and LENGTH stand for the part that was asked for."""
    odd = st.sampled_from([b"", b"-1", b"+5", b"2_048", b"2048, 2048", "²".encode(), b"9" * 30, b"chunked", b";"])
    odd |= st.sampled_from(ODD_TEXTS).map(lambda text: text.encode(errors="surrogateescape")) | st.binary(max_size=20)
    value = {
        b"Content-Length": st.sampled_from([b"LENGTH", b"LENGTH", b"0", b"2048", b"2049"]) | odd,
        b"Transfer-Encoding": st.sampled_from([b"chunked", b"gzip, chunked"]) | odd,
        b"Content-Range": st.sampled_from([b"bytes 0-2047/2048", b"bytes */2048"]) | odd,
        b"Content-Encoding": st.sampled_from([b"gzip", b"br"]) | odd,
        b"Location": st.sampled_from([b"/x", b"", b"?", b"http://127.0.0.1:9/", b"//[", b"https:", b"data:,x"]),
        b"Set-Cookie": st.sampled_from([b"a=b; Max-Age=x; Expires=0; Domain=..", b"a=b; Version=x; Port=y"]) | odd,
        b"Connection": st.sampled_from([b"close", b"keep-alive", b"upgrade"]) | odd,
    }
    header = st.sampled_from(list(value)).flatmap(lambda name: value[name].map(lambda text: name + b": " + text))
    header |= st.builds(lambda name, text: name + b":" + text, odd, odd)
    status = st.sampled_from([200, 200, 200, 206, 206, 100, 101, 103, 204, 301, 302, 304, 307, 404, 416, 429, 500, 999])
    version = st.sampled_from([b"HTTP/1.1", b"HTTP/1.0", b"HTTP/3"])
    first = st.builds(b"%s %d %s".__mod__, st.tuples(version, status, odd))
    size = st.sampled_from([b"%x" % len(CONTENT), b"0", b"-1", b"f" * 20, b"800;x=y", b"7ff"])
    chunk = st.builds(lambda size: size + b"\r\nCONTENT\r\n", size)
    body = st.sampled_from([b"CONTENT", b"CONTENT", b"", b"CONTENTCONTENT"]) | st.binary(max_size=3000)
    body |= st.lists(chunk, max_size=3).map(lambda chunks: b"".join(chunks) + b"0\r\n\r\n")
    headers = st.lists(header, max_size=5).map(lambda lines: b"\r\n".join([*lines, b""]))
    answer = st.builds(lambda *parts: b"%s\r\n%s\r\n%s" % parts, first, headers, body)
    answer |= bytes_near(answer) | st.binary(max_size=100)
    return st.tuples(answer, st.sampled_from([False] * 9 + [True]))


@SECONDS
def test_downloads(server, tmp_path, seconds, monkeypatch, capsys):
    monkeypatch.setattr(download, "_PAUSES", (0.001,))
    monkeypatch.setattr(download, "_TIMEOUT", 0.3)

    def fetch(drawn: list[tuple[bytes, bool]]) -> None:
        started, url = time.process_time(), server.play("x", *(give(*answer) for answer in drawn))
        for file in tmp_path.iterdir():
            file.unlink()
        code = console.exit_code(lambda: download._download(ARCHIVE, tmp_path / "x", [url]))
        check_printed(code, *capsys.readouterr())
        assert (tmp_path / "x").exists() == (code == 0)
        assert code or (tmp_path / "x").read_bytes() == CONTENT
        assert time.process_time() - started < 5

    fuzz(fetch, st.lists(answers(), min_size=1, max_size=3), seconds, count=30)
