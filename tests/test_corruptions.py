import numpy as np
import pytest
import torch

from cifar import corruptions
from cifar.errors import UserError
from cifar.runs import Run


def grey(value: int, count: int = 1, side: int = 32) -> torch.Tensor:
    return torch.full((count, 3, side, side), value, dtype=torch.uint8)


def distance(images: torch.Tensor, others: torch.Tensor) -> float:
    return (images.float() - others.float()).abs().mean().item()


def test_there_are_ten_kinds_at_five_severities():
    assert len(corruptions.AMOUNTS) == 10
    assert {len(amounts) for amounts in corruptions.AMOUNTS.values()} == {5}
    assert corruptions.CELLS == 50


@pytest.mark.parametrize("kind", corruptions.AMOUNTS)
@pytest.mark.parametrize("side", [32, 48])
def test_each_severity_does_more_harm_than_the_one_before(kind, side):
    ramp = torch.linspace(40, 215, side).round().byte()
    dots = torch.randint(0, 40, (40, 3, side, side), generator=torch.Generator().manual_seed(1)).byte()
    images = ramp.expand(40, 3, side, side) + dots
    harmed = [corruptions.corrupt(images, kind, amount, seed=0) for amount in corruptions.AMOUNTS[kind]]
    assert {(made.dtype, made.shape) for made in harmed} == {(torch.uint8, images.shape)}
    distances = [distance(images, made) for made in harmed]
    assert distances[0] > 0
    assert distances == sorted(distances)
    assert len(set(distances)) == 5


def test_the_amounts_are_what_they_say():
    def of(kind, amount, images):
        return corruptions.corrupt(images, kind, amount, seed=0)

    assert (of("brightness", 1.2, grey(100)) == 120).all()
    assert (of("darkness", 0.5, grey(100)) == 50).all()
    halves = torch.cat([grey(50, side=4), grey(150, side=4)], dim=2).reshape(1, 3, 4, 8)
    assert of("contrast", 0.5, halves).unique().tolist() == pytest.approx([75, 125], abs=1)
    noise = of("noise", 0.1, grey(128, count=50)).float() - 128
    assert noise.std().item() / 255 == pytest.approx(0.1, rel=0.02)
    shifted = of("shift", 1 / 16, grey(200))[0, 0]
    assert (shifted == 0).sum() == 32 * 32 - 30 * 30
    assert (of("occlusion", 0.25, grey(200))[0, 0] == 0).sum() == 16 * 16
    steps = torch.arange(1024).remainder(251).byte().view(1, 1, 32, 32).expand(1, 3, 32, 32)
    assert len(of("pixelation", 0.5, steps)[0, 0, :2, :2].unique()) == 1


@pytest.mark.parametrize("kind", ["noise", "shift", "rotation", "occlusion"])
def test_chance_is_the_seeds_and_torchs_own_stays_as_it_was(kind):
    images, amount = grey(100, count=80), corruptions.AMOUNTS[kind][2]
    torch.manual_seed(5)
    before = torch.get_rng_state()
    first, again, other = (corruptions.corrupt(images, kind, amount, seed) for seed in (0, 0, 1))
    assert torch.equal(torch.get_rng_state(), before)
    assert torch.equal(first, again)
    assert not torch.equal(first, other)


def test_the_unharmed_row_is_what_metrics_json_says(corrupted_run, digits):
    content, metrics = corrupted_run.read("corruptions.json"), corrupted_run.read("metrics.json")
    assert content["n"] == metrics["n"] == len(digits.test)
    after = metrics["calibration"]["after"]["expected_calibration_error"]
    assert content["clean"]["accuracy"] == pytest.approx(metrics["accuracy"])
    assert content["clean"]["expected_calibration_error"] == pytest.approx(after, abs=2e-3)
    cells = [row for rows in content["corruptions"].values() for row in rows]
    assert [row["severity"] for row in cells] == [1, 2, 3, 4, 5] * 3
    assert content["mean"]["accuracy"] == pytest.approx(np.mean([row["accuracy"] for row in cells]))
    assert min(row["accuracy"] for row in cells) < content["clean"]["accuracy"]


def test_of_many_images_2000_are_drawn_by_the_seed(evaluated_run, digits, tmp_path, monkeypatch):
    monkeypatch.setattr(corruptions, "_MOST", 100)
    monkeypatch.setattr(corruptions, "AMOUNTS", {"darkness": (0.5,)})
    run = Run(tmp_path)
    for name in ("config.json", "run.json", "metrics.json"):
        (tmp_path / name).write_bytes((evaluated_run.path / name).read_bytes())
    run.checkpoints.symlink_to(evaluated_run.checkpoints)
    harmed, corrupt = [], corruptions.corrupt
    monkeypatch.setattr(corruptions, "corrupt", lambda images, *how: harmed.append(images) or corrupt(images, *how))
    first, again = (corruptions.measure(run, digits, "cpu", lambda _: None) for _ in range(2))
    assert first == again
    assert first["n"] == 100
    run.write("config.json", {**run.read("config.json"), "seed": 1})
    corruptions.measure(run, digits, "cpu", lambda _: None)
    drawn, drawn_again, drawn_by_another = harmed
    assert torch.equal(drawn, drawn_again)
    assert not torch.equal(drawn, drawn_by_another)
    assert not torch.equal(drawn, digits.test.images[:100])


def test_a_run_that_was_not_evaluated_is_refused(make_run, digits):
    with pytest.raises(UserError, match="has not been evaluated: `invoke evaluate --run "):
        corruptions.measure(make_run(epochs=1), digits, "cpu", lambda _: None)
