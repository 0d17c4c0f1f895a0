"""Run main.py and the invoke tasks, in this process or in one of their own."""

import contextlib
import gc
import io
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

from cifar.config import PROJECT
from cifar.errors import UserError

MAIN = str(PROJECT / "main.py")
INVOKE = ("-c", "import sys; from invoke.main import program; sys.exit(program.run())")
QUICK = ("--recipe", "mlp", "--dataset", "digits", "--epochs", "1", "--device", "cpu")  # a training of a second


def start(*arguments: str, cwd: Path = PROJECT, **options) -> subprocess.Popen:
    """Start Python with the arguments; its output is text in pipes."""
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True, "encoding": "utf-8"}
    return subprocess.Popen([sys.executable, *arguments], cwd=cwd, **pipes | options)


def run(*arguments: str, cwd: Path = PROJECT, **options) -> tuple[int, str, str]:
    """Run Python with the arguments; returns its exit code, output and errors."""
    process = start(*arguments, cwd=cwd, **options)
    out, err = process.communicate(timeout=120)
    return process.returncode, out, err


def reached(*arguments, **options):
    """Stand in for what takes long, or waits for visitors."""
    raise UserError("reached")


def main(*arguments: str, cwd: Path = PROJECT) -> tuple[int, str, str]:
    """Call main.py in this process, which saves the imports; returns its exit code, output and errors."""
    import main

    return _call(main.main, ["main.py", *arguments], cwd)


def invoke(*arguments: str, cwd: Path = PROJECT) -> tuple[int, str, str]:
    """Call invoke in this process, in any working directory; returns its exit code, output and errors."""
    from invoke.main import program

    tasks = [] if cwd == PROJECT else [f"--search-root={PROJECT}"]
    return _call(program.run, ["invoke", *tasks, *arguments], cwd)


def _call(command: Callable[[], int | None], words: list[str], cwd: Path) -> tuple[int, str, str]:
    out, err = io.StringIO(), io.StringIO()
    with pytest.MonkeyPatch.context() as patch, contextlib.chdir(cwd):
        patch.setattr(sys, "argv", words)
        with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
            try:
                code = command()
            except SystemExit as end:
                code = end.code
    gc.unfreeze()  # main.py has kept the collector from what it imported
    return code or 0, out.getvalue(), err.getvalue()
