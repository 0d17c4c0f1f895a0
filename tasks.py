"""The stages of main.py one by one, as invoke tasks: `invoke --list`, `invoke --help train`."""

import functools
import inspect
import shlex
import sys
from collections.abc import Callable
from pathlib import Path

from invoke import Argument, Exit, Task, task

from cifar import console, settings, tables
from cifar.config import FIELDS, PROJECT, RESUME_HELP, Config, help_text
from cifar.errors import UsageError, UserError, short


class _Words(Argument):
    """A positional argument that takes all words of the command line; invoke's own takes one.

    invoke hands it words while its value is None, so that is what it says until it has them all. The flags of the
    task must take values.
    """

    def __init__(self, words: list[str], least: int, **options):
        super().__init__(kind=list, positional=True, **options)
        after_flag = [False, *("=" not in word and word.startswith("--") for word in words)]
        self.missing = max(
            least, sum(not word.startswith("--") and not value for word, value in zip(words, after_flag))
        )

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
            _Words(words, least=0 if argument.default == () else 1, names=argument.names, help=argument.help)
            if argument.positional
            else argument
            for argument in super().get_arguments(ignore_unknown_help)
        ]


_RUN_HELP = {"run": "run directory, or its name in --output-dir; default that of the task before, or the latest"}
_PORT, _PORT_HELP = "7860", "port that the demo listens on; default 7860"
_chain: dict[str, str] = {}  # the run of the last task of this command line


def stage(*names: str, from_file: bool = False, **own_help: str) -> Callable:
    """Make a function an invoke task whose flags are the settings `names`, and its own keyword parameters.

    from_file: whether --config and --set give settings too. The function receives the Config that the settings make
    or, if it asks for `given`, those that were named. Each flag arrives as text, because invoke would show a traceback
    for a number that it cannot read.
    """

    def decorate(body: Callable) -> Callable:
        first, *own = inspect.signature(body).parameters.values()
        places = settings.HELP if from_file else {}
        flags = [
            inspect.Parameter(name, inspect.Parameter.POSITIONAL_OR_KEYWORD, default=None) for name in (*names, *places)
        ]

        @functools.wraps(body)
        def door(_context, **given):
            extra = {parameter.name: given.pop(parameter.name, parameter.default) for parameter in own}
            file, assignments = given.pop("config", None), given.pop("set", [])

            def call() -> None:
                named = settings.gather(given, file, assignments)
                body(named if first.name == "given" else Config.create(named), **extra)

            if code := console.exit_code(call):
                raise Exit(code=code)

        context = inspect.Parameter("context", inspect.Parameter.POSITIONAL_OR_KEYWORD)
        door.__signature__ = inspect.Signature([context, *own, *flags])
        positional = [parameter.name for parameter in own if parameter.default in (parameter.empty, ())]
        help = {name: help_text(name) for name in names} | own_help | places
        repeated = [name for name in places if name == "set"]
        return task(door, help=help, auto_shortflags=False, positional=positional, iterable=repeated, klass=_WordsTask)

    return decorate


@stage("dataset", "data_dir", "image_size", "mirror")
def data(config):
    """Fetch the dataset if it is not there, check its files, and say what is there."""
    from cifar import datasets

    dataset, note = datasets.find(config.dataset, config.data_dir, config.image_size, config.mirror)
    console.banner(note)
    tables.show_dataset(dataset)


_OF_A_RUN = [name for name in FIELDS if name != "seeds"]  # whose figures need the stages after training


@stage(*_OF_A_RUN, from_file=True, resume=RESUME_HELP)
def train(given, resume=None):
    """Train a network into a new run directory, or go on with a training."""
    from cifar import train

    if resume is None:
        config = Config.create(given)
        if config.seeds > 1:
            raise UsageError(f"this trains one run: python main.py --seeds {config.seeds} goes all the way with each")
        run, dataset = train.begin(config)
    else:
        run, dataset = train.take_up(resume, given)
    _chain["run"] = str(run.path)
    if run.record["status"] == "completed":
        console.say(f"{run.path.name} is complete: there is nothing to resume")
        return
    with run.lifetime(), run.stage("train"):
        train.fit(run, dataset)
    tables.show_run(run)


@stage(
    "device",
    "output_dir",
    data_dir=help_text("data_dir"),
    corruptions="measure also on pictures that are noisy, blurred, dark, turned and so on",
    **_RUN_HELP,
)
def evaluate(config, run=None, data_dir=None, corruptions=False):
    """Measure a run's best checkpoint on the test split."""
    found = _find_run(config, run)

    from cifar import datasets, evaluate

    dataset = datasets.of_run(found, data_dir)
    with found.claim(), found.stage("evaluate"):
        metrics = evaluate.evaluate(found, dataset, config.device)
    tables.show_metrics(metrics)
    if corruptions:
        _measure_corruptions(found, dataset, config.device)


@stage("output_dir", data_dir=help_text("data_dir"), **_RUN_HELP)
def visualize(config, run=None, data_dir=None):
    """Draw a run's figures from what it has saved, and its page, report.html."""
    found = _find_run(config, run)

    from cifar import datasets, report, visualize

    dataset = datasets.of_run(found, data_dir)
    with found.claim():
        with found.stage("visualize"):
            visualize.visualize(found, dataset)
        with found.stage("report"):
            report.write(found, dataset)
    tables.show_run(found)


def _measure_corruptions(run, dataset, device: str) -> None:
    from cifar import corruptions

    with run.claim(), run.stage("corruptions"), console.counting_bar("corruptions", corruptions.CELLS) as advance:
        table = corruptions.measure(run, dataset, device, advance)
    tables.show_corruptions(table)


def _number_of(port: str) -> int:
    if not (port.isascii() and port.isdecimal() and len(port) <= 5 and 0 < int(port) < 65536):
        raise UsageError(f"--port takes a number from 1 to 65535, not '{port}'")
    return int(port)


def _find_run(config: Config, name: str | None):
    """The run that is named, or else the one of the task before, or else the latest."""
    from cifar import outputs

    found = outputs.find(config.output_dir, name or _chain.get("run"))
    _chain["run"] = str(found.path)
    return found


@stage("dataset", "data_dir", "image_size", "output_dir")
def bench(config):
    """Measure, on the CPU, training speed beside a per-image DataLoader, and where a step of `fast` spends its time."""
    from cifar import bench, datasets, profiling, runs

    runs.check_writable(config.output_dir)
    dataset, note = datasets.find(config.dataset, config.data_dir, config.image_size)
    console.banner(note)
    own = {"device": "cpu", "image_size": config.image_size}
    recipes = {recipe: Config.create({"recipe": recipe, **own}) for recipe in ("fast", "simple", "convnet")}
    profile = profiling.profile(recipes.pop("fast"), dataset)
    tables.show_profile(profile)
    speeds = {recipe: bench.compare(chosen, dataset) for recipe, chosen in recipes.items()}
    tables.show_speeds(dataset.name, speeds)
    path = Path(config.output_dir) / "bench.json"
    runs.write_json(path, {"profile": profile, "speeds": speeds})
    console.say(f"all figures: {path}")


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
    tables.show_answers(answers, predictor)
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

    tables.show_export(export.export(found, Path(output) if output else found.path / "model.pt2"))


@stage(
    "output_dir",
    names="runs, or directories of several seeds; none lists all runs",
    sort="column by which the list of all runs is sorted; default the newest first",
    output="folder that receives the page, the figure and the numbers; default compare/ in --output-dir",
)
def compare(config, names=(), sort=None, output=None):
    """Say which of several runs is better and how sure that is, or list all runs."""
    from cifar import headlines

    if not names:
        rows, groups = headlines.table(config.output_dir, sort), headlines.groups(config.output_dir)
        return tables.show_runs(rows, groups, headlines.columns(sort))
    if sort:
        raise UsageError("--sort is for the list of all runs, which `invoke compare` gives without names")

    from cifar import compare, compare_page, outputs

    comparison = compare.compare([run for name in names for run in outputs.find_all(config.output_dir, name)])
    page = compare_page.write(comparison, Path(output) if output else compare.folder(config.output_dir, comparison))
    tables.show_comparison(comparison)
    console.say(f"page, figure and numbers: {short(page.parent)}")


@stage(
    "device",
    "data_dir",
    "output_dir",
    host="address to listen on; default 127.0.0.1, which only this machine reaches",
    port=_PORT_HELP,
    share="make a public address through Gradio's servers",
    auth="USER:PASSWORD that visitors must give; CIFAR_DEMO_AUTH in the environment stands for it",
    run="run directory, or its name in --output-dir; default that of the task before, or the newest that was evaluated",
)
def demo(config, run=None, host="127.0.0.1", port=_PORT, share=False, auth=None):
    """Show a run in the browser and let it answer for any picture."""
    number = _number_of(port)
    found = _find_run(config, run) if run or _chain else None

    from cifar import demo

    places = {"output_dir": config.output_dir, "data_dir": config.data_dir}
    demo.serve(found, **places, host=host, port=number, share=share, auth=auth, device=config.device)


@stage("dataset", "data_dir", "output_dir", "device", "mirror", port=_PORT_HELP)
def doctor(config, port=_PORT):
    """Check whether this machine can do a run, and say what mends what is not as it should be."""
    from cifar import doctor

    findings = doctor.examine(config, _number_of(port))
    tables.show_findings(findings)
    if failures := [finding.subject for finding in findings if finding.level == "failure"]:
        raise UserError(f"a run would fail: see {', '.join(dict.fromkeys(failures))}")


@task(
    help={"only": "run the tests whose names contain this", "slow": "run those that take minutes too"},
    auto_shortflags=False,
)
def test(context, only="", slow=False):  # noqa: PT028
    """Run the tests."""
    import pytest

    shared_out = ["-n", "auto", "--dist", "loadfile"]  # a worker for each core
    chosen = [*(["-k", only] if only else shared_out), *(["-m", ""] if slow else [])]
    if code := pytest.main([str(PROJECT / "tests"), f"--rootdir={PROJECT}", *chosen]):
        raise Exit(code=int(code))


@task
def lint(context):
    """Check the code's style and look for mistakes, with ruff."""
    ruff = f"{shlex.quote(sys.executable)} -m ruff"
    with context.cd(str(PROJECT)):
        context.run(f"{ruff} check . && {ruff} format --check .")
