"""Damaged run directories, over all commands: one sentence, or whatever works without the file; never a traceback."""

import json
import os
import random
import shutil
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

import commands
from cifar import files, runs
from cifar.runs import Run
from commands import reached
from image_files import picture
from processes import slowly

LAST, PREVIOUS, BEST = (f"checkpoints/{name}.pt" for name in ("last", "previous", "best"))
FILES = (
    *("run.json", "config.json", "history.jsonl", "metrics.json", "predictions.csv", "classification_report.txt"),
    *("analysis.json", "saliency.npz", "corruptions.json", BEST, LAST, PREVIOUS),
    *("figures/training_history.png", "report.html"),
)
DAMAGES: dict[str, Callable[[bytes], bytes] | None] = {
    "missing": None,
    "a folder": None,
    "a pipe": None,
    "empty": lambda content: b"",
    "truncated": lambda content: content[: len(content) * 2 // 5],  # half of two lines may be one whole line
    "random": lambda content: random.Random(0).randbytes(1000),
    "of another program": lambda content: b'{"accuracy": [1], "status": "fine", "seconds": null}',
}
RUN = {"run.json", "config.json"}  # without them a directory is not a run
USABLE = RUN | {"metrics.json", BEST}  # without them a run predicts nothing
DRAWN = {"history.jsonl", "metrics.json", "predictions.csv", "analysis.json", "saliency.npz", "corruptions.json"}
COMMANDS: dict[str, tuple[set[str], set[str]]] = {  # what they need, and what must be whole if it is there
    "evaluate --corruptions --run run": (RUN | {BEST}, {"history.jsonl"}),  # which its report shows
    "visualize --run run": (RUN, DRAWN),
    "compare run good": (RUN | {"metrics.json"}, {"history.jsonl"}),
    "predict {image} --run run": (USABLE, set()),
    "export --run run": (USABLE, set()),
    "demo --run run": (USABLE, set()),
    "main --resume run": (RUN, set()),
    "train --resume run": (RUN, set()),
}


def damage(path: Path, kind: str) -> None:
    content = path.read_bytes()
    path.unlink()
    if kind == "a folder":
        path.mkdir()
    elif kind == "a pipe":
        os.mkfifo(path)  # opening one waits for its other end
    elif change := DAMAGES[kind]:
        path.write_bytes(change(content))


def call(folder: Path, name: str, *words: str) -> tuple[int, str, str]:
    """Call main.py or a task on the runs in a folder."""
    words = (*words, "--output-dir", str(folder))
    return commands.main(*words) if name == "main" else commands.invoke(name, *words)


def show_demo(demo):
    """Stand in for the demo's page: make what it shows first."""
    from cifar import demo as module

    module._heading(demo.run(demo.default))
    module._report(demo.run(demo.default))
    demo.choices()
    reached()


@pytest.fixture
def quick(monkeypatch):
    """Nothing takes long, or waits for visitors; figures are made but not drawn."""
    from matplotlib.figure import Figure

    from cifar import analysis, demo, export, server

    listen = server.listen
    monkeypatch.setattr(server, "listen", lambda host, port: listen(host, 0))  # as two demos at once cannot have one
    monkeypatch.setattr(export, "_program", reached)
    monkeypatch.setattr(demo, "build", show_demo)
    monkeypatch.setattr(Figure, "savefig", lambda figure, path, **_: Path(path).touch())
    monkeypatch.setattr(analysis, "CORRUPTIONS", {"noise": (0.1,)})


@pytest.fixture
def outputs(quick, corrupted_run, evaluated_run, digits, tmp_path) -> Path:
    """A folder with a run that has every file, to be damaged, an older one that stays whole, and an image beside it."""
    folder = tmp_path / "outputs"
    shutil.copytree(corrupted_run.path, folder / "run")
    shutil.copy(folder / "run" / LAST, folder / "run" / PREVIOUS)
    shutil.copytree(evaluated_run.path, folder / "good")
    picture(digits.test.images[0]).save(tmp_path / "image.png")
    return folder


CASES = [(file, kind, command) for file in FILES for kind in DAMAGES for command in COMMANDS]


@pytest.mark.parametrize(
    ("file", "kind", "command"),
    [pytest.param(*case, marks=[pytest.mark.slow] * (number % 23 > 0)) for number, case in enumerate(CASES)],
)
def test_a_damaged_file_is_reported_or_not_needed(outputs, file, kind, command):
    damage(outputs / "run" / file, kind)
    code, _, err = call(outputs, *command.format(image=outputs.parent / "image.png").split())
    needed, read = COMMANDS[command]
    if file in needed or (file in read and kind != "missing" and (file, kind) != ("history.jsonl", "empty")):
        assert code == 1
        assert err.startswith("error: ")
        assert err.count("\n") == 1
        assert Path(file).name in err or (file, kind) == ("metrics.json", "missing")
    elif kind == "a folder" and code:  # in the place of a file to write
        is_named = err.startswith("error: cannot write ") and err.endswith(f"/run/{file}: Is a directory\n")
        assert is_named or err == "error: reached\n"
    else:
        assert (code, err) in ((0, ""), (1, "error: reached\n"))


@pytest.mark.parametrize("kind", ["random", *slowly(kind for kind in DAMAGES if kind != "random")])
def test_a_damaged_run_hides_none_of_the_others(outputs, kind):
    for file in sorted(USABLE | {"history.jsonl"}):
        shutil.rmtree(outputs / "run")
        shutil.copytree(outputs / "good", outputs / "run")
        damage(outputs / "run" / file, kind)
        code, out, err = call(outputs, "compare")
        assert (code, "2 runs" in out, err) == (0, True, "")
        assert call(outputs, "demo")[::2] == (1, "error: reached\n")


@pytest.mark.parametrize("command", COMMANDS)
def test_a_run_from_elsewhere_chooses_no_code_that_runs_here(outputs, tmp_path, monkeypatch, command):
    import torch

    run, imported, changes = Run(outputs / "run"), tmp_path / "imported", {"model": "evil_network:build"}
    (tmp_path / "evil_network.py").write_text(f"open({str(imported)!r}, 'w')")
    monkeypatch.syspath_prepend(tmp_path)
    run.write("config.json", run.config.model_dump() | changes | {"recipe": "plain"})
    for path in run.checkpoints.iterdir():
        torch.save(torch.load(path, weights_only=True) | changes, path)
    run.update(status="killed")
    code, _, err = call(outputs, *command.format(image=tmp_path / "image.png").split())
    assert not imported.exists()
    if not command.startswith(("visualize", "compare")):  # which need no network
        assert (code, err.count("\n"), "add --model evil_network:build" in err) == (1, 1, True)


PARTIAL = (f"{file}.partial" for file in (*FILES[::3], "model.pt2"))
LINKS = (*FILES, *PARTIAL, "figures", "checkpoints", "model", "model.pt2")


@pytest.mark.parametrize("command", [name for name in COMMANDS if not name.startswith(("compare", "predict", "demo"))])
def test_nothing_is_written_through_a_link_in_a_run(outputs, tmp_path, monkeypatch, command):
    from cifar import export

    monkeypatch.setattr(export, "_program", lambda predictor: None)
    monkeypatch.setitem(sys.modules, "onnx", None)  # so that nothing is converted
    monkeypatch.setattr("torch.export.save", lambda program, file, **_: file.write(b"exported"))
    run, outside = Run(outputs / "run"), tmp_path / "outside"
    run.update(status="killed")
    for file in LINKS:
        path = run.path / file
        if path.exists():
            path.rename(outside)
        else:
            outside.write_text("")
        path.symlink_to(outside)
        before = content_of(outside)
        code, _, err = call(outputs, *command.split())
        assert content_of(outside) == before, file
        if not command.startswith("export"):
            assert (code, err.startswith("error: remove the symbolic link ")) == (1, True), (file, err)
        path.unlink(missing_ok=True)
        outside.rename(path)


def content_of(path: Path) -> list | bytes:
    return sorted((file, file.read_bytes()) for file in path.iterdir()) if path.is_dir() else path.read_bytes()


SEEDS = (*commands.QUICK, "--seeds", "2")


@pytest.fixture(scope="module")
def killed_group(tmp_path_factory) -> Path:
    """A folder with a group whose process was killed after its two runs had ended; do not change it."""
    folder = tmp_path_factory.mktemp("seeds")
    assert call(folder, "main", *SEEDS)[0] == 0
    (group,) = runs.groups(folder)
    content = json.loads((group / "summary.json").read_text())
    files.write_json(group / "summary.json", {**content, "status": "running"})
    return folder


@pytest.mark.slow
@pytest.mark.parametrize("kind", DAMAGES)
@pytest.mark.parametrize("file", ["summary.json", *FILES[:12]])
def test_several_seeds_reach_the_same_whatever_file_was_damaged(killed_group, quick, tmp_path, file, kind):
    folder = tmp_path / "outputs"
    shutil.copytree(killed_group, folder, symlinks=True)
    (group,) = runs.groups(folder)
    expected = runs.read_json(group / "summary.json").figures
    path = group / file if file == "summary.json" else runs.directories(group)[-1] / file
    if path.exists():
        damage(path, kind)
    code, _, err = call(folder, "main", *SEEDS)
    if code and kind == "a folder":  # in the place of a file to write
        assert err.endswith(f"{file}: Is a directory\n")
        return
    assert (code, err) == (0, "")
    newest = runs.groups(folder)[0]
    assert (newest == group) == (file != "summary.json")
    spreads = runs.read_json(newest / "summary.json").figures
    assert (spreads["accuracy"], spreads["loss"]) == (expected["accuracy"], expected["loss"])
    code, out, err = call(folder, "compare")
    assert (code, group.name[:19] in out, err) == (0, True, "")
