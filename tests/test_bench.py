"""Planned epochs against sums by hand; the DataLoader's images against the suite's; the profile's shapes and FLOP."""

import json
import math

import numpy as np
import pytest
import torch
from PIL import Image

from cifar import bench, data, datasets
from cifar.errors import UserError
from conftest import quick_config
from image_files import picture


@pytest.fixture(autouse=True)
def briefly(monkeypatch):
    """Time as little as possible: on a busy machine no duration can be asserted anyway."""
    for name, value in {"_SECONDS": 0.0, "_ROUNDS": 1, "_WORKERS": (0, 1), "_MATRIX_SIZE": 64}.items():
        monkeypatch.setattr(bench, name, value)


# A budget of minutes


@pytest.mark.parametrize(
    ("seconds", "small_epochs", "plan"),  # of epochs of 10 and 20 seconds, of which `small_epochs` of 10 are small
    [
        (19, 5, (0, 0)),
        (35, 5, (2, 1)),  # 10 + 20
        (50, 5, (3, 1)),  # 10 + 40, nearer than 20 + 20
        (49, 5, (3, 2)),
        (60, 0, (3, 0)),
        (95, 6, (6, 3)),  # 30 + 60, nearer than 40 + 40; the seven with 4.2 small ones would take 40 + 60
        (95, 9, (6, 3)),  # of ten at most six may be small
        (1e300, 5, (100_000, 50_000)),  # the largest number of epochs
    ],
)
def test_the_plan_is_the_longest_that_fits_in_the_recipes_proportions(tmp_path, seconds, small_epochs, plan):
    config = quick_config(tmp_path, recipe="convnet", epochs=10, small_epochs=small_epochs)
    assert bench.choose_epochs(config, seconds, {24: 8.0, 32: 18.0}, 2.0) == (*plan, 0)


def test_hard_epochs_that_save_time_make_room_for_another_epoch(tmp_path):
    config = quick_config(tmp_path, epochs=10, hard_epochs=1, hard_share=0.5)
    assert bench.choose_epochs(config, 79, {32: 20.0}, 0.0) == (4, 0, 1)  # 3 of 20 seconds and one of 10
    assert bench.choose_epochs(config, 69, {32: 20.0}, 0.0) == (3, 0, 0)  # at most a quarter are hard


@pytest.fixture
def measured(monkeypatch):
    """The speed of a machine: epochs of 10 and 20 seconds, 2 of them for validation."""
    monkeypatch.setattr(bench, "epoch_seconds", lambda *_: ({24: 8.0, 32: 18.0}, 2.0))


def test_the_planned_epochs_fit_the_minutes(measured, digits, tmp_path, capsys):
    settings = {"epochs": 9, "small_epochs": 4, "hard_epochs": 2, "minutes": 2, "warmup_epochs": 50}
    config = datasets.resolve(quick_config(tmp_path, recipe="convnet", **settings), digits)
    planned = bench.plan_epochs(config, digits)
    # 0.97 * 120 = 116.4 seconds: 8 epochs, 4 of them small, take 120 less 36% of two times 18; with 3 small, 10 more.
    assert (planned.epochs, planned.small_epochs, planned.hard_epochs, planned.minutes) == (8, 4, 2, None)
    assert planned.warmup_epochs == 4
    assert datasets.resolve(planned, digits) == planned
    assert (
        "8 epochs in 2 minutes: "
        "4 at 24x24 (10.0 s each), 4 at 32x32 (20.0 s each), the last 2 on the hardest 64% of the images, "
        "4 of warm-up\n"
    ) in capsys.readouterr().out
    next(bench.training_steps(config, digits, 32))  # of 9 epochs, which are all warm-up


def test_too_few_minutes_are_an_error_that_names_how_many_suffice(measured, digits, tmp_path):
    config = datasets.resolve(quick_config(tmp_path, minutes=0.2), digits)
    with pytest.raises(UserError, match=r"^--minutes 0\.2 is too short: one epoch takes about 0\.35 minutes$"):
        bench.plan_epochs(config, digits)
    assert bench.plan_epochs(config.replace(minutes=0.35), digits).epochs == 1


def test_an_epochs_time_is_that_of_its_steps_validation_and_checkpoints(digits, tmp_path, monkeypatch):
    monkeypatch.setattr(bench, "image_seconds", lambda config, dataset, size, seconds: size / 100)
    settings = {"val_size": 237, "minutes": 1, "batch_size": 250, "epochs": 3, "small_epochs": 1, "small_size": 16}
    steps, ending = bench.epoch_seconds(quick_config(tmp_path, recipe="convnet", **settings), digits)
    # 1,000 of 1,200 images fill 4 steps; a third of the time of 237 images validates.
    assert steps == {32: pytest.approx(320), 16: pytest.approx(160)}
    assert ending == pytest.approx(79 * 0.32 + bench._SAVE_SECONDS + bench._EPOCH_SECONDS)


@pytest.mark.parametrize(("per_image", "timed"), [(0.0039, [(32, 0.1), (500, 9)]), (0.0041, [(32, 0.1)])])
def test_a_slow_processor_is_timed_on_few_images(digits, tmp_path, monkeypatch, per_image, timed):
    calls = []

    def time(step, hardware, seconds):
        calls.append((next(step.args[0]), seconds))
        return calls[-1][0] * per_image

    monkeypatch.setattr(bench, "training_steps", lambda config, *_: iter([config.batch_size]))
    monkeypatch.setattr(bench, "step_seconds", time)
    config = quick_config(tmp_path, batch_size=2000)
    assert bench.image_seconds(config, digits, 32, 9) == pytest.approx(per_image)
    assert calls == timed


def test_a_steps_time_is_the_mean_of_many_after_a_warm_up(monkeypatch):
    clock, durations = [0.0], iter([7.0, 5.0, *[2.0] * 100])  # the first steps take longer
    monkeypatch.setattr(bench.time, "perf_counter", lambda: clock[0])

    def step():
        clock[0] += next(durations)

    assert bench.step_seconds(step, torch.device("cpu"), seconds=10) == 2


# The comparison with a DataLoader


def test_the_comparison_reports_speeds_and_their_ratio(digits, tmp_path, capsys):
    config = datasets.resolve(quick_config(tmp_path, recipe="simple", batch_size=8), digits)
    result = bench.compare(config, digits)
    suite, loaders = result["suite_images_per_second"], result["loader_images_per_second"].values()
    loader = max(loaders)
    assert (min(suite, *loaders) > 0, result["ratio"]) == (True, suite / loader)
    bench.show_speeds("digits", {"simple": result})
    assert f"simple on digits: {suite:,.0f} images a second, {suite / loader:.2f} times" in capsys.readouterr().out


def test_the_loaders_images_are_the_splits_normalized(digits, tmp_path):
    split = digits.train[:20]
    augment = bench._augmentation(quick_config(tmp_path, crop=0, jitter=0.0, flip="none"), split)
    mean, std = (values.view(3, 1, 1) for values in split.mean_and_std)
    for pixels, expected in zip(split.images, (data.to_float(split.images) - mean) / std):
        image = augment(picture(pixels))
        torch.testing.assert_close(image, expected, atol=1e-5, rtol=1e-5)
    augment = bench._augmentation(quick_config(tmp_path, crop_scale=0.01), split)
    ramp = Image.fromarray(np.arange(0, 256, 8, dtype=np.uint8)[None].repeat(32, 0)).convert("RGB")
    ranges = [np.ptp(augment(ramp)[0].numpy()) * std[0].item() for _ in range(20)]
    assert min(ranges) < 0.5 < max(ranges)  # of 0.97: some show a part of the ramp, some nearly all of it


# The profile of a step


def test_the_matrix_rate_is_that_of_the_product_that_is_timed(monkeypatch):
    monkeypatch.setattr(bench, "step_seconds", lambda step, *_: 0.5 if step().shape == (64, 64) else math.nan)
    assert bench.matrix_rate(torch.device("cpu"), "float32") == 2 * 64**3 / 0.5


def test_the_profile_covers_both_image_sizes(digits, tmp_path, capsys):
    config = quick_config(tmp_path, recipe="convnet", epochs=3, small_epochs=1, batch_size=8, precision="float32")
    profile = bench.profile(datasets.resolve(config, digits), digits)
    assert list(profile["image_sizes"]) == [32, 24]
    full, small = profile["image_sizes"].values()
    assert full["flop"] > small["flop"] > 0
    for size, step in profile["image_sizes"].items():
        seconds = [row["seconds"] for row in step["operators"]]
        assert seconds == sorted(seconds, reverse=True)
        calls = {row["name"]: row["calls"] for row in step["operators"]}
        assert calls[f"convolution_backward 8x3x{size}x{size} * 32x3x3x3"] == 1
        assert calls["_fused_adam_"] == 1
    full["kernels"] = [{"name": "void at::native::sm90_gemm", "calls": 3, "seconds": full["seconds"] / 2}]
    bench.show_profile(json.loads(json.dumps(profile)))
    shown = capsys.readouterr().out
    assert "32x32 pixels: 3 kernels a step, which take 50% of its time" in " ".join(shown.split())
    assert "sm90_gemm" in shown
    assert "24x24 pixels: " in shown
    assert "convolution_backward" in shown


def test_the_benchmark_resolves_each_recipe_and_writes_its_values(tmp_path, monkeypatch):
    monkeypatch.setattr(bench, "compare", lambda config, _: {"model": config.model, "flip": config.flip})
    monkeypatch.setattr(bench, "profile", lambda config, _: {"recipe": config.recipe, "precision": config.precision})
    for name in ("show_profile", "show_speeds"):
        monkeypatch.setattr(bench, name, lambda *_: None)
    bench.run(quick_config(tmp_path, precision="float32"))
    assert json.loads((tmp_path / "bench.json").read_text()) == {
        "profile": {"recipe": "fast", "precision": "float32"},
        "speeds": {name: {"model": name, "flip": "none"} for name in ("simple", "convnet")},
    }
