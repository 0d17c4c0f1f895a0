"""Trainings in separate processes, and what they leave."""

import multiprocessing
import signal
import sys
import time
from pathlib import Path

import pytest
import torch

from cifar import checkpoint, console, device, evaluate, pipeline, runs, trainer
from conftest import flat, quick_config

TIMES = ("seconds", "images_per_second")
# A process of it starts in a few hundredths of a second, as it has everything imported that a training needs.
SERVER = multiprocessing.get_context("forkserver")
IMPORTED = ("torch._dynamo", "sklearn.metrics", "sklearn.model_selection", "sklearn.datasets", __name__)
SERVER.set_forkserver_preload(list(IMPORTED))


def slowly(values) -> list:
    """Parameters of a test that only `invoke test --slow` tries."""
    return [pytest.param(value, marks=pytest.mark.slow) for value in values]


def work(outputs: Path, name: str | None, hinder, log: Path) -> None:
    """Train and evaluate in a process of its own."""
    sys.stdout = sys.stderr = log.open("a", buffering=1, encoding="utf-8")
    torch.set_num_threads(1)

    console.out.file = console.err.file = sys.stdout
    checkpoint.EPOCH_SECONDS = 0.0
    sys.exit(console.exit_code(lambda: train_and_evaluate(outputs, name, hinder, val_size=137)))


def train_and_evaluate(outputs: Path, name: str | None, hinder, **settings) -> None:
    """Make a run of two epochs, or resume the one of that name; `hinder` is called in all processes first."""
    if hinder:
        hinder()
    config = quick_config(outputs, epochs=2, **settings)
    run, dataset = pipeline.create(config) if name is None else pipeline.resume(name, {"output_dir": str(outputs)})
    if device.rank():
        return trainer.fit(run, dataset)
    with run.lifetime(), device.lost_process_errors():
        trainer.fit(run, dataset)
        evaluate.evaluate(run, dataset, "cpu")


class Outputs:
    """A folder of one run that processes work on, one after the other."""

    def __init__(self, folder: Path):
        self.folder, self.log = folder / "outputs", folder / "log"

    @property
    def run(self) -> runs.Run:
        return runs.Run(next(path.parent for path in self.folder.glob("[!l]*/run.json")))

    def said(self) -> str:
        """Return what the processes have printed."""
        return self.log.read_text(encoding="utf-8") if self.log.exists() else ""

    def has_an_epoch(self) -> bool:
        return any(self.folder.glob("*/history.jsonl")) and len(self.run.history()) > 0

    def start(self, hinder=None, name: str | None = None):
        process = SERVER.Process(target=work, args=(self.folder, name, hinder, self.log))
        process.start()
        return process

    def exit_code(self, hinder=None, name: str | None = None) -> int | None:
        """Start a process, and return its exit code once it has ended."""
        process = self.start(hinder, name)
        process.join(60)
        return process.exitcode

    def start_or_resume(self):
        """Start a process as a user would: a new run only if there is none to resume."""
        has_run = any(self.folder.glob("*/run.json"))
        return self.start(name="" if has_run else None)

    def finish(self) -> dict:
        """Return the results of the run, after a last process that nothing hinders, if it has not ended."""
        if any(self.folder.glob("*/run.json")) and self.run.status() == "completed":
            return results(self.run)
        process = self.start_or_resume()
        process.join(60)
        assert process.exitcode == 0, self.said()
        return results(self.run)


def results(run: runs.Run) -> dict:
    """All that must be the same however often the run was interrupted."""
    names = ("checkpoints/best.pt", "metrics.json", "predictions.csv", "classification_report.txt")
    assert run.record.status == "completed"
    assert not list(run.path.rglob("*.partial"))
    history = [line.model_dump(exclude=set(TIMES)) for line in run.history()]
    return {
        **{name: (run.path / name).read_bytes() for name in names},
        "last.pt": flat(torch.load(run.checkpoints / "last.pt", weights_only=True)),
        "history": history,
    }


def wait_until(condition, seconds: float = 60) -> None:
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline, f"it did not come so far in {seconds} seconds"
        time.sleep(0.01)


def after_each_step(action) -> None:
    """Have this process call action(checkpointer) after each step, before a checkpoint may be saved."""
    save_if_due = checkpoint.Checkpointer.save_if_due

    def act(checkpointer, signal_number):
        if checkpointer.training.step:
            signal_number = action(checkpointer) or signal_number
        save_if_due(checkpointer, signal_number)

    checkpoint.Checkpointer.save_if_due = act


def stop_after(steps: int) -> None:
    """Have this process stop after so many steps, as if it had been interrupted then."""
    after_each_step(lambda checkpointer: signal.SIGINT if checkpointer.training.optimizer.steps == steps else None)


def assert_resumes(train, dataset, steps: int, hinder=None) -> runs.Run:
    """Assert that a training that is stopped after so many steps goes on bit for bit as one that is not.

    train: makes a run; hinder: is called before it is resumed. Returns the resumed run.
    """
    uninterrupted = train()
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(checkpoint.Checkpointer, "save_if_due", checkpoint.Checkpointer.save_if_due)  # put back
        stop_after(steps)
        with pytest.raises(KeyboardInterrupt):
            train()
    run = runs.find_resumable(str(uninterrupted.path.parent))
    torch.manual_seed(1)
    if hinder:
        hinder()
    with run.lifetime():
        trainer.fit(run, dataset)
    for name in ("last.pt", "best.pt"):
        saved = [torch.load(one.checkpoints / name, weights_only=True) for one in (uninterrupted, run)]
        assert flat(saved[0]) == flat(saved[1])
    return run


def slow_steps(seconds: float) -> None:
    """Have this process print each step and wait after it."""

    def wait(_):
        print("a step")
        time.sleep(seconds)

    after_each_step(wait)
