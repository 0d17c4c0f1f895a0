"""main.py and the invoke tasks, called here or in a process of their own."""

import contextlib
import io
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
from invoke.main import program

import main as main_module
from cifar.config import PROJECT

INVOKE = "import sys; from invoke.main import program; sys.exit(program.run())"
MAIN = str(PROJECT / "main.py")


def start(*arguments: str, cwd: Path = PROJECT, **options) -> subprocess.Popen:
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True, "encoding": "utf-8"}
    return subprocess.Popen([sys.executable, *arguments], cwd=cwd, **pipes, **options)


def run(*arguments: str, cwd: Path = PROJECT) -> tuple[int, str, str]:
    process = start(*arguments, cwd=cwd)
    out, err = process.communicate(timeout=120)
    return process.returncode, out, err


def main(*arguments: str) -> tuple[int, str, str]:
    return call(lambda: main_module.main(list(arguments)), ["main.py", *arguments])


def invoke(*arguments: str, cwd: Path = PROJECT) -> tuple[int, str, str]:
    return call(program.run, ["invoke", *arguments], cwd)


def call(command: Callable[[], int | None], words: list[str], cwd: Path = PROJECT) -> tuple[int, str, str]:
    """What a command returns or exits with, and prints."""
    out, err = io.StringIO(), io.StringIO()
    with (
        contextlib.chdir(cwd),
        contextlib.redirect_stdout(out),
        contextlib.redirect_stderr(err),
        pytest.MonkeyPatch.context() as patch,
    ):
        patch.setattr(sys, "argv", words)
        try:
            code = command()
        except SystemExit as end:
            code = end.code
    return code or 0, out.getvalue(), err.getvalue()
