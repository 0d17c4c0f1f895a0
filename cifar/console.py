"""The terminal: messages, banners, progress and tables; Ctrl-C and SIGTERM; exit codes.

Everything has a plain form for a pipe, a file or a dumb terminal.
"""

import contextlib
import io
import re
import signal
import sys
import threading
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from itertools import accumulate
from operator import mul
from typing import NoReturn

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
from rich.table import Table
from rich.text import Text

from cifar.errors import UserError, describe
from cifar.records import EpochRecord

_REFRESH_SECONDS = 0.25
_PIPE_WIDTH = 10_000  # nothing is folded or cut off where nobody sees a window
_GAP = 3  # columns of the terminal between two columns of a table
_NUMBER = re.compile(r"([-+]?[\d.,e-]+%?( .*)?)?$")


def _console(stderr: bool = False) -> Console:
    console = Console(stderr=stderr, highlight=False)
    if not console.is_terminal:
        console.width = _PIPE_WIDTH
    return console


out = _console()
err = _console(stderr=True)


def is_live() -> bool:
    """Return whether lines can be redrawn: not in a pipe, a file or a dumb terminal."""
    return out.is_terminal and not out.is_dumb_terminal


def printable(text: str) -> str:
    """Escape control characters, line breaks and lone surrogates, which file names and files may contain."""
    return "".join(letter if letter.isprintable() else ascii(letter)[1:-1] for letter in text)


def say(message: str, style: str | None = None) -> None:
    """Print one line, never wrapped or interpreted as markup."""
    out.print(Text(printable(message), style=style or ""), soft_wrap=True)


def error(message: str) -> None:
    """Print the one sentence of an error on standard error, on one line."""
    err.print(Text.assemble(("error: ", "bold red"), printable(message)), soft_wrap=True)


def banner(message: str | None) -> None:
    """Print a sentence that must not be overlooked, if there is one."""
    if message:
        width = None if out.is_terminal else 80
        out.print(Panel(Text(printable(message)), border_style="yellow", title="note", width=width))


def table(title: str, columns: Mapping[str, Sequence[str | Text]]) -> Table:
    """Make a table of the first columns that fit, at least two; a pipe has room for all.

    columns: title -> cells; numbers are aligned on the right. The caption names the columns that do not fit.
    """
    result = Table(title=Text(printable(title)), show_edge=False, pad_edge=False)
    shown, left_out, room = [], [], out.width + _GAP
    for name, values in columns.items():
        head, *cells = [text if isinstance(text, Text) else Text(printable(text)) for text in (name, *values)]
        room -= _GAP + max(out.measure(text).maximum for text in (head, *cells))
        if room < 0 and len(shown) >= 2:
            left_out.append(head.plain)
            continue
        is_number = all(_NUMBER.match(text.plain) for text in cells)
        result.add_column(head, justify="right" if is_number else "left", overflow="fold")
        shown.append(cells)
    for row in zip(*shown):
        result.add_row(*row)
    result.caption = Text(f"too narrow for: {', '.join(left_out)}") if left_out else None
    return result


def exit_code(action: Callable[[], None]) -> int:
    """Run a command; print an error that the user can fix, or that the system reports, as one sentence.

    Returns 0, 1 for an error, 2 for invalid usage, 130 after Ctrl-C and 143 after SIGTERM.
    """
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors="backslashreplace")  # text that the terminal's encoding does not have
    try:
        with handled(signal.SIGTERM, by=interrupt):
            action()
    except UserError as problem:
        error(str(problem))
        return problem.exit_code
    except KeyboardInterrupt as stop:
        err.print(Text(printable(str(stop) or "interrupted")), soft_wrap=True)
        return 128 + signal_number(stop)
    except Exception as problem:
        if (sentence := _system_error(problem)) is None:
            raise
        error(sentence)
        return 1
    return 0


def _system_error(problem: Exception) -> str | None:
    """Word an error that the system reports: a file, or memory; None for any other, which is a bug."""
    name = type(problem).__name__  # torch.OutOfMemoryError, without the import of torch
    if name in ("OutOfMemoryError", "MemoryError") or "DefaultCPUAllocator: " in str(problem):
        return "out of memory; a smaller --batch-size needs less"
    if isinstance(problem, OSError):
        reason = problem.strerror or describe(problem)
        return f"{problem.filename}: {reason}" if problem.filename else reason
    return None


class Interrupted(KeyboardInterrupt):
    """Ctrl-C or SIGTERM, with a sentence for the user."""

    def __init__(self, number: int = signal.SIGINT, message: str = "interrupted"):
        super().__init__(message)
        self.number = int(number)


def signal_number(stop: KeyboardInterrupt) -> int:
    """Return the number of the signal that a KeyboardInterrupt comes from."""
    return stop.number if isinstance(stop, Interrupted) else int(signal.SIGINT)


def interrupt(number: int, frame: object = None) -> NoReturn:
    """Raise Interrupted; a signal handler."""
    raise Interrupted(number)


@contextlib.contextmanager
def handled(*numbers: int, by: Callable[[int, object], None]) -> Iterator[None]:
    """Handle signals inside the context, except those that this process was started to ignore."""
    handlers: dict[int, object] = {}
    if threading.current_thread() is threading.main_thread():
        wanted = (number for number in numbers if signal.getsignal(number) is not signal.SIG_IGN)
        handlers = {number: signal.signal(number, by) for number in wanted}
    try:
        yield
    finally:
        for number, handler in handlers.items():
            signal.signal(number, handler)


@contextlib.contextmanager
def deferred_interrupt() -> Iterator[Callable[[], int | None]]:
    """Defer the first Ctrl-C or SIGTERM, and say so; a second one raises Interrupted at once.

    Yields a function that returns the number of the signal that was received, or None.
    """
    received: list[int] = []

    def handler(number: int, frame: object) -> None:
        received.append(number)
        if len(received) > 1:
            interrupt(number)
        hint = "; press Ctrl-C again to quit now" if number == signal.SIGINT else ""
        with contextlib.suppress(RuntimeError):  # the signal came while the same stream was being written
            say(f"finishing this step, then saving{hint}")

    with handled(signal.SIGINT, signal.SIGTERM, by=handler):
        yield lambda: received[0] if received else None


@contextlib.contextmanager
def download_bar(name: str, size: int, present: int = 0) -> Iterator[Callable[[int], None]]:
    """Show a bar of bytes, speed and time left; yields a function that takes the number of bytes present so far.

    size: in bytes. present: how many of them an earlier download has left.
    """
    if not is_live():
        done = f" ({present / 1e6:.0f} MB already present)" if present else ""
        say(f"downloading {name}, {size / 1e6:.0f} MB{done}")
        yield lambda count: None
        return
    label = TextColumn("{task.description}", markup=False)
    columns = (label, BarColumn(), DownloadColumn(), TransferSpeedColumn(), TimeRemainingColumn())
    with Progress(*columns, console=out) as progress:
        task = progress.add_task(printable(name), total=size, completed=present)
        yield lambda count: progress.update(task, completed=count)


@contextlib.contextmanager
def counting_bar(name: str, total: int) -> Iterator[Callable[[int], None]]:
    """Show a bar that counts things; yields a function that takes how many more are done. Nothing in a pipe."""
    with Progress(*Progress.get_default_columns(), console=out, transient=True, disable=not is_live()) as progress:
        task = progress.add_task(name, total=total)
        yield lambda count: progress.advance(task, count)


class TrainingProgress(Progress):
    """The live line of a training, and a permanent line for each epoch."""

    def __init__(self, steps: Sequence[int], costs: Sequence[float]):
        """steps: of each epoch. costs: of one step of each epoch, in any unit that is proportional to time."""
        parts = ("{task.description}", BarColumn(None), "{task.fields[status]}", TimeRemainingColumn(), "left")
        super().__init__(SpinnerColumn(), *parts, console=out, transient=True, expand=True, disable=not is_live())
        self.steps, self.costs = steps, costs
        self.work = [0.0, *accumulate(map(mul, steps, costs))]  # until the end of each epoch
        self.work_before = 0.0  # by an earlier process
        self.started, self.drawn = time.monotonic(), 0.0
        self.line = self.add_task("training", total=self.work[-1], status="")

    def _work_until(self, epoch: int, step: int) -> float:
        return self.work[epoch - 1] + (step * self.costs[epoch - 1] if step else 0.0)

    def resume(self, epoch: int, step: int) -> None:
        """Say where training resumes, and count the work up to that step of the epoch as done before."""
        self.work_before = self._work_until(epoch, step)
        if epoch <= len(self.steps):
            say(f"resuming at epoch {epoch}" + (f", step {step} of {self.steps[epoch - 1]}" if step else ""))

    def is_due(self) -> bool:
        """Return whether the live line should be redrawn, so that the caller need not compute its values each step."""
        return time.monotonic() - self.drawn >= _REFRESH_SECONDS

    def step(self, epoch: int, step: int, loss: float, accuracy: float, speed: float) -> None:
        """Redraw the live line. epoch and step count from 1; speed is in images per second."""
        self.drawn = time.monotonic()
        status = f"batch {step}/{self.steps[epoch - 1]} loss {loss:.3f} acc {accuracy:.1%} {speed:,.0f} images/s"
        description, done = f"epoch {epoch}/{len(self.steps)}", self._work_until(epoch, step)
        self.update(self.line, completed=done, description=description, status=status)

    def end_epoch(self, record: EpochRecord, is_best: bool) -> None:
        """Print the permanent line of an epoch, with a star at the best one so far."""
        loss, accuracy = f"loss {record.train_loss:.3f}", f"acc {record.train_accuracy:.1%}"
        if record.val_accuracy is not None:
            loss += f" val {record.val_loss:.3f}"
            accuracy += f" val {record.val_accuracy:.2%}" + ("*" if is_best else " ")
        epochs, done = len(self.steps), self.work[record.epoch]
        epoch = f"epoch {record.epoch:>{len(str(epochs))}}/{epochs}"
        pace = (time.monotonic() - self.started) / max(done - self.work_before, 1e-9)
        minutes, seconds = divmod(int(pace * (self.work[-1] - done)), 60)
        say(f"{epoch}  {loss}  {accuracy} {record.images_per_second:,.0f} img/s  {minutes}:{seconds:02d} left")
