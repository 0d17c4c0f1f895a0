"""The whole way, as a user goes it: main.py and the invoke tasks.

In a process of its own goes what is about the process: its start, its signals, its network. All else is called here,
which spares each command two seconds of imports.
"""

import csv
import json
import os
import re
import shlex
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from PIL import Image
from torchvision.datasets import CIFAR10

import picture_files
from cifar.config import FIELDS, PROJECT, flag
from commands import INVOKE, MAIN, invoke, main, run, start

QUICK = ("--recipe", "convnet", "--dataset", "digits", "--epochs", "1")
FIGURES = {
    "training_history",
    "confusion_matrix",
    "per_class_metrics",
    "precision_recall",
    "misclassified",
    "dataset_samples",
    "sample_predictions",
    "architecture",
    "calibration",
    "risk_coverage",
}


@pytest.fixture(scope="module")
def offline(tmp_path_factory) -> tuple[Path, str]:
    """What the command does and prints where there is neither CIFAR-10 nor a network: its output folder, its output."""
    folder = tmp_path_factory.mktemp("offline")
    script = (
        "import dataclasses, runpy; from cifar.archive import ARCHIVES; "
        "ARCHIVES['cifar10'] = dataclasses.replace(ARCHIVES['cifar10'], urls=('http://127.0.0.1:9/x',)); "
        "runpy.run_path('main.py', run_name='__main__')"
    )
    flags = ("--recipe", "convnet", "--epochs", "1", "--data-dir", str(folder / "data"), "--output-dir", str(folder))
    code, out, err = run("-c", script, *flags)
    assert (code, err) == (0, "")
    return folder, out


def test_one_command_fills_the_run_directory(offline):
    folder, out = offline
    made = next(folder.glob("*_convnet_digits"))
    assert (folder / "latest").resolve() == made
    assert {path.name for path in made.iterdir()} == {
        *("config.json", "run.json", "history.jsonl", "metrics.json", "classification_report.txt", "predictions.csv"),
        *("analysis.json", "saliency.npz", "report.html", "checkpoints", "figures"),
    }
    assert {path.stem for path in (made / "figures").iterdir()} == FIGURES
    assert {path.name for path in (made / "checkpoints").iterdir()} == {"last.pt", "best.pt"}
    assert out.count("epoch 1/1") == 1
    assert "accuracy with test-time augmentation" in out
    assert str(Path(made.name, "report.html")) in out
    assert "\x1b" not in out


def test_without_cifar10_and_network_a_banner_at_the_start_and_the_end_says_so(offline):
    _, out = offline
    first, last = out.index("This is not CIFAR-10"), out.rindex("This is not CIFAR-10")
    assert first < out.index("epoch 1/1") < last


def test_a_chain_of_tasks_works_from_a_subfolder_each_on_the_run_before_it(tmp_path):
    train = ("train", *QUICK, "--output-dir", str(tmp_path))
    code, out, err = invoke(*train, "evaluate", "--corruptions", "visualize", cwd=PROJECT / "cifar")
    assert (code, err) == (0, "")
    made = next(tmp_path.glob("*_convnet_digits"))
    assert (made / "metrics.json").exists()
    assert {path.stem for path in (made / "figures").iterdir()} == FIGURES | {"corruptions"}
    assert "accuracy by corruption and severity" in out
    assert 'id="corruptions"' in (made / "report.html").read_text(encoding="utf-8")
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


def test_a_training_alone_takes_no_more_than_one_seed(tmp_path):
    code, out, err = invoke("train", *QUICK, "--set", "seeds=3", "--output-dir", str(tmp_path))
    sentence = "error: this trains one run: python main.py --seeds 3 goes all the way with each\n"
    assert (code, out, err) == (2, "", sentence)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("task", ["evaluate", "visualize"])
def test_a_run_that_is_none_is_one_sentence(task, tmp_path):
    for arguments in (("--run", str(tmp_path)), ("--run", "nowhere"), ("--output-dir", str(tmp_path))):
        code, out, err = invoke(task, *arguments)
        assert (code, out) == (1, "")
        assert err.startswith("error: ")
        assert err.count("\n") == 1


def test_compare_lists_all_runs_and_says_which_is_better(evaluated_run, tmp_path):
    for name in ("first", "second"):
        shutil.copytree(evaluated_run.path, tmp_path / name)
    code, out, err = invoke("compare", "--sort", "accuracy", "--output-dir", str(tmp_path))
    assert (code, err) == (0, "")
    assert out.index("2 runs") < out.index("second ") < out.index("first ")
    code, out, err = invoke("compare", "first", "second", "--output-dir", str(tmp_path))
    assert (code, err) == (0, "")
    assert "no significant difference between A and B: B - A is +0.00 points" in out
    folder = tmp_path / "compare" / "first_vs_second"
    assert out.endswith(f"page, figure and numbers: {os.path.relpath(folder, PROJECT)}\n")
    assert (folder / "comparison.html").exists()


@pytest.mark.parametrize(
    ("arguments", "code", "sentence"),
    [
        (("one", "two"), 1, "there is no run at one"),
        (("--sort", "speed"), 1, "unknown column 'speed': did you mean seed"),
        (("one", "two", "--sort", "accuracy"), 2, "--sort is for the list of all runs"),
    ],
)
def test_compare_tells_a_mistake_in_one_sentence(arguments, code, sentence, tmp_path):
    returned, out, err = invoke("compare", *arguments, "--output-dir", str(tmp_path))
    assert (returned, out) == (code, "")
    assert err.startswith(f"error: {sentence}")
    assert err.count("\n") == 1


def test_an_unknown_flag_is_a_usage_error():
    code, _, err = main("--epoch", "3")
    assert code == 2
    assert "unrecognized arguments: --epoch 3" in err


@pytest.mark.parametrize(
    "command", ["import main; main.parse([])", "import main; main.main(['--epochs', '0'])", "import tasks"]
)
def test_help_list_and_a_mistake_load_no_torch(command):
    code, out, _ = run("-c", f"{command}; import sys; print('torch' in sys.modules, 'matplotlib' in sys.modules)")
    assert (code, out.strip()) == (0, "False False")


def test_every_setting_but_seeds_is_a_flag_with_its_help_behind_both_doors():
    _, help_of_main, _ = main("--help")
    _, help_of_train, _ = invoke("--help", "train")
    for name in FIELDS:
        assert flag(name) in help_of_main
        assert (flag(name) in help_of_train) == (name != "seeds")
    assert "default 40" not in help_of_main
    assert "simple 40" in " ".join(help_of_main.split())


def test_ctrl_c_tells_the_command_that_goes_on_and_it_does(tmp_path):
    flags = ("--recipe", "convnet", "--dataset", "digits", "--epochs", "5", "--patience", "0", "--val-size", "0")
    process = start(MAIN, *flags, "--output-dir", str(tmp_path))
    deadline = time.monotonic() + 60
    while not list(tmp_path.glob("*/history.jsonl")) and time.monotonic() < deadline:
        time.sleep(0.1)
    os.kill(process.pid, signal.SIGINT)
    _, err = process.communicate(timeout=60)
    assert process.returncode == 130
    made = next(tmp_path.glob("*_convnet_digits"))
    command = f"python main.py --resume {os.path.relpath(made, PROJECT)}"
    assert err == f"error: interrupted: `{command}` goes on with it\n"
    assert json.loads((made / "run.json").read_text(encoding="utf-8"))["status"] == "interrupted"
    code, out, err = main(*shlex.split(command)[2:])
    assert (code, err) == (0, "")
    assert "epoch 1/5" not in out
    assert out.count("epoch 5/5") == 1
    assert json.loads((made / "run.json").read_text(encoding="utf-8"))["status"] == "completed"
    assert {path.stem for path in (made / "figures").iterdir()} == FIGURES
    code, out, err = main("--resume", str(made))
    assert (code, out, err) == (0, f"{made.name} is complete: there is nothing to resume\n", "")


@pytest.mark.parametrize(
    ("arguments", "code", "sentence"),
    [
        (("--resume",), 1, "there is no run in {folder} that could be resumed"),
        (("--resume", "nowhere"), 1, "there is no run at nowhere"),
        (("--resume", "cifar"), 1, "cifar is not a run directory"),
        (("--resume", "x", "--epochs", "3", "--lr", "1"), 2, "leave out --epochs, --lr"),
    ],
)
def test_what_cannot_be_resumed_is_told_in_one_sentence(tmp_path, arguments, code, sentence):
    returned, out, err = main(*arguments, "--output-dir", str(tmp_path))
    assert (returned, out) == (code, "")
    assert sentence.format(folder=tmp_path) in err
    assert err.count("\n") == 1


def test_invoke_train_goes_on_with_a_run_and_takes_no_setting_beside_it(evaluated_run, tmp_path):
    shutil.copytree(evaluated_run.path, tmp_path / "run")
    code, out, err = invoke("train", "--resume", "run", "--output-dir", str(tmp_path))
    assert (code, out, err) == (0, "run is complete: there is nothing to resume\n", "")
    code, out, err = invoke("train", "--resume", "run", "--output-dir", str(tmp_path), "--recipe", "fast")
    assert (code, out) == (2, "")
    assert "leave out --recipe" in err


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
    monkeypatch.setattr(picture_files, "picture", lambda side=64: digit.resize((side, side)))
    for kind, (make, _) in (picture_files.GOOD | picture_files.REFUSED).items():
        (tmp_path / kind).write_bytes(make())
    output = tmp_path.parent / "answers.json"
    code, _, err = invoke("predict", str(tmp_path), "--run", str(evaluated_run.path), "--output", str(output))
    answers = {Path(row["picture"]).name: row for row in json.loads(output.read_text(encoding="utf-8"))}
    total = len(picture_files.GOOD) + len(picture_files.REFUSED)
    assert (code, err) == (1, f"error: {len(picture_files.REFUSED)} of {total} pictures were refused\n")
    hides = ("PNG 1 bit", "PNG RGBA", "PNG LA")  # greys, or the lower half, as do those called transparent
    whole = [kind for kind in picture_files.GOOD if kind not in hides and "transparent" not in kind]
    assert {kind: answers[kind]["predicted"] for kind in whole} == dict.fromkeys(whole, answers["PNG RGB"]["predicted"])
    for kind, (_, sentence) in picture_files.REFUSED.items():
        assert re.search(sentence, answers[kind]["refusal"])


OFFLINE = """
import json, socket, sys
from pathlib import Path
attempts = []
def watch(event, arguments):
    if event in ("socket.connect", "socket.sendto", "socket.getaddrinfo", "socket.gethostbyname"):
        address = arguments[1] if event in ("socket.connect", "socket.sendto") else arguments
        if isinstance(address, tuple) and address[0] not in ("127.0.0.1", "::1", "localhost", None):
            attempts.append(f"{event} {address}")
            raise ConnectionRefusedError(111, "Connection refused")
sys.addaudithook(watch)
from torchvision.datasets import CIFAR10
lists, data_dir, output_dir, picture = json.loads(sys.argv[1])
for name, value in lists.items():
    setattr(CIFAR10, name, value)
from cifar import demo
from cifar.archive import ARCHIVES
from invoke.main import program
import main
md5s = [(CIFAR10.meta["filename"], CIFAR10.meta["md5"]), *CIFAR10.train_list, *CIFAR10.test_list]
ARCHIVES["cifar10"].files.update(md5s)
places = ["--data-dir", data_dir, "--output-dir", output_dir]
if code := main.main(["--recipe", "convnet", "--epochs", "1", "--device", "cpu", *places]):
    sys.exit(code)
from cifar import bench, profiling, visualize
profiling.profile = lambda config, dataset: {"recipe": "none", "batch_size": 1, "precision": "", "hardware": "",
    "threads": 1, "matrix_flop_per_second": 1, "sides": {}}
bench.compare = lambda config, dataset: {"suite_images_per_second": 1, "loader_images_per_second": {0: 1}, "ratio": 1}
visualize._save = lambda figure, path: path  # main.py has drawn them
outputs, quick = places[2:], ["--recipe", "convnet", "--epochs", "1", "--device", "cpu"]
for command in (
    ["data", *places[:2]], ["doctor", *places], ["visualize", *places],
    ["predict", picture, *outputs], ["export", *outputs], ["compare", *outputs], ["bench", *places],
    ["train", *quick, *places], ["evaluate", *places],
):
    sys.argv = ["invoke", *command]
    program.run(exit=False)
sys.argv = ["invoke", "compare", *(path.parent.name for path in Path(output_dir).glob("2*/metrics.json")), *outputs]
program.run(exit=False)
with socket.create_server(("127.0.0.1", 0)) as listener:
    port = listener.getsockname()[1]
with demo.running(output_dir=output_dir, data_dir=data_dir, port=port):
    pass
print(json.dumps(attempts))
"""


def test_with_the_data_on_disk_no_command_tries_to_leave_this_machine(small_cifar10, pictures, tmp_path):
    lists = {name: getattr(CIFAR10, name) for name in ("train_list", "test_list", "meta")}
    given = [lists, str(small_cifar10.parent), str(tmp_path / "outputs"), str(pictures / "0.png")]
    code, out, err = run("-c", OFFLINE, json.dumps(given))
    assert (code, err) == (0, "")
    assert json.loads(out.splitlines()[-1]) == []
    for part in ("run directory: ", "SHA-256", "ok       dataset   in ", "accuracy with test-time", "0.png"):
        assert part in out
    for part in ("torch.export.load(", "1 runs", "all figures: ", "page, figure and numbers: "):
        assert part in out
