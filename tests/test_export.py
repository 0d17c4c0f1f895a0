import json
from pathlib import Path

import numpy as np
import pytest
import torch

from cifar import evaluate, export, predict
from cifar.errors import UserError


@pytest.fixture(scope="module")
def files(evaluated_run, tmp_path_factory) -> list[Path]:
    return export.export(evaluated_run, tmp_path_factory.mktemp("exported") / "new" / "digits.pt2")


@pytest.fixture(scope="module")
def predictor(evaluated_run) -> predict.Predictor:
    predictor = predict.Predictor(evaluated_run, "cpu")
    predictor.precision = "float32"
    return predictor


@pytest.mark.parametrize("count", [1, 7, 360])
def test_the_exported_program_gives_the_probabilities_of_predict(files, predictor, digits, count):
    pictures = digits.test.images[:count]
    answers = torch.export.load(files[0]).module()(pictures).detach()
    assert (answers.shape, answers.dtype) == ((count, 10), torch.float32)
    np.testing.assert_allclose(answers, predictor.probabilities(pictures), atol=1e-6)


def test_the_answers_are_those_of_predict_in_its_own_precision_but_for_bfloat16s_rounding(files, evaluated_run, digits):
    answers = torch.export.load(files[0]).module()(digits.test.images).detach()
    own = predict.Predictor(evaluated_run, "cpu").probabilities(digits.test.images)
    np.testing.assert_allclose(answers, own, atol=0.05)


def test_the_file_holds_the_classes_in_the_order_of_the_columns(files, evaluated_run):
    extra = {"about.json": ""}
    torch.export.load(files[0], extra_files=extra)
    assert json.loads(extra["about.json"]) == {
        "run": evaluated_run.path.name,
        "classes": list("0123456789"),
        "image_size": 32,
        "threshold": evaluated_run.read("metrics.json")["calibration"]["threshold"],
    }


def test_without_its_packages_there_is_no_onnx_file(evaluated_run, tmp_path, monkeypatch):
    monkeypatch.setattr(export, "_ONNX_PACKAGES", ("no_such_package",))
    assert export.export(evaluated_run, tmp_path / "model.pt2") == [tmp_path / "model.pt2"]
    assert [path.name for path in tmp_path.iterdir()] == ["model.pt2"]


def test_the_onnx_file_gives_the_probabilities_of_predict(files, predictor, digits):
    onnxruntime = pytest.importorskip("onnxruntime")
    session = onnxruntime.InferenceSession(str(files[1]))
    for count in (1, 7):
        (answers,) = session.run(["probabilities"], {"pictures": digits.test.images[:count].numpy()})
        np.testing.assert_allclose(answers, predictor.probabilities(digits.test.images[:count]), atol=1e-6)
    about = json.loads(session.get_modelmeta().custom_metadata_map["about.json"])
    assert about["classes"] == list("0123456789")


NETWORK = """
from torch import nn


class Undecided(nn.Sequential):
    def forward(self, images):
        return super().forward(images if images.sum() > 0 else -images)


def build(num_classes):
    return Undecided(nn.Flatten(), nn.Linear(3 * 32 * 32, num_classes))
"""


def test_a_network_that_torch_cannot_follow_is_told_in_one_sentence(make_run, digits, tmp_path, monkeypatch):
    (tmp_path / "undecided_network.py").write_text(NETWORK)
    monkeypatch.chdir(tmp_path)
    run = make_run(recipe="plain", model="undecided_network:build", epochs=1)
    evaluate.evaluate(run, digits, "cpu")
    with pytest.raises(
        UserError, match=r"^torch.export cannot follow the network of .*undecided_network-build_digits: "
    ):
        export.export(run, tmp_path / "model.pt2")
    assert not (tmp_path / "model.pt2").exists()
