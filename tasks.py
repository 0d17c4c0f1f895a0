"""What `invoke` starts: the tasks of cifar/commands.py, where new ones belong, and the tests and the linter."""

import shlex
import sys

from invoke import Collection, Exit, task

from cifar import commands
from cifar.config import PROJECT


@task(
    help={"only": "run the tests whose names contain this", "slow": "also run those that take minutes"},
    auto_shortflags=False,
)
def test(_context, only="", slow=False):  # noqa: PT028
    """Run the tests."""
    import pytest

    chosen = ["-k", only] if only else ["-n", "auto", "--dist", "loadfile"]  # a worker for each core
    if code := pytest.main([str(PROJECT / "tests"), f"--rootdir={PROJECT}", *chosen, *(["-m", ""] if slow else [])]):
        raise Exit(code=int(code))


@task
def lint(context):
    """Check the code's style with ruff, and its types with mypy."""
    python = shlex.quote(sys.executable)
    with context.cd(str(PROJECT)):
        context.run(f"{python} -m ruff check . && {python} -m ruff format --check . && {python} -m mypy")


namespace = Collection.from_module(commands)
for one in (test, lint):
    namespace.add_task(one)  # type: ignore[arg-type]  # invoke annotates what @task returns as a function
commands.read_command_line(namespace)
