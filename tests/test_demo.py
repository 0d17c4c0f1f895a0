"""The demo as its visitors meet it: a real server on the loopback address, a client and a browser."""

import contextlib
import gc
import io
import itertools
import json
import os
import re
import shutil
import signal
import socket
import subprocess
import sys
import threading
import warnings
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from types import SimpleNamespace
from urllib.parse import quote, urlparse

import gradio as gr
import httpx
import numpy as np
import pytest
from gradio_client import Client, handle_file
from gradio_client.exceptions import AppError
from PIL import Image

from cifar import demo, demo_page, visualize
from cifar.config import PROJECT
from cifar.demo_runs import DemoRuns
from cifar.errors import UserError
from cifar.picture import decode
from cifar.predict import Predictor
from cifar.runs import Run

OLDER, NEWER = "2026-01-01_00-00-00_convnet_digits", "2026-01-02_00-00-00_convnet_digits"


# Gradio leaves behind event loops, with their sockets, that it made for its locks.
pytestmark = [
    pytest.mark.filterwarnings("ignore:unclosed event loop:ResourceWarning"),
    pytest.mark.filterwarnings("ignore:unclosed <socket:ResourceWarning"),
]


@pytest.fixture(scope="module", autouse=True)
def clean_surroundings():
    """Keep gradio_client off the network, and collect what Gradio leaves behind where it is excepted."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
        yield
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", ResourceWarning)
        gc.collect()


def free_port() -> int:
    with socket.create_server(("127.0.0.1", 0)) as listener:
        return listener.getsockname()[1]


@pytest.fixture(scope="module")
def outputs(evaluated_run, digits, tmp_path_factory) -> Path:
    """Two evaluated runs with figures, of which the newer says that its recipe is `newer`."""
    folder = tmp_path_factory.mktemp("outputs")
    for name in (OLDER, NEWER):
        shutil.copytree(evaluated_run.path, folder / name)
    run = Run(folder / NEWER)
    run.write("metrics.json", {**run.read("metrics.json"), "recipe": "newer"})
    for name in (OLDER, NEWER):
        visualize.visualize(Run(folder / name), digits)
    return folder


@pytest.fixture(scope="module")
def page(outputs):
    places = {"output_dir": str(outputs), "data_dir": "nowhere", "device": "cpu"}
    with demo.running(port=free_port(), **places) as page:
        yield page


@pytest.fixture(scope="module")
def client(page):
    client = connect(page)
    yield client
    client.close()


@pytest.fixture(scope="module")
def digit(digits, tmp_path_factory) -> Path:
    """A test image as a PNG file."""
    path = tmp_path_factory.mktemp("picture") / "digit.png"
    Image.fromarray(digits.test.images[0].permute(1, 2, 0).numpy()).save(path)
    return path


def connect(page, **given) -> Client:
    return Client(page.local_url, verbose=False, analytics_enabled=False, **given)


def ask(client: Client, path: Path, **given) -> dict:
    return client.predict(handle_file(path), api_name="/predict", **given)


def confidences(answer: dict) -> dict[str, float]:
    return {row["label"]: row["confidence"] for row in answer["confidences"]}


def pictures() -> dict[str, bytes]:
    """Pictures that a decoder on the way would change: turned, wide, transparent, of few colours, for print."""
    noise = np.random.default_rng(0).integers(0, 256, (40, 64, 4), dtype=np.uint8)
    turned = Image.Exif()
    turned[0x0112] = 6
    colours = Image.fromarray(noise[..., :3])
    kinds = {
        "turned.jpg": (colours, {"exif": turned, "quality": 95}),
        "wide.png": (Image.fromarray(noise[..., 0].astype(np.uint16) * 257), {}),
        "transparent.png": (Image.fromarray(noise), {}),
        "palette.png": (colours.quantize(16), {"transparency": 3}),
        "print.jpg": (colours.convert("CMYK"), {}),
        "animated.gif": (colours.quantize(16), {"save_all": True, "append_images": [Image.new("P", colours.size)]}),
        "modern.webp": (Image.fromarray(noise), {"lossless": True}),
    }
    files = {}
    for name, (image, options) in kinds.items():
        file = io.BytesIO()
        image.save(file, Path(name).suffix[1:].replace("jpg", "jpeg"), **options)
        files[name] = file.getvalue()
    return files


@pytest.mark.parametrize("name", pictures())
def test_a_client_gets_what_the_predictor_gives_for_the_file(name, client, outputs, tmp_path):
    path = tmp_path / name
    path.write_bytes(pictures()[name])
    predictor = Predictor(Run(outputs / NEWER), "cpu")
    expected = predictor.probabilities(decode(path, predictor.image_size)[None])[0]
    answer = ask(client, path)
    assert confidences(answer) == pytest.approx(dict(zip(predictor.classes, expected)), abs=1e-6)
    assert answer["label"] == predictor.classes[expected.argmax()]
    assert answer["probably_none"] == (expected.max() < answer["threshold"])
    assert answer["run"] == NEWER


def test_a_client_chooses_the_run(client, digit):
    assert ask(client, digit, run=OLDER)["run"] == OLDER
    with pytest.raises(AppError, match=r"^Unknown run 'nowhere': known are"):
        ask(client, digit, run="nowhere")


def bad_files() -> dict[str, bytes]:
    whole = pictures()["turned.jpg"]
    bomb = io.BytesIO()
    Image.new("1", (20_000, 20_000)).save(bomb, "PNG")
    return {
        "text.png": b"not a picture",
        "empty.png": b"",
        "cut.jpg": whole[: len(whole) // 2],
        "drawing.svg": b'<svg xmlns="http://www.w3.org/2000/svg" width="8" height="8"/>',
        "bomb.png": bomb.getvalue(),
    }


@pytest.mark.parametrize("name", bad_files())
def test_a_bad_file_gets_one_sentence_and_the_next_is_answered(name, client, digit, tmp_path, capfd):
    path = tmp_path / name
    path.write_bytes(bad_files()[name])
    with pytest.raises(AppError) as refusal:
        ask(client, path)
    assert re.fullmatch(r"[A-Z][^\n]*\.", refusal.value.message)
    assert "Traceback" not in capfd.readouterr().err
    assert ask(client, digit)["label"]


def test_files_beyond_the_uploads_are_refused(page, outputs):
    inside = Path(os.environ["GRADIO_TEMP_DIR"])
    checkpoint = outputs / NEWER / "checkpoints" / "best.pt"
    assert checkpoint.exists()
    paths = [
        "/etc/passwd",
        str(PROJECT / ".git" / "config"),
        str(PROJECT / "tasks.py"),
        "cifar/demo.py",
        str(checkpoint),
        str(outputs / NEWER / "metrics.json"),
        "../../../../etc/passwd",
        f"{inside}/../../../etc/passwd",
        "..",
        "http://127.0.0.1:9/x",
        "https://example.com/x",
    ]
    for route in ("file=", "file/"):
        for path in paths:
            reply = httpx.get(f"{page.local_url}gradio_api/{route}{quote(path)}")
            assert reply.status_code in (403, 404), path
    for path in ("static", "assets", "svelte"):
        for escape in ("../../../etc/passwd", "..%2f..%2f..%2f..%2fetc%2fpasswd", "%2fetc%2fpasswd"):
            assert httpx.get(f"{page.local_url}{path}/{escape}").status_code in (403, 404)


@pytest.mark.parametrize("meta", [{}, {"meta": {"_type": "gradio.FileData"}}])
def test_a_client_cannot_have_a_file_of_the_server_or_an_address_read(meta, client, page, digit):
    for path in (str(digit), "/etc/passwd", "http://example.com/cat.png", "https://huggingface.co/cat.png"):
        session = {"session_hash": f"x{abs(hash((path, str(meta))))}"}
        data = [{"path": path, **meta}, NEWER]
        dependency = next(d["id"] for d in client.config["dependencies"] if d["api_name"] == "predict")
        body = {"data": data, "fn_index": dependency, **session}
        assert httpx.post(f"{page.local_url}gradio_api/queue/join", json=body).is_success
        with httpx.stream("GET", f"{page.local_url}gradio_api/queue/data", params=session) as stream:
            messages = [json.loads(line[6:]) for line in stream.iter_lines() if line.startswith("data: ")]
        completed = next(message for message in messages if message["msg"] == "process_completed")
        assert not completed["success"]
        assert "label" not in str(completed["output"])


@pytest.mark.parametrize("size", [10_500_000, 30_000_000])
def test_more_than_ten_megabytes_are_refused(size, page, client, digit):
    reply = httpx.post(f"{page.local_url}gradio_api/upload", files={"files": ("a.png", bytes(size))})
    assert reply.status_code == 413
    assert ask(client, digit)["label"]


def test_what_the_demo_does_not_need_is_closed(page):
    for path in ("gradio_api/deep_link?session_hash=x", "monitoring", "monitoring/summary", "gradio_api/runs"):
        assert httpx.get(f"{page.local_url}{path}").status_code in (403, 404), path
    for path in ("process_recording", "run/predict", "vibe-code"):
        assert httpx.post(f"{page.local_url}gradio_api/{path}", json={"data": [], "code": ""}).status_code in (403, 404)


def test_many_clients_all_get_their_own_answer(page, digits, outputs, tmp_path):
    predictor = Predictor(Run(outputs / NEWER), "cpu")
    images = digits.test.images[:16]
    expected = [predictor.classes[row.argmax()] for row in predictor.probabilities(images)]
    for index, image in enumerate(images):
        Image.fromarray(image.permute(1, 2, 0).numpy()).save(tmp_path / f"{index}.png")

    def visit(start: int) -> list[str]:
        client = connect(page)
        labels = [ask(client, tmp_path / f"{(start + step) % 16}.png")["label"] for step in range(6)]
        client.close()
        return labels

    with ThreadPoolExecutor(8) as pool:
        for start, labels in enumerate(pool.map(visit, range(8))):
            assert labels == [expected[(start + step) % 16] for step in range(6)]


def test_a_full_queue_says_so_and_loses_nobody_who_waits(page, client, digit, monkeypatch):
    released = threading.Event()
    real = DemoRuns.ask
    monkeypatch.setattr(DemoRuns, "ask", lambda *given, **named: released.wait(30) and real(*given, **named))
    monkeypatch.setattr(page._queue, "max_size", 2)

    def visit(_) -> str:
        try:
            return ask(connect(page), digit)["label"]
        except Exception as error:
            released.set()
            return str(error)

    with ThreadPoolExecutor(12) as pool:
        replies = list(pool.map(visit, range(12)))
    right = ask(client, digit)["label"]
    assert set(replies) == {right, "Queue is full! Please try again."}
    assert replies.count(right) >= 3


def test_the_page_shows_nothing_from_elsewhere(page):
    home = httpx.get(page.local_url).text
    styles = httpx.get(f"{page.local_url}theme.css").text
    assert not re.search(r"""<(script|link|img|iframe)[^>]+(src|href)=["']?(https?:)?//""", home)
    assert not re.search(r"(url\(|@import)\s*[\"']?(https?:)?//", styles + home)


WATCHED = """
import sys
from pathlib import Path

def watch(event, arguments):
    if event == "socket.getaddrinfo" or event == "socket.connect" and isinstance(arguments[1], tuple):
        address = arguments if event == "socket.getaddrinfo" else arguments[1]
        print("asks", address[0], flush=True)

sys.addaudithook(watch)
from cifar import console, demo
sys.exit(console.exit_code(lambda: demo.serve(output_dir=sys.argv[1], data_dir="nowhere", port=int(sys.argv[2]))))
"""


def test_the_server_asks_nobody_else_and_ends_on_ctrl_c(outputs, digit):
    port = free_port()
    process = subprocess.Popen(
        [sys.executable, "-c", WATCHED, str(outputs), str(port)],
        cwd=PROJECT,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        encoding="utf-8",
    )
    asked = list(itertools.takewhile(lambda line: "the demo is at" not in line, process.stdout))
    api = f"http://127.0.0.1:{port}/gradio_api"
    assert httpx.get(f"http://127.0.0.1:{port}/").is_success
    (uploaded,) = httpx.post(f"{api}/upload", files={"files": digit.read_bytes()}).json()
    for path in (uploaded, "https://example.com/cat.png", "https://huggingface.co/cat.png"):
        picture = {"path": path, "meta": {"_type": "gradio.FileData"}}
        event = httpx.post(f"{api}/call/predict", json={"data": [picture, NEWER]}).json()["event_id"]
        reply = httpx.get(f"{api}/call/predict/{event}").text
        assert ("label" in reply) == (path == uploaded)
    process.send_signal(signal.SIGINT)
    out, err = process.communicate(timeout=30)
    assert (process.returncode, err) == (130, "error: interrupted\n")
    asked += out.splitlines()
    assert asked
    assert {line.split()[1] for line in asked if line.startswith("asks")} <= {"127.0.0.1", "localhost"}


def test_temporary_files_are_gone_when_the_demo_ends(outputs, digit):
    before = os.environ.get("GRADIO_TEMP_DIR")
    with demo.running(output_dir=str(outputs), data_dir="nowhere", port=free_port(), device="cpu") as page:
        folder = Path(os.environ["GRADIO_TEMP_DIR"])
        ask(connect(page), digit)
        assert list(folder.rglob("digit.png"))
    assert not folder.parent.exists()
    assert os.environ.get("GRADIO_TEMP_DIR") == before


def test_with_auth_only_those_who_know_the_password_are_answered(outputs, digit, monkeypatch):
    monkeypatch.setenv("CIFAR_DEMO_AUTH", "ada:with:colon")
    with demo.running(output_dir=str(outputs), data_dir="nowhere", port=free_port(), device="cpu") as page:
        assert httpx.get(f"{page.local_url}config").status_code == 401
        uploaded = httpx.post(f"{page.local_url}gradio_api/upload", files={"files": digit.read_bytes()})
        assert uploaded.status_code == 401
        known = connect(page, auth=("ada", "with:colon"))
        assert ask(known, digit)["label"]


def refusal(**given) -> str:
    with pytest.raises(UserError) as error, demo.running(**{"data_dir": "nowhere", "device": "cpu", **given}):
        pass
    return str(error.value)


def test_a_taken_port_is_named_with_a_free_one(outputs):
    with socket.create_server(("127.0.0.1", 0)) as listener:
        port = listener.getsockname()[1]
        sentence = refusal(output_dir=str(outputs), port=port)
    free = int(re.fullmatch(rf"port {port} is taken: --port (\d+) is free", sentence)[1])
    socket.create_server(("127.0.0.1", free)).close()


def test_without_an_evaluated_run_a_sentence_says_how_to_make_one(tmp_path):
    assert refusal(output_dir=str(tmp_path), port=free_port()) == (
        f"there is no evaluated run in {tmp_path}: make one with `python main.py`"
    )


@pytest.mark.parametrize(
    ("given", "sentence"),
    [
        ({"auth": "ada"}, "USER:PASSWORD"),
        ({"auth": ":secret"}, "USER:PASSWORD"),
        ({"auth": "ada:"}, "USER:PASSWORD"),
        ({"port": 0}, "--port must be"),
        ({"port": 70_000}, "--port must be"),
        ({"host": "256.1.1.1"}, "cannot listen on 256.1.1.1"),
    ],
)
def test_a_mistake_is_one_sentence(given, sentence, outputs):
    assert sentence in refusal(**{"output_dir": str(outputs), "port": free_port(), **given})


def find(browser, selector: str):
    return browser.find_element("css selector", selector)


def wait_for(browser, condition, what: str):
    from selenium.webdriver.support.ui import WebDriverWait

    return WebDriverWait(browser, 10).until(lambda _: condition(), f"no {what}")


def shown_label(browser) -> str:
    return browser.execute_script("return document.querySelector('[data-testid=label-output-value]')?.innerText ?? ''")


def test_a_visitor_uploads_clicks_an_example_changes_the_run_and_reads_about_it(browser, page, digit, client, tmp_path):
    browser.get(page.local_url)
    find(browser, "input[type=file]").send_keys(str(digit))
    answer = ask(client, digit)["label"]
    assert wait_for(browser, lambda: shown_label(browser).strip(), "label") == answer
    assert len(browser.find_elements("css selector", ".views img")) == 2

    find(browser, "button[aria-label='Remove Image']").click()
    wait_for(browser, lambda: not shown_label(browser), "empty answer")
    text = tmp_path / "text.png"
    text.write_bytes(b"not a picture")
    find(browser, "input[type=file]").send_keys(str(text))
    assert find(browser, ".note.refused").text.startswith("The file is not a picture")

    for example in (3, 7):
        browser.find_elements("css selector", "#examples button")[example].click()
        wait_for(browser, lambda: shown_label(browser).strip(), "answer to the example")

    find(browser, "#run input").click()
    browser.find_elements("css selector", "[role=option]")[1].click()
    browser.find_elements("css selector", "[role=tab]")[1].click()
    wait_for(browser, lambda: "recipe convnet" in find(browser, ".tiles").text, "report of the older run")
    figures = browser.find_elements("css selector", ".sheet img")
    assert len(figures) == 4
    assert all(figure.get_property("naturalWidth") > 500 for figure in figures)

    severe = [entry for entry in browser.get_log("browser") if entry["level"] == "SEVERE"]
    assert not severe
    events = [json.loads(entry["message"])["message"] for entry in browser.get_log("performance")]
    sent = [event["params"]["request"]["url"] for event in events if event["method"] == "Network.requestWillBeSent"]
    assert len(sent) > 10
    assert {urlparse(url).hostname for url in sent if url.startswith(("http", "ws"))} == {"127.0.0.1"}


def test_a_visitor_is_told_of_a_full_queue_and_of_a_file_that_is_too_large(browser, page, digit, tmp_path, monkeypatch):
    browser.get(page.local_url)
    large = tmp_path / "large.png"
    large.write_bytes(bytes(11_000_000))
    find(browser, "input[type=file]").send_keys(str(large))
    wait_for(browser, lambda: "maximum allowed size" in find(browser, ".toast-body").text, "word on the size")
    monkeypatch.setattr(page._queue, "max_size", 0)
    browser.get(page.local_url)
    find(browser, "input[type=file]").send_keys(str(digit))
    wait_for(browser, lambda: "currently busy" in find(browser, ".toast-body").text, "word on the queue")


def test_a_run_that_is_damaged_after_the_start_is_a_sentence_on_the_page(outputs, tmp_path):
    shutil.copytree(outputs / NEWER, tmp_path / "outputs" / NEWER)
    runs = DemoRuns(None, str(tmp_path / "outputs"), "nowhere", "cpu", tmp_path / "examples")
    page = demo_page._telling(lambda: (demo_page._heading(runs, NEWER), demo_page._report(runs.run(NEWER))))
    assert all(page())
    (tmp_path / "outputs" / NEWER / "figures" / "calibration.png").write_bytes(b"\x89PNG rubbish")
    assert page()[1].count("<img") == 3
    for file in ("metrics.json", "run.json"):
        (tmp_path / "outputs" / NEWER / file).write_text("{")
        with pytest.raises(gr.Error, match=rf"/{file} is damaged: it does not hold a JSON object.*\.") as caught:
            page()
        assert not caught.value.print_exception


@pytest.mark.parametrize(
    ("host", "here"),
    [
        ("127.0.0.1", True),
        ("::1", True),
        ("localhost", True),
        ("0.0.0.0", False),
        ("192.168.1.2", False),
        ("cat", False),
    ],
)
def test_who_serves_to_others_without_a_password_is_warned(host, here, monkeypatch, capsys):
    page = SimpleNamespace(share_url=None, local_url="http://it:1/", auth=None, is_running=False)
    monkeypatch.setattr(demo, "running", lambda *_, **__: contextlib.nullcontext(page))
    demo.serve(host=host)
    printed = capsys.readouterr().out
    assert "the demo is at http://it:1/, Ctrl-C ends it" in printed
    assert (f"Whoever reaches {host} can use the demo" in printed) != here


def test_without_a_public_address_the_demo_ends_with_a_sentence(outputs, monkeypatch):
    launch = demo._launch
    monkeypatch.setattr(demo, "_launch", lambda *given, share, **named: launch(*given, share=False, **named))
    assert "no public address could be had" in refusal(output_dir=str(outputs), port=free_port(), share=True)
