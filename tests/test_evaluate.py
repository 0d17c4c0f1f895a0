import csv
import dataclasses
import functools
import json
import math
import re
import shutil

import numpy as np
import pytest
import torch
from sklearn.metrics import accuracy_score, confusion_matrix, f1_score, log_loss, precision_recall_fscore_support

import handmade
from cifar import data, evaluate
from cifar.errors import UserError
from cifar.records import EpochRecord
from cifar.runs import Run
from image_files import random_images


@pytest.mark.parametrize("count", [1203, 0])
def test_infer_gives_the_networks_logits_in_order_whatever_the_batches(count):
    images, network = random_images(count), handmade.Brightness()
    torch.testing.assert_close(evaluate.infer(network, images, precision="float32"), network(images / 255))


@pytest.mark.parametrize("flips", [True, False])
def test_tta_is_the_weighted_mean_of_the_copies(flips):
    images, network, done = random_images(7), handmade.Brightness(), []
    options = {"temperature": 1e6, "precision": "float32"}  # so hot that the network is unsure of all
    plain, mean = evaluate.infer_tta(network, images, flips=flips, advance=done.append, **options)
    assert sum(done) == pytest.approx(14)  # two for each image, so that a bar ends full
    padded = np.pad(images.numpy(), ((0, 0), (0, 0), (1, 1), (1, 1)), "reflect")
    expected = 0
    for copies, weight in ((images.numpy(), 0.5), (padded[:, :, :8, :8], 0.25), (padded[:, :, 2:, 2:], 0.25)):
        both = [copies, copies[..., ::-1].copy()] if flips else [copies]
        expected += weight * sum(network(torch.from_numpy(one) / 255) for one in both) / len(both)
    torch.testing.assert_close(mean, expected)
    torch.testing.assert_close(plain, network(images / 255))


def test_tta_is_for_unsure_images_alone():
    images = random_images(7)
    advanced: list[float] = []
    options = {"flips": True, "precision": "float32", "advance": advanced.append}
    tta = functools.partial(evaluate.infer_tta, handmade.Brightness(), images, **options)
    plain, always = tta(temperature=1e6)
    leads = plain.topk(2).values.diff().abs().flatten()
    temperature = leads.median().item() / math.log(19)  # at which a lead of the median makes 0.95 of two classes
    mean = tta(temperature=temperature)[1]
    sure = (plain.double() / temperature).softmax(1).amax(1) >= 0.95
    assert 0 < sure.sum() < 7
    assert mean[sure].equal(plain[sure])
    torch.testing.assert_close(mean[~sure], always[~sure])
    assert not mean[~sure].equal(plain[~sure])
    assert tta(temperature=1e-6)[1].equal(plain)  # sure of all
    assert sum(advanced) == pytest.approx(3 * 2 * 7)


def saved_predictions(run) -> list[dict[str, str]]:
    with (run.path / "predictions.csv").open(newline="", encoding="utf-8") as file:
        return list(csv.DictReader(file))


def test_the_metrics_are_scikit_learns_on_the_saved_predictions(evaluated_run, digits):
    rows = saved_predictions(evaluated_run)
    metrics = json.loads((evaluated_run.path / "metrics.json").read_text(encoding="utf-8"))
    true, predicted = [row["true"] for row in rows], [row["predicted"] for row in rows]
    assert true == [digits.classes[label] for label in digits.test.labels]
    assert metrics["accuracy"] == pytest.approx(accuracy_score(true, predicted))
    assert metrics["confusion_matrix"] == confusion_matrix(true, predicted).tolist()
    reference = precision_recall_fscore_support(true, predicted, zero_division=0)
    for key, values in zip(("precision", "recall", "f1", "support"), reference):
        np.testing.assert_allclose([scores[key] for scores in metrics["per_class"].values()], values)
    probabilities = np.array([[float(row[name]) for name in digits.classes] for row in rows])
    np.testing.assert_allclose(probabilities.sum(1), 1, atol=1e-5)
    probabilities /= probabilities.sum(1, keepdims=True)
    likelihood = metrics["calibration"]["after"]["negative_log_likelihood"]
    assert likelihood == pytest.approx(log_loss(true, probabilities), rel=1e-3)
    low, high = metrics["interval_95"]
    assert low < metrics["accuracy"] < high
    assert metrics["weighted_average"]["f1"] == pytest.approx(f1_score(true, predicted, average="weighted"))
    assert f"{metrics['accuracy']:.4f}" in (evaluated_run.path / "classification_report.txt").read_text("utf-8")


def test_a_run_is_evaluated_on_its_own_dataset_alone(evaluated_run, digits):
    other, changed = dataclasses.replace(digits, key="cifar10"), dataclasses.replace(digits)
    vars(changed)["train"] = data.Split(digits.train.images.flip(0), digits.train.labels)
    for dataset, sentence in ((other, "was trained on digits, not on cifar10"), (changed, "are not those that ")):
        with pytest.raises(UserError, match=sentence):
            evaluate.evaluate(evaluated_run, dataset, "cpu")


def test_of_other_test_images_no_earlier_result_is_left(evaluated_run, digits, tmp_path):
    run = Run(shutil.copytree(evaluated_run.path, tmp_path / "run"))
    old = [run.path / "report.html", run.path / "analysis.json", run.figures / "calibration.png"]
    for path in old:
        path.touch()
    evaluate.evaluate(run, digits, "cpu")
    assert all(path.exists() for path in old)
    changed = {"train": digits.train, "test": digits.test[:300]}
    evaluate.evaluate(run, dataclasses.replace(digits, read=changed.__getitem__), "cpu")
    assert not any(path.exists() for path in old)
    assert run.metrics.n == 300


def test_a_run_without_validation_is_evaluated_without_a_temperature(make_run, digits):
    calibration = evaluate.evaluate(make_run(val_size=0), digits, "cpu").metrics.calibration
    assert (calibration.temperature, calibration.threshold, calibration.fitted_on) == (1, None, 0)


def test_outputs_that_are_not_finite_are_one_sentence(evaluated_run, digits, monkeypatch):
    monkeypatch.setattr(evaluate, "infer_tta", lambda network, images, **_: [torch.full((len(images), 10), np.nan)] * 2)
    with pytest.raises(UserError, match=r"^the network's outputs for the test images are not finite: "):
        evaluate.measure(evaluated_run, digits, "cpu")


@pytest.mark.parametrize(
    ("changes", "sentence"),
    [
        ({"weights": {}}, "do not fit the network mlp"),
        ({"classes": list("abcdefghij")}, "is for other classes: a, b, c and 7 more"),
        ({"model": "hostile:build"}, "is of the network hostile:build, not mlp"),
    ],
)
def test_a_checkpoint_of_something_else_is_refused_and_imports_nothing(
    evaluated_run, tmp_path, monkeypatch, changes, sentence
):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "hostile.py").write_text("from pathlib import Path\nPath('imported').touch()\nbuild = dict\n")
    run = Run(shutil.copytree(evaluated_run.path, tmp_path / "run"))
    path = run.checkpoints / "best.pt"
    torch.save({**torch.load(path, weights_only=True), **changes}, path)
    with pytest.raises(UserError, match=sentence):
        evaluate.load_network(run, "0123456789")
    assert not (tmp_path / "imported").exists()


@pytest.mark.parametrize(
    "damage",
    [
        lambda text: "",
        lambda text: text[:-5].replace("\n", "\n,"),
        lambda text: "\x00\x01",
        lambda text: text.replace("confidence", "sureness"),
        lambda text: text.replace("\n0,", "\n1,", 1),
        lambda text: text.splitlines()[0] + "\n0,1,1,1.5" + ",0" * 10,
        lambda text: text.splitlines()[0] + "\n0,1,1,high" + ",0" * 10,
    ],
)
def test_damaged_predictions_are_one_sentence(evaluated_run, tmp_path, damage):
    text = (evaluated_run.path / "predictions.csv").read_text(encoding="utf-8")
    (tmp_path / "predictions.csv").write_text(damage(text), encoding="utf-8")
    with pytest.raises(UserError, match=r"predictions\.csv is damaged: .*`invoke evaluate --run .*`"):
        evaluate.read_predictions(Run(tmp_path))


def test_predictions_are_read_as_they_were_written(tmp_path):
    classes, labels = ("'=NA", '=a "b", c'), np.array([0, 1, 1])
    probabilities = np.array([[0.75, 0.25], [0.5, 0.5], [0.125, 0.875]])
    evaluate.write_predictions(Run(tmp_path), probabilities, labels, classes, ("a.png", "b/+.png", "-c.png"))
    table = evaluate.read_predictions(Run(tmp_path))
    assert table["true"].tolist() == ["'=NA", '=a "b", c', '=a "b", c']
    assert table["predicted"].tolist() == ["'=NA", "'=NA", '=a "b", c']
    assert table["confidence"].tolist() == [0.75, 0.5, 0.875]
    rows = saved_predictions(Run(tmp_path))
    assert list(rows[0]) == ["index", "true", "predicted", "confidence", "file", "''=NA", '\'=a "b", c']  # no formula
    assert [row["file"] for row in rows] == ["a.png", "b/+.png", "'-c.png"]
    evaluate.write_predictions(Run(tmp_path), probabilities, labels, ("true", "file"))
    assert list(saved_predictions(Run(tmp_path))[0])[4:] == ["true (class)", "file"]


@pytest.mark.parametrize(
    ("matrix", "train_accuracy", "val_accuracy", "said"),
    [
        ([[30, 10], [10, 30]], 0.9, 0.75, []),
        ([[40, 0], [40, 0]], 0.9, 0.5, ["every test image the same class", "Validation accuracy is 50.0%"]),
        ([[20, 20], [20, 20]], 0.9, 0.54, [r"guessing gives \(50.0%\), at a training accuracy of 90.0%"]),
        ([[20, 20], [20, 20]], 0.6, 0.5, [r"Test accuracy is 50.0%, which cannot be told from guessing \(50.0%\)"]),
        ([[25, 15], [17, 23]], 0.6, 0.58, ["Test accuracy is 60.0%"]),  # Wilson's interval is 49.0 to 70.0%
        ([[27, 13], [17, 23]], 0.6, 0.58, []),  # and of 62.5% it is 51.5 to 72.3%
        ([[60, 12], [8, 0]], 0.95, 0.9, ["Validation accuracy is 90.0%"]),  # 72 of 80 images are of one class
        ([[20, 20], [20, 20]], 0.9, None, ["Test accuracy is 50.0%"]),
        ([[63, 9], [1, 7]], 0.9, None, []),  # 87.5%, and 90% is guessed right, but of each class 87.5% are found
    ],
)
def test_a_network_that_knows_only_its_training_images_is_reported(
    tmp_path, matrix, train_accuracy, val_accuracy, said
):
    counts = np.ravel(matrix)
    true, predicted = np.repeat([0, 0, 1, 1], counts), np.repeat([0, 1, 0, 1], counts)
    run = handmade.make_run(tmp_path, list("ab"), epochs=0, true=true, predicted=predicted, confidence=[0.9] * 80)
    accuracies = {"train_accuracy": train_accuracy, "val_accuracy": val_accuracy}
    run.write_history([EpochRecord(**handmade.make_line(1, val_accuracy is not None) | accuracies)])
    problems = evaluate.learning_problems(run)
    assert len(problems) == len(said)
    for problem, part in zip(problems, said):
        assert re.search(part, problem)
