"""What nobody should type or find on a disk, over all commands: an answer or one sentence, and never a traceback."""

import contextlib
import json
import random
import shutil
import signal
import socket
import sys
from pathlib import Path

import pytest
from invoke import Collection, Program
from PIL import Image

import main
import tasks
from cifar import bench, budget, compare, corruptions, demo_page, export, headlines, profiling, report, resume, runs
from cifar import evaluate as evaluation
from cifar import train as training
from cifar import visualize as visualization
from cifar.config import FIELDS, flag
from cifar.errors import UserError
from cifar.outputs import directories, groups
from cifar.runs import Run
from cifar.signals import Interrupted
from cifar.state import State
from conftest import quick_config

DOORS = ("data", "doctor", "train", "evaluate", "visualize", "predict", "export", "compare", "demo", "bench")


def reached(*arguments, **options):
    """In place of what takes long or waits for visitors."""
    raise UserError("reached")


def shown(answering, uploads):
    """In place of the demo's page: what it would show at first."""
    demo_page._menu(answering)
    demo_page._heading(answering, answering.default)
    demo_page._report(answering.run(answering.default))
    reached()


@pytest.fixture
def hasty(tmp_path, monkeypatch):
    """What takes long, or waits for visitors, only says that it was reached. The working directory is an empty one."""
    for module, name in ((bench, "compare"), (profiling, "profile"), (export, "_program")):
        monkeypatch.setattr(module, name, reached)
    monkeypatch.setattr(demo_page, "build", shown)
    monkeypatch.setattr(budget, "epoch_seconds", lambda config, dataset, side: 1e-6)
    monkeypatch.setattr(visualization, "_save", lambda figure, path: path)
    monkeypatch.setattr(corruptions, "AMOUNTS", {"noise": (0.1,)})
    monkeypatch.chdir(tmp_path)


def call(capfd, monkeypatch, name: str, *words: str) -> tuple[int, str, str]:
    """Exit code and output of a command, run in this process: an error that it does not tell is one of the test."""
    monkeypatch.setattr(sys, "argv", ["invoke", name, *words])
    monkeypatch.setattr(tasks, "_chain", {})
    try:
        if name == "main":
            code = main.main([*words])
        else:
            code = Program(namespace=Collection.from_module(tasks)).run(["invoke", name, *words], exit=True)
    except SystemExit as end:
        code = end.code
    return code or 0, *capfd.readouterr()


# Typed.

WORDS = """
    -1 0 1 2 -0 1.5 1e999 1e-400 nan -inf 0x10 1_000 ١٢ ½ 4294967296 18446744073709551616 0.0.0.0:1 ::1 None true [1] {}
    {0} %s%n [bold]x[/] * [ ** $(id) -- --x = lr=nan epochs=1e9 x=1 ../.. ~ /dev/null /dev/full /proc/self/mem
    /proc/version file folder folder/x.json no/where.csv run latest nowhere fast plain digits cpu os:getcwd os.path:join
    run/config.json deep.json deep.toml odd.json
"""
VALUES = [
    *("", " ", "\n", "\t", "\x1b[31m", "\udcff", "💥", "'; ls", "é" * 300, "a" * 5000, "a/" * 3000),
    *("9" * 400, "9" * 5000, "batch_size=" + "9" * 400, *WORDS.split()),
]
QUICK = {"recipe": "convnet", "dataset": "digits", "epochs": "1", "device": "cpu", "output_dir": "outputs"}


def typed(chance: random.Random, port: int) -> list[str]:
    """A command line with one or two hostile values."""
    name = chance.choice(["main", *DOORS])
    taken = dict.fromkeys((*FIELDS, "config", "set", "resume"), str)
    if name != "main":
        taken = {argument.name: argument.kind for argument in tasks.__dict__[name].get_arguments()}
    flags = [field for field, kind in taken.items() if field not in ("paths", "names") and kind is not bool]
    given = {field: value for field, value in {**QUICK, "port": str(port)}.items() if field in flags}
    given |= {chance.choice(flags): chance.choice(VALUES) for _ in range(chance.choice((1, 2)))}
    words = [word for field, value in given.items() for word in (flag(field), value)]
    names = [value for value in VALUES if not value.startswith("-")]  # which invoke takes for flags of its own
    return [name, *words, *(chance.choices(names, k=2) if name in ("predict", "compare") else [])]


@pytest.mark.parametrize("lines", [200, pytest.param(3000, marks=pytest.mark.slow)])
def test_no_command_line_ends_in_a_traceback(hasty, evaluated_run, tmp_path, monkeypatch, capfd, lines):
    for module, name in ((training, "fit"), (evaluation, "evaluate"), (visualization, "visualize")):
        monkeypatch.setattr(module, name, reached)
    shutil.copytree(evaluated_run.path, tmp_path / "outputs" / "run")
    (tmp_path / "folder").mkdir()
    for name, text in (("file", "text"), ("deep.json", "[" * 10**5), ("deep.toml", "a=" + "[" * 10**5)):
        (tmp_path / name).write_text(text)
    odd = {"data_dir": "\0", "output_dir": "\ud800", "recipe": ["fast"], "batch_size": 10**400, "lr": {}}
    (tmp_path / "odd.json").write_text(json.dumps(odd))
    with socket.create_server(("127.0.0.1", 0)) as listener:
        port = listener.getsockname()[1]
    chance = random.Random(lines)
    for _ in range(lines):
        words = typed(chance, port)
        code, out, err = call(capfd, monkeypatch, *words)
        assert code in (0, 1, 2), words
        assert "Traceback" not in out + err, words
        assert bool(code) == bool(err), (words, err)
        assert err.count("\n") <= 1 or "usage:" in err, (words, err)


# Found on the disk.

DAMAGES = {
    "missing": None,
    "empty": lambda content: b"",
    "truncated": lambda content: content[: len(content) * 2 // 5],  # half of two lines may be one whole line
    "rubbish": lambda content: random.Random(0).randbytes(1000),
    "another's": lambda content: b'{"accuracy": [1], "status": "fine", "seconds": null}',
    "a folder": lambda content: None,
}


def damage(path: Path, kind: str) -> None:
    content = path.read_bytes()
    path.unlink()
    if kind == "a folder":
        path.mkdir()
    elif kind != "missing":
        path.write_bytes(DAMAGES[kind](content))


FILES = (
    *("run.json", "config.json", "history.jsonl", "metrics.json", "predictions.csv", "classification_report.txt"),
    *("analysis.json", "saliency.npz", "corruptions.json", "checkpoints/best.pt", "checkpoints/last.pt"),
    *("checkpoints/previous.pt", "figures/training_history.png", "figures/corruptions.png", "report.html"),
)
OWN = {"run.json", "config.json"}  # without which no run is one
KNOWN = OWN | {"metrics.json", "checkpoints/best.pt"}  # without which none answers
# What a command cannot do without, and what it can do without but not with a damaged one.
COMMANDS = {
    ("evaluate", "--corruptions"): (OWN | {"checkpoints/best.pt"}, set()),
    ("visualize",): (
        OWN,
        {"history.jsonl", "metrics.json", "predictions.csv", "analysis.json", "saliency.npz", "corruptions.json"},
    ),
    ("compare", "good"): (OWN | {"metrics.json"}, set()),
    ("predict", "picture.png"): (KNOWN, set()),
    ("export",): (KNOWN, set()),
    ("demo",): (KNOWN, set()),
    ("main", "--resume"): (OWN, set()),
    ("train", "--resume"): (OWN, set()),
}
FLAGS = {"compare": (), "main": (), "train": ()}  # others take the run as --run


@pytest.fixture(scope="module")
def whole_run(corrupted_run, tmp_path_factory) -> Run:
    """A run that has every file that a run can have; do not change it."""
    path = tmp_path_factory.mktemp("whole") / "run"
    shutil.copytree(corrupted_run.path, path)
    shutil.copy(path / "checkpoints" / "last.pt", path / "checkpoints" / "previous.pt")
    assert {str(file.relative_to(path)) for file in path.rglob("*") if file.suffix not in ("", ".png")} <= {*FILES}
    return Run(path)


@pytest.fixture
def outputs(hasty, whole_run, evaluated_run, digits, tmp_path) -> Path:
    """A folder with a run to damage, an older one that stays whole, and a picture beside it."""
    folder = tmp_path / "outputs"
    shutil.copytree(whole_run.path, folder / "run")
    shutil.copytree(evaluated_run.path, folder / "good")
    Image.fromarray(digits.test.images[0].permute(1, 2, 0).numpy()).save(tmp_path / "picture.png")
    return folder


def cases(share: int) -> list:
    """Each file with a damage and a command; all of them, or one of so many, drawn evenly."""
    every = [(file, kind, command) for file in FILES for kind in DAMAGES for command in COMMANDS]
    return [
        pytest.param(*case, marks=[pytest.mark.slow] if number % share else [], id=f"{case[0]} {case[1]}, {case[2][0]}")
        for number, case in enumerate(every)
    ]


@pytest.mark.parametrize(("file", "kind", "command"), cases(23))
def test_a_damaged_file_is_one_sentence_or_what_can_be_shown_without_it(
    outputs, monkeypatch, capfd, file, kind, command
):
    damage(outputs / "run" / file, kind)
    name, *words = command
    run = ("run",) if name in ("compare", "main", "train") else ("--run", "run")
    port = ("--port", "45678") if name == "demo" else ()
    code, _, err = call(capfd, monkeypatch, name, *words, *run, *port, "--output-dir", "outputs")
    needed, read = COMMANDS[command]
    refused = file in needed or (file in read and kind != "missing" and (file, kind) != ("history.jsonl", "empty"))
    in_the_way = kind == "a folder" and err == f"error: cannot write {outputs / 'run' / file}: Is a directory\n"
    if refused:
        assert code == 1
        assert err.startswith("error: ")
        assert err.count("\n") == 1
        assert Path(file).name in err or (file, kind) == ("metrics.json", "missing")
    else:
        assert in_the_way or (code, err) in ((0, ""), (1, "error: reached\n"))


def slowly(*quick: str) -> list:
    """All damages as parameters, of which only the quick ones are tried without `invoke test --slow`."""
    return [pytest.param(kind, marks=() if kind in quick else pytest.mark.slow) for kind in DAMAGES]


@pytest.mark.parametrize("kind", slowly("missing", "rubbish"))
def test_a_damaged_run_hides_none_of_the_others(outputs, monkeypatch, capfd, kind):
    for file in sorted(KNOWN | {"history.jsonl"}):
        shutil.rmtree(outputs / "run")
        shutil.copytree(outputs / "good", outputs / "run")
        damage(outputs / "run" / file, kind)
        code, out, err = call(capfd, monkeypatch, "compare", "--output-dir", "outputs")
        assert (code, err) == (0, "")
        assert "2 runs" in out
        code, out, err = call(capfd, monkeypatch, "demo", "--port", "45678", "--output-dir", "outputs")
        assert (code, err) == (1, "error: reached\n")


@pytest.fixture(scope="module")
def interrupted_run(digits, tmp_path_factory) -> Run:
    """A run that was interrupted within its second epoch, and so has a previous.pt; do not change it."""
    run = training.create(quick_config(tmp_path_factory.mktemp("interrupted")), digits)

    def pause(keeper, signal_number, own=resume.Keeper.pause):
        own(keeper, lambda: signal.SIGINT if (keeper.state.epoch, keeper.state.step) == (2, 3) else None)

    with pytest.MonkeyPatch.context() as patch, contextlib.suppress(Interrupted), run.lifetime():
        patch.setattr(resume.Keeper, "pause", pause)
        training.fit(run, digits)
    assert run.status() == "interrupted"
    return run


LAST, PREVIOUS, BEST = (f"checkpoints/{name}.pt" for name in ("last", "previous", "best"))


@pytest.mark.parametrize("file", ["run.json", "config.json", "history.jsonl", LAST, PREVIOUS, BEST])
@pytest.mark.parametrize("kind", slowly("truncated"))
def test_an_interrupted_run_with_a_damaged_file_goes_on_or_says_why_not(
    hasty, interrupted_run, tmp_path, monkeypatch, capfd, file, kind
):
    monkeypatch.setattr(State, "has_ended", lambda state, epochs, patience: reached())  # as soon as it goes on
    shutil.copytree(interrupted_run.path, tmp_path / "outputs" / "run")
    damage(tmp_path / "outputs" / "run" / file, kind)
    code, out, err = call(capfd, monkeypatch, "main", "--resume", "outputs/run")
    assert code == 1
    assert err.count("\n") == 1
    if file in (LAST, PREVIOUS):
        assert err == "error: reached\n"
        assert "going on after epoch 1" + (" and 3 of" if file == PREVIOUS else "\n") in out
        assert ("going on from previous.pt" in " ".join(out.replace("│", " ").split())) == (file == LAST)
    else:
        assert err != "error: reached\n"
        assert Path(file).name in err


SEEDS = ("--recipe", "convnet", "--dataset", "digits", "--epochs", "1", "--device", "cpu", "--seeds", "2")


@pytest.fixture(scope="module")
def killed_group(tmp_path_factory) -> Path:
    """A folder with a group whose process was killed after its two runs had ended; do not change it."""
    folder = tmp_path_factory.mktemp("seeds")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(visualization, "visualize", lambda run, dataset: [])
        patch.setattr(report, "write", lambda run, dataset: None)
        assert main.main([*SEEDS, "--output-dir", str(folder)]) == 0
    (group,) = groups(folder)
    summary = runs.read_json(group / runs.SUMMARY)
    runs.write_json(group / runs.SUMMARY, {**summary, "status": "running"})
    return folder


@pytest.mark.slow
@pytest.mark.parametrize("kind", DAMAGES)
@pytest.mark.parametrize("file", ["summary.json", *FILES[:12]])
def test_several_seeds_come_to_the_same_whatever_file_of_them_was_damaged(
    hasty, killed_group, tmp_path, monkeypatch, capfd, file, kind
):
    monkeypatch.setattr(visualization, "visualize", lambda run, dataset: [])
    monkeypatch.setattr(report, "write", lambda run, dataset: None)
    shutil.copytree(killed_group, tmp_path / "outputs", symlinks=True)
    (group,) = groups(tmp_path / "outputs")
    whole = runs.read_json(group / runs.SUMMARY)
    if (place := group / file if file == runs.SUMMARY else directories(group)[-1] / file).exists():
        damage(place, kind)
    code, out, err = call(capfd, monkeypatch, "main", *SEEDS, "--output-dir", "outputs")
    if (file, kind) == ("metrics.json", "a folder"):  # in the way of the one that would be made anew
        assert (code, err) == (1, f"error: cannot write {place}: Is a directory\n")
        return
    assert (code, err) == (0, "")
    newest = groups(tmp_path / "outputs")[0]
    figures = runs.read_json(newest / runs.SUMMARY)["figures"]
    assert figures["accuracy"] == whole["figures"]["accuracy"]
    assert figures["loss"] == whole["figures"]["loss"]
    assert (newest == group) == (file != runs.SUMMARY)
    if file == runs.SUMMARY:
        assert f"{group.name} cannot be gone on with: " in out
    code, out, err = call(capfd, monkeypatch, "compare", "--output-dir", "outputs")
    assert (code, err) == (0, "")
    assert group.name[:19] in out


def leaves(content, path=()):
    """The paths of the values in a JSON document, of lists the first item alone."""
    yield path
    inside = dict(enumerate(content[:1])) if isinstance(content, list) else content
    for key, value in inside.items() if isinstance(inside, dict) else ():
        yield from leaves(value, (*path, key))


ODD = [None, True, -1, 0, 2, 0.5, 1e308, 10**400, "", "x", "\ud800", [], [[]], {}, {"": None}, [None, 2]]
MISSING = object()


def changed(chance: random.Random, content):
    """The document with one or two of its values replaced by an odd one, missing or twice."""
    for _ in range(chance.choice((1, 1, 2))):
        *path, last = chance.choice(list(leaves(content))[1:])
        place = content
        for key in path:
            place = place[key]
        value = chance.choice([*ODD, MISSING, MISSING])
        if value is MISSING:
            del place[last]
        else:
            place[last] = value
    return content


@pytest.mark.parametrize("changes", [5, pytest.param(300, marks=pytest.mark.slow)])
def test_whatever_a_json_file_says_is_refused_or_can_be_shown(outputs, digits, changes):
    chance, run = random.Random(changes), Run(outputs / "run")
    shown = 0
    for _ in range(changes):
        file = chance.choice(["run.json", "history.jsonl", "metrics.json", "analysis.json", "corruptions.json"])
        kept = (run.path / file).read_text(encoding="utf-8")
        lines = kept.splitlines() if file == "history.jsonl" else [kept]
        odd = changed(chance, [json.loads(line) for line in lines])
        (run.path / file).write_text("\n".join(map(json.dumps, odd)), encoding="utf-8")
        assert len(headlines.table("outputs")) == 2
        for show in (
            lambda: [figure.draw_without_rendering() for _, figure in visualization._figures(run, digits)],
            lambda: report.write(run, digits),
            lambda: compare.compare([run, Run(outputs / "good")]),
            lambda: (demo_page._title(run), demo_page._report(run)),
        ):
            refusal = None
            try:
                show()
            except UserError as error:
                refusal = str(error)
            assert refusal is None or file in refusal
            shown += refusal is None
        (run.path / file).write_text(kept, encoding="utf-8")
    assert 0 < shown < 4 * changes
