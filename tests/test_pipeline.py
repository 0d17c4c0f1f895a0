"""The whole way, as a user goes it: main.py and the invoke tasks in processes of their own."""

import csv
import json
import os
import re
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import test_picture
from PIL import Image

from cifar.config import FIELDS, PROJECT, flag

INVOKE = "import sys; from invoke.main import program; sys.exit(program.run())"
QUICK = ("--recipe", "convnet", "--dataset", "digits", "--epochs", "1")
FIGURES = {
    "training_history",
    "confusion_matrix",
    "per_class_metrics",
    "misclassified",
    "dataset_samples",
    "sample_predictions",
    "architecture",
    "calibration",
}


def start(*arguments: str, cwd: Path = PROJECT, **options) -> subprocess.Popen:
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True, "encoding": "utf-8"}
    return subprocess.Popen([sys.executable, *arguments], cwd=cwd, **pipes, **options)


def run(*arguments: str, cwd: Path = PROJECT) -> tuple[int, str, str]:
    process = start(*arguments, cwd=cwd)
    out, err = process.communicate(timeout=120)
    return process.returncode, out, err


def main(*arguments: str) -> tuple[int, str, str]:
    return run(str(PROJECT / "main.py"), *arguments)


def invoke(*arguments: str, cwd: Path = PROJECT) -> tuple[int, str, str]:
    return run("-c", INVOKE, *arguments, cwd=cwd)


def test_one_command_fills_the_run_directory(tmp_path):
    code, out, err = main(*QUICK, "--output-dir", str(tmp_path))
    assert (code, err) == (0, "")
    made = next(tmp_path.glob("*_convnet_digits"))
    assert (tmp_path / "latest").resolve() == made
    assert {path.name for path in made.iterdir()} == {
        *("config.json", "run.json", "history.jsonl", "metrics.json", "classification_report.txt", "predictions.csv"),
        *("checkpoints", "figures"),
    }
    assert {path.stem for path in (made / "figures").iterdir()} == FIGURES
    assert {path.name for path in (made / "checkpoints").iterdir()} == {"last.pt", "best.pt"}
    assert out.count("epoch 1/1") == 1
    assert "accuracy with test-time augmentation" in out
    assert "\x1b" not in out


def test_a_chain_of_tasks_works_from_a_subfolder_each_on_the_run_before_it(tmp_path):
    train = ("train", *QUICK, "--output-dir", str(tmp_path))
    code, out, err = invoke(*train, "evaluate", "visualize", cwd=PROJECT / "cifar")
    assert (code, err) == (0, "")
    made = next(tmp_path.glob("*_convnet_digits"))
    assert (made / "metrics.json").exists()
    assert {path.stem for path in (made / "figures").iterdir()} == FIGURES
    assert str(made.name) in out


def test_a_folder_of_pictures_with_odd_names_goes_the_whole_way(digits, tmp_path):
    place = tmp_path / "my [red] <b>pictures"
    for label, name in enumerate(("accuracy", "a, 'b' & $\\x$ [bold]")):
        (place / name).mkdir(parents=True)
        for number, image in enumerate(digits.train.images[digits.train.labels == label][:60]):
            Image.fromarray(image.permute(1, 2, 0).numpy()).save(place / name / f"{number}.png")
    flags = ("--dataset", str(place), "--image-size", "40", "--recipe", "convnet", "--epochs", "2")
    outputs = ("--output-dir", str(tmp_path / "outputs"))
    code, out, err = main(*flags, *outputs, "--data-dir", str(tmp_path))
    assert (code, err) == (0, "")
    assert "convnet on my [red] <b>pictures: test split, 24 images" in out
    assert {path.stem for path in next((tmp_path / "outputs").glob("*/figures")).iterdir()} == FIGURES
    code, out, err = invoke("predict", str(place / "accuracy" / "0.png"), *outputs)
    assert (code, err) == (0, "")
    assert "accuracy" in out


@pytest.mark.parametrize(
    ("arguments", "code", "sentence"),
    [
        (("--recipe", "quick"), 1, "unknown recipe 'quick'"),
        (("--dataset", "mnist"), 1, "unknown dataset 'mnist'"),
        (("--device", "tpu"), 1, "unknown device 'tpu'"),
        (("--epochs", "0"), 1, "--epochs must be"),
        (("--epochs", "-3"), 1, "--epochs must be"),
        (("--set", "epochs=abc"), 2, "--epochs takes a whole number, not 'abc' (passes over"),
        (("--config", "none.toml"), 1, "cannot read none.toml"),
        (("--epochs", "abc"), 2, "--epochs takes a whole number, not 'abc'"),
        ((*QUICK, "--val-size", "60000"), 1, "--val-size 60000 does not fit"),
        ((*QUICK, "--output-dir", "main.py"), 1, "cannot write to the output folder main.py"),
        ((*QUICK, "--device", "mps"), 1, "this machine has no device 'mps'"),
        (("--dataset", "cifar10", "--data-dir", "main.py"), 1, "main.py is damaged or another file"),
    ],
)
@pytest.mark.parametrize("door", [main, lambda *arguments: invoke("train", *arguments)])
def test_a_mistake_is_one_sentence_and_the_right_exit_code(door, arguments, code, sentence):
    returned, out, err = door(*arguments)
    assert returned == code
    assert sentence in err
    assert (err.count("\n"), out) == (1, "")


@pytest.mark.parametrize("task", ["evaluate", "visualize"])
def test_a_run_that_is_none_is_one_sentence(task, tmp_path):
    for arguments in (("--run", str(tmp_path)), ("--run", "nowhere"), ("--output-dir", str(tmp_path))):
        code, out, err = invoke(task, *arguments)
        assert (code, out) == (1, "")
        assert err.startswith("error: ")
        assert err.count("\n") == 1


def test_an_unknown_flag_is_a_usage_error():
    code, _, err = main("--epoch", "3")
    assert code == 2
    assert "unrecognized arguments: --epoch 3" in err


def test_without_cifar10_and_network_a_banner_at_the_start_and_the_end_says_so(tmp_path):
    address = "from torchvision.datasets import CIFAR10; CIFAR10.url = 'http://127.0.0.1:9/x'; "
    flags = ["--recipe", "convnet", "--epochs", "1", "--data-dir", str(tmp_path), "--output-dir", str(tmp_path)]
    code, out, _ = run("-c", f"{address}import sys, main; sys.exit(main.main({flags!r}))")
    assert code == 0
    first, last = out.index("This is not CIFAR-10"), out.rindex("This is not CIFAR-10")
    assert first < out.index("epoch 1/1") < last


@pytest.mark.parametrize("command", ["import main; main.parse([])", "import tasks"])
def test_help_and_list_load_no_torch(command):
    code, out, _ = run("-c", f"{command}; import sys; print('torch' in sys.modules, 'matplotlib' in sys.modules)")
    assert (code, out.strip()) == (0, "False False")


def test_every_setting_is_a_flag_with_its_help_behind_both_doors():
    _, help_of_main, _ = main("--help")
    _, help_of_train, _ = invoke("--help", "train")
    for name in FIELDS:
        assert flag(name) in help_of_main
        assert flag(name) in help_of_train
    assert "default 25" not in help_of_main
    assert "simple 25" in " ".join(help_of_main.split())


def test_ctrl_c_marks_the_run_interrupted(tmp_path):
    flags = ("--recipe", "convnet", "--dataset", "digits", "--epochs", "5000", "--patience", "0")
    process = start(str(PROJECT / "main.py"), *flags, "--output-dir", str(tmp_path))
    deadline = time.monotonic() + 60
    while not list(tmp_path.glob("*/history.jsonl")) and time.monotonic() < deadline:
        time.sleep(0.1)
    os.kill(process.pid, signal.SIGINT)
    _, err = process.communicate(timeout=60)
    assert process.returncode == 130
    assert err.count("\n") == 1
    record = next(tmp_path.glob("*_convnet_digits/run.json")).read_text(encoding="utf-8")
    assert '"status": "interrupted"' in record


@pytest.fixture(scope="module")
def pictures(tmp_path_factory, digits) -> Path:
    folder = tmp_path_factory.mktemp("pictures")
    for index in range(3):
        Image.fromarray(digits.test.images[index].permute(1, 2, 0).numpy()).save(folder / f"{index}.png")
    return folder


@pytest.mark.parametrize("flags_first", [True, False])
def test_predict_takes_files_and_keeps_all_probabilities(evaluated_run, pictures, tmp_path, flags_first):
    files = [str(pictures / f"{index}.png") for index in range(3)]
    flags = ["--run", str(evaluated_run.path), "--output", str(tmp_path / "answers.csv")]
    code, out, err = invoke("predict", *(flags + files if flags_first else files + flags))
    assert (code, err) == (0, "")
    for file in files:
        assert Path(file).name in out
    rows = (tmp_path / "answers.csv").read_text(encoding="utf-8").splitlines()
    kept = (evaluated_run.path / "predictions.csv").read_text(encoding="utf-8").splitlines()
    assert [row.split(",")[1] for row in rows[1:]] == [row.split(",")[2] for row in kept[1:4]]


def test_predict_reads_standard_input(evaluated_run, pictures):
    arguments = ("-c", INVOKE, "predict", "-", "--run", str(evaluated_run.path))
    done = subprocess.run(
        [sys.executable, *arguments], cwd=PROJECT, input=(pictures / "0.png").read_bytes(), capture_output=True
    )
    assert done.returncode == 0
    assert b"standard input" in done.stdout


def test_predict_tries_every_picture_and_then_exits_with_1(evaluated_run, pictures, tmp_path):
    (tmp_path / "notes.txt").write_text("no picture")
    files = (str(tmp_path / "notes.txt"), str(pictures))
    code, out, err = invoke("predict", *files, "--run", str(evaluated_run.path))
    assert (code, err) == (1, "error: 1 of 4 pictures were refused\n")
    assert f"refused {tmp_path / 'notes.txt'}: the file is not a picture" in out
    assert "2.png" in out


def test_export_writes_a_file_and_says_how_to_use_it(evaluated_run, tmp_path):
    code, out, err = invoke("export", "--run", str(evaluated_run.path), "--output", str(tmp_path / "net.pt2"))
    assert (code, err) == (0, "")
    assert (tmp_path / "net.pt2").exists()
    assert "uint8 RGB pictures" in out
    assert ("pip install onnx onnxscript" in out) != (tmp_path / "net.onnx").exists()
    code, out, err = invoke("export", "--run", str(evaluated_run.path), "--output", "net.txt")
    assert (code, err) == (1, "error: --output takes a file that ends in .pt2, not 'net.txt'\n")


@pytest.mark.parametrize(
    ("arguments", "sentence"),
    [
        (("x.png", "--output", "x.txt"), "--output takes a file that ends in"),
        (("x.png", "--fit", "stretch"), "unknown fit"),
    ],
)
def test_predict_tells_a_mistake_in_one_sentence(evaluated_run, arguments, sentence):
    code, _, err = invoke("predict", *arguments, "--run", str(evaluated_run.path))
    assert code == 1
    assert sentence in err
    assert err.count("\n") == 1


def test_predict_answers_or_refuses_every_odd_and_hostile_file(evaluated_run, digits, tmp_path, monkeypatch):
    saved = (evaluated_run.path / "predictions.csv").read_text(encoding="utf-8").splitlines()
    clearest = int(max(csv.DictReader(saved), key=lambda row: float(row["confidence"]))["index"])
    pixels = digits.test.images[clearest].permute(1, 2, 0).numpy()
    digit = Image.fromarray(pixels).resize((64, 64), Image.Resampling.NEAREST)
    monkeypatch.setattr(test_picture, "picture", lambda side=64: digit.resize((side, side)))
    for kind, (make, _) in (test_picture.GOOD | test_picture.REFUSED).items():
        (tmp_path / kind).write_bytes(make())
    output = tmp_path.parent / "answers.json"
    code, _, err = invoke("predict", str(tmp_path), "--run", str(evaluated_run.path), "--output", str(output))
    answers = {Path(row["picture"]).name: row for row in json.loads(output.read_text(encoding="utf-8"))}
    total = len(test_picture.GOOD) + len(test_picture.REFUSED)
    assert (code, err) == (1, f"error: {len(test_picture.REFUSED)} of {total} pictures were refused\n")
    hides = ("PNG 1 bit", "PNG RGBA", "PNG LA")  # greys, or the lower half, as do those called transparent
    whole = [kind for kind in test_picture.GOOD if kind not in hides and "transparent" not in kind]
    assert {kind: answers[kind]["predicted"] for kind in whole} == dict.fromkeys(whole, answers["PNG RGB"]["predicted"])
    for kind, (_, sentence) in test_picture.REFUSED.items():
        assert re.search(sentence, answers[kind]["refusal"])
