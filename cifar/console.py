"""The terminal: sentences, banners, progress and their plain form without one; commands end here with an exit code."""

import contextlib
import io
import signal
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from typing import Any

from rich.console import Console
from rich.panel import Panel
from rich.progress import (
    BarColumn,
    DownloadColumn,
    Progress,
    SpinnerColumn,
    TextColumn,
    TimeRemainingColumn,
    TransferSpeedColumn,
)
from rich.text import Text

from cifar import signals
from cifar.errors import UserError, told

_REFRESH_SECONDS = 0.25
out = Console(highlight=False)
err = Console(stderr=True, highlight=False)


def is_live() -> bool:
    """Whether lines can be redrawn: not in a pipe, a file or a dumb terminal."""
    return out.is_terminal and not out.is_dumb_terminal


def say(message: str, style: str | None = None) -> None:
    """One line, never wrapped or interpreted as markup."""
    out.print(Text(message, style=style or ""), soft_wrap=True)


def exit_code(action: Callable[[], None]) -> int:
    """Run a command and turn what a user can mend, and what the system refuses, into one sentence.

    0, or 1, 2 for a usage error, 130 for Ctrl-C and 143 for SIGTERM, which ends a command likewise.
    """
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors="backslashreplace")  # the name of a file may be in no encoding
    try:
        with signals.handled(signal.SIGTERM, by=signals.interrupt):
            action()
    except UserError as error:
        fail(str(error))
        return error.exit_code
    except OSError as error:
        fail(f"{error.filename}: {error.strerror}" if error.filename and error.strerror else told(error))
        return 1
    except KeyboardInterrupt as stop:
        fail(str(stop) or "interrupted")
        return 128 + signals.number_of(stop)
    return 0


def fail(message: str) -> None:
    """The one sentence of an error, on standard error, and on one line whatever a name or a file in it says."""
    message = "".join(letter if letter.isprintable() else ascii(letter)[1:-1] for letter in message)
    err.print(Text.assemble(("error: ", "bold red"), message), soft_wrap=True)


def banner(message: str | None) -> None:
    """A sentence that must not be overlooked, if there is one."""
    if message:
        out.print(Panel(Text(message), border_style="yellow", title="note"))


@contextlib.contextmanager
def download_bar(name: str, size: int, there: int = 0) -> Iterator[Callable[[int], None]]:
    """A bar of bytes, speed and time left; yields a function that takes how many bytes there are by now.

    size: in bytes. there: how many of them an earlier download has left.
    """
    if not is_live():
        say(f"downloading {name}, {size / 1e6:.0f} MB" + (f", of which {there / 1e6:.0f} are there" if there else ""))
        yield lambda count: None
        return
    columns = (
        TextColumn("{task.description}"),
        BarColumn(),
        DownloadColumn(),
        TransferSpeedColumn(),
        TimeRemainingColumn(),
    )
    with Progress(*columns, console=out) as progress:
        task = progress.add_task(name, total=size, completed=there)
        yield lambda count: progress.update(task, completed=count)


@contextlib.contextmanager
def counting_bar(name: str, total: int) -> Iterator[Callable[[int], None]]:
    """A bar that counts things; yields a function that takes how many more are done. Nothing without a terminal."""
    with Progress(*Progress.get_default_columns(), console=out, transient=True, disable=not is_live()) as progress:
        task = progress.add_task(name, total=total)
        yield lambda count: progress.advance(task, count)


class TrainingDisplay:
    """The live line of a training, and a lasting line for each epoch."""

    def __init__(self, steps: Sequence[int], costs: Sequence[float]):
        """steps: in each epoch. costs: of one step of each epoch, in any unit that is proportional to time."""
        self.epochs, self.steps, self.costs = len(steps), steps, costs
        self.work, self.done = self._work_until(len(steps) + 1, 0), 0.0
        self.started = time.monotonic()
        self.drawn = 0.0
        self.begun = 0.0  # the work that was done before
        self.progress = self._progress() if is_live() else None
        self.task = self.progress.add_task("training", total=self.work, status="") if self.progress else None

    @staticmethod
    def _progress() -> Progress:
        return Progress(
            SpinnerColumn(),
            TextColumn("{task.description}"),
            BarColumn(bar_width=None),
            TextColumn("{task.fields[status]}"),
            TimeRemainingColumn(),
            TextColumn("left"),
            console=out,
            transient=True,
            expand=True,
        )

    def __enter__(self) -> "TrainingDisplay":
        if self.progress:
            self.progress.start()
        return self

    def __exit__(self, *_) -> None:
        if self.progress:
            self.progress.stop()

    def resume(self, epoch: int, step: int) -> None:
        """Say from where a training goes on, and take the work up to that step of the epoch as done before."""
        self.begun = self.done = self._work_until(epoch, step)
        say(f"going on after epoch {epoch - 1}" + (f" and {step} of {self.steps[epoch - 1]} steps" if step else ""))

    def _work_until(self, epoch: int, step: int) -> float:
        before = sum(steps * cost for steps, cost in zip(self.steps[: epoch - 1], self.costs))
        return before + step * sum(self.costs[epoch - 1 : epoch])

    def is_due(self) -> bool:
        """Whether the live line is old enough to be drawn anew, so that the caller need not compute it each step."""
        return time.monotonic() - self.drawn >= _REFRESH_SECONDS

    def step(self, epoch: int, step: int, loss: float, accuracy: float, speed: float) -> None:
        """Draw the live line. epoch and step count from 1; speed is in images a second."""
        self.drawn = time.monotonic()
        self.done = self._work_until(epoch, step)
        if self.progress:
            status = f"batch {step}/{self.steps[epoch - 1]} loss {loss:.3f} acc {accuracy:.1%} {speed:,.0f} images/s"
            self.progress.update(
                self.task, completed=self.done, description=f"epoch {epoch}/{self.epochs}", status=status
            )

    def end_epoch(self, record: dict[str, Any], best: bool) -> None:
        """Print the line that stays, with a star at the best epoch so far; record: as history.jsonl has it."""
        loss, accuracy = f"loss {record['train_loss']:.3f}", f"accuracy {record['train_accuracy']:.1%}"
        if record["val_accuracy"] is not None:
            loss += f" val {record['val_loss']:.3f}"
            accuracy += f" val {record['val_accuracy']:.2%}" + ("*" if best else " ")
        where = f"epoch {record['epoch']:>{len(str(self.epochs))}}/{self.epochs}"
        say(f"{where}  {loss}  {accuracy} {record['images_per_second']:,.0f}/s  {self._left()} left")

    def _left(self) -> str:
        seconds = (time.monotonic() - self.started) * (self.work - self.done) / max(self.done - self.begun, 1e-9)
        return f"{int(seconds // 60)}:{int(seconds % 60):02d}"
