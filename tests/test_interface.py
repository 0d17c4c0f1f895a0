"""The Python interface, torch.hub, and the network that comes with the package."""

import importlib.util
import io
import json
import os
import threading

import numpy as np
import pytest
import torch
from PIL import Image

import cifar
from cifar import checkpoint, console, datasets, evaluate, export, runs, visualize
from cifar.config import PROJECT
from cifar.demo import Demo
from cifar.errors import UserError
from cifar.predict import Predictor
from commands import invoke, run
from handmade import make_run
from image_files import picture, saved

FAST = runs.SHIPPED / "fast"
QUICK = {"recipe": "mlp", "dataset": "digits", "epochs": 1, "device": "cpu"}


@pytest.fixture(scope="module")
def fast() -> Predictor:
    return cifar.load("fast", device="cpu")


TRUNCATED = saved(Image.effect_noise((64, 64), 50), "PNG")[:-999]


def photo(mode: str = "RGB", size: tuple[int, int] = (64, 48)) -> Image.Image:
    noise = np.random.default_rng(0).integers(0, 256, (size[1] // 8, size[0] // 8, 4), dtype=np.uint8)
    return Image.fromarray(noise).resize(size, Image.Resampling.BICUBIC).convert(mode)


@pytest.mark.parametrize(
    ("module", "slow"),
    [
        ("cifar", ("torch", "numpy", "rich", "pydantic")),
        ("cifar.pipeline", ("torchvision", "torch._dynamo", "sklearn", "pandas", "matplotlib")),
    ],
)
def test_import_loads_nothing_slow_and_prints_nothing(module, slow):
    assert run("-c", f"import sys, {module}; print(set({slow}) & sys.modules.keys())") == (0, "set()\n", "")


# The network that comes with the package.


def test_the_shipped_weights_are_small_float16_and_name_no_place_of_another_machine():
    files = [path for path in FAST.rglob("*") if path.is_file()]
    assert sum(path.stat().st_size for path in files) < 5_000_000
    weights = checkpoint.load(FAST / "checkpoints" / "best.pt")["weights"]
    assert {tensor.dtype for tensor in weights.values() if tensor.is_floating_point()} == {torch.float16}
    texts = [path.read_text(encoding="utf-8") for path in files if path.suffix in (".json", ".jsonl")]
    assert not [text for text in texts if '"/' in text]


def test_the_shipped_network_measures_what_its_metrics_say(fast, real_cifar10):
    images, labels = real_cifar10.test.images[:1000], real_cifar10.test.labels[:1000].numpy()
    predicted = fast.probabilities(images).argmax(1)
    assert abs((predicted == labels).mean() - fast.run.metrics.accuracy) < 0.03


def test_it_predicts_where_there_is_no_run_and_says_so(tmp_path, evaluated_run):
    photo().save(tmp_path / "photo.jpg")
    words = ("predict", str(tmp_path / "photo.jpg"), "--output-dir")
    code, out, err = invoke(*words, str(tmp_path / "outputs"))
    assert (code, err) == (0, "")
    assert out.startswith("predictions of fast (which comes with this program), trained on cifar10\n")
    assert invoke(*words, str(evaluated_run.path.parent))[1].startswith(f"predictions of {evaluated_run.path.name}, ")
    assert invoke(*words, str(evaluated_run.path.parent), "--run", "fast")[1].startswith("predictions of fast (")


def test_the_demo_offers_it_after_ones_own_runs(tmp_path, evaluated_run, capsys):
    demo = Demo(None, str(tmp_path), "nowhere", "cpu")
    assert demo.default == "fast"
    sentence = f"no evaluated run in {tmp_path}: using the network that comes with this program (fast)"
    assert sentence in capsys.readouterr().out
    ((title, name),) = demo.choices()
    assert (title[:20], title[-23:], name) == ("fast on cifar10, 93.", "comes with this program", "fast")
    both = Demo(None, str(evaluated_run.path.parent), "nowhere", "cpu")
    assert [name for _, name in both.choices()] == [evaluated_run.path.name, "fast"]
    assert both.default == evaluated_run.path.name


@pytest.mark.parametrize("task", ["evaluate", "visualize"])
def test_it_is_not_changed(task, tmp_path, monkeypatch, digits):
    monkeypatch.setattr(datasets, "of_run", lambda *_: digits)
    before = {path: path.stat().st_mtime_ns for path in FAST.rglob("*")}
    code, out, err = invoke(task, "--run", "fast", "--output-dir", str(tmp_path))
    assert (code, out) == (1, "")
    assert "error: fast comes with this program and is read-only: copy " in err
    assert {path: path.stat().st_mtime_ns for path in FAST.rglob("*")} == before


def test_weights_for_others_are_a_run_measured_again_in_float16(evaluated_run, digits, tmp_path, monkeypatch):
    with pytest.raises(UserError, match="is not an empty folder: name another one with --weights"):
        export.write_weights(evaluated_run, evaluated_run.path, None, "cpu")
    with monkeypatch.context() as patch:
        patch.delattr(evaluate, "measure")
        with pytest.raises(AttributeError):
            export.write_weights(evaluated_run, tmp_path / "new" / "weights", None, "cpu")
    assert not list((tmp_path / "new" / "weights").iterdir())
    made = export.write_weights(evaluated_run, tmp_path / "new" / "weights", None, "cpu")
    assert made.metrics.original == {
        "run": evaluated_run.path.name,
        "accuracy": evaluated_run.metrics.accuracy,
        "accuracy_tta": evaluated_run.metrics.accuracy_tta,
    }
    again = evaluate.measure(made, digits, "cpu").metrics
    assert (again.accuracy, again.calibration) == (made.metrics.accuracy, made.metrics.calibration)
    full, half = (checkpoint.load(one.checkpoints / "best.pt")["weights"] for one in (evaluated_run, made))
    for name, tensor in half.items():
        torch.testing.assert_close(tensor, full[name].to(tensor.dtype), rtol=0, atol=0)
    assert [made.config.output_dir, made.config.data_dir, made.record.command] == ["outputs", "data", None]
    assert made.history() == evaluated_run.history()


# load


def test_files_bytes_pillows_images_arrays_and_tensors_get_the_same_prediction(fast, tmp_path):
    image = photo()
    image.save(path := tmp_path / "photo.png")
    array = np.asarray(image)
    tensors = (torch.from_numpy(values).permute(2, 0, 1) for values in (array.copy(), array / np.float32(255)))
    predictions = fast.predict([str(path), path, path.read_bytes(), image, array, array / 255, *tensors])
    for prediction in predictions:
        np.testing.assert_allclose(prediction.probabilities, predictions[0].probabilities, atol=1e-6)
    (alone,) = fast.predict(image)
    assert predictions[0].top(10)[0] == (alone.label, pytest.approx(alone.confidence, abs=1e-5))
    assert alone.top(10) == sorted(zip(fast.classes, alone.probabilities), key=lambda pair: -pair[1])
    batch = np.stack([array, array])
    assert [one.label for one in fast.predict(batch)] == [alone.label] * 2


@pytest.mark.parametrize(
    ("image", "sentence"),
    [
        (Image.open(io.BytesIO(TRUNCATED)), "Pillow cannot read the image: OSError: image file is truncated"),
        (np.zeros((3, 32, 32), np.uint8), r"shape \(3, 32, 32\) is no image: arrays are \(H, W, 3\), tensors"),
        (np.full((32, 32, 3), 200.0), "float from 0 to 1, not float64"),
        (np.full((32, 32, 3), np.nan), "float from 0 to 1"),
        (np.zeros((0, 32, 3), np.uint8), "is no image"),
        (torch.zeros(3, 32, 32, dtype=torch.int64), "not int64"),
    ],
)
def test_what_is_no_image_is_one_sentence(fast, image, sentence):
    with pytest.raises(UserError, match=sentence):
        fast.predict([image])


def test_opened_files_and_bfloat16_are_images_and_no_image_is_a_sentence(fast, tmp_path):
    pixels = torch.rand(3, 32, 32).bfloat16()
    file = io.BytesIO(saved(picture((pixels.float() * 255).round().byte()), "PNG"))
    (expected,), (read,) = fast.predict(pixels), fast.predict(file)
    np.testing.assert_array_equal(read.probabilities, expected.probabilities)
    with pytest.raises(UserError, match="int is no image"):
        fast.predict(5)
    (tmp_path / "a.png").write_bytes(file.getvalue())
    with (tmp_path / "a.png").open(encoding="utf-8") as text, pytest.raises(UserError, match="open as text"):
        fast.predict(text)
    file.close()
    with pytest.raises(UserError, match="the file cannot be read: ValueError: I/O operation on closed file"):
        fast.predict(file)
    assert fast.predict("a\0b.png")[0].error
    assert [one.source for one in fast.predict(np.array(["a.png", "b.png"]))] == ["a.png", "b.png"]


def test_mistakes_are_user_errors(fast, tmp_path):
    with pytest.raises(UserError, match="the run needs a name or a path"):
        cifar.load("")
    with pytest.raises(UserError, match="there is no run named '\0'"):
        cifar.load("\0")
    with pytest.raises(UserError, match="has not been evaluated; run `invoke evaluate"):
        cifar.load(make_run(tmp_path / "run", evaluated=False))
    with pytest.raises(UserError, match="unknown device 'tpu'"):
        cifar.load("fast", device="tpu")
    with pytest.raises(UserError, match=r"takes torch.uint8 \(N, 3, 32, 32\), not torch.float32 \(1, 3, 32, 32\)"):
        fast.probabilities(torch.zeros(1, 3, 32, 32))
    (missing,) = fast.predict(tmp_path / "missing.png")
    with pytest.raises(UserError, match=r"missing.png cannot be read: No such file"):
        _ = missing.label


# train


def test_train_does_what_the_command_does_in_silence_also_in_a_thread(tmp_path, capfd, monkeypatch):
    monkeypatch.setattr(visualize, "visualize", lambda *_: None)  # takes most of the time
    made = []
    options = QUICK | {"output_dir": str(tmp_path)}
    thread = threading.Thread(target=lambda: made.append(cifar.train(**options)))
    thread.start()
    thread.join()
    assert capfd.readouterr() == ("", "")
    assert not console.out.quiet
    (trained,) = made
    assert (trained.status(), trained.metrics.dataset, trained.config.epochs) == ("completed", "digits", 1)
    assert (trained.path / "report.html").exists()
    again = cifar.train(**options)
    assert [(run.path / "log.txt").read_text().count("--flip none instead") for run in (trained, again)] == [1, 1]
    assert cifar.load(trained).classes == cifar.load(trained.path.name, output_dir=str(tmp_path)).classes
    (tmp_path / "settings.toml").write_text("lr = 1e-3")
    with pytest.raises(UserError, match="--val-size 9999 does not fit"):
        cifar.train(**options, config=str(tmp_path / "settings.toml"), val_size=9999, verbose=True)


@pytest.mark.parametrize(
    ("settings", "sentence"),
    [
        ({"epochs": 0}, "--epochs must be at least 1"),
        ({"seeds": 3}, "makes one run"),
        ({"model": "no_such.network:build"}, "cannot import no_such.network:build"),
    ],
)
def test_a_wrong_setting_is_a_user_error_before_any_directory_is_made(tmp_path, settings, sentence):
    with pytest.raises(UserError, match=sentence):
        cifar.train(output_dir=str(tmp_path), dataset="digits", **settings)
    assert not list(tmp_path.iterdir())


# torch.hub

HUB = """
import sys, torch
network = torch.hub.load(sys.argv[1], "fast", source="local")
torch.save(network(torch.load(sys.argv[2]) / 255), sys.argv[2])
assert torch.hub.load(sys.argv[1], "fast", source="local", pretrained=False).head.out_features == 10
"""


def test_torch_hub_loads_the_network_from_any_folder_by_the_packages_that_it_lists(fast, tmp_path):
    images = torch.stack([torch.from_numpy(np.array(photo(size=(32, 32)))).permute(2, 0, 1)] * 2)
    torch.save(images, tmp_path / "images.pt")
    assert run("-c", HUB, str(PROJECT), str(tmp_path / "images.pt"), cwd=tmp_path) == (0, "", "")
    logits = torch.load(tmp_path / "images.pt")
    fast.precision = "float32"
    probabilities = (logits / fast.temperature).softmax(1).detach()
    np.testing.assert_allclose(probabilities, fast.probabilities(images), atol=1e-5)


# The notebook.


@pytest.mark.slow
def test_the_notebook_runs_from_top_to_bottom(tmp_path):
    nbclient, nbformat = pytest.importorskip("nbclient"), pytest.importorskip("nbformat")
    if not importlib.util.find_spec("ipykernel"):
        pytest.skip("ipykernel is not installed")
    notebook = nbformat.read(PROJECT / "docs" / "quickstart.ipynb", as_version=4)
    environment = {"PYTHONPATH": str(PROJECT), "PIP_DISABLE_PIP_VERSION_CHECK": "1"}
    client = nbclient.NotebookClient(notebook, timeout=900, resources={"metadata": {"path": str(tmp_path)}})
    client.execute(env=os.environ | environment)
    printed = json.dumps([cell.get("outputs") for cell in notebook.cells])
    assert "Traceback" not in printed
    assert "\\u001b" not in printed  # neither colors nor lines that are redrawn
