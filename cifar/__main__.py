"""The command `cifar`, and `python -m cifar`: the whole pipeline or, if the first word is a task, as invoke does."""

import os
import sys
from types import ModuleType

from invoke.loader import FilesystemLoader
from invoke.main import program

from cifar import main as pipeline


class _Loader(FilesystemLoader):
    """Loads this package's tasks, where invoke would look for a tasks.py."""

    def load(self, name: str | None = None) -> tuple[ModuleType, str]:
        from invoke import Collection

        from cifar import commands

        commands.read_command_line(Collection.from_module(commands))
        return commands, os.path.dirname(__file__)  # where invoke looks for its settings, which may be Python


def main() -> int:
    """Run what the command line names; returns the exit code."""
    if not sys.argv[1:] or sys.argv[1].startswith("-"):
        return pipeline.main()
    program.loader_class = _Loader
    program.run()
    return 0


if __name__ == "__main__":
    sys.exit(main())
