"""Errors that a user can fix, and helpers that word messages."""

import difflib
import os
from collections.abc import Collection, Iterable, Sequence
from pathlib import Path
from typing import Any

# What torch, the dynamic linker, Python and the system say.
_NO_MEMORY = ("DefaultCPUAllocator: ", "failed to map segment", "can't start new thread", "Cannot allocate memory")
_NO_GPU_MEMORY = ("CUDA error: out of memory", "_STATUS_ALLOC_FAILED", "MPS backend out of memory")


class UserError(ValueError):
    """A mistake that the user can fix; its message is one sentence, shown without a traceback."""

    exit_code = 1


class UsageError(UserError):
    """An invalid command line, such as `--epochs abc`."""

    exit_code = 2


def known_name(kind: str, name: str, known: Collection[str], others: str = "") -> str:
    """Return `name`; raise UserError with the nearest and all known names if it is not one of them.

    kind: what is named, such as "recipe". others: what else is accepted, in words, for the message.
    """
    if name in known:
        return name
    also = f", or {others}" if others else ""
    raise UserError(f"unknown {kind} '{name}': {did_you_mean(name, known)}choose from {', '.join(known)}{also}")


def did_you_mean(name: str, known: Iterable[str]) -> str:
    """Return "did you mean X? " with the known name that is nearest, or nothing if none is near."""
    nearest = difflib.get_close_matches(name, known, n=1)
    return f"did you mean {nearest[0]}? " if nearest else ""


def listing(names: Sequence[str], most: int = 3) -> str:
    """List the first names and count the others: "a, b, c and 4 more"."""
    more = f" and {len(names) - most:,} more" if len(names) > most else ""
    return ", ".join(names[:most]) + more


def plural(count: int, noun: str) -> str:
    """Word a number of things: `1 epoch`, `1,200 epochs`."""
    return f"{count:,} {noun}{'s' * (count != 1)}"


def percent(fraction: float | None, decimals: int = 2) -> str:
    """Word a fraction, in templates too; a dash where it is not known."""
    return "\u2013" if fraction is None else f"{fraction:.{decimals}%}"


def describe(error: BaseException) -> str:
    """Name the error's type and quote the first line of its message."""
    return f"{type(error).__name__}: {first_line(error)}"


def first_line(error: BaseException) -> str:
    """Return the first line of the error's message; those of torch and NumPy can have many, and blank ones."""
    return (str(error).strip().splitlines() or [""])[0]


def out_of_memory(error: BaseException) -> str | None:
    """Word the error if it says that the computer, or its GPU, has no memory left; None for any other."""
    name = type(error).__name__  # torch.OutOfMemoryError, without the import of torch
    if name == "OutOfMemoryError" or any(text in str(error) for text in _NO_GPU_MEMORY):
        return "the GPU is out of memory: close other programs on it; in training, a smaller --batch-size needs less"
    if name == "MemoryError" or any(text in str(error) for text in _NO_MEMORY):
        return "out of memory: close other programs or raise the limit; in training, a smaller --batch-size needs less"
    return None


def csv_cell(value: Any) -> Any:
    """Return a cell of a CSV file, with an apostrophe before text that a spreadsheet would run as a formula."""
    is_formula = isinstance(value, str) and value.lstrip("'").startswith(("=", "+", "-", "@", "\t", "\r"))
    return f"'{value}" if is_formula else value


def display_path(path: str | Path) -> str:
    """Return the path relative to the working directory, or the absolute one if that is shorter."""
    try:
        return min(os.path.relpath(path), os.path.abspath(path), key=len).replace(os.sep, "/")  # also on Windows
    except ValueError:  # on another drive of Windows
        return str(path)
