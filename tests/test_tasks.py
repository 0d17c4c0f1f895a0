"""The invoke tasks and main.py as a user types them: flags, words, chains, mistakes."""

import json
import os
import random
import re
import resource
import shutil
import socket
import sys
from collections import deque
from pathlib import Path

import pytest

from cifar import analysis, bench, commands, demo, evaluate, export, trainer, visualize
from cifar.config import FIELDS, flag
from cifar.flags import take_flag
from commands import INVOKE, MAIN, QUICK, invoke, main, reached, run
from image_files import picture

TASKS = (
    *("train", "evaluate", "visualize", "predict", "demo", "export", "compare"),
    *("data", "doctor", "bench", "test", "lint"),
)


@pytest.fixture(scope="module")
def images(tmp_path_factory, digits) -> Path:
    """A folder with the first three test images."""
    folder = tmp_path_factory.mktemp("images")
    for index, image in enumerate(digits.test.images[:3]):
        picture(image).save(folder / f"{index}.png")
    return folder


# Help.


@pytest.mark.parametrize(
    ("command", "expected"),
    [
        ((*INVOKE, "--list"), 0),
        ((MAIN, "--help"), 0),
        ((MAIN, "--epochs", "0"), 1),
        ((*INVOKE, "data", "--dataset"), 2),
    ],
)
def test_help_and_a_mistake_take_less_than_half_a_second(command, expected):
    def cpu_seconds() -> float:
        """Return the seconds on a core; other processes make them more, too, as they share its caches."""
        before = resource.getrusage(resource.RUSAGE_CHILDREN)
        assert run(*command)[0] == expected
        after = resource.getrusage(resource.RUSAGE_CHILDREN)
        return after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime

    assert any(cpu_seconds() < 0.5 for _ in range(3))


@pytest.mark.parametrize("arguments", [(), ("--list",)])
def test_invoke_lists_the_tasks(arguments):
    code, out, err = invoke(*arguments)
    assert (code, err) == (0, "")
    assert set(re.findall(r"^  (\w+)", out, re.M)) == {*TASKS, "list"}


def test_every_setting_but_seeds_is_a_flag_of_main_and_of_train():
    train = run(*INVOKE, "train", "--help")  # not here: as invoke reads a task, it removes its help texts
    texts = [" ".join(call[1].split()) for call in (main("--help"), train)]
    for name in FIELDS:
        assert f"{flag(name)} " in texts[0]
        assert (f"{flag(name)} " in texts[1]) == (name != "seeds")
    for text in texts:
        assert "passes over the training images; default 11 (best: 40," in text


@pytest.mark.parametrize("task", TASKS)
def test_every_task_has_help_wherever_it_is_asked_for(task):
    for words in ((task, "--help"), ("--help", task), (task, "-h"), ("data", "x", task, "--no-flag", "a.png", "-h")):
        code, out, err = invoke(*words)
        assert (code, err) == (0, "")
        assert re.match(rf"usage: invoke {task} \[FLAGS\].*\n\n\w+ .*\.\n", out, re.DOTALL)


def test_main_has_help_wherever_it_is_asked_for():
    pages = [main(*words) for words in (("--help",), ("-h",), ("--no-flag", "--help"), ("--epochs", "-h"))]
    assert pages == [(0, pages[0][1], "")] * 4


# Mistakes.


MISTAKES = [  # in the flags of main.py and of `invoke train`
    (("--dataset", "mnist"), 1, "unknown dataset 'mnist'"),
    (("--weights", "nowhere.pth", "--dataset", "mnist"), 1, "cannot read nowhere.pth: there is no such file"),
    (("--model", "airbench"), 1, "unknown model 'airbench'"),
    (("--config", "none.toml"), 1, "cannot read none.toml"),
    (("--dataset", " "), 2, "--dataset must not be empty"),
    (("--dataset=",), 2, "--dataset must not be empty"),
    (("--epoch", "3"), 2, "has no flag --epoch: did you mean --epochs?"),
    (("-lr", "3"), 2, "has no flag -lr: did you mean --lr?"),
    (("--xyz",), 2, " --help` lists its flags"),
    (("--epochs",), 2, "--epochs needs a value"),
    (("--epochs", "--lr", "1"), 2, "--epochs needs a value"),
    (("--epochs", "1", "--minutes", "1"), 2, "--minutes chooses the number of epochs: leave out --epochs or"),
    (("--DATA-DIR=--device",), 2, "--data-dir needs a value, not '--device'"),
    (("--pretrained", "--model", "convnet"), 1, "there are no pretrained weights for convnet: name a network of "),
    (("--pretrained=maybe",), 2, "--pretrained takes yes or no, not 'maybe'"),
    (("--epochs", "1", "--epochs=x"), 2, "--epochs takes a whole number, not 'x'"),
    (("--batch_size", "x"), 2, "--batch-size takes a whole number, not 'x'"),
    (("fast",), 2, "'fast'"),
    ((*QUICK, "--val-size", "60000"), 1, "--val-size 60000 does not fit"),
    ((*QUICK, "--output-dir", "main.py"), 1, "cannot write to the output folder main.py"),
    ((*QUICK, "--precision", "float16"), 1, "--precision float16 needs an NVIDIA GPU"),
    ((*QUICK, "--device", "mps"), 1, "PyTorch finds no device 'mps' here"),
    (("--dataset", "cifar10", "--data-dir", "main.py"), 1, "main.py"),
    (("--resume", "nowhere"), 1, "there is no run named 'nowhere'"),
    (("--resume", "x", "--epochs", "3", "--lr", "1"), 2, "leave out --epochs, --lr"),
]


@pytest.mark.parametrize(
    ("arguments", "code", "sentence"),
    [
        *(((name, *flags), *expected) for name in ("main", "train") for flags, *expected in MISTAKES),
        (("evaluate", "--device", "tpu"), 1, "unknown device 'tpu'"),
        (("evaluate", "--run", "{run}", "--model", "my.net:build"), 1, " is mlp, not my.net:build: leave out --model"),
        (("evaluate", "--corruptions=yes"), 2, "--corruptions takes no value, so not 'yes'"),
        (("--help", "trian"), 2, "there is no task 'trian': did you mean train?"),
        (("-x",), 2, "there is no task '-x': `invoke list` lists them"),
        (("compare", "-e"), 2, "invoke compare has no flag -e: `invoke compare --help` lists its flags"),
        (("train", "evaluate", "--epochs", "2"), 2, "no flag --epochs: write it right behind `invoke train`"),
        (("predict", ""), 2, "a word after `invoke predict` must not be empty"),
        (("visualize", "--run", "{empty}"), 1, "{empty} is not a run directory: it has no run.json and no config.json"),
        (("predict",), 2, "name image files, folders or glob patterns, or - for standard input"),
        (("predict", "x.png", "--output", "x.txt"), 1, "--output takes a file that ends in .csv or .json, not 'x.txt'"),
        (("predict", "x.png", "--fit", "stretch", "--run", "{run}"), 1, "unknown fit 'stretch'"),
        (("export", "--device", "cpu"), 2, "--data-dir and --device are for --weights: leave them out"),
        (("data", "--dataset", "digits", "--image-size", "64"), 1, "--image-size is for folders of images; those of"),
        (("train", "--resume", "x", "--config", "x.toml"), 2, "the settings of the run: leave out --config"),
        (("export", "--output", "net.txt"), 1, "--output takes a file that ends in .pt2, not 'net.txt'"),
        (("compare", "one", "two", "--sort", "accuracy"), 2, "--sort applies only to the list of all runs"),
        (("compare", "--pairs"), 2, "--pairs and --output apply only to a comparison: name runs, or omit them"),
        (("doctor", "--run", "{run}", "--dataset", "digits"), 2, "--dataset would not be used: omit --run, or leave"),
        (("doctor", "--run", "{run}", "--port", "7860"), 2, "--port would not be used: omit --run, or leave"),
        (("demo", "--auth", ""), 2, "--auth must not be empty"),
        (("demo", "--host", "\udcff"), 1, "cannot listen on \\udcff: it is not a valid name"),
        (("demo", "--port", "70000"), 2, "--port takes a number from 1 to 65535, not '70000'"),
        (("train", "--config", "{empty}/seeds.toml"), 2, "seeds.toml has 3 seeds, but invoke train makes one run"),
        (("train", *QUICK[2:], "--model", "my:net", "--pretrained", "evaluate"), 1, "no pretrained weights for my:net"),
    ],
)
def test_a_mistake_is_one_sentence_and_the_right_exit_code(evaluated_run, tmp_path, arguments, code, sentence):
    (tmp_path / "seeds.toml").write_text("seeds = 3")
    places = {"run": evaluated_run.path, "empty": tmp_path}
    name, *words = (argument.format(**places) for argument in arguments)
    returned, out, err = main(*words) if name == "main" else invoke(name, *words)
    assert (returned, out) == (code, "")
    assert re.fullmatch(r"error: [^\n]+\n", err)
    assert sentence.format(**places) in err


def test_a_variable_of_another_launcher_changes_nothing():
    code, out, err = run(MAIN, "--epochs", "x", env={**os.environ, "RANK": "abc"})
    assert (code, out, err) == (2, "", "error: --epochs takes a whole number, not 'x'\n")


def test_doctor_exits_with_1_if_a_check_fails(evaluated_run):
    code, out, err = invoke("doctor", "--dataset", "digits", "--output-dir", "main.py")
    assert code == 1
    assert "failure" in out
    assert re.fullmatch(r"error: failed checks: [^\n]+\n", err)
    assert invoke("doctor", "--run", str(evaluated_run.path))[::2] == (0, "")


# Words, chains and results.


def test_predict_takes_words_between_flags_and_after_two_dashes_and_the_home_directory(
    evaluated_run, images, tmp_path, monkeypatch
):
    monkeypatch.setenv("HOME", str(images))
    shutil.copy(images / "0.png", tmp_path / "-0.png")
    flags = ("--run", str(evaluated_run.path), "~/[12].png", "--output=~/all.CSV")
    words = (str(images / "0.png"), *flags, "--", "-0.png", "--help")
    code, _, err = invoke("predict", *words, cwd=tmp_path)
    assert (code, err) == (1, "error: 1 of 5 images could not be read\n")
    rows = [row.split(",")[0] for row in (images / "all.CSV").read_text(encoding="utf-8").splitlines()]
    assert rows == ["image", *(str(images / f"{index}.png") for index in range(3)), "'-0.png", "'--help"]
    (images / "all.CSV").unlink()


def test_a_switch_takes_the_next_word_only_if_that_is_yes_or_no():
    for word, value in (("evaluate", True), ("No", "No"), ("1", "1")):
        assert take_flag(deque(["--pretrained", word]), {"--pretrained": None}, "invoke train")[1] == value
    assert take_flag(deque(["--resume", "evaluate"]), {"--resume": None}, "main.py") == ("--resume", "evaluate")


def test_the_tasks_of_a_chain_use_the_run_of_the_first_and_corruptions_enter_its_report(
    evaluated_run, images, tmp_path, monkeypatch
):
    monkeypatch.setattr(analysis, "CORRUPTIONS", {"noise": (0.1,)})
    for name in ("first", "second"):
        shutil.copytree(evaluated_run.path, tmp_path / name)
    (tmp_path / "latest").symlink_to("second")
    (tmp_path / "second" / "checkpoints" / "best.pt").unlink()
    (tmp_path / "first" / "report.html").touch()
    evaluation = ("evaluate", "--run", "first", "--corruptions", "--output-dir", str(tmp_path))
    with (images / "0.png").open() as stdin:
        monkeypatch.setattr(sys, "stdin", stdin)
        code, out, err = invoke(*evaluation, "predict", "-")
    assert (code, err, "standard input" in out) == (0, "", True)
    assert "accuracy and calibration error by corruption" in (tmp_path / "first" / "report.html").read_text().lower()
    assert "best.pt" in invoke("evaluate", "--output-dir", str(tmp_path))[2]  # without --run: the latest


def test_corruptions_are_not_measured_for_a_run_whose_report_cannot_be_written(evaluated_run, tmp_path):
    shutil.copytree(evaluated_run.path, tmp_path / "run")
    (tmp_path / "run" / "history.jsonl").write_text("{}")
    before = {path: path.read_bytes() for path in (tmp_path / "run").rglob("*") if path.is_file()}
    code, _, err = invoke("evaluate", "--corruptions", "--run", str(tmp_path / "run"))
    assert (code, "history.jsonl is damaged" in err) == (1, True)
    assert before == {path: path.read_bytes() for path in (tmp_path / "run").rglob("*") if path.is_file()}


# Hostile command lines: an answer or one sentence, and never a traceback.

WORDS = """
    -1 0 1 2 -0 1.5 1e999 1e-400 nan -inf 0x10 1_000 ١٢ ½ 4294967296 18446744073709551616 0.0.0.0:1 ::1 None true [1] {}
    {0} %s%n [bold]x[/] * [ ** $(id) -- --x = lr=nan epochs=1e9 x=1 ../.. ~ /dev/null /dev/full /proc/self/mem
    /proc/version file folder folder/x.json no/where.csv run latest nowhere fast plain digits cpu os:getcwd os.path:join
    run/config.json deep.json deep.toml odd.json
"""
VALUES = [
    *("", " ", "\n", "\t", "\x1b[31m", "\udcff", "💥", "'; ls", "é" * 300, "a" * 5000, "a/" * 3000),
    *("9" * 400, "9" * 5000, *WORDS.split()),
]


@pytest.fixture
def hasty(tmp_path, monkeypatch, evaluated_run) -> Path:
    """A working directory with odd files and a run, where slow functions only say that they were reached."""
    slow = ((trainer, "fit"), (evaluate, "evaluate"), (visualize, "visualize"), (export, "export"), (demo, "build"))
    for module, name in (*slow, (bench, "profile"), (bench, "plan_epochs")):
        monkeypatch.setattr(module, name, reached)
    monkeypatch.setenv("HOME", str(tmp_path / "folder"))  # `predict ~` looks for images in all of it
    shutil.copytree(evaluated_run.path, tmp_path / "outputs" / "run")
    (tmp_path / "folder").mkdir()
    for name, text in (("file", "text"), ("deep.json", "[" * 10**5), ("deep.toml", "a=" + "[" * 10**5)):
        (tmp_path / name).write_text(text)
    odd = {"data_dir": "\0", "output_dir": "\ud800", "recipe": ["fast"], "batch_size": 10**400, "lr": {}}
    (tmp_path / "odd.json").write_text(json.dumps(odd))
    return tmp_path


def typed(chance: random.Random, port: int) -> list[str]:
    """Draw a command line with one or two hostile values, and sometimes a hostile word anywhere."""
    name = chance.choice(["main", *TASKS[:-2]])
    kinds = dict.fromkeys((*FIELDS, "config", "resume"), str)
    if name != "main":
        kinds = {argument.name: argument.kind for argument in getattr(commands, name).get_arguments()}
    flags = [field for field, kind in kinds.items() if kind is str]
    quick = dict(zip(("recipe", "dataset", "epochs", "device"), QUICK[1::2], strict=True)) | {"output_dir": "outputs"}
    given = {field: value for field, value in {**quick, "port": str(port)}.items() if field in flags}
    given |= {chance.choice(flags): chance.choice(VALUES) for _ in range(chance.choice((1, 2)))}
    words = [word for field, value in given.items() for word in (flag(field), value)]
    if chance.random() < 0.3:
        words.insert(chance.randrange(len(words) + 1), chance.choice([*VALUES, *map(flag, kinds), "--help"]))
    return [name, *words, *(chance.choices(VALUES, k=2) if name in ("predict", "compare") else [])]


@pytest.mark.parametrize("lines", [100, pytest.param(3000, marks=pytest.mark.slow)])
def test_no_command_line_ends_in_a_traceback(hasty, lines):
    with socket.create_server(("127.0.0.1", 0)) as listener:
        port = listener.getsockname()[1]
    chance = random.Random(lines)
    for _ in range(lines):
        name, *words = typed(chance, port)
        code, out, err = main(*words, cwd=hasty) if name == "main" else invoke(name, *words, cwd=hasty)
        assert code in (0, 1, 2), (name, words)
        assert "Traceback" not in out + err, (name, words)
        assert bool(code) == bool(err), (name, words, err)
        assert err.count("\n") <= 1, (name, words, err)
