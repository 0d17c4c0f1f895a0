import timeit

import torch
import torch.nn.functional as F

from cifar import profiling, tables
from cifar.config import Config


def test_a_convolutions_arithmetic_and_traffic_are_counted():
    images = torch.zeros(2, 3, 8, 8, requires_grad=True)
    weights = torch.zeros(5, 3, 3, 3, requires_grad=True)
    with profiling.OperatorCosts() as costs:
        F.conv2d(images, weights, padding=1).backward(torch.ones(2, 5, 8, 8))
    forward = costs.by_convolution["3 to 5, 3x3, on 8x8 pixels, forward"]
    backward = costs.by_convolution["3 to 5, 3x3, on 8x8 pixels, backward"]
    flop = 2 * (3 * 3 * 3) * (2 * 5 * 8 * 8)  # a multiplication and an addition for each weight of each output
    assert (forward.calls, forward.flop) == (1, flop)
    assert (backward.calls, backward.flop) == (1, 2 * flop)  # for the images and for the weights
    assert forward.bytes == 4 * (2 * 3 * 8 * 8 + 5 * 3 * 3 * 3 + 2 * 5 * 8 * 8)


def test_views_move_no_memory():
    with profiling.OperatorCosts() as costs:
        torch.zeros(10, 10).t().add(1.0)
    assert costs.by_operator["aten.t"].bytes == 0
    assert costs.by_operator["aten.add"].bytes == 4 * (100 + 100)


def test_the_matrix_rate_is_that_of_the_product_it_times():
    one, other = torch.randn(2, 2048, 2048)
    seconds = min(timeit.repeat(lambda: one @ other, number=1, repeat=3))
    rate = 2 * 2048**3 / seconds
    assert rate / 5 < profiling.matrix_rate(torch.device("cpu"), "float32", repeats=1) < rate * 5


def test_a_profile_covers_both_image_sizes_and_adds_up(digits, capsys, monkeypatch):
    monkeypatch.setattr(profiling, "_MATRIX_SIDE", 256)
    config = Config.create({"device": "cpu", "batch_size": "16", "precision": "float32"})
    profile = profiling.profile(config, digits, steps=2)
    assert list(profile["sides"]) == [32, 24]
    full, small = profile["sides"].values()
    assert full["flop"] > small["flop"]
    for step in (full, small):
        convolutions = [row["seconds"] for row in step["operators"] if row["name"].startswith("aten.convolution")]
        torch.testing.assert_close(sum(row["seconds"] for row in step["convolutions"]), sum(convolutions))
        assert step["augmentation_seconds"] < step["seconds"]
    tables.show_profile(profile)
    shown = capsys.readouterr().out
    assert "24 to 64, 3x3" in shown
    assert "…" not in shown
    assert "page faults" in shown
