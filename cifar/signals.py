"""Ctrl-C and SIGTERM: at once, or when what is under way has come to a good place."""

import contextlib
import signal
import threading
from collections.abc import Callable, Iterator
from typing import NoReturn


class Interrupted(KeyboardInterrupt):
    """Ctrl-C or SIGTERM, with a sentence for the user."""

    def __init__(self, number: int = signal.SIGINT, message: str = "interrupted"):
        super().__init__(message)
        self.number = int(number)


def number_of(stop: KeyboardInterrupt) -> int:
    """The signal that a KeyboardInterrupt is from."""
    return stop.number if isinstance(stop, Interrupted) else int(signal.SIGINT)


def interrupt(number: int, frame: object = None) -> NoReturn:
    """A handler that raises Interrupted."""
    raise Interrupted(number)


@contextlib.contextmanager
def handled(*numbers: int, by: Callable[[int, object], None]) -> Iterator[None]:
    """Handle the signals so while the context lasts; those that the caller of this process ignores stay ignored."""
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
def held_back() -> Iterator[Callable[[], int | None]]:
    """Hold back the first Ctrl-C or SIGTERM; a second one acts at once.

    Yields a function that returns the number of the signal that has come, or None.
    """
    came: list[int] = []

    def note(number: int, frame: object) -> None:
        came.append(number)
        if len(came) > 1:
            interrupt(number)

    with handled(signal.SIGINT, signal.SIGTERM, by=note):
        yield lambda: came[0] if came else None
