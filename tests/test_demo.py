"""The demo as its visitors meet it: a real server in a process of its own, and a real browser."""

import base64
import contextlib
import itertools
import json
import os
import random
import re
import shutil
import signal
import socket
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from threading import Thread
from types import SimpleNamespace
from urllib.parse import quote, urlparse

import httpx
import numpy as np
import pytest
from PIL import Image

import image_files
from cifar import datasets, demo
from cifar.config import PROJECT
from cifar.demo import Demo
from cifar.errors import UserError
from cifar.images import decode
from cifar.predict import Predictor
from cifar.runs import Run
from cifar.visualize import FIGURES
from commands import start
from conftest import pack_cifar10
from processes import slowly

OLDER, NEWER = "2026-01-01_00-00-00_mlp_digits", "2026-01-02_00-00-00_mlp_digits"
DAMAGED = {"2026-01-04_damaged": "run.json", "2026-01-03_damaged": "checkpoints/best.pt"}
FILE = {"meta": {"_type": "gradio.FileData"}}
# Serves the runs of a folder, and prints which addresses the process looks up or connects to.
SERVER = """
import socket, sys, tempfile

def watch(event, arguments):
    if event == "socket.getaddrinfo" or event == "socket.connect" and isinstance(arguments[1], tuple):
        print("contacts", arguments[0] if event == "socket.getaddrinfo" else arguments[1][0], flush=True)

sys.addaudithook(watch)
socket.getaddrinfo("localhost", 80)  # shows that it watches
outputs, tempfile.tempdir = sys.argv[1:]
from cifar import console, demo
options = {"host": "127.0.0.1", "port": 0, "share": False, "auth": None, "device": "cpu"}
sys.exit(console.exit_code(lambda: demo.serve(None, output_dir=outputs, data_dir="nowhere", **options)))
"""


@pytest.fixture(scope="module")
def site(evaluated_run, tmp_path_factory):
    """A demo of two runs and two newer, damaged ones; only the oldest has figures."""
    outputs, temporary = tmp_path_factory.mktemp("outputs"), tmp_path_factory.mktemp("temporary")
    for name in (OLDER, NEWER, *DAMAGED):
        shutil.copytree(evaluated_run.path, outputs / name)
    for name, file in DAMAGED.items():
        (outputs / name / file).write_text("{")
    for name in FIGURES:
        Image.new("RGB", (600, 300)).save(outputs / OLDER / "figures" / f"{name}.png")
    process, printed = start("-c", SERVER, str(outputs), str(temporary)), []
    while not printed or not printed[-1].startswith("demo running at "):
        printed.append(process.stdout.readline() or pytest.fail(process.stderr.read()))
    url = re.search(r"http://127\.0\.0\.1:\d+/", printed[-1])[0]
    Thread(target=lambda: printed.extend(process.stdout)).start()  # or the process would wait when the pipe is full
    with process, httpx.Client(base_url=url, timeout=30, trust_env=False) as http:
        demo = {"url": url, "http": http, "process": process, "printed": printed}
        predictor = Predictor(Run(outputs / NEWER), "cpu")
        yield SimpleNamespace(**demo, outputs=outputs, temporary=temporary, predictor=predictor)
        process.kill()


def resident(site) -> int:
    """Return the server's memory in bytes."""
    return int(Path(f"/proc/{site.process.pid}/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE")


def digit(digits, index: int = 0) -> bytes:
    return image_files.saved(image_files.picture(digits.test.images[index]), "PNG")


def ask(site, image: bytes | dict, **run: str) -> dict | str:
    """Have a file classified, which is uploaded unless its path is given; returns the answer, or the error message."""
    if isinstance(image, bytes):
        (path,) = site.http.post("/gradio_api/upload", files={"files": ("image", image)}).json()
        image = {"path": path, **FILE}
    event = site.http.post("/gradio_api/call/v2/predict", json={"image": image, **run}).json()["event_id"]
    reply = site.http.get(f"/gradio_api/call/v2/predict/{event}").text
    kind, data = re.search(r"event: (complete|error)\ndata: (.*)", reply).groups()
    return json.loads(data)[0] if kind == "complete" else json.loads(data)["error"] or ""


def test_the_newest_run_that_loads_comes_first_and_the_newer_ones_are_named_with_the_reason(site):
    named = [line for line in site.printed if not line.startswith("contacts")]
    for line, (name, file) in zip(named, DAMAGED.items()):
        assert re.match(rf"{name} cannot be loaded: .*{Path(file).name}", line)
    with pytest.raises(UserError, match=r"best\.pt is damaged"):  # no other run stands in for the one asked for
        Demo(Run(site.outputs / "2026-01-03_damaged"), str(site.outputs), "nowhere", "cpu")


def test_the_api_answers_with_the_predictors_probabilities_for_the_file_as_it_was_sent(site):
    noise, exif = np.random.default_rng(0).integers(0, 256, (40, 64, 3), dtype=np.uint8), Image.Exif()
    exif[0x0112] = 6  # rotated
    content, predictor = image_files.saved(Image.fromarray(noise), "JPEG", exif=exif), site.predictor
    expected = predictor.probabilities(decode(content, predictor.image_size)[None])[0]
    answer = ask(site, content)
    confidences = {row["label"]: row["confidence"] for row in answer.pop("confidences")}
    assert confidences == pytest.approx(dict(zip(predictor.classes, expected)), abs=1e-6)
    label, is_none = predictor.classes[expected.argmax()], expected.max() < predictor.threshold
    assert answer == {"label": label, "probably_none": is_none, "threshold": predictor.threshold, "run": NEWER}
    assert next(iter(confidences)) == label


def test_the_api_selects_a_run_by_name_also_a_newly_added_one(site, digits):
    assert ask(site, digit(digits), run=OLDER)["run"] == OLDER
    shutil.copytree(site.outputs / OLDER, site.outputs / "added")
    assert ask(site, digit(digits), run="added")["run"] == "added"
    shutil.rmtree(site.outputs / "added")
    for name, reason in {**DAMAGED, "nowhere": "Unknown run 'nowhere': "}.items():
        assert re.fullmatch(rf".*{reason}.*\.", ask(site, digit(digits), run=name))


@pytest.mark.parametrize("content", [b"not an image", b"", image_files.saved(Image.new("1", (10_001, 10_001)), "PNG")])
def test_a_file_that_is_no_image_is_refused_in_one_sentence(content, site):
    assert re.fullmatch(r"[A-Z][^\n]*\.", ask(site, content))


@pytest.mark.parametrize("meta", [{}, FILE])
@pytest.mark.parametrize("path", [str(PROJECT / "docs/demo.png"), "https://huggingface.co/cat.png"])
def test_a_client_cannot_make_the_server_read_its_own_files_or_an_address(path, meta, site):
    assert isinstance(ask(site, {"path": path, **meta}), str)
    assert not list(site.temporary.glob(f"**/{Path(path).name}"))


def test_a_figure_that_is_a_link_is_not_shown(evaluated_run, tmp_path):
    copy = Run(shutil.copytree(evaluated_run.path, tmp_path / "run"))
    (tmp_path / "secret").write_bytes(b"my notes, " * 9)
    shutil.rmtree(copy.figures, ignore_errors=True)
    copy.figures.mkdir()
    (copy.figures / "architecture.png").symlink_to(tmp_path / "secret")
    (copy.figures / "calibration.png").write_bytes(b"a figure")
    page = demo._report(copy)
    assert base64.b64encode(b"a figure").decode() in page
    assert base64.b64encode(b"my notes, ").decode()[:12] not in page


def test_examples_come_from_where_the_run_found_its_data(evaluated_run, small_cifar10, tmp_path, monkeypatch):
    monkeypatch.delenv("CIFAR_DATA_DIR", raising=False)
    run = Run(shutil.copytree(evaluated_run.path, tmp_path / "run"))
    archive = tmp_path / "archive" / "cifar-10-python.tar.gz"
    pack_cifar10(small_cifar10, archive, monkeypatch)
    test = datasets.find("cifar10", str(small_cifar10)).test  # image n is of class n modulo 10
    for place in (small_cifar10, archive):
        run.write("config.json", {**run.config.model_dump(), "dataset": "cifar10", "data_dir": str(place)})
        examples = Demo(run, str(tmp_path), None, "cpu").examples("run")
        assert np.array_equal(np.stack([image for (image,) in examples]), test.images[:10].permute(0, 2, 3, 1)), place


def test_only_uploaded_files_can_be_downloaded(site, digits):
    (uploaded,) = site.http.post("/gradio_api/upload", files={"files": ("image", digit(digits))}).json()
    assert site.http.get(f"/gradio_api/file={quote(uploaded)}").content == digit(digits)
    checkpoint = site.outputs / NEWER / "checkpoints" / "best.pt"
    assert checkpoint.exists()
    (uploads,) = site.temporary.glob("cifar-demo-*")
    paths = ["/etc/passwd", PROJECT / "tasks.py", "cifar/demo.py", checkpoint, f"{uploads}/../../../etc/passwd", ".."]
    for path in [*paths, "http://127.0.0.1:9/x", "https://example.com/x"]:
        for route in ("file=", "file/"):
            assert site.http.get(f"/gradio_api/{route}{quote(str(path))}").status_code in (403, 404), path
    for route in ("static", "assets", "svelte"):
        for path in ("../../../etc/passwd", "..%2f..%2f..%2f..%2fetc%2fpasswd", "%2fetc%2fpasswd"):
            assert site.http.get(f"/{route}/{path}").status_code in (403, 404)


def test_the_api_has_one_endpoint_and_what_the_page_does_not_need_is_closed(site):
    endpoints = site.http.get("/gradio_api/info").json()["named_endpoints"]
    assert list(endpoints) == ["/predict"]
    assert [part["parameter_name"] for part in endpoints["/predict"]["parameters"]] == ["image", "run"]
    for path in ("deep_link?session_hash=x", "monitoring", "../monitoring/summary", "runs", "proxy=http://x/y"):
        assert site.http.get(f"/gradio_api/{path}").status_code in (403, 404), path
    for path in ("process_recording", "run/predict", "vibe-code"):
        assert site.http.post(f"/gradio_api/{path}", json={"data": [], "code": ""}).status_code in (403, 404), path


@pytest.mark.parametrize(("clients", "requests"), [(8, 2), pytest.param(32, 30, marks=pytest.mark.slow)])
def test_simultaneous_visitors_each_get_their_own_answer(site, digits, clients, requests):
    count = clients * requests
    rows = site.predictor.probabilities(digits.test.images[[index % 300 for index in range(count)]])
    ask(site, digit(digits))
    before = resident(site)
    with ThreadPoolExecutor(clients) as pool:
        answers = list(pool.map(lambda index: ask(site, digit(digits, index % 300)), range(count)))
    assert [answer["label"] for answer in answers] == [site.predictor.classes[row.argmax()] for row in rows]
    assert resident(site) < before + 50e6


ESCAPES = "\33]0;title\7"
FILES = [5, "", ESCAPES, "a\0b", "x" * 5000, "/etc/passwd", "http://127.0.0.1:9/", None, [], {}]
SHAPES = [
    *([], [None], [None] * 3, [[1]], [True, 5], [ESCAPES], [None, ESCAPES], [None, {"x": [1]}], [1e308, -1], [{}, {}]),
    *([{"path": path, **FILE}, NEWER] for path in FILES),
]


def test_data_of_a_wrong_shape_is_answered_with_a_sentence_and_never_reaches_the_terminal_raw(site):
    functions = [function["id"] for function in site.http.get("/config").json()["dependencies"]]
    for data in SHAPES:
        answer = site.http.post("/gradio_api/call/predict", json={"data": data}).json()
        reply = site.http.get(f"/gradio_api/call/predict/{answer['event_id']}").text
        assert re.match(r'event: error\ndata: {"error": "[A-Z].*\."', reply), (data, reply)

    def call(number: int, data: list, function: int) -> bool:
        body = {"data": data, "fn_index": function, "session_hash": f"shapes {number}"}
        assert site.http.post("/gradio_api/queue/join", json=body).is_success
        with site.http.stream("GET", "/gradio_api/queue/data", params={"session_hash": f"shapes {number}"}) as stream:
            return any('"process_completed"' in line for line in stream.iter_lines())

    with ThreadPoolExecutor(8) as pool:
        assert all(pool.map(call, itertools.count(), *zip(*itertools.product(SHAPES, functions))))
    bodies = [{}, [], 5, {"data": 5}, {"zzz": ESCAPES}, *({"data": [], "fn_index": index} for index in (99, ESCAPES))]
    for body in bodies:
        for path in ("call/predict", f"call/{ESCAPES}", "call/v2/predict", "queue/join", "cancel", "component_server"):
            reply = site.http.post(f"/gradio_api/{quote(path)}", json=body)
            assert 400 <= reply.status_code < 500 or reply.text.startswith('{"event_id"'), (path, body)
            assert len(reply.text) > 10
    no_form = {"content": b"no form", "headers": {"Content-Type": "multipart/form-data; boundary=b"}}
    assert site.http.post("/gradio_api/upload", **no_form).status_code == 400  # logs nothing
    for path in ("5", "file=%00", "file=5", "static/%00", "call/predict/5", f"call/predict/{quote(ESCAPES)}"):
        with contextlib.suppress(httpx.RemoteProtocolError):  # an answer that has begun is cut off
            assert site.http.get(f"/gradio_api/{path}").status_code in (200, 403, 404)


def test_slow_images_keep_nobody_waiting(site, digits):
    with ThreadPoolExecutor(2) as pool:
        slow = [pool.submit(ask, site, image_files.empty_scans(20_000)) for _ in range(2)]
        time.sleep(1)
        started = time.monotonic()
        assert ask(site, digit(digits))["label"]
        assert time.monotonic() - started < 3
        assert not any(answer.done() for answer in slow)
        assert all("seconds" in answer.result() for answer in slow)


def abuse(site, rng: random.Random) -> None:
    """Do something that no honest visitor does."""
    head = "Content-Type: multipart/form-data; boundary=b\r\nContent-Length: 9000000"
    part = '--b\r\nContent-Disposition: form-data; name="files"; filename="a"\r\n\r\n'
    beginning = rng.choice(
        [
            "",
            "GET / HTTP/1.1\r\nHost: loc",
            "GET /gradio_api/heartbeat/x HTTP/1.1\r\nHost: localhost\r\n\r\n",
            f"POST /gradio_api/upload HTTP/1.1\r\nHost: localhost\r\n{head}\r\n\r\n{part}",
            "POST /gradio_api/queue/join HTTP/1.1\r\nHost: localhost\r\nTransfer-Encoding: chunked\r\n\r\n4c4b40\r\n",
        ]
    )
    with (
        contextlib.suppress(OSError),
        socket.create_connection(("127.0.0.1", urlparse(site.url).port), 10) as connection,
    ):
        connection.sendall(beginning.encode() + b"x" * rng.choice([0, 1000, 5_000_000]))
        time.sleep(rng.choice([0, 0.1, 2]))
    with contextlib.suppress(httpx.HTTPError):
        site.http.post(
            "/gradio_api/queue/join", content=rng.randbytes(1000), headers={"Origin": rng.choice([site.url[:-1], "x"])}
        )
        site.http.post("/gradio_api/call/predict", json={"data": rng.choice(SHAPES)})
        (path,) = site.http.post(
            "/gradio_api/upload", files={"files": (ESCAPES, rng.randbytes(rng.choice([1, 9_000_000])))}
        ).json()
        if rng.random() < 0.1:
            ask(site, image_files.empty_scans(200))
        ask(site, {"path": path, **FILE})


@pytest.mark.parametrize("seconds", slowly([600]))
def test_hostile_visitors_disturb_no_honest_ones(site, digits, seconds):
    expected = site.predictor.classes[site.predictor.probabilities(digits.test.images[:1])[0].argmax()]
    for seed in range(30):  # after which the memory that the server keeps for later hardly grows
        abuse(site, random.Random(seed))
    before, deadline, waits = resident(site), time.monotonic() + seconds, []

    def attack(seed: int) -> int:
        rng, count = random.Random(seed), 0
        while time.monotonic() < deadline:
            abuse(site, rng)
            count += 1
        return count

    with ThreadPoolExecutor(6) as pool:
        attacks = [pool.submit(attack, seed) for seed in range(6)]
        while time.monotonic() < deadline:
            started = time.monotonic()
            assert site.http.get("/").is_success
            waits.append(time.monotonic() - started)
            assert ask(site, digit(digits))["label"] == expected
        assert min(attack.result() for attack in attacks) > seconds / 30
    assert max(waits) < 3
    assert resident(site) < before + 50e6


def find(browser, selector: str):
    """Wait for the first such element."""
    return browser.find_element("css selector", selector)


def upload(browser, site, path: Path, content: bytes) -> None:
    """Open the page and upload a file once its examples are there, which arrive last: until then it may miss it."""
    path.write_bytes(content)
    browser.get(site.url)
    find(browser, "#examples button")
    find(browser, "input[type=file]").send_keys(str(path))


def test_a_visitor_uploads_an_image_tries_an_example_and_reads_about_another_run(browser, site, digits, tmp_path):
    upload(browser, site, tmp_path / "upload.png", digit(digits))
    label = find(browser, "[data-testid=label-output-value]").text
    assert label == ask(site, digit(digits))["label"]
    images = browser.find_elements("css selector", ".inputs img")
    captions = ["Input of the network: 32 by 32 pixels", f'Saliency for "{label}"']
    assert [image.get_attribute("alt") for image in images] == captions
    find(browser, "button[aria-label='Remove Image']").click()
    find(browser, "body:not(:has([data-testid=label-output-value], .inputs))")
    find(browser, "#examples button:nth-of-type(4)").click()
    label = ask(site, digit(digits, digits.test.labels.tolist().index(3)))["label"]
    find(browser, f"""img[alt='Saliency for "{label}"']""")

    find(browser, "#run input").click()
    find(browser, "[role=option]:nth-last-child(2)").click()
    find(browser, "[role=tab]:nth-of-type(2)").click()
    find(browser, ".tiles + .figure")
    metrics = Run(site.outputs / OLDER).metrics
    tiles = [tile.text for tile in browser.find_elements("css selector", ".tile strong")]
    assert tiles[:2] == [f"{metrics.accuracy:.2%}", f"{metrics.accuracy_tta:.2%}"]
    figures = browser.find_elements("css selector", ".figure img")
    assert [figure.get_attribute("alt") for figure in figures] == [figure.alt for figure in FIGURES.values()]
    decode = "return Promise.all(arguments[0].map(image => image.decode().then(() => image.naturalWidth)))"
    assert browser.execute_script(decode, figures) == [600] * len(FIGURES)

    assert not [entry for entry in browser.get_log("browser") if entry["level"] == "SEVERE"]
    events = [json.loads(entry["message"])["message"] for entry in browser.get_log("performance")]
    sent = [event["params"]["request"]["url"] for event in events if event["method"] == "Network.requestWillBeSent"]
    assert len(sent) > 10
    assert {urlparse(url).hostname for url in sent if url.startswith(("http", "ws"))} == {"127.0.0.1"}


def test_a_visitor_reads_why_a_file_was_refused(browser, site, tmp_path):
    upload(browser, site, tmp_path / "upload.png", b"not an image")
    assert "not an image" in find(browser, ".note.error").text
    upload(browser, site, tmp_path / "upload.png", bytes(11_000_000))
    browser.find_element("xpath", "//*[contains(., 'maximum allowed size')]")


def test_ctrl_c_ends_the_demo_which_contacted_nobody_and_leaves_no_files(site):
    assert list(site.temporary.glob("cifar-demo-*/*"))
    site.process.send_signal(signal.SIGINT)
    assert site.process.wait(30) == 130
    assert site.process.stderr.read() == "interrupted\n"
    assert all(line[:-1].isprintable() and len(line) < 300 for line in site.printed)
    contacts = [line.split()[1] for line in site.printed if line.startswith("contacts")]
    assert contacts == ["localhost"]
    assert not list(site.temporary.glob("cifar-demo-*"))
