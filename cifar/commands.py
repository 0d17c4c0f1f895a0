"""The stages of main.py one by one, as invoke tasks: `invoke list`, `invoke train --help`.

A task is a function: its parameters are the flags, its docstring is the help. A parameter without a default stands for
the words without a flag, `**settings` for a flag of every setting in cifar/config.py. The flags are read here, as those
of main.py are, and passed on to invoke as it spells them. (This file is not called tasks.py: invoke, started in this
folder, would load it alone.)
"""

import functools
import os
from collections import deque
from collections.abc import Callable, Mapping
from inspect import Parameter, Signature, signature
from itertools import takewhile
from pathlib import Path
from typing import Any

from invoke import Argument, Collection, Exit, Task, task
from invoke.main import program

from cifar import console, runs
from cifar.config import FIELDS, PIPELINE, STAGES, Config, flag
from cifar.errors import UsageError, UserError, did_you_mean, display_path, listing
from cifar.flags import HELP, SWITCHES, help_page, load_settings, take_flag

_PORT = "7860"
_SETTINGS = [name for name in FIELDS if name != "seeds"]  # several seeds take all stages: they are main.py's
_HELP = HELP | {
    "run": "run directory, or its name in --output-dir; default the run of the previous task, or else the latest",
    "port": f"port that the demo listens on; default {_PORT}",
}
_EVALUATED = "run directory, or its name; default the previous task's, or the latest evaluated, or the shipped `fast`"
_OWN_NETWORK = "the run's network, if it is package.module:factory: you allow its code to run"
_previous: list[runs.Run] = []  # the run of the previous task on this command line


def command(**help: str) -> Callable:
    """Make a function an invoke task that ends in an exit code and one sentence instead of a traceback.

    help: of the flags that _HELP does not have. Flags arrive as text, or not at all: invoke itself would show a
    traceback for `--port abc`.
    """

    def decorate(body: Callable) -> Any:
        defaults = {name: parameter.default for name, parameter in signature(body).parameters.items()}
        if defaults.pop("settings", None):
            defaults |= dict.fromkeys(_SETTINGS)
        words = [name for name, default in defaults.items() if default is Parameter.empty]
        defaults |= dict.fromkeys(words)
        flags = [Parameter(name, Parameter.KEYWORD_ONLY, default=value) for name, value in defaults.items()]

        @functools.wraps(body)
        def run(_context, **values):
            given = {name: value for name, value in values.items() if value is not None}
            if code := console.exit_code(lambda: body(**given)):
                raise Exit(code=code)

        flags.insert(0, Parameter("context", Parameter.POSITIONAL_ONLY))
        setattr(run, "__signature__", Signature(flags))  # noqa: B010 (types know only the attributes of all functions)
        texts = {name: (_HELP | help)[name] for name in defaults}
        switches = [name for name in SWITCHES if name in defaults]
        return task(run, help=texts, auto_shortflags=False, iterable=words, optional=switches)

    return decorate


def _find_run(output_dir: str | None, name: str | None, model: str | None = None, evaluated: bool = False) -> runs.Run:
    """Find the named run, or else that of the previous task, or else the latest.

    evaluated: instead of a latest one without metrics, the run that `runs.find_evaluated` returns.
    Raises UserError if there is none, or if its network is not the given one.
    """
    name = name or next((str(run.path) for run in _previous), None)
    folder = Config.create({"output_dir": output_dir}).output_dir
    found = runs.find_evaluated(folder) if evaluated and not name else runs.find(folder, name)
    found.allow_model(model)
    _previous[:] = [found]
    return found


def _port(text: str) -> int:
    if not (text.isascii() and text.isdecimal() and len(text) <= 5 and 0 < int(text) < 65536):
        raise UsageError(f"--port takes a number from 1 to 65535, not '{text}'")
    return int(text)


@task(default=True, name="list")
def list_tasks(_context):
    """List the tasks."""
    if code := console.exit_code(program.list_tasks):
        raise Exit(code=code)


@command()
def data(dataset=None, data_dir=None, labels=None, image_size=None, mirror=None):
    """Download the dataset if it is not on the disk, verify it, and describe it."""
    given = {"dataset": dataset, "data_dir": data_dir, "labels": labels, "image_size": image_size, "mirror": mirror}
    config = Config.create(given)

    from cifar import datasets

    datasets.show_dataset(datasets.of_config(config))


@command()
def train(resume=None, config=None, **settings):
    """Train a network into a new run directory, or resume a run."""
    given = load_settings(settings, config, resume is not None)
    if (seeds := Config.create(given).seeds) > 1:
        raise UsageError(
            f"{config} has {seeds} seeds, but {STAGES} train makes one run: use {PIPELINE} with the same flags"
        )

    from cifar import pipeline, report, trainer

    run, dataset = pipeline.resume(resume, given) if resume else pipeline.create(Config.create(given))
    _previous[:] = [run]
    if run.record.status == "completed":
        return console.say(f"{run.path.name} is complete: there is nothing to resume")
    with run.lifetime(), run.stage("train"):
        trainer.fit(run, dataset)
    report.show_run(run)


@command(
    corruptions="also measure the robustness to common corruptions (noise, blur, rotation and others)",
    model=_OWN_NETWORK,
)
def evaluate(run=None, model=None, corruptions=False, data_dir=None, device=None, output_dir=None):
    """Measure a run's best checkpoint on the test split."""
    device = Config.create({"device": device}).device
    found = _find_run(output_dir, run, model)

    from cifar import analysis, datasets, evaluate, report

    dataset = datasets.of_run(found, data_dir)
    if corruptions:
        found.history()  # the report needs it: if it is damaged, nothing is written
    with found.claim():
        with found.stage("evaluate"):
            evaluation = evaluate.evaluate(found, dataset, device)
            analysis.write(found, dataset, evaluation)
        report.show_metrics(evaluation.metrics)
        if corruptions:
            with found.stage("corruptions"):
                table = analysis.measure_corruptions(found, dataset, device)
            analysis.show_corruptions(table)
            if (found.path / "report.html").exists():
                report.write(found, dataset)


@command()
def visualize(run=None, data_dir=None, output_dir=None):
    """Draw a run's figures from its files, and write its report.html."""
    found = _find_run(output_dir, run)

    from cifar import datasets, report, visualize

    dataset = datasets.of_run(found, data_dir)
    with found.claim():
        with found.stage("visualize"):
            visualize.visualize(found, dataset)
        with found.stage("report"):
            report.write(found, dataset)
    report.show_run(found)


@command(
    paths="image files, folders, glob patterns, or - for standard input",
    fit="what happens to an image that is not square: crop its middle, or letterbox it; default crop",
    output="file for all probabilities, .csv or .json",
    run=_EVALUATED,
    model=_OWN_NETWORK,
)
def predict(paths, run=None, model=None, fit="crop", output=None, device=None, output_dir=None):
    """Predict the classes of images: files, folders, glob patterns, or - for standard input."""
    if not paths:
        raise UsageError("name image files, folders or glob patterns, or - for standard input")
    if output and Path(output).suffix.lower() not in (".csv", ".json"):
        raise UserError(f"--output takes a file that ends in .csv or .json, not '{output}'")
    if output and os.path.isdir(output):
        raise UserError(f"--output takes a file, and {output} is a folder")
    device = Config.create({"device": device}).device
    found = _find_run(output_dir, run, model, evaluated=True)

    from cifar import predict

    predictor = predict.Predictor(found, device)
    images = predict.find_images(paths)
    predictions = []
    with console.counting_bar("images", len(images)) as advance:
        for prediction in predictor.stream(images, fit):
            predictions.append(prediction)
            advance(1)
    predict.show_predictions(predictions, predictor)
    if output:
        predict.write(Path(output), predictions, predictor)
        console.say(f"all probabilities: {display_path(output)}")
    if failed := sum(prediction.error is not None for prediction in predictions):
        raise UserError(f"{failed} of {len(predictions)} images could not be read")


@command(
    host="address to listen on; default 127.0.0.1, which other machines cannot reach",
    share="create a public link through Gradio's servers",
    auth="USER:PASSWORD that visitors must enter; the environment variable CIFAR_DEMO_AUTH does the same",
    run=_EVALUATED,
    model=_OWN_NETWORK,
)
def demo(
    run=None,
    model=None,
    host="127.0.0.1",
    port=_PORT,
    share=False,
    auth=None,
    data_dir=None,
    device=None,
    output_dir=None,
):
    """Show a run in the browser, and its predictions for any image."""
    config = Config.create({"device": device, "data_dir": data_dir, "output_dir": output_dir})
    places = {"output_dir": config.output_dir, "host": host, "port": _port(port)}
    data_dir = data_dir and config.data_dir  # else where each run found its data
    found = _find_run(output_dir, run, model) if run or model or _previous else None

    try:
        from cifar import demo
    except ModuleNotFoundError as error:
        raise UserError(f"the demo needs {error.name}: pip install 'gradio>=6.31,<7'") from None

    demo.serve(found, data_dir=data_dir, **places, share=share, auth=auth, device=config.device)


@command(
    output="file that ends in .pt2; default model.pt2 in the run's directory; for fast in outputs/export/fast",
    run=_EVALUATED,
    weights="empty folder: write a copy of the run with float16 weights, measured again on the test set, instead",
    model=_OWN_NETWORK,
)
def export(run=None, model=None, output=None, weights=None, data_dir=None, device=None, output_dir=None):
    """Export a run's network for others: .pt2, and if their packages are installed .onnx and a Hugging Face folder."""
    if output and Path(output).suffix.lower() != ".pt2":
        raise UserError(f"--output takes a file that ends in .pt2, not '{output}'")
    if not weights and (data_dir or device):
        raise UsageError("--data-dir and --device are for --weights: leave them out")
    if weights and output:
        raise UsageError("--weights writes a folder, and --output a file: leave one of them out")
    config = Config.create({"device": device, "output_dir": output_dir})
    found = _find_run(output_dir, run, model, evaluated=True)

    from cifar import export, report

    if weights:
        made = export.write_weights(found, Path(weights), data_dir, config.device)
        console.say(f"the run with small weights: {display_path(made.path)}")
        return report.show_metrics(made.metrics)
    folder = Path(config.output_dir) / "export" / found.path.name if found.is_shipped else found.path
    export.show_export(export.export(found, Path(output) if output else folder / "model.pt2"))


@command(
    names="runs, or directories of several seeds; without names all runs are listed",
    sort="column by which to sort the list of all runs; default the newest first",
    pairs="compare the runs of several seeds one by one, and not by their mean",
    output="folder for the figure and the numbers; default compare/ in --output-dir",
)
def compare(names, sort=None, pairs=False, output=None, output_dir=None):
    """Compare runs, with tests of significance, or list all runs."""
    output_dir = Config.create({"output_dir": output_dir}).output_dir
    if names and sort:
        raise UsageError("--sort applies only to the list of all runs: omit --sort or the names")
    if not names and (pairs or output):
        raise UsageError("--pairs and --output apply only to a comparison: name runs, or omit them")

    from cifar import compare

    if not names:
        return compare.show_runs(compare.leaderboard(output_dir, sort), compare.groups(output_dir))
    comparison = compare.compare([run for name in names for run in runs.find_all(output_dir, name)], pairs)
    compare.show_comparison(comparison)
    folder = compare.write(comparison, Path(output) if output else compare.folder(output_dir, comparison))
    console.say(f"figure and numbers: {display_path(folder)}")


@command(run="report on this run instead: how it ended, problems, and what to try")
def doctor(run=None, dataset=None, data_dir=None, labels=None, mirror=None, device=None, output_dir=None, port=None):
    """Check the environment and suggest fixes."""
    given = {"dataset": dataset, "data_dir": data_dir, "labels": labels, "mirror": mirror}
    config = Config.create({**given, "device": device, "output_dir": output_dir})
    if run and (unused := [flag(name) for name, value in {**given, "device": device, "port": port}.items() if value]):
        raise UsageError(f"{listing(unused)} would not be used: omit --run, or leave them out")

    from cifar import doctor

    findings = doctor.examine_run(_find_run(output_dir, run)) if run else doctor.examine(config, _port(port or _PORT))
    doctor.show_findings(findings)
    if failures := [finding.subject for finding in findings if finding.level == "failure"]:
        raise UserError(f"failed checks: {', '.join(dict.fromkeys(failures))}")


@command()
def bench(dataset=None, data_dir=None, labels=None, image_size=None, device=None, compile=None, output_dir=None):
    """Compare the training speed with that of a DataLoader, and profile a step; on a GPU, train a whole `fast`, too."""
    given = {"dataset": dataset, "data_dir": data_dir, "labels": labels, "image_size": image_size}
    config = Config.create({**given, "device": device, "compile": compile, "output_dir": output_dir})

    from cifar import bench, pipeline

    if bench.run(config).type == "cuda":
        pipeline.run_stages(*pipeline.create(config))


# The command line.


def read_command_line(tasks: Collection) -> None:
    """Check the words that invoke has left for the tasks, and spell them as it does; show the help that they ask for.

    Once invoke has read its own flags, it loads a tasks.py, which calls this, and goes on. Raises invoke.Exit.
    """
    _previous.clear()
    if hasattr(program, "core") and (code := console.exit_code(lambda: _read_words(tasks.tasks))):
        raise Exit(code=code)


def _read_words(tasks: Mapping[str, Task]) -> None:
    """Raise UsageError for an unknown task, and as `take_flag`."""
    words = list(program.core.unparsed)
    before_help = list(takewhile(lambda word: word not in ("-h", "--help"), words))
    asked = program.args.help.value
    if len(before_help) < len(words):
        asked = next((word for word in reversed(before_help) if word in tasks), "list")
    if asked:
        console.out.out(_help(asked, tasks))
        raise Exit
    if words and program.core.remainder:  # what follows `--`, so that it is no flag
        rest = program.argv[program.argv.index("--") + 1 :]
        words += [f"./{word}" if word.startswith("-") else word for word in rest]
    program.core.unparsed[:] = _spelled(deque(words), tasks)


def _spelled(words: deque[str], tasks: Mapping[str, Task]) -> list[str]:
    """Return the tasks, their flags and their words as invoke takes them: `predict --paths=a.png --run=x`."""
    spelled: list[str] = []
    flags: dict[str, str] = {}
    others: dict[str, str] = {}  # the flags of the tasks before, and whose they are
    takes_value: dict[str, bool | None] = {}
    command, words_flag = "", None
    while words:
        word = words[0]
        if command and word.startswith("-") and word != "-":  # which is standard input
            name, value = take_flag(words, takes_value, command, others)
            if value is True and takes_value[name] is None:
                value = "yes"  # or invoke would not know whether the next task is its value
            flags[name] = name if value is True else f"{name}={value}"  # of one that is given twice, the last counts
        elif words_flag:
            if not word.strip():
                raise UsageError(f"a word after `{command}` must not be empty")
            spelled.append(f"{words_flag}={os.path.expanduser(words.popleft())}")
        else:
            others |= dict.fromkeys(takes_value, command)
            arguments, command = _arguments(word, tasks), f"{STAGES} {word}"
            words_flag = next((name for name, argument in arguments.items() if argument.kind is list), None)
            takes_value = {name: _takes_value(one) for name, one in arguments.items() if name != words_flag}
            spelled += [*flags.values(), words.popleft()]
            flags = {}
    return [*spelled, *flags.values()]


def _arguments(task: str, tasks: Mapping[str, Task]) -> dict[str, Argument]:
    """Return the arguments of a task by flag. Raises UsageError if there is no such task."""
    if task not in tasks:
        hint = did_you_mean(task, tasks) or f"`{STAGES} list` lists them"
        raise UsageError(f"there is no task '{task}': {hint.strip()}")
    return {f"--{argument.names[0]}": argument for argument in tasks[task].get_arguments()}


def _takes_value(argument: Argument) -> bool | None:
    """Say whether a flag takes a value; None where it may be left out."""
    return None if argument.optional else argument.takes_value


def _help(task: str, tasks: Mapping[str, Task]) -> str:
    arguments = _arguments(task, tasks).items()
    texts = {name.lstrip("-") if one.kind is list else name: str(one.help) for name, one in arguments}
    return help_page(
        f"{STAGES} {task}", str(tasks[task].__doc__), texts, {name: _takes_value(one) for name, one in arguments}
    )
