"""Trainings in processes of their own that are killed, interrupted and hindered, and go on."""

import functools
import multiprocessing
import os
import random
import signal
import sys
import time
from pathlib import Path

import pytest
import torch
from conftest import quick_config
from test_state import flat

from cifar import console, evaluate, runs, train

TIMES = ("seconds", "images_per_second")
# A process of it starts in a few hundredths of a second, as it has everything imported that a training needs.
SERVER = multiprocessing.get_context("forkserver")
SERVER.set_forkserver_preload(
    ["torch._dynamo", "sklearn.metrics", "sklearn.model_selection", "sklearn.datasets", __name__]
)


def work(outputs: Path, name: str | None, hinder, log: Path) -> None:
    """A process: train and evaluate a new run or, if it has a name, go on with it; `hinder` is called first."""
    sys.stdout = sys.stderr = log.open("a", buffering=1, encoding="utf-8")
    torch.set_num_threads(1)

    def train_and_evaluate():
        settings = quick_config(outputs, recipe="mlp", epochs=3, val_size=137)
        run, dataset = train.begin(settings) if name is None else train.take_up(name, {"output_dir": str(outputs)})
        with run.lifetime():
            train.fit(run, dataset)
            evaluate.evaluate(run, dataset, "cpu")

    if hinder:
        hinder()
    console.out.file = console.err.file = sys.stdout
    sys.exit(console.exit_code(train_and_evaluate))


class Outputs:
    """A folder of one run that processes work on, one after the other."""

    def __init__(self, folder: Path):
        self.folder, self.log = folder / "outputs", folder / "log"

    @property
    def run(self) -> runs.Run:
        return runs.Run(next(path.parent for path in self.folder.glob("[!l]*/run.json")))

    def start(self, hinder=None, name: str | None = None):
        process = SERVER.Process(target=work, args=(self.folder, name, hinder, self.log))
        process.start()
        return process

    def begin_or_go_on(self, hinder=None):
        """Start a process as a user would: a new run only if there is none that could go on."""
        has_run = any(self.folder.glob("*/run.json"))
        return self.start(hinder, "" if has_run else None)

    def finish(self) -> dict:
        """What the run has come to, after a last process that nothing hinders, unless it has ended already."""
        if any(self.folder.glob("*/run.json")) and self.run.status() == "completed":
            return results(self.run)
        process = self.begin_or_go_on()
        process.join(60)
        assert process.exitcode == 0, self.log.read_text()
        return results(self.run)


def results(run: runs.Run) -> dict:
    """All that must be the same however often the run was interrupted."""
    names = ("checkpoints/best.pt", "metrics.json", "predictions.csv", "classification_report.txt")
    assert run.record["status"] == "completed"
    assert not list(run.path.rglob("*.partial"))
    history = [{key: value for key, value in line.items() if key not in TIMES} for line in run.history()]
    return {
        **{name: (run.path / name).read_bytes() for name in names},
        "last.pt": flat(torch.load(run.checkpoints / "last.pt", weights_only=True)),
        "history": history,
    }


@pytest.fixture(scope="module")
def uninterrupted(tmp_path_factory) -> dict:
    return Outputs(tmp_path_factory.mktemp("uninterrupted")).finish()


@pytest.fixture(scope="module")
def duration(tmp_path_factory, uninterrupted) -> float:
    """Seconds that a training takes; the first has waited for the server to start."""
    started = time.monotonic()
    Outputs(tmp_path_factory.mktemp("duration")).finish()
    return time.monotonic() - started


@pytest.fixture
def outputs(tmp_path) -> Outputs:
    return Outputs(tmp_path)


@pytest.mark.parametrize("seed", [0, 1, 2, *(pytest.param(seed, marks=pytest.mark.slow) for seed in range(3, 28))])
def test_a_run_that_is_killed_at_any_instants_ends_as_if_it_had_not_been(outputs, uninterrupted, duration, seed):
    chance = random.Random(seed)
    for _ in range(chance.choice((1, 2, 3))):  # the second kill is one during the resume
        process = outputs.begin_or_go_on()
        process.join(chance.uniform(0, duration))
        process.kill()
        process.join()
        if process.exitcode == 0:
            break
    assert outputs.finish() == uninterrupted


def kill_at(count: int, marker: Path) -> None:
    """Have this process kill itself at the `count`th write, sync or rename, a write when it is half done.

    The marker is there afterwards if it came so far.
    """
    done = 0

    def passing(action, half):
        def act(*arguments, **options):
            nonlocal done
            done += 1
            if done == count:
                marker.touch()
                half(*arguments)
                os.kill(os.getpid(), signal.SIGKILL)
            return action(*arguments, **options)

        return act

    for write in (Path.write_bytes, Path.write_text):
        halfway = functools.partial(lambda write, path, content, *_: write(path, content[: len(content) // 2]), write)
        setattr(Path, write.__name__, passing(write, halfway))
    for name in ("fsync", "replace", "truncate"):
        setattr(os, name, passing(getattr(os, name), lambda *_: None))


POINTS = 60  # more than there are


@pytest.mark.parametrize("point", [15, 24, *(pytest.param(n, marks=pytest.mark.slow) for n in range(1, POINTS))])
def test_a_run_that_is_killed_at_a_write_sync_or_rename_ends_as_if_it_had_not_been(
    outputs, uninterrupted, tmp_path, point
):
    process = outputs.start(functools.partial(kill_at, point, tmp_path / "came so far"))
    process.join(60)
    if not (tmp_path / "came so far").exists():
        pytest.skip(f"there is no write number {point}")
    assert process.exitcode == -signal.SIGKILL
    assert outputs.finish() == uninterrupted
