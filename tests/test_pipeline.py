"""The whole way in processes of their own: in a pipe, in a terminal, interrupted, and without a network."""

import contextlib
import dataclasses
import json
import os
import re
import shlex
import shutil
import time
from pathlib import Path

from PIL import Image

from cifar import pipeline, report, trainer, visualize
from cifar.config import PROJECT
from cifar.download import ARCHIVES
from cifar.runs import Run
from cifar.visualize import FIGURES
from commands import INVOKE, MAIN, main, run, start
from image_files import picture

QUICK = ("--recipe", "mlp", "--epochs", "1", "--device", "cpu")
DRAWN = FIGURES.keys() - {"corruptions"}
# Runs main.py where the addresses of CIFAR-10 cannot be reached.
UNREACHABLE = """
import dataclasses, runpy
from cifar.download import ARCHIVES
ARCHIVES["cifar10"] = dataclasses.replace(ARCHIVES["cifar10"], urls=("http://127.0.0.1:9/x",))
runpy.run_path("main.py", run_name="__main__")
"""


def stems(folder: Path) -> set[str]:
    return {path.stem for path in folder.iterdir()}


def test_one_command_without_cifar10_and_network_goes_the_whole_way_on_digits_and_says_so(tmp_path):
    code, out, err = run("-c", UNREACHABLE, *QUICK, "--data-dir", str(tmp_path / "data"), "--output-dir", str(tmp_path))
    assert (code, err) == (0, "")
    made = next(tmp_path.glob("*_mlp_digits"))
    assert (tmp_path / "latest").resolve() == made
    assert stems(made) == {
        *("config", "run", "history", "metrics", "classification_report", "predictions"),
        *("analysis", "saliency", "report", "checkpoints", "figures", "log"),
    }
    assert stems(made / "figures") == DRAWN
    assert stems(made / "checkpoints") == {"last", "best"}
    assert "\x1b" not in out
    changed = "not CIFAR-10.*--flip none instead of random"
    in_order = (changed, "epoch 1/1", "test-time augmentation", f"{made.name}/report.html")
    assert re.search(".*".join([*in_order, "not CIFAR-10"]), out, re.S)


def test_a_chain_of_tasks_works_from_a_subfolder_on_a_folder_of_images_with_odd_names(digits, tmp_path):
    folder = tmp_path / "my [red] <b>images"
    for label, name in enumerate(("accuracy", "a, 'b' & $\\x$ [bold]")):
        (folder / name).mkdir(parents=True)
        for number, image in enumerate(digits.train.images[digits.train.labels == label][:60]):
            picture(image).save(folder / name / f"{number}.png")
    outputs = ("--output-dir", str(tmp_path / "outputs"))
    train = ("train", *QUICK, "--dataset", str(folder), "--image-size", "40", "--data-dir", str(tmp_path), *outputs)
    others = ("evaluate", *outputs, "visualize", *outputs, "predict", str(folder / "accuracy" / "0.png"), *outputs)
    code, out, err = run(*INVOKE, *train, *others, cwd=PROJECT / "cifar")
    assert (code, err) == (0, "")
    made = next((tmp_path / "outputs").glob("2*"))
    assert stems(made / "figures") == DRAWN
    assert (made / "report.html").exists()
    assert (Run(made).status(), out.count(f"{made.name}\n")) == ("completed", 2)
    assert "my [red] <b>images: test split, 24 images" in out


def type_into(terminal: int, key: bytes, after: str) -> str:
    """Press a key in a terminal once a text has appeared; returns all that the terminal shows until it closes."""
    shown, deadline, typed = "", time.monotonic() + 60, False
    with contextlib.suppress(OSError):  # Linux reports the end of a terminal as an error
        while time.monotonic() < deadline and (part := os.read(terminal, 4096)):
            shown += part.decode(errors="replace")
            if after in shown and not typed:
                typed = bool(os.write(terminal, key))
    return shown


def test_ctrl_c_in_a_terminal_says_how_to_resume_and_that_completes_the_run(tmp_path, monkeypatch):
    flags = ("--recipe", "mlp", "--dataset", "digits", "--epochs", "12", "--patience", "0", "--val-size", "0")
    terminal, child_end = os.openpty()
    environment = {**os.environ, "TERM": "xterm-256color", "COLUMNS": "120"}
    options = {"env": environment, "preexec_fn": lambda: os.login_tty(child_end), "stdout": None, "stderr": None}
    process = start(MAIN, *flags, "--output-dir", str(tmp_path), **options)
    os.close(child_end)
    shown = type_into(terminal, b"\x03", after="epoch  2/12")
    os.close(terminal)
    assert process.wait(60) == 130
    made = Run(next(tmp_path.glob("*_mlp_digits")))
    assert made.status() == "interrupted"
    assert f"interrupted; resume with `{made.resume_command}`" in " ".join(shown.split())
    assert ("\x1b[" in shown, "finishing this step, then saving" in shown, "error" in shown) == (True, True, False)
    for module, name in ((visualize, "visualize"), (report, "write")):
        monkeypatch.setattr(module, name, lambda *_: None)
    code, out, err = main(*shlex.split(made.resume_command)[2:])
    assert (code, err) == (0, "")
    assert ("resuming at epoch" in out, "epoch  1/12" in out, out.count("epoch 12/12")) == (True, False, 1)
    assert made.status() == "completed"
    complete = f"{made.path.name} is complete: there is nothing to resume\n"
    assert main("--resume", str(made.path)) == (0, complete, "")


def test_a_complete_run_is_evaluated_again_if_there_are_other_test_images(evaluated_run, digits, tmp_path, monkeypatch):
    run = Run(shutil.copytree(evaluated_run.path, tmp_path / "run"))
    run.update(status="completed")
    for module, name in ((trainer, "fit"), (visualize, "visualize"), (report, "write")):
        monkeypatch.setattr(module, name, lambda *_: None)
    before = (run.path / "metrics.json").stat().st_mtime_ns
    pipeline.run_stages(run, digits)
    assert (run.path / "metrics.json").stat().st_mtime_ns == before
    changed = {"train": digits.train, "test": digits.test[:300]}
    pipeline.run_stages(run, dataclasses.replace(digits, read=changed.__getitem__))
    assert run.metrics.n == 300


# Runs the commands, with what takes long replaced, and prints each attempt to leave this machine.
WATCHED = """
import json, sys
attempts = []
def watch(event, arguments):
    if event in ("socket.connect", "socket.sendto", "socket.getaddrinfo", "socket.gethostbyname"):
        address = arguments[1] if event in ("socket.connect", "socket.sendto") else arguments
        if isinstance(address, tuple) and address[0] not in ("127.0.0.1", "::1", "localhost", None):
            attempts.append(f"{event} {address}")
            raise ConnectionRefusedError(111, "Connection refused")
sys.addaudithook(watch)
import contextlib, dataclasses, socket
with contextlib.suppress(OSError):
    socket.getaddrinfo("example.invalid", 80)  # shows that it watches
from cifar.download import ARCHIVES
files, *commands = json.loads(sys.argv[1])
ARCHIVES["cifar10"] = dataclasses.replace(ARCHIVES["cifar10"], files=files)
from invoke.main import program
from cifar import bench, demo, server
bench.profile = bench.compare = lambda *arguments: {}
bench.show_profile = bench.show_speeds = lambda *arguments: None
server.serve = lambda *arguments, **options: print("demo built")
for command in commands:
    sys.argv = ["invoke", *command]
    program.run(exit=False)
print(json.dumps(attempts))
"""


def test_with_the_data_on_disk_no_command_tries_to_leave_this_machine(small_cifar10, tmp_path):
    image, outputs = tmp_path / "0.png", ("--output-dir", str(tmp_path / "outputs"))
    Image.new("RGB", (32, 32)).save(image)
    data = ("--data-dir", str(small_cifar10.parent))
    commands = [
        ("data", *data),
        ("train", *QUICK, *data, *outputs, "evaluate", *outputs, "predict", str(image), *outputs),
        ("compare", *outputs),
        *((name, *data, *outputs) for name in ("doctor", "bench", "demo")),
    ]
    code, out, err = run("-c", WATCHED, json.dumps([dict(ARCHIVES["cifar10"].files), *commands]))
    assert (code, err) == (0, "")
    (attempt,) = json.loads(out.splitlines()[-1])
    assert "example.invalid" in attempt
    for part in ("airplane", "run directory: ", "0.png", "ok       dataset", "all values: ", "demo built"):
        assert part in out
    assert re.search(r"\b1 runs?\b", out)
