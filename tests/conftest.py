"""Fixtures that several test modules share: datasets on disk, and runs that were really trained.

Modules of cifar are imported where they are used, so that a broken one fails only the tests that need it.
"""

import contextlib
import dataclasses
import hashlib
import io
import os
import pickle
import shutil
import signal
import tarfile
from collections.abc import Iterator
from pathlib import Path

import pytest

from cifar import config
from cifar.config import PROJECT, Config

# A shell lets what it starts in the background ignore Ctrl-C, and that would hold for all that the tests start.
signal.signal(signal.SIGINT, signal.default_int_handler)

# The workers of `invoke test` share the cores; with all threads in each of them they take many times as long.
if workers := os.environ.get("PYTEST_XDIST_WORKER_COUNT"):
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    os.environ["OMP_NUM_THREADS"] = str(max(1, cores // int(workers)))

REAL_CIFAR10 = os.environ.get("CIFAR_DATA_DIR", str(PROJECT / "data"))
CIFAR10_CLASSES = ("airplane", "automobile", "bird", "cat", "deer", "dog", "frog", "horse", "ship", "truck")


@pytest.fixture(autouse=True)
def clean_environment(monkeypatch):
    for name in ("CIFAR_DATA_DIR", "CIFAR_MIRROR", "CIFAR_DEMO_AUTH", "FORCE_COLOR", "TTY_COMPATIBLE"):
        monkeypatch.delenv(name, raising=False)
    config.allowed_models.clear()


@pytest.fixture
def terminal(monkeypatch) -> io.StringIO:
    """A terminal of 120 columns; returns what is written to it."""
    from rich.console import Console

    from cifar import console

    written = io.StringIO()
    monkeypatch.setenv("TERM", "xterm-256color")
    monkeypatch.setattr(console, "out", Console(file=written, force_terminal=True, width=120, highlight=False))
    return written


@contextlib.contextmanager
def as_nobody() -> Iterator[None]:
    """Give up root's privilege to write everywhere."""
    user = os.geteuid()
    try:
        if user == 0:
            os.seteuid(65534)
        yield
    finally:
        os.seteuid(user)


def flat(content) -> list:
    """Return the leaves of dicts and lists without durations, with tensors as bytes, to be compared with ==."""
    import torch

    if isinstance(content, dict):
        return [(key, *flat(value)) for key, value in content.items() if key not in ("seconds", "epoch_seconds")]
    if isinstance(content, (list, tuple)):
        return [flat(value) for value in content]
    return [content.contiguous().numpy().tobytes() if isinstance(content, torch.Tensor) else content]


@pytest.fixture(scope="session")
def digits():
    from cifar import datasets

    return datasets.find("digits", "nowhere")


@pytest.fixture(scope="session")
def real_cifar10():
    from cifar import datasets, download

    if not (Path(REAL_CIFAR10).is_file() or download.find(download.ARCHIVES["cifar10"], Path(REAL_CIFAR10))):
        pytest.skip("neither data/ nor CIFAR_DATA_DIR has CIFAR-10")
    return datasets.find("cifar10", REAL_CIFAR10)


@pytest.fixture
def small_cifar10(tmp_path, monkeypatch) -> Path:
    """A folder with the seven files of CIFAR-10 at a hundredth of their size, accepted as the real ones."""
    return _small_cifar("cifar10", tmp_path, monkeypatch, "", CIFAR10_CLASSES)


@pytest.fixture
def small_cifar100(tmp_path, monkeypatch) -> Path:
    """A folder with the three files of CIFAR-100, with 300 images each, accepted as the real ones."""
    return _small_cifar("cifar100", tmp_path, monkeypatch, "fine_", [f"class {number}" for number in range(100)])


def _small_cifar(name: str, parent: Path, monkeypatch, prefix: str, classes) -> Path:
    import numpy as np

    from cifar.download import ARCHIVES

    archive, rng, count = ARCHIVES[name], np.random.default_rng(0), max(100, 3 * len(classes))
    folder = parent / archive.folder
    folder.mkdir()
    labels = [index % len(classes) for index in range(count)]
    for file in archive.files:
        content = {"data": rng.integers(0, 256, (count, 3072), dtype=np.uint8), f"{prefix}labels": labels}
        names = {f"{prefix}label_names": list(classes)}
        (folder / file).write_bytes(pickle.dumps(names if "meta" in file else content))
    files = {file: hashlib.md5((folder / file).read_bytes()).hexdigest() for file in archive.files}
    monkeypatch.setitem(ARCHIVES, name, dataclasses.replace(archive, files=files))
    return folder


def pack_cifar10(folder: Path, archive: Path, monkeypatch) -> None:
    """Write the archive of a small CIFAR-10, accepted as the real one."""
    from cifar.download import ARCHIVES

    archive.parent.mkdir()
    with tarfile.open(archive, "w:gz") as tar:
        tar.add(folder, folder.name)
    content = archive.read_bytes()
    facts = {"size": len(content), "sha256": hashlib.sha256(content).hexdigest()}
    monkeypatch.setitem(ARCHIVES, "cifar10", dataclasses.replace(ARCHIVES["cifar10"], **facts))


def quick_config(output_dir: Path, minutes: float | None = None, **settings) -> Config:
    """Return the settings of the quickest training, `mlp` on digits for one epoch, with the given ones over them.

    minutes: chooses the number of epochs, in the proportions of the settings.
    """
    quick = {"recipe": "mlp", "dataset": "digits", "epochs": 1, "output_dir": str(output_dir), "device": "cpu"}
    config = Config.create({**quick, **settings})
    return config.replace(minutes=minutes) if minutes else config


def trained(config: Config, dataset):
    from cifar import datasets, pipeline, trainer

    run = pipeline.create_run(datasets.resolve(config, dataset), dataset)
    with run.lifetime(), run.stage("train"):
        trainer.fit(run, dataset)
    return run


@pytest.fixture
def make_run(tmp_path, digits):
    """A function that trains quickly, with the given settings over quick_config, and returns the run."""
    return lambda dataset=digits, **settings: trained(quick_config(tmp_path / "outputs", **settings), dataset)


@pytest.fixture(scope="session")
def evaluated_run(tmp_path_factory, digits):
    """A run on digits, trained, evaluated and analyzed; do not change it."""
    from cifar import analysis, evaluate

    run = trained(quick_config(tmp_path_factory.mktemp("evaluated")), digits)
    with run.stage("evaluate"):
        analysis.write(run, digits, evaluate.evaluate(run, digits, "cpu"))
    return run


@pytest.fixture(scope="session")
def corrupted_run(evaluated_run, digits, tmp_path_factory):
    """A copy of evaluated_run with three of the corruptions measured, its figures and report; do not change it."""
    from cifar import analysis, report, visualize
    from cifar.runs import Run

    run = Run(shutil.copytree(evaluated_run.path, tmp_path_factory.mktemp("corrupted") / "run"))
    three = {kind: analysis.CORRUPTIONS[kind] for kind in ("noise", "jpeg", "shift")}
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(analysis, "CORRUPTIONS", three)
        analysis.measure_corruptions(run, digits, "cpu")
    visualize.visualize(run, digits)
    report.write(run, digits)
    return run


@pytest.fixture
def server():
    from server import serving

    with serving() as server:
        yield server


@pytest.fixture(scope="session")
def browser(tmp_path_factory):
    """Chromium, whose console messages and requests are recorded."""
    binary, driver = shutil.which("chromium"), shutil.which("chromedriver")
    if not binary or not driver:
        pytest.skip("chromium and chromedriver are not installed")
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
