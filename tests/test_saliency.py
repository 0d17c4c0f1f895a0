import io

import numpy as np
import pytest
import torch
from torch import nn

from cifar import analysis, saliency
from cifar.errors import UserError
from cifar.runs import Run


class Corners(nn.Module):
    """Class 0 is the mean of the upper left quarter, class 1 that of the lower right one."""

    def __init__(self):
        super().__init__()
        self.scale = nn.Parameter(torch.ones(()))

    def forward(self, images):
        grey = images.mean(1)
        return self.scale * torch.stack([grey[:, :4, :4].mean((1, 2)), grey[:, 4:, 4:].mean((1, 2))], 1)


@pytest.mark.parametrize(
    ("label", "peak", "rest"), [(0, np.s_[:3, :3], np.s_[5:, 5:]), (1, np.s_[5:, 5:], np.s_[:3, :3])]
)
def test_the_pixels_that_decided_are_those_that_the_logit_is_made_of(label, peak, rest):
    heat = saliency.saliency(Corners(), torch.zeros(3, 8, 8, dtype=torch.uint8), label, precision="float32")
    assert heat.shape == (8, 8)
    assert torch.allclose(heat[peak], torch.ones(3, 3))
    assert (heat[rest] == 0).all()


def test_what_is_written_is_read(tmp_path):
    images = torch.zeros(5, 3, 8, 8, dtype=torch.uint8)
    saliency.write(Run(tmp_path), Corners(), images, {3: 1, 0: 0}, precision="float32")
    heats = saliency.read(Run(tmp_path), 8)
    assert list(heats) == [3, 0]
    expected = saliency.saliency(Corners(), images[3], 1, precision="float32")
    np.testing.assert_allclose(heats[3], expected, atol=1 / 500)


def test_a_run_without_mistakes_has_an_empty_file_and_one_without_the_file_none(tmp_path):
    assert saliency.read(Run(tmp_path), 8) == {}
    saliency.write(Run(tmp_path), Corners(), torch.zeros(5, 3, 8, 8, dtype=torch.uint8), {}, precision="float32")
    assert saliency.read(Run(tmp_path), 8) == {}


def packed(**arrays) -> bytes:
    file = io.BytesIO()
    np.savez_compressed(file, **arrays)
    return file.getvalue()


GREYS = np.zeros((1, 8, 8), np.uint8)


@pytest.mark.parametrize(
    "content",
    [
        b"",
        b"PK\x03\x04 nothing",
        packed(index=[3], heat=GREYS)[:-20],
        packed(index=[3]),
        packed(index=[3, 4], heat=GREYS),
        packed(index=[3], heat=GREYS[:, :4]),
        packed(index=[3], heat=np.full((1, 8, 8), np.nan)),
        packed(index=[None], heat=GREYS),
        packed(index=[3], heat=np.zeros((2000, 240, 240), np.uint8)),
    ],
)
def test_a_damaged_file_is_one_sentence(tmp_path, content):
    (tmp_path / "saliency.npz").write_bytes(content)
    with pytest.raises(UserError, match=r"saliency.npz is damaged: [^\n]*; `invoke evaluate --run .*` makes it anew$"):
        saliency.read(Run(tmp_path), 8)


def test_an_evaluation_explains_every_picture_that_it_names(evaluated_run):
    named = {picture["index"] for picture in analysis.pictures(evaluated_run.read("analysis.json"))}
    heats = saliency.read(evaluated_run, 32)
    assert set(heats) == named
    assert all(heat.shape == (32, 32) and heat.max() == 1 for heat in heats.values())


def test_the_overlay_is_grey_where_nothing_decided_and_orange_where_all_did():
    picture = np.full((2, 2, 3), 100, dtype=np.uint8)
    shown = saliency.overlay(picture, np.array([[0.0, 1.0], [0.0, 1.0]]))
    assert (abs(shown[:, 0].astype(int) - 100) <= 1).all()
    red, green, blue = shown[0, 1].astype(int)
    assert red > 150
    assert red > green > blue
