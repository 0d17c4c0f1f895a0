"""What several test modules start from: datasets on disk and runs that were really made."""

import contextlib
import dataclasses
import io
import os
import pickle
import shutil
import signal
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
import torch
from rich.console import Console
from torchvision.datasets import CIFAR10, CIFAR100
from torchvision.datasets.utils import calculate_md5

from cifar import archive, console, corruptions, datasets, evaluate, limits, report, train, visualize
from cifar.archive import ARCHIVES
from cifar.config import PROJECT, Config
from cifar.runs import Run
from server import Server, serving

# A shell ignores Ctrl-C for what it starts in the background, and so would all that the tests start and interrupt.
signal.signal(signal.SIGINT, signal.default_int_handler)

# The workers of `invoke test` share the cores: if all their threads waited for each other, they would take many times
# as long.
if workers := os.environ.get("PYTEST_XDIST_WORKER_COUNT"):
    os.environ["OMP_NUM_THREADS"] = str(max(1, limits.cores() // int(workers)))
    torch.set_num_threads(int(os.environ["OMP_NUM_THREADS"]))

REAL_CIFAR10 = os.environ.get("CIFAR_DATA_DIR", str(PROJECT / "data"))


@pytest.fixture(autouse=True)
def nothing_in_the_environment(monkeypatch):
    for name in ("CIFAR_DATA_DIR", "CIFAR_MIRROR", "FORCE_COLOR", "TTY_COMPATIBLE"):
        monkeypatch.delenv(name, raising=False)


@pytest.fixture
def terminal(monkeypatch) -> io.StringIO:
    """A terminal of 120 columns, and what is written to it."""
    written = io.StringIO()
    monkeypatch.setenv("TERM", "xterm-256color")
    monkeypatch.setattr(console, "out", Console(file=written, force_terminal=True, width=120, highlight=False))
    return written


@contextlib.contextmanager
def as_nobody():
    """Give up for a while what root may do anyway."""
    user = os.geteuid()
    try:
        if user == 0:
            os.seteuid(65534)
        yield
    finally:
        os.seteuid(user)


def flat(content) -> list:
    """The leaves of dicts and lists, times aside, with the bytes of tensors."""
    if isinstance(content, dict):
        return [(key, *flat(value)) for key, value in content.items() if key not in ("seconds", "epoch_seconds")]
    if isinstance(content, list):
        return [flat(value) for value in content]
    return [content.contiguous().numpy().tobytes() if isinstance(content, torch.Tensor) else content]


@pytest.fixture(scope="session")
def digits() -> datasets.Dataset:
    return datasets.find("digits", "nowhere")[0]


@pytest.fixture(scope="session")
def real_cifar10() -> datasets.Dataset:
    if not (Path(REAL_CIFAR10).is_file() or archive.find(ARCHIVES["cifar10"], Path(REAL_CIFAR10))):
        pytest.skip("neither data/ nor CIFAR_DATA_DIR has CIFAR-10")
    return datasets.find("cifar10", REAL_CIFAR10)[0]


CIFAR10_CLASSES = ("airplane", "automobile", "bird", "cat", "deer", "dog", "frog", "horse", "ship", "truck")


@pytest.fixture
def small_cifar10(tmp_path, monkeypatch) -> Path:
    """A folder with the seven files of CIFAR-10 at a hundredth of their size, which torchvision takes for the real."""
    return _small(CIFAR10, tmp_path, monkeypatch, "labels", CIFAR10_CLASSES)


@pytest.fixture
def small_cifar100(tmp_path, monkeypatch) -> Path:
    """Likewise the three files of CIFAR-100, with 300 images each and classes called by their numbers."""
    return _small(CIFAR100, tmp_path, monkeypatch, "fine_labels", [f"class {n}" for n in range(100)])


def _small(kind, place: Path, monkeypatch, labels_key: str, classes) -> Path:
    folder = place / kind.base_folder
    folder.mkdir()
    rng = np.random.default_rng(0)
    lists = {"train_list": [], "test_list": []}
    count = max(100, 3 * len(classes))
    for part, files in (("train_list", kind.train_list), ("test_list", kind.test_list)):
        for name, _ in files:
            labels = [index % len(classes) for index in range(count)]
            pictures = rng.integers(0, 256, (count, 3072), dtype=np.uint8)
            (folder / name).write_bytes(pickle.dumps({"data": pictures, labels_key: labels}))
            lists[part].append([name, calculate_md5(folder / name)])
    names = folder / kind.meta["filename"]
    names.write_bytes(pickle.dumps({kind.meta["key"]: list(classes)}))
    for name, value in {**lists, "meta": {**kind.meta, "md5": calculate_md5(names)}}.items():
        monkeypatch.setattr(kind, name, value)
    archive = ARCHIVES[kind.__name__.lower()]
    files = {name: calculate_md5(folder / name) for name in archive.files}
    monkeypatch.setitem(ARCHIVES, kind.__name__.lower(), dataclasses.replace(archive, files=files))
    return folder


def quick_config(output_dir: Path, **settings) -> Config:
    """The smallest training that is one: `convnet` on digits."""
    given = {"recipe": "convnet", "dataset": "digits", "epochs": 2, "output_dir": str(output_dir), "device": "cpu"}
    return Config.create({**given, **settings})


@pytest.fixture
def make_run(tmp_path, digits):
    """A function that trains on digits with the given settings and returns the run."""

    def make(dataset: datasets.Dataset = digits, **settings):
        run = train.create(quick_config(tmp_path / "outputs", **settings), dataset)
        with run.lifetime(), run.stage("train"):
            train.fit(run, dataset)
        return run

    return make


@pytest.fixture(scope="session")
def evaluated_run(tmp_path_factory, digits):
    """A run on digits, trained and evaluated; do not change it."""
    run = train.create(quick_config(tmp_path_factory.mktemp("evaluated")), digits)
    with run.lifetime():
        with run.stage("train"):
            train.fit(run, digits)
        with run.stage("evaluate"):
            evaluate.evaluate(run, digits, "cpu")
    return run


@pytest.fixture(scope="session")
def corrupted_run(evaluated_run, digits, tmp_path_factory):
    """A copy of it, measured under three of the corruptions, with its figures and its page; do not change it."""
    path = tmp_path_factory.mktemp("corrupted") / "run"
    shutil.copytree(evaluated_run.path, path)
    run = Run(path)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(corruptions, "AMOUNTS", {kind: corruptions.AMOUNTS[kind] for kind in ("noise", "jpeg", "shift")})
        corruptions.measure(run, digits, "cpu", lambda _: None)
    visualize.visualize(run, digits)
    report.write(run, digits)
    return run


@pytest.fixture
def server() -> Iterator[Server]:
    with serving() as server:
        yield server


@pytest.fixture(scope="session")
def browser(tmp_path_factory):
    """Chromium, with its console and its requests recorded."""
    binary, driver = shutil.which("chromium"), shutil.which("chromedriver")
    if not binary or not driver:
        pytest.skip("there is no chromium with its driver here")
    from selenium import webdriver

    options = webdriver.ChromeOptions()
    options.binary_location = binary
    for flag in (
        *("headless=new", "no-sandbox", "disable-gpu", "disable-quic", "no-first-run", "disable-sync"),
        *("disable-background-networking", "disable-component-update", "window-size=1280,1000"),
        f"user-data-dir={tmp_path_factory.mktemp('chromium')}",
    ):
        options.add_argument(f"--{flag}")
    options.set_capability("goog:loggingPrefs", {"performance": "ALL", "browser": "ALL"})
    chrome = webdriver.Chrome(options=options, service=webdriver.ChromeService(executable_path=driver))
    chrome.implicitly_wait(10)
    yield chrome
    chrome.quit()
