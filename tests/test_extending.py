"""docs/extending.md: its diffs apply to the code, and what they add trains and resumes."""

import os
import re
import shutil

import numpy as np
import pytest
from scipy.io import savemat

from cifar.config import PROJECT
from commands import run

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


@pytest.mark.parametrize(
    ("flags", "shown"),
    [
        ("--dataset svhn --data-dir . --model tiny", "--flip none instead of random"),
        pytest.param(
            *("--dataset digits --model mine:network --optimizer nadam --lr 1e-3 --grayscale 0.5", "epoch 2/2"),
            marks=pytest.mark.slow,
        ),
    ],
)
def test_what_the_page_adds_trains(flags, shown, extended):
    words = f"train --recipe plain --device cpu --epochs 2 {flags}".split()
    code, out, err = run("-m", "cifar", *words, cwd=extended)
    assert (code, err) == (0, "")
    assert shown in out


RESUMED = """
from pathlib import Path
import conftest, processes
from cifar import datasets

settings = {"recipe": "plain", "model": "tiny", "optimizer": "nadam", "lr": 1e-3, "grayscale": 0.5, "val_size": 413}
config, dataset = conftest.quick_config(Path("resumed"), **settings), datasets.find("digits", ".")
run = processes.assert_resumes(lambda: conftest.trained(config, dataset), dataset, 3)
assert [resumed.step for resumed in run.record.resumed] == [3]
"""


def test_what_the_page_adds_resumes_bit_for_bit(extended):
    environment = os.environ | {"PYTHONPATH": str(PROJECT / "tests")}
    assert run("-c", RESUMED, cwd=extended, env=environment)[::2] == (0, "")
