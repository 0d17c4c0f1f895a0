"""Exported networks, which others load without this suite."""

import json
import os
import re
import shutil
import sys
from pathlib import Path

import numpy as np
import pytest
import torch

from cifar import export, model, predict
from cifar.config import PROJECT
from cifar.errors import UserError
from cifar.runs import Run
from commands import run


@pytest.fixture(scope="module")
def files(evaluated_run, tmp_path_factory) -> list[Path]:
    return export.export(evaluated_run, tmp_path_factory.mktemp("exported") / "new" / "digits.pt2")


@pytest.fixture(scope="module")
def predictor(evaluated_run) -> predict.Predictor:
    predictor = predict.Predictor(evaluated_run, "cpu")
    predictor.precision = "float32"
    return predictor


def test_the_exported_program_gives_the_probabilities_of_predict_and_what_a_user_of_them_needs(
    files, predictor, digits, evaluated_run
):
    extra = {"about.json": ""}
    program = torch.export.load(files[0], extra_files=extra).module()
    for count in (1, 7, 360):
        images = digits.test.images[:count]
        probabilities = program(images).detach()
        assert (probabilities.shape, probabilities.dtype) == ((count, 10), torch.float32)
        np.testing.assert_allclose(probabilities, predictor.probabilities(images), atol=1e-6)
    assert json.loads(extra["about.json"]) == {
        "run": evaluated_run.path.name,
        "classes": list("0123456789"),
        "image_size": 32,
        "threshold": evaluated_run.metrics.calibration.threshold,
    }


def test_without_their_packages_no_onnx_file_and_no_folder_are_written(evaluated_run, tmp_path, monkeypatch, capsys):
    for package in ("onnx", "safetensors"):
        monkeypatch.setitem(sys.modules, package, None)
    written = export.export(evaluated_run, tmp_path / "model.pt2")
    assert [path.name for path in tmp_path.iterdir()] == [path.name for path in written] == ["model.pt2"]
    export.show_export(written)
    assert re.search("pip install onnx onnxscript.*pip install safetensors", capsys.readouterr().out, re.DOTALL)


def test_what_no_export_has_written_is_not_overwritten(evaluated_run, tmp_path):
    pytest.importorskip("safetensors")
    folder = tmp_path / "net"
    for _ in range(2):
        export.export(evaluated_run, tmp_path / "net.pt2")
    before = (folder / "config.json").read_bytes()
    (folder / "run.json").touch()
    with pytest.raises(UserError, match=r"net has other files \(run\.json\): name another file with --output$"):
        export.export(evaluated_run, tmp_path / "net.pt2")
    assert (folder / "config.json").read_bytes() == before


def test_an_operation_that_onnx_lacks_is_one_sentence(evaluated_run, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(export, "_are_installed", lambda *packages: "onnx" in packages)
    monkeypatch.setattr("torch.onnx.export", lambda *_, **__: 1 / 0)
    assert export.export(evaluated_run, tmp_path / "model.pt2") == [tmp_path / "model.pt2"]
    assert "no .onnx file was written: torch.onnx.export fails: ZeroDivisionError" in capsys.readouterr().out


def test_the_onnx_file_gives_the_probabilities_of_predict(files, predictor, digits):
    onnxruntime = pytest.importorskip("onnxruntime")
    session = onnxruntime.InferenceSession(str(files[1]))
    images = digits.test.images[:7]
    (probabilities,) = session.run(["probabilities"], {"images": images.numpy()})
    np.testing.assert_allclose(probabilities, predictor.probabilities(images), atol=1e-6)
    about = json.loads(session.get_modelmeta().custom_metadata_map["about.json"])
    assert about["classes"] == list("0123456789")


# Runs the code of a model card, which may import neither this suite nor torchvision.
CARD = """
import re, sys
exec(re.search("```python\\n(.*?)```", open("README.md", encoding="utf-8").read(), re.DOTALL)[1])
images = torch.load(sys.argv[1], weights_only=True)
torch.save(predict(images), sys.argv[1])
assert not {"cifar", "torchvision"} & sys.modules.keys()
"""


def test_the_hub_folder_loads_by_the_code_on_its_card_and_gives_the_probabilities_of_predict(
    files, predictor, digits, evaluated_run, tmp_path
):
    pytest.importorskip("safetensors")
    folder, images = files[-1], digits.test.images[:50]
    assert {path.name for path in folder.iterdir()} == {
        *("model.safetensors", "config.json", "README.md", "model.py", "load.py")
    }
    torch.save(images, tmp_path / "images.pt")
    assert run("-c", CARD, str(tmp_path / "images.pt"), cwd=folder) == (0, "", "")
    np.testing.assert_allclose(torch.load(tmp_path / "images.pt"), predictor.probabilities(images), atol=1e-3)
    card = (folder / "README.md").read_text(encoding="utf-8")
    assert f"```python\n{(folder / 'load.py').read_text(encoding='utf-8')}```" in card
    for class_name, scores in evaluated_run.metrics.per_class.items():
        assert f"| {class_name} | {scores.precision:.1%} | {scores.recall:.1%} | {scores.f1:.1%} |" in card
    for end in evaluated_run.metrics.interval_95:
        assert f"{end:.2%}" in card
    assert "Not measured." in card


def test_a_card_shows_measured_corruptions_and_escapes_what_markdown_would_run(corrupted_run, tmp_path):
    copied = Run(shutil.copytree(corrupted_run.path, tmp_path / "run"))
    metrics = copied.metrics.model_dump()
    odd = {name: f"<b>{name}|x\n" for name in metrics["per_class"]}
    metrics["per_class"] = {odd[name]: scores for name, scores in metrics["per_class"].items()}
    metrics["average_precision"] = None
    copied.write("metrics.json", metrics)
    copied.write("run.json", copied.record.model_dump(exclude={"model"}))  # as runs of earlier versions
    card = export._card(predict.Predictor(copied, "cpu"))
    assert "| &lt;b&gt;3&#124;x\\n | " in card
    rows = re.findall(r"^\| (\w+) \| (?:[\d.]+% \| ){5}$", card, re.MULTILINE)
    assert rows == list(copied.read("corruptions.json").corruptions)


def test_every_network_is_written_as_code_that_needs_torch_alone(tmp_path):
    source = export._source("airbench94", pretrained=False)
    assert "cifar" not in source.replace("cifar10-airbench", "")
    scope = {}
    exec(source, scope)
    for name in model.NETWORKS:
        ours, plain = model.build(name, 7, 32), scope["build"](name, 7, 32)
        plain.load_state_dict(ours.state_dict())
        images = torch.rand(2, 3, 32, 32)
        torch.testing.assert_close(plain.eval()(images), ours.eval()(images))
    (tmp_path / "model.py").write_text(export._source("mobilenet_v3_small", pretrained=False))
    code = "from model import build; build('mobilenet_v3_small', 3, 32)"
    assert run("-c", code, cwd=tmp_path, env=os.environ | {"PYTHONPATH": str(PROJECT)}) == (0, "", "")


def test_a_network_that_torch_export_does_not_support_is_one_sentence(evaluated_run, tmp_path, monkeypatch):
    monkeypatch.setattr("torch.export.export", lambda *_, **__: 1 / 0)
    with pytest.raises(UserError, match=r"^torch.export fails for .*ZeroDivisionError"):
        export.export(evaluated_run, tmp_path / "model.pt2")
    assert not (tmp_path / "model.pt2").exists()
