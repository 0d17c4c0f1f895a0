"""docs/extending.md: its diffs apply to the code, and what they add trains and resumes."""

import re
import shutil
import subprocess
import sys

import numpy as np
import pytest
from scipy.io import savemat

from cifar.config import PROJECT

PAGE = (PROJECT / "docs" / "extending.md").read_text(encoding="utf-8")


def apply(diff: str, folder) -> None:
    """Apply a diff whose hunks have no line numbers: each must match in one place of its file."""
    for name, *hunks in (part.split("@@\n") for part in diff.split("+++ ")[1:]):
        path = folder / name.strip()
        code = path.read_text(encoding="utf-8")
        for hunk in hunks:
            lines = hunk.splitlines(keepends=True)
            old, new = ("".join(line[1:] or "\n" for line in lines if line[0] != sign) for sign in "+-")
            assert code.count(old) == 1, old
            code = code.replace(old, new)
        path.write_text(code, encoding="utf-8")


@pytest.fixture(scope="module")
def extended(tmp_path_factory):
    """A copy of the code with all changes of the page, and SVHN's two files, of random images."""
    folder = tmp_path_factory.mktemp("extended")
    shutil.copytree(PROJECT / "cifar", folder / "cifar", ignore=shutil.ignore_patterns("__pycache__"))
    shutil.copy(PROJECT / "main.py", folder)
    diffs = re.findall(r"```diff\n(.*?)```", PAGE, re.DOTALL)
    assert len(diffs) == 4
    for diff in diffs:
        apply(diff, folder)
    (source,) = re.findall(r"```python\n(from torch import nn\n.*?)```", PAGE, re.DOTALL)
    (folder / "mine.py").write_text(source)
    rng = np.random.default_rng(0)
    for part, count in (("train", 400), ("test", 100)):
        images = rng.integers(0, 256, (32, 32, 3, count), dtype=np.uint8)
        savemat(folder / f"{part}_32x32.mat", {"X": images, "y": np.arange(count)[:, None] % 10 + 1})
    return folder


FLAGS = ("--recipe", "plain", "--device", "cpu", "--epochs", "2")


@pytest.mark.parametrize(
    ("flags", "shown"),
    [
        (("--dataset", "svhn", "--data-dir", ".", "--model", "tiny"), "--flip none instead of random"),
        (
            (
                "--dataset",
                "digits",
                "--model",
                "mine:network",
                "--optimizer",
                "nadam",
                "--lr",
                "1e-3",
                "--grayscale",
                "0.5",
            ),
            "accuracy",
        ),
    ],
)
def test_what_the_page_adds_trains(flags, shown, extended):
    command = [sys.executable, "main.py", *FLAGS, *flags]
    done = subprocess.run(command, cwd=extended, capture_output=True, text=True, timeout=200)
    assert (done.returncode, done.stderr) == (0, "")
    assert shown in done.stdout


RESUMED = """
import torch
from cifar import data, datasets, model, optim, trainer
from cifar.config import Config

config = Config.create({"recipe": "plain", "dataset": "digits", "model": "tiny", "optimizer": "nadam", "lr": 1e-3,
                        "grayscale": 0.5, "epochs": 2, "val_size": 100, "flip": "none"})
train_set = datasets.find("digits", ".").train[:1024]

def training():
    network = trainer.new_network(config, train_set, 10)
    batches = data.Batches(train_set, config, torch.device("cpu"), 10)
    return trainer.Training(network, optim.build(network, config, batches.steps_per_epoch), batches)

def train(one, steps):
    for batch in batches(one, steps):
        loss, correct = trainer.train_step(one.network, one.optimizer, batch, torch.nn.CrossEntropyLoss(), "float32")
        one.record_step(batch, loss, correct)

def batches(one, steps):
    return [batch for _, batch in zip(range(steps), one.batches.epoch(1, skip=one.step))]

whole, first = training(), training()
train(whole, 6)
train(first, 3)
second = training()
second.network.load_state_dict(first.network.state_dict())
second.load_state_dict(first.state_dict())
train(second, 3)
for one, other in zip(whole.network.state_dict().values(), second.network.state_dict().values()):
    assert torch.equal(one, other)
"""


def test_what_the_page_adds_resumes_bit_for_bit(extended):
    done = subprocess.run([sys.executable, "-c", RESUMED], cwd=extended, capture_output=True, text=True, timeout=200)
    assert (done.returncode, done.stderr) == (0, "")
