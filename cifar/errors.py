"""Mistakes that the user can mend, and the words for them."""

import difflib
import os
from collections.abc import Sequence
from pathlib import Path


class UserError(ValueError):
    """A mistake that the user can mend; its message is one sentence, shown without a traceback."""

    exit_code = 1


class UsageError(UserError):
    """A command line that cannot be read, such as `--epochs abc`."""

    exit_code = 2


def known_name(kind: str, name: str, known, others: str = "") -> str:
    """`name`, if it is one of `known`. Raises UserError that names the known ones, the `others` and the nearest."""
    if name in known:
        return name
    near = difflib.get_close_matches(str(name), known, n=1)
    hint = f"did you mean {near[0]}? " if near else ""
    beside = f", and {others}" if others else ""
    raise UserError(f"unknown {kind} '{name}': {hint}known are {', '.join(known)}{beside}")


def some(names: Sequence[str], most: int = 3) -> str:
    """The first of the names, and how many more there are."""
    more = f" and {len(names) - most:,} more" if len(names) > most else ""
    return ", ".join(names[:most]) + more


def told(error: Exception) -> str:
    """The error's kind and the first line of what it says."""
    return f"{type(error).__name__}: {first_line(error)}"


def first_line(error: Exception) -> str:
    """The first line of what the error says; messages of torch, NumPy and the system may have many, and blank ones."""
    return (str(error).strip().splitlines() or [""])[0]


def short(path: Path) -> str:
    """A path as seen from the working directory, where it can be."""
    try:
        return os.path.relpath(path)
    except ValueError:  # on another drive
        return str(path)
