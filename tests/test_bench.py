from dataclasses import replace

import pytest
import torch

from cifar import bench, data
from cifar.config import Config


@pytest.fixture
def config() -> Config:
    return Config.create({"recipe": "simple", "batch_size": "8", "device": "cpu"})


def test_the_comparison_reports_speeds_and_their_ratio(config, digits, monkeypatch):
    monkeypatch.setattr(bench, "_WORKERS", (0,))
    monkeypatch.setattr(bench, "_WARM_STEPS", 1)
    result = bench.compare(config, digits, steps=2, rounds=1)
    assert result["suite_images_per_second"] > 0
    assert result["loader_images_per_second"][0] > 0
    assert result["ratio"] == result["suite_images_per_second"] / result["loader_images_per_second"][0]


def test_the_loaders_pictures_are_the_splits_normalized(config, digits):
    split = digits.train[:20]
    pictures = bench._Pictures(split, replace(config, crop=0, jitter=0.0, flip="none"))
    mean, std = (values.view(3, 1, 1) for values in split.mean_and_std())
    for index in range(20):
        image, label = pictures[index]
        torch.testing.assert_close(image, (data.to_float(split.images)[index] - mean) / std, atol=1e-5, rtol=1e-5)
        assert label == split.labels[index]


def test_the_loader_cuts_out_as_much_as_the_suite(config, digits):
    pictures = bench._Pictures(digits.train[:20], replace(config, cutout=12))
    assert all((pictures[index][0] == 0).all(0).sum() == 144 for index in range(20))
