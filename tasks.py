"""The stages of main.py one by one, as invoke tasks: `invoke --list`, `invoke --help train`."""

import functools
import inspect
import time
from collections.abc import Callable
from pathlib import Path

from invoke import Exit, task

from cifar import console
from cifar.config import FIELDS, Config, help_text

_PROJECT = Path(__file__).resolve().parent
_PLACES = ("data_dir", "output_dir")
_RUN_HELP = {"run": "run directory, or its name in --output-dir; default the latest that has ended"}


def stage(*names: str, **own_help: str) -> Callable:
    """Make a function an invoke task whose flags are the settings `names`, and its own keyword parameters.

    The function receives the Config that the settings make. Each flag arrives as text, because invoke would
    show a traceback for a number that it cannot read.
    """

    def decorate(body: Callable) -> Callable:
        own = [parameter for parameter in inspect.signature(body).parameters.values() if parameter.name != "config"]
        flags = [inspect.Parameter(name, inspect.Parameter.POSITIONAL_OR_KEYWORD, default=None) for name in names]

        @functools.wraps(body)
        def door(_context, **given):
            extra = {parameter.name: given.pop(parameter.name, parameter.default) for parameter in own}
            if code := console.exit_code(lambda: body(Config.create(given), **extra)):
                raise Exit(code=code)

        context = inspect.Parameter("context", inspect.Parameter.POSITIONAL_OR_KEYWORD)
        door.__signature__ = inspect.Signature([context, *own, *flags])
        return task(door, help={name: help_text(name) for name in names} | own_help, auto_shortflags=False)

    return decorate


@stage("dataset", "data_dir")
def data(config):
    """Fetch the dataset if it is not there, check its files, and say what is there."""
    from cifar import data

    dataset, note = data.find(config.dataset, config.data_dir)
    if note:
        console.banner(note)
    console.show_dataset(dataset)


@stage(*FIELDS)
def train(config):
    """Train a network into a new run directory."""
    from cifar import data, train

    started = time.perf_counter()
    dataset, note = data.find(config.dataset, config.data_dir)
    if note:
        console.banner(note)
    run = train.begin(config, dataset, started)
    with run.lifetime(), run.stage("train"):
        train.fit(run, dataset)
    console.show_run(run)
    if note:
        console.banner(note)


@stage("device", *_PLACES, **_RUN_HELP)
def evaluate(config, run=None):
    """Measure a run's best checkpoint on the test split."""
    from cifar import data, evaluate, runs

    found = runs.find(config.output_dir, run)
    dataset, _ = data.find(found.config.dataset, config.data_dir)
    with found.stage("evaluate"):
        metrics = evaluate.evaluate(found, dataset, config.device)
    console.show_metrics(metrics)


@stage(*_PLACES, **_RUN_HELP)
def visualize(config, run=None):
    """Draw a run's figures from what it has saved."""
    from cifar import data, runs, visualize

    found = runs.find(config.output_dir, run)
    dataset, _ = data.find(found.config.dataset, config.data_dir)
    with found.stage("visualize"):
        visualize.visualize(found, dataset)
    console.show_run(found)


@stage("dataset", "data_dir", "device")
def bench(config):
    """Measure training speed beside a DataLoader that augments picture by picture, in float32."""
    from cifar import bench, data

    dataset, _ = data.find(config.dataset, config.data_dir)
    recipes = ("simple", "convnet")
    given = {"data_dir": config.data_dir, "device": config.device}
    console.show_speeds(
        {recipe: bench.compare(Config.create({"recipe": recipe, **given}), dataset) for recipe in recipes}
    )


@task(help={"only": "run the tests whose names contain this"}, auto_shortflags=False)
def test(context, only=""):  # noqa: PT028
    """Run the tests."""
    import pytest

    if code := pytest.main([str(_PROJECT / "tests"), f"--rootdir={_PROJECT}", *(["-k", only] if only else [])]):
        raise Exit(code=int(code))


@task
def lint(context):
    """Check the code's style and look for mistakes, with ruff."""
    with context.cd(str(_PROJECT)):
        context.run("ruff check . && ruff format --check .")
