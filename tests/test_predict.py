import json
import os
import shutil

import numpy as np
import pytest
import torch
from PIL import Image

from cifar import data, evaluate, predict
from cifar.errors import UserError
from cifar.picture import decode
from cifar.runs import Run
from picture_files import SIZE, saved


@pytest.fixture(scope="module")
def predictor(evaluated_run) -> predict.Predictor:
    return predict.Predictor(evaluated_run)


def test_a_folder_of_the_test_images_gets_the_answers_of_evaluate(predictor, evaluated_run, digits, tmp_path):
    for index, image in enumerate(digits.test.images):
        Image.fromarray(image.permute(1, 2, 0).numpy()).save(tmp_path / f"{index:05}.png")
    answers = list(predictor.answer(predict.find_pictures([str(tmp_path)])))
    kept = np.genfromtxt(evaluated_run.path / "predictions.csv", delimiter=",", skip_header=1)
    np.testing.assert_allclose([answer.probabilities for answer in answers], kept[:, 4:], atol=1e-6)


def test_one_picture_gets_the_logits_that_it_gets_among_many(predictor, digits):
    together = predictor.logits(digits.test.images[:100])
    alone = torch.cat([predictor.logits(digits.test.images[index : index + 1]) for index in range(100)])
    torch.testing.assert_close(alone, together, atol=1e-5, rtol=0)


def test_real_images_as_png_files_get_the_logits_of_the_arrays(real_cifar10, predictor):
    images = real_cifar10.test.images[:200]
    files = [saved(Image.fromarray(image.permute(1, 2, 0).numpy()), "PNG") for image in images]
    decoded = torch.stack([decode(file, SIZE) for file in files])
    torch.testing.assert_close(predictor.logits(decoded), predictor.logits(images), atol=1e-5, rtol=0)


def test_a_refused_picture_keeps_its_place_among_the_others(predictor, digits):
    good = digits.test.images[0].permute(1, 2, 0).numpy()
    answers = list(predictor.answer([("a", good), ("b", b"no picture"), ("c", good)]))
    assert [answer.source for answer in answers] == ["a", "b", "c"]
    assert answers[1].probabilities is None
    assert "not a picture" in answers[1].refusal
    np.testing.assert_allclose(answers[0].probabilities, answers[2].probabilities, atol=1e-5)


def test_probabilities_are_calibrated_and_sum_to_one(predictor, digits):
    images = digits.test.images[:10]
    logits = evaluate.infer(predictor.network, images, precision=predictor.precision)
    expected = (logits.double() / predictor.temperature).softmax(1)
    np.testing.assert_allclose(predictor.probabilities(images), expected, atol=1e-12)
    np.testing.assert_allclose(predictor.probabilities(images).sum(1), 1)


def test_the_threshold_is_what_all_but_a_twentieth_of_the_validation_images_reach(predictor, evaluated_run, digits):
    val = data.hold_out(digits.train, evaluated_run.config.val_size, evaluated_run.config.seed)[1]
    unsure = [predictor.is_probably_none(row) for row in predictor.probabilities(val.images)]
    assert abs(np.mean(unsure) - 0.05) < 0.02
    assert predictor.is_probably_none(np.full(10, 0.1))


def test_a_run_that_was_not_evaluated_says_what_to_do(make_run):
    with pytest.raises(UserError, match="has not been evaluated: `invoke evaluate"):
        predict.Predictor(make_run(epochs=1))


def test_a_run_without_a_threshold_says_what_to_do(evaluated_run, tmp_path):
    run = Run(shutil.copytree(evaluated_run.path, tmp_path / "early"))
    metrics = run.metrics
    del metrics["calibration"]["threshold"]
    run.write("metrics.json", metrics)
    with pytest.raises(UserError, match=r"early has no threshold in its metrics\.json: evaluate it anew"):
        predict.Predictor(run)


def test_files_folders_and_globs_are_found_in_order_and_hidden_files_passed_over(tmp_path):
    for name in ("b.png", "a.png", ".hidden", "inner/c.png", "x.txt"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_bytes(b"")
    names = lambda *patterns: [os.path.relpath(name, tmp_path) for name, _ in predict.find_pictures(patterns)]  # noqa: E731
    assert names(str(tmp_path)) == ["a.png", "b.png", "inner/c.png", "x.txt"]
    assert names(str(tmp_path / "*.png")) == ["a.png", "b.png"]
    assert names(str(tmp_path / "none.png"), str(tmp_path / "a.png")) == ["none.png", "a.png"]


def test_answers_are_written_as_csv_and_json(predictor, digits, tmp_path):
    answers = list(predictor.answer([("a", digits.test.images[0].permute(1, 2, 0).numpy()), ("b", b"")]))
    for name in ("answers.csv", "answers.json"):
        predict.write(tmp_path / name, answers, predictor)
    rows = json.loads((tmp_path / "answers.json").read_text(encoding="utf-8"))
    winner = "0123456789"[answers[0].probabilities.argmax()]
    assert (rows[0]["picture"], rows[0]["predicted"]) == ("a", winner)
    assert rows[0]["confidence"] == rows[0][winner] == pytest.approx(answers[0].probabilities.max(), abs=1e-6)
    assert rows[1] == {"picture": "b", "refusal": "the file is empty"}
    header, first, second = (tmp_path / "answers.csv").read_text(encoding="utf-8").splitlines()
    assert header.startswith("picture,predicted,confidence,probably_none,refusal,0,1,2")
    assert first.startswith(f"a,{winner},")
    assert second.startswith("b,,,,the file is empty")
