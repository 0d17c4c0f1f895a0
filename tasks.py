"""The stages of main.py one by one, as invoke tasks: `invoke --list`, `invoke --help train`."""

import functools
import inspect
import os
import shlex
import sys
from collections.abc import Callable
from pathlib import Path

from invoke import Argument, Exit, Task, task

from cifar import console, settings
from cifar.config import FIELDS, PROJECT, Config, UsageError, UserError, help_text


class _Words(Argument):
    """A positional argument that takes all words of the command line; invoke's own takes one.

    invoke hands it words while its value is None, so that is what it says until it has them all. The flags of the
    task must take values.
    """

    def __init__(self, words: list[str], **options):
        super().__init__(kind=list, positional=True, **options)
        after_flag = [False, *("=" not in word and word.startswith("--") for word in words)]
        self.missing = max(1, sum(not word.startswith("--") and not value for word, value in zip(words, after_flag)))

    @property
    def value(self) -> list[str] | None:
        return None if self.missing else self._value

    @value.setter
    def value(self, word: str) -> None:
        self._value = [*self._value, word]
        self.missing -= 1


class _WordsTask(Task):
    """A task whose positional arguments are lists of words."""

    def get_arguments(self, ignore_unknown_help: bool | None = None) -> list[Argument]:
        words = sys.argv[sys.argv.index(self.name) + 1 :] if self.name in sys.argv else []
        return [
            _Words(words, names=argument.names, help=argument.help) if argument.positional else argument
            for argument in super().get_arguments(ignore_unknown_help)
        ]


_RUN_HELP = {"run": "run directory, or its name in --output-dir; default that of the task before, or the latest"}
_chain: dict[str, str] = {}  # the run of the last task of this command line


def stage(*names: str, from_file: bool = False, **own_help: str) -> Callable:
    """Make a function an invoke task whose flags are the settings `names`, and its own keyword parameters.

    from_file: whether --config and --set give settings too. The function receives the Config that the settings make.
    Each flag arrives as text, because invoke would show a traceback for a number that it cannot read.
    """

    def decorate(body: Callable) -> Callable:
        own = [parameter for parameter in inspect.signature(body).parameters.values() if parameter.name != "config"]
        places = settings.HELP if from_file else {}
        flags = [
            inspect.Parameter(name, inspect.Parameter.POSITIONAL_OR_KEYWORD, default=None) for name in (*names, *places)
        ]

        @functools.wraps(body)
        def door(_context, **given):
            extra = {parameter.name: given.pop(parameter.name, parameter.default) for parameter in own}
            file, assignments = given.pop("config", None), given.pop("set", [])
            create = lambda: Config.create(settings.gather(given, file, assignments))  # noqa: E731
            if code := console.exit_code(lambda: body(create(), **extra)):
                raise Exit(code=code)

        context = inspect.Parameter("context", inspect.Parameter.POSITIONAL_OR_KEYWORD)
        door.__signature__ = inspect.Signature([context, *own, *flags])
        positional = [parameter.name for parameter in own if parameter.default is parameter.empty]
        help = {name: help_text(name) for name in names} | own_help | places
        repeated = [name for name in places if name == "set"]
        return task(door, help=help, auto_shortflags=False, positional=positional, iterable=repeated, klass=_WordsTask)

    return decorate


@stage("dataset", "data_dir", "image_size")
def data(config):
    """Fetch the dataset if it is not there, check its files, and say what is there."""
    from cifar import datasets

    dataset, note = datasets.find(config.dataset, config.data_dir, config.image_size)
    if note:
        console.banner(note)
    console.show_dataset(dataset)


@stage(*FIELDS, from_file=True)
def train(config):
    """Train a network into a new run directory."""
    from cifar import train

    run, dataset = train.begin(config)
    _chain["run"] = str(run.path)
    with run.lifetime(), run.stage("train"):
        train.fit(run, dataset)
    console.show_run(run)


@stage("device", "output_dir", data_dir=help_text("data_dir"), **_RUN_HELP)
def evaluate(config, run=None, data_dir=None):
    """Measure a run's best checkpoint on the test split."""
    found = _find_run(config, run)

    from cifar import evaluate

    with found.stage("evaluate"):
        metrics = evaluate.evaluate(found, _dataset_of(found, data_dir), config.device)
    console.show_metrics(metrics)


@stage("output_dir", data_dir=help_text("data_dir"), **_RUN_HELP)
def visualize(config, run=None, data_dir=None):
    """Draw a run's figures from what it has saved."""
    found = _find_run(config, run)

    from cifar import visualize

    with found.stage("visualize"):
        visualize.visualize(found, _dataset_of(found, data_dir))
    console.show_run(found)


def _find_run(config: Config, name: str | None):
    """The run that is named, or else the one of the task before, or else the latest."""
    from cifar import runs

    found = runs.find(config.output_dir, name or _chain.get("run"))
    _chain["run"] = str(found.path)
    return found


def _dataset_of(run, data_dir: str | None):
    """The run's dataset, from the folder that is named, or else that of the environment, or else the run's own."""
    from cifar import datasets

    config = run.config
    place = data_dir or os.environ.get("CIFAR_DATA_DIR") or config.data_dir
    return datasets.find(config.dataset, place, config.image_size)[0]


@stage("dataset", "data_dir", "image_size")
def bench(config):
    """Measure training speed on the CPU beside a DataLoader that augments picture by picture, in float32."""
    from cifar import bench, datasets

    dataset, note = datasets.find(config.dataset, config.data_dir, config.image_size)
    if note:
        console.banner(note)
    own = {"device": "cpu", "image_size": config.image_size}
    speeds = {
        recipe: bench.compare(Config.create({"recipe": recipe, **own}), dataset) for recipe in ("simple", "convnet")
    }
    console.show_speeds(dataset.name, speeds)


@stage(
    "device",
    "output_dir",
    paths="files, folders, globs, or - for standard input",
    fit="what becomes of a picture that is not square; crop to its middle, or letterbox; default crop",
    output="file that receives all probabilities, .csv or .json",
    **_RUN_HELP,
)
def predict(config, paths, run=None, fit="crop", output=None):
    """Say what is in pictures: files, folders, a glob, or - for standard input."""
    if output and not output.endswith((".csv", ".json")):
        raise UserError(f"--output takes a file that ends in .csv or .json, not '{output}'")
    found = _find_run(config, run)

    from cifar import predict

    predictor = predict.Predictor(found, config.device)
    pictures = predict.find_pictures(paths)
    with console.counting_bar("pictures", len(pictures)) as advance:
        answers = []
        for answer in predictor.answer(pictures, fit):
            answers.append(answer)
            advance(1)
    console.show_answers(answers, predictor)
    if output:
        predict.write(Path(output), answers, predictor)
    if refused := sum(answer.refusal is not None for answer in answers):
        raise UserError(f"{refused} of {len(answers)} pictures were refused")


@stage("output_dir", output="file that ends in .pt2; default model.pt2 in the run's directory", **_RUN_HELP)
def export(config, run=None, output=None):
    """Write a run's network as a file that answers without this program: .pt2, and .onnx if onnx is installed."""
    if output and not output.endswith(".pt2"):
        raise UserError(f"--output takes a file that ends in .pt2, not '{output}'")
    found = _find_run(config, run)

    from cifar import export

    console.show_export(export.export(found, Path(output) if output else found.path / "model.pt2"))


@stage(
    "device",
    "data_dir",
    "output_dir",
    host="address to listen on; default 127.0.0.1, which only this machine reaches",
    port="port to listen on; default 7860",
    share="make a public address through Gradio's servers",
    auth="USER:PASSWORD that visitors must give; CIFAR_DEMO_AUTH in the environment stands for it",
    **_RUN_HELP,
)
def demo(config, run=None, host="127.0.0.1", port="7860", share=False, auth=None):
    """Show a run in the browser and let it answer for any picture."""
    if not port.isdecimal() or not 0 < int(port) < 65536:
        raise UsageError(f"--port takes a number from 1 to 65535, not '{port}'")
    found = _find_run(config, run) if run or _chain else None

    from cifar import demo

    places = {"output_dir": config.output_dir, "data_dir": config.data_dir}
    demo.serve(found, **places, host=host, port=int(port), share=share, auth=auth, device=config.device)


@task(help={"only": "run the tests whose names contain this"}, auto_shortflags=False)
def test(context, only=""):  # noqa: PT028
    """Run the tests."""
    import pytest

    if code := pytest.main([str(PROJECT / "tests"), f"--rootdir={PROJECT}", *(["-k", only] if only else [])]):
        raise Exit(code=int(code))


@task
def lint(context):
    """Check the code's style and look for mistakes, with ruff."""
    ruff = f"{shlex.quote(sys.executable)} -m ruff"
    with context.cd(str(PROJECT)):
        context.run(f"{ruff} check . && {ruff} format --check .")
