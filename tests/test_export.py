"""Exported networks, which torch.export loads without this suite."""

import json
import sys
from pathlib import Path

import numpy as np
import pytest
import torch

from cifar import evaluate, predict
from cifar.errors import UserError


@pytest.fixture(scope="module")
def files(evaluated_run, tmp_path_factory) -> list[Path]:
    return predict.export(evaluated_run, tmp_path_factory.mktemp("exported") / "new" / "digits.pt2")


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


def test_without_its_packages_no_onnx_file_is_written(evaluated_run, tmp_path, monkeypatch, capsys):
    monkeypatch.setitem(sys.modules, "onnx", None)
    written = predict.export(evaluated_run, tmp_path / "model.pt2")
    assert [path.name for path in tmp_path.iterdir()] == [path.name for path in written] == ["model.pt2"]
    predict.show_export(written)
    assert "pip install onnx onnxscript" in capsys.readouterr().out


def test_the_onnx_file_gives_the_probabilities_of_predict(files, predictor, digits):
    onnxruntime = pytest.importorskip("onnxruntime")
    session = onnxruntime.InferenceSession(str(files[1]))
    images = digits.test.images[:7]
    (probabilities,) = session.run(["probabilities"], {"images": images.numpy()})
    np.testing.assert_allclose(probabilities, predictor.probabilities(images), atol=1e-6)
    about = json.loads(session.get_modelmeta().custom_metadata_map["about.json"])
    assert about["classes"] == list("0123456789")


NETWORK = """
from torch import nn

class Branching(nn.Sequential):
    def forward(self, images):
        return super().forward(images if images.sum() > 0 else -images)

def build(num_classes):
    return Branching(nn.Flatten(), nn.Linear(3 * 32 * 32, num_classes))
"""


def test_a_network_that_torch_export_does_not_support_is_one_sentence(make_run, digits, tmp_path, monkeypatch):
    (tmp_path / "branching_network.py").write_text(NETWORK)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "argv", ["main.py", "--model", "branching_network:build"])
    run = make_run(recipe="plain", model="branching_network:build")
    evaluate.evaluate(run, digits, "cpu")
    with pytest.raises(UserError, match=r"^torch.export fails for .*branching_network-build_"):
        predict.export(run, tmp_path / "model.pt2")
    assert not (tmp_path / "model.pt2").exists()
