"""The terminal: messages, banners, progress and tables; signals; exit codes.

Everything has a plain form for a pipe, a file or a dumb terminal.
"""

import contextlib
import errno
import io
import operator
import os
import re
import signal
import socket
import stat
import sys
import textwrap
import threading
import time
from collections import deque
from collections.abc import Callable, Iterator, Mapping, Sequence
from itertools import accumulate
from pathlib import Path
from typing import Any, NoReturn

from rich.console import Console
from rich.control import Control
from rich.panel import Panel
from rich.progress import (
    BarColumn,
    DownloadColumn,
    Progress,
    SpinnerColumn,
    TaskProgressColumn,
    TextColumn,
    TimeRemainingColumn,
    TransferSpeedColumn,
)
from rich.table import Table
from rich.text import Text

from cifar.errors import UserError, describe, out_of_memory
from cifar.records import EpochRecord

_REFRESH_SECONDS = 0.25
_PIPE_SECONDS = 5.0  # between two lines of a bar where nobody sees it move
_PIPE_WIDTH = 10_000  # nothing is folded or cut off where nobody sees a window
_MIN_WIDTH = 40  # columns; a smaller value of the variable COLUMNS is a mistake
_GAP = 3  # columns of the terminal between two columns of a table
_NUMBER = re.compile(r"([-+]?[\d.,e-]+%?( .*)?)?$")
_BACKQUOTED = re.compile(r"`[^`]+`")
_HANG_UP: int | None = getattr(signal, "SIGHUP", None)  # the terminal is closed; Windows has no such signal
ENDING = [number for number in (signal.SIGTERM, _HANG_UP) if number]
_NO_BREAK = "\ue000"  # stands for a space at which a line must not end
_NAME = TextColumn("{task.description}", markup=False)


class _Console(Console):
    """Standard output or standard error: a terminal, a pipe or a file."""

    def __init__(self, **options):
        if "ipykernel" in sys.modules:  # in a notebook, each redrawn line would stay: it gets those of a pipe
            options |= {"force_jupyter": False, "force_terminal": False}
        super().__init__(highlight=False, **options)
        if not getattr(self.file, "isatty", bool)():  # whatever FORCE_COLOR says; a user's own stream may lack it
            self.width = _PIPE_WIDTH

    def print(self, *objects: Any, **options: Any) -> None:
        """Print, and keep it for the log; not what moves the cursor, for a bar."""
        super().print(*objects, **options)
        if not any(isinstance(part, Control) for part in objects):
            _log_console.print(*objects, **{"width": self.width, **options})

    def __exit__(self, *details: Any) -> None:
        """Write what was printed, by bars too, unless the terminal has been closed; SIGHUP follows."""
        try:
            super().__exit__(*details)
        except OSError as problem:
            if problem.errno != errno.EIO or not stat.S_ISCHR(os.fstat(self.file.fileno()).st_mode):
                raise
            _leave_terminal()

    def on_broken_pipe(self) -> None:
        """Go on without output when nobody reads it any more, as after `| head -1`."""
        self.quiet = True
        with open(os.devnull, "w") as null:
            os.dup2(null.fileno(), self.file.fileno())
        err.print("standard output is closed: continuing without it")


class _Log(io.StringIO):
    """What has been printed, for the log of a run: the last of it until there is one, and then all."""

    def __init__(self):
        super().__init__()
        self.lines: deque[str] = deque(maxlen=1000)
        self.path: Path | None = None

    def write(self, text: str) -> int:
        with contextlib.suppress(OSError):  # the disk may be full; what matters says so itself
            self.lines.append(text)
            if self.path:
                with self.path.open("a", encoding="utf-8", errors="backslashreplace") as file:
                    file.writelines(self.lines)
                self.lines.clear()
        return len(text)


columns = os.environ.get("COLUMNS", "80")
if not columns.isdecimal() or len(columns) > 6 or int(columns) < _MIN_WIDTH:
    del os.environ["COLUMNS"]  # which rich and argparse would obey
out = _Console()
err = _Console(stderr=True)
_log = _Log()
_log_console = Console(
    file=_log, width=_PIPE_WIDTH, highlight=False, color_system=None, force_terminal=False, force_jupyter=False
)


def log_to(path: Path | None) -> None:
    """Append what is printed from now on to a file, if it can be written, after what was printed before.

    None: keep what is printed for the next file.
    """
    _log.path = path
    _log.write("")


def is_live() -> bool:
    """Return whether lines can be redrawn: not in a pipe, a file or a dumb terminal."""
    return out.is_terminal and not out.is_dumb_terminal


@contextlib.contextmanager
def silenced(is_silent: bool = True) -> Iterator[None]:
    """Print nothing, if it is to be silent, until the context ends."""
    before = out.quiet, err.quiet
    out.quiet, err.quiet = (True, True) if is_silent else before
    try:
        yield
    finally:
        out.quiet, err.quiet = before


def printable(text: str) -> str:
    """Escape control characters, line breaks and lone surrogates, which file names and files may contain."""
    return "".join(letter if letter.isprintable() else ascii(letter)[1:-1] for letter in text)


def say(message: str, style: str | None = None) -> None:
    """Print a sentence; only a terminal that is narrower gets several lines, broken between words."""
    out.print(Text(_wrapped(printable(message), out), style=style or ""), soft_wrap=True)


def error(message: str) -> None:
    """Print the one sentence of an error on standard error."""
    text = Text(_wrapped(f"error: {printable(message)}", err))
    text.stylize("bold red", 0, len("error:"))
    err.print(text, soft_wrap=True)


def _wrapped(text: str, console: Console) -> str:
    """Break a text for a terminal between words; not in `commands`, so that they can be copied, nor in paths."""
    if not console.is_terminal:
        return text
    text = _BACKQUOTED.sub(lambda command: command[0].replace(" ", _NO_BREAK), text)
    lines = textwrap.fill(text, console.width, break_long_words=False, break_on_hyphens=False)
    return lines.replace(_NO_BREAK, " ")


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
    shown: list[list[Text]] = []
    left_out: list[str] = []
    room = out.width + _GAP
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
    result.caption = Text(f"too narrow to show: {', '.join(left_out)}") if left_out else None
    return result


def exit_code(action: Callable[[], None]) -> int:
    """Run a command; print an error that the user can fix, or that the system reports, as one sentence.

    Returns 0, 1 for an error, 2 for invalid usage, 130 after Ctrl-C, 143 after SIGTERM and 129 after SIGHUP.
    """
    escape_unencodable()
    _open_standard_streams()
    hook, sys.unraisablehook = sys.unraisablehook, _redeliver
    try:
        with handled(*ENDING, by=interrupt):
            action()
    except UserError as problem:
        error(str(problem))
        return problem.exit_code
    except KeyboardInterrupt as stop:
        err.print(Text(_wrapped(printable(str(stop) or "interrupted"), err)), soft_wrap=True)
        return 128 + signal_number(stop)
    except Exception as problem:
        if (sentence := _system_error(problem)) is None:
            raise
        error(sentence)
        return 1
    finally:
        sys.unraisablehook = hook
    return 0


def escape_unencodable() -> None:
    """Have standard output and standard error escape what their encoding lacks."""
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):
            with contextlib.suppress(ValueError):  # it is closed
                stream.reconfigure(errors="backslashreplace")


def _open_standard_streams() -> None:
    """Keep files from taking the number of a standard stream that is closed: what libraries print would be in them."""
    for descriptor in range(3):
        try:
            os.fstat(descriptor)
        except OSError:
            os.open(os.devnull, os.O_RDWR)  # takes the lowest number that is free


def _redeliver(unraisable: "sys.UnraisableHookArgs") -> None:
    """Send a signal again whose exception Python has dropped, because it came while a finalizer ran."""
    if isinstance(unraisable.exc_value, KeyboardInterrupt):
        # Not now: it would be dropped again.
        threading.Timer(0.05, os.kill, (os.getpid(), signal_number(unraisable.exc_value))).start()
    else:
        sys.__unraisablehook__(unraisable)


def _system_error(problem: Exception) -> str | None:
    """Word an error that the system reports: a file, or memory; None for any other, which is a bug."""
    if sentence := out_of_memory(problem):
        return sentence
    if isinstance(problem, OSError):
        if problem.errno == errno.ENOSPC and not problem.filename:
            return "the disk is full (writing standard output or a temporary file): make room"
        reason = problem.strerror or describe(problem)
        return f"{problem.filename}: {reason}" if problem.filename else reason
    return None


class Interrupted(KeyboardInterrupt):
    """Ctrl-C, SIGTERM or SIGHUP, with a sentence for the user."""

    def __init__(self, number: int = signal.SIGINT, message: str = "interrupted"):
        super().__init__(message)
        self.number = int(number)


def signal_number(stop: KeyboardInterrupt) -> int:
    """Return the number of the signal that a KeyboardInterrupt comes from."""
    return stop.number if isinstance(stop, Interrupted) else int(signal.SIGINT)


def interrupt(number: int, frame: object = None) -> NoReturn:
    """Raise Interrupted; a signal handler."""
    if number == _HANG_UP:
        _leave_terminal()
    raise Interrupted(number)


def _leave_terminal() -> None:
    """Write nowhere what would be written to a terminal, which is closed, so that writing raises."""
    with open(os.devnull, "w") as null:
        for descriptor in (1, 2):
            if stat.S_ISCHR(os.fstat(descriptor).st_mode):
                os.dup2(null.fileno(), descriptor)


@contextlib.contextmanager
def handled(*numbers: int, by: Callable[[int, object], None]) -> Iterator[None]:
    """Handle signals inside the context, except those that this process was started to ignore.

    Only the main thread can.
    """
    wanted = [number for number in numbers if signal.getsignal(number) is not signal.SIG_IGN and _is_main_thread()]
    handlers = {number: signal.signal(number, by) for number in wanted}
    try:
        yield
    finally:
        for number, handler in handlers.items():
            signal.signal(number, handler)


def _is_main_thread() -> bool:
    return threading.current_thread() is threading.main_thread()


@contextlib.contextmanager
def deferred_interrupt() -> Iterator[Callable[[], int | None]]:
    """Defer the first Ctrl-C, SIGTERM or SIGHUP, and say so at once; a second one raises Interrupted.

    Yields a function that returns the number of the signal that was received, or None.
    """
    received: list[int] = []
    announced: list[int] = []
    if not _is_main_thread():  # which alone receives signals
        yield lambda: None
        return

    def handler(number: int, frame: object) -> None:
        received.append(number)
        if max(len(received), len(announced)) > 1:  # Python calls this once for two that came during one operation
            interrupt(number)

    def announce(number: int) -> None:
        if number not in (signal.SIGINT, *ENDING):  # that other code handles
            return
        announced.append(number)
        if number == _HANG_UP:
            _leave_terminal()
        elif len(announced) == 1:
            hint = "; press Ctrl-C again to quit now" if number == signal.SIGINT else ""
            say(f"finishing this step, then saving{hint}")

    with _watched(announce), handled(signal.SIGINT, *ENDING, by=handler):
        try:
            yield lambda: received[0] if received else None
        except RuntimeError:
            if received:  # of several processes, which all receive it, another one ended first
                interrupt(received[0])
            raise


@contextlib.contextmanager
def _watched(action: Callable[[int], None]) -> Iterator[None]:
    """Call the action in another thread for each signal that is handled.

    Python itself calls a handler only between two operations, and a step of training can be one of several seconds.
    """
    reader, writer = socket.socketpair()
    writer.setblocking(False)

    def watch() -> None:
        while number := reader.recv(1):
            action(*number)

    thread = threading.Thread(target=watch)
    thread.start()
    previous = signal.set_wakeup_fd(writer.fileno())
    try:
        yield
    finally:
        signal.set_wakeup_fd(previous)
        writer.close()
        thread.join()
        reader.close()


@contextlib.contextmanager
def download_bar(name: str, size: int, present: int = 0) -> Iterator[Callable[[int], None]]:
    """Show a bar of bytes, speed and time left; yields a function that takes the number of bytes present so far.

    size: in bytes. present: how many of them an earlier download has left.
    """
    if not is_live():
        done = f" ({present / 1e6:.0f} MB already present)" if present else ""
        say(f"downloading {name}, {size / 1e6:.0f} MB{done}")
    columns = (BarColumn(), DownloadColumn(), TransferSpeedColumn(), TimeRemainingColumn())
    with Progress(_NAME, *columns, console=out, disable=not is_live()) as progress:
        task = progress.add_task(printable(name), total=size, completed=present)
        yield lambda count: progress.update(task, completed=count)


@contextlib.contextmanager
def counting_bar(name: str, total: int) -> Iterator[Callable[[float], None]]:
    """Show a bar that counts things; yields a function that takes how many more are done.

    In a pipe, a line says how far it is after _PIPE_SECONDS, and then as often.
    """
    columns = (_NAME, BarColumn(), TaskProgressColumn(), TimeRemainingColumn())
    with Progress(*columns, console=out, transient=True, disable=not is_live()) as progress:
        task, said = progress.add_task(printable(name), total=total), time.monotonic()

        def advance(count: float) -> None:
            nonlocal said
            progress.advance(task, count)
            if not is_live() and time.monotonic() - said >= _PIPE_SECONDS:
                said = time.monotonic()
                say(f"{name}: {progress.tasks[0].percentage:.0f}%")

        yield advance


class TrainingProgress(Progress):
    """The live line of a training, and a permanent line for each epoch."""

    def __init__(
        self, steps: Sequence[int], image_sizes: Sequence[int], forecast: Callable[[float, float], str] | None = None
    ):
        """steps: of each epoch. image_sizes: of each epoch, in pixels; the time of a step is taken as their square.

        forecast: words what the training will take, given the seconds, and the fraction of the time so far in which
        this thread had a core; printed as soon as these can be estimated.
        """
        bar = "{task.description}", BarColumn(None), "{task.fields[status]}", TimeRemainingColumn(compact=True), "left"
        super().__init__(SpinnerColumn(), *bar, console=out, transient=True, expand=True, disable=not is_live())
        self.steps, self.costs = steps, [size**2 for size in image_sizes]
        self.work = [0, *accumulate(map(operator.mul, steps, self.costs))]  # until the end of each epoch
        self.work_before = 0.0  # by an earlier process
        self.started, self.drawn = time.monotonic(), 0.0
        self.forecast = forecast
        self.first: tuple[float, ...] | None = None  # time, time on a core, and work after the first step, a longer one
        self.line = self.add_task("training", total=self.work[-1], status="")

    def _work_until(self, epoch: int, step: int) -> float:
        return self.work[epoch - 1] + (step * self.costs[epoch - 1] if step else 0.0)

    def resume(self, epoch: int, step: int) -> None:
        """Say where training resumes, and count the work up to that step of the epoch as done before."""
        self.work_before, self.forecast = self._work_until(epoch, step), None
        if epoch <= len(self.steps):
            say(f"resuming at epoch {epoch}" + (f", step {step} of {self.steps[epoch - 1]}" if step else ""))

    def is_due(self) -> bool:
        """Return whether the live line should be redrawn, so that the caller need not compute its values each step."""
        return time.monotonic() - self.drawn >= _REFRESH_SECONDS

    def step(self, epoch: int, step: int, loss: float, accuracy: float, speed: float) -> None:
        """Redraw the live line. epoch and step count from 1; speed is in images per second."""
        self.drawn = time.monotonic()
        done = self._work_until(epoch, step)
        if self.first is None:
            self.first = self.drawn, time.thread_time(), done
        elif self.forecast and done > self.first[-1]:
            taken, on_core, work = map(operator.sub, (self.drawn, time.thread_time(), done), self.first)
            say(self.forecast((self.work[-1] - self.work_before) * taken / work, on_core / taken))
            self.forecast = None
        status = f"{step}/{self.steps[epoch - 1]} loss {loss:.3f} acc {accuracy:.1%} {speed:,.0f} img/s"
        self.update(self.line, completed=done, description=f"epoch {epoch}/{len(self.steps)}", status=status)

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
