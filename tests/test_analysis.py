import io
import re
import shutil
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from sklearn.metrics import precision_recall_curve

from cifar import analysis, data, records
from cifar.errors import UserError
from cifar.records import Metrics
from cifar.runs import Run
from handmade import CLASSES, CORRUPTIONS, LABELS, PROBABILITIES, Brightness, make_dataset, make_metrics, make_run


def test_mistakes_and_the_points_of_curves_are_those_found_by_hand():
    pairs = [{"true": "ship", "predicted": "dog", "count": 1}]
    content = analysis.analyze(PROBABILITIES, LABELS, CLASSES, pairs)
    first = {"index": 2, "true": "dog", "predicted": "cat", "confidence": 0.7, "true_probability": 0.2}
    second = {"index": 4, "true": "ship", "predicted": "dog", "confidence": 0.5, "true_probability": 0.3}
    assert content["confident_mistakes"] == [first, second]
    assert content["confused_pairs"] == [{**pairs[0], "pictures": [second]}]
    assert content["precision_recall"]["ship"] == {"recall": [0.5, 1.0], "precision": [1.0, 1.0]}
    assert content["precision_recall"]["dog"] == {"recall": [0.5, 1.0], "precision": [1.0, 0.5]}


def test_of_many_mistakes_the_most_confident_are_kept_the_earlier_of_equal_ones_first():
    confidence = np.repeat([0.6, 0.9], 20)
    probabilities = np.stack([1 - confidence, confidence], 1)
    pairs = [{"true": "cat", "predicted": "dog", "count": 40}]
    content = analysis.analyze(probabilities, np.zeros(40, int), CLASSES[:2], pairs)
    assert [image["index"] for image in content["confident_mistakes"]] == [*range(20, 40), *range(4)]
    assert [image["index"] for image in content["confused_pairs"][0]["pictures"]] == [*range(20, 28)]


def test_label_errors_are_ranked_by_log_odds_not_by_confidence():
    probabilities = np.array([[0.60, 0.39, 0.01], [0.55, 0.01, 0.44], [0.9, 0.1, 0.0], [0.5, 0.5, 0.0]])
    found = analysis.analyze(probabilities, np.array([1, 1, 0, 2]), CLASSES, [])["suspected_labels"]
    assert [image["index"] for image in found] == [3, 1, 0]
    assert [image["log_odds"] for image in found[1:]] == pytest.approx([np.log(55), np.log(60 / 39)])
    assert np.isfinite(found[0]["log_odds"]), "a probability of zero"


def test_precision_recall_points_are_scikit_learns():
    rng = np.random.default_rng(0)
    probabilities, labels = rng.dirichlet((1, 1, 1), 400), rng.integers(0, 3, 400)
    curves = analysis.analyze(probabilities, labels, CLASSES, [])["precision_recall"]
    for number, name in enumerate(CLASSES):
        precision, recall, _ = precision_recall_curve(labels == number, probabilities[:, number])
        points = set(zip(precision.round(4).tolist(), recall.round(4).tolist()))
        assert set(zip(curves[name]["precision"], curves[name]["recall"])) <= points
        assert max(np.diff(curves[name]["recall"], prepend=0)) < 0.01 + 1 / (labels == number).sum()


def test_an_analysis_that_contradicts_the_metrics_is_damaged(tmp_path):
    run = make_run(tmp_path)
    scores = {"average_precision": {"cat": 1.0, "dog": 1.0, "ship": None}}
    with pytest.raises(UserError, match=r"analysis.json is damaged: it does not match metrics.json"):
        analysis.read(run, Metrics(**run.metrics.model_dump() | scores))


@pytest.mark.parametrize("label", [0, 1, 2])
def test_saliency_is_where_the_logit_comes_from(label):
    saliency = analysis.saliency(Brightness(), torch.zeros(3, 8, 8, dtype=torch.uint8), label, precision="float32")
    halves = [saliency[:, :3], saliency[:, 5:], saliency[:3], saliency[5:]]  # left, right, upper, lower
    opposite = (1, 0, 3)[label]
    assert torch.allclose(halves[label], torch.ones(()))
    assert (halves[opposite] == 0).all()


def test_the_saliency_of_each_named_image_is_for_the_predicted_class(tmp_path):
    run, dataset = Run(tmp_path), make_dataset(("a", "b"), (0, 0, 1))
    assert analysis.read_saliency(run, 8) == {}
    probabilities = np.array([[0.1, 0.9], [0.8, 0.2], [0.7, 0.3]])
    metrics = records.parse("metrics.json", make_metrics(("a", "b"), ((1, 1), (1, 0))))
    evaluation = SimpleNamespace(
        metrics=metrics, probabilities=probabilities, network=Brightness(), precision="float32"
    )
    analysis.write(run, dataset, evaluation)
    found = analysis.read_saliency(run, 8)
    assert found.keys() == {0, 2}
    for index, predicted in ((0, 1), (2, 0)):
        expected = analysis.saliency(Brightness(), dataset.test.images[index], predicted, precision="float32")
        np.testing.assert_allclose(found[index], expected, atol=1 / 500)
    evaluation.probabilities = np.array([[0.9, 0.1], [0.8, 0.2], [0.3, 0.7]])
    evaluation.metrics = records.parse("metrics.json", make_metrics(("a", "b"), ((2, 0), (0, 1))))
    analysis.write(run, dataset, evaluation)
    assert analysis.read_saliency(run, 8) == {}, "no mistakes"
    assert not list(analysis.images(run.read("analysis.json")))


def packed(**arrays) -> bytes:
    file = io.BytesIO()
    np.savez_compressed(file, **arrays)
    return file.getvalue()


MAPS = np.zeros((1, 8, 8), np.uint8)
BOMB = packed(index=[3], heat=np.zeros((2000, 240, 240), np.uint8))
DAMAGED = b"", packed(index=[3], heat=MAPS)[:-20], packed(index=[3]), packed(index=[3, 4], heat=MAPS), BOMB


@pytest.mark.parametrize("content", DAMAGED)
def test_damaged_saliency_is_one_sentence(tmp_path, content):
    (tmp_path / "saliency.npz").write_bytes(content)
    with pytest.raises(UserError, match=r"saliency.npz is damaged: .*invoke evaluate"):
        analysis.read_saliency(Run(tmp_path), 8)


def test_the_overlay_is_grey_without_saliency_and_orange_at_its_peak():
    shown = analysis.overlay(np.full((2, 2, 3), 100, dtype=np.uint8), np.array([[0.0, 1.0], [0.0, 1.0]]))
    assert (abs(shown[:, 0].astype(int) - 100) <= 1).all()
    assert shown[0, 1].tolist() == pytest.approx([0.9 * 0xD5 + 10, 0.9 * 0x5E + 10, 10], abs=1)


def grey(value: int, count: int = 1, size: int = 32) -> torch.Tensor:
    return torch.full((count, 3, size, size), value, dtype=torch.uint8)


@pytest.mark.parametrize("kind", analysis.CORRUPTIONS)
def test_each_severity_changes_images_more_than_the_one_before(kind):
    dots = torch.randint(0, 40, (40, 3, 48, 48), generator=torch.Generator().manual_seed(1)).byte()
    images = torch.linspace(40, 215, 48).round().byte() + dots
    distances = [0.0]
    for amount in analysis.CORRUPTIONS[kind]:
        corrupted = analysis.corrupt(images, kind, amount, seed=0)
        assert (corrupted.dtype, corrupted.shape) == (torch.uint8, images.shape)
        distances.append((images.float() - corrupted.float()).abs().mean().item())
    assert distances == sorted(set(distances))


def test_amounts_mean_what_their_comments_say():
    def corrupted(kind, amount, images):
        return analysis.corrupt(images, kind, amount, seed=0)

    assert (corrupted("brightness", 1.2, grey(100)) == 120).all()
    assert (corrupted("darkness", 0.5, grey(100)) == 50).all()
    halves = torch.cat([grey(50, size=4), grey(150, size=4)], dim=2).reshape(1, 3, 4, 8)
    assert corrupted("contrast", 0.5, halves).unique().tolist() == pytest.approx([75, 125], abs=1)
    noise = corrupted("noise", 0.1, grey(128, count=50)).float() - 128
    assert noise.std().item() / 255 == pytest.approx(0.1, rel=0.02)
    assert (corrupted("shift", 1 / 16, grey(200))[0, 0] == 0).sum() == 32 * 32 - 30 * 30
    assert (corrupted("occlusion", 0.25, grey(200))[0, 0] == 0).sum() == 16 * 16
    steps = torch.arange(1024).remainder(251).byte().view(1, 1, 32, 32).expand(1, 3, 32, 32)
    assert len(corrupted("pixelation", 0.5, steps)[0, 0, :2, :2].unique()) == 1


@pytest.mark.parametrize("kind", ["noise", "shift", "rotation", "occlusion"])
def test_the_seed_decides_and_torchs_generator_is_untouched(kind):
    images, amount = grey(100, count=80), analysis.CORRUPTIONS[kind][2]
    before = torch.get_rng_state()
    first, again, other = (analysis.corrupt(images, kind, amount, seed) for seed in (0, 0, 1))
    assert torch.equal(torch.get_rng_state(), before)
    assert torch.equal(first, again)
    assert not torch.equal(first, other)


def test_clean_images_score_as_in_metrics_json(corrupted_run, digits):
    content, metrics = corrupted_run.read("corruptions.json"), corrupted_run.metrics
    assert content.n == metrics.n == len(digits.test)
    assert content.clean.accuracy == pytest.approx(metrics.accuracy)
    error = metrics.calibration.after.expected_calibration_error
    assert content.clean.expected_calibration_error == pytest.approx(error, abs=2e-3)
    cells = [cell for row in content.corruptions.values() for cell in row]
    assert [cell.severity for cell in cells] == [1, 2, 3, 4, 5] * 3
    assert content.mean.accuracy == pytest.approx(np.mean([cell.accuracy for cell in cells]))


def test_many_images_are_sampled_by_the_seed_and_each_chunk_is_corrupted_by_its_own(
    evaluated_run, digits, tmp_path, monkeypatch
):
    run = Run(shutil.copytree(evaluated_run.path, tmp_path / "run"))
    monkeypatch.setattr(analysis, "_MAX_CORRUPTED", 100)
    monkeypatch.setattr(analysis, "CORRUPTIONS", {"darkness": (0.5,)})
    monkeypatch.setattr(data, "_CHUNK_PIXELS", 50 * digits.test.image_size**2)
    samples, seeds = [], []

    def corrupt(images: torch.Tensor, kind: str, amount: float, seed: int) -> torch.Tensor:
        samples.append(images)
        seeds.append(seed)
        return images

    monkeypatch.setattr(analysis, "corrupt", corrupt)
    for seed in (0, 0, 1):
        run.write("config.json", run.config.replace(seed=seed).model_dump())
        assert analysis.measure_corruptions(run, digits, "cpu").n == 100
    first, again, other = (torch.cat(samples[start : start + 2]) for start in (0, 2, 4))
    assert torch.equal(first, again)
    assert not torch.equal(first, other)
    assert (seeds[0] != seeds[1], seeds[:2]) == (True, seeds[2:4])


def test_corruptions_are_printed_mildest_first_with_their_means(capsys):
    analysis.show_corruptions(records.parse("corruptions.json", CORRUPTIONS))
    printed = capsys.readouterr().out
    assert re.search(r"shift .*70.0% .*30.0% .*50.0% .*20.0%", printed)
    assert printed.index("shift") < printed.index("noise")
    assert "mean accuracy 40.0%; on the clean images 75.0%" in printed
