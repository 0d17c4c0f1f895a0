import os
import time

import numpy as np
import pytest
import torch
from PIL import Image

from cifar import images
from cifar.errors import UserError
from cifar.images import FITS, decode, decode_all, read_rgb
from image_files import COLORS, GOOD, GREYS, REFUSED, SIZE, quarters, sample, saved, wide


@pytest.mark.parametrize("kind", GOOD)
def test_every_kind_of_image_is_seen_as_a_person_sees_it(kind):
    make, expected = GOOD[kind]
    np.testing.assert_allclose(quarters(decode(make(), SIZE)), expected, atol=12)


# EXIF orientation -> the Image.Transpose that it undoes; one out of range is ignored.
TURNS = {1: None, 2: 0, 3: 3, 4: 1, 5: 5, 6: 2, 7: 6, 8: 4, 77: None}


@pytest.mark.parametrize("orientation", TURNS)
@pytest.mark.parametrize("format", ["JPEG", "PNG", "TIFF", "WEBP"])
def test_a_photo_is_turned_upright_and_an_orientation_out_of_range_is_ignored(format, orientation):
    exif = Image.Exif()
    exif[0x0112] = orientation
    turned = sample() if TURNS[orientation] is None else sample().transpose(TURNS[orientation])
    np.testing.assert_allclose(quarters(decode(saved(turned, format, exif=exif), SIZE)), COLORS, atol=12)


@pytest.mark.parametrize("exif", [b"rubbish", b"II*\x00\xff\xff\xff\xff", b"\xff" * 500])
def test_malformed_exif_is_ignored(exif):
    file = saved(sample(), "JPEG", exif=b"Exif\x00\x00" + exif, quality=95)
    np.testing.assert_allclose(quarters(decode(file, SIZE)), COLORS, atol=12)


def test_an_image_of_the_networks_size_keeps_every_pixel(digits):
    for image in digits.test.images[:20]:
        assert torch.equal(decode(saved(Image.fromarray(image.permute(1, 2, 0).numpy()), "PNG"), SIZE), image)


@pytest.mark.parametrize("kind", [(np.uint16, 257), (np.int32, 257), (np.float32, 1 / 255)])
def test_large_greyscale_of_many_bits_with_one_brighter_pixel_is_read(kind):
    large = np.array(wide(*kind).resize((3000, 3000), Image.Resampling.NEAREST))
    large[0, 0] = large.max() * 1.1
    np.testing.assert_allclose(quarters(decode(saved(Image.fromarray(large), "TIFF"), SIZE)), GREYS, atol=12)


def test_a_wide_image_is_cropped_to_its_middle_or_kept_whole_on_white():
    pixels = np.zeros((30, 90, 3), dtype=np.uint8)
    pixels[:, 30:60] = (200, 100, 50)
    cropped, kept = (decode(saved(Image.fromarray(pixels), "PNG"), SIZE, fit) for fit in FITS)
    assert cropped[:, 2:-2, 2:-2].flatten(1).float().std(1).max() < 1
    assert kept[:, 2, 16].tolist() == [255, 255, 255]
    assert kept[:, 16, 16].tolist() == pytest.approx([200, 100, 50], abs=3)
    assert kept[:, 16, 3].tolist() == pytest.approx([0, 0, 0], abs=3)


@pytest.mark.parametrize("fit", FITS)
@pytest.mark.parametrize("size", [(1, 1), (1, 1000), (3000, 2), (5000, 5000)])
def test_any_size_up_to_25_megapixels_is_read(size, fit):
    started = time.perf_counter()
    assert decode(saved(Image.new("RGB", size, (9, 99, 199)), "PNG"), SIZE, fit)[:, 16, 16].tolist() == [9, 99, 199]
    assert time.perf_counter() - started < 5


@pytest.mark.parametrize("kind", REFUSED)
def test_a_bad_file_is_refused_in_one_sentence(kind):
    make, sentence = REFUSED[kind]
    content = make()
    started = time.perf_counter()
    with pytest.raises(UserError, match=sentence) as caught:
        decode(content, SIZE)
    assert time.perf_counter() - started < 5
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("format", ["PNG", "JPEG", "WEBP", "GIF", "TIFF", "AVIF", "BMP", "PPM"])
def test_a_file_that_is_truncated_or_has_flipped_bits_never_crashes_the_decoder(format):
    rng = np.random.default_rng(0)
    whole = saved(Image.fromarray(rng.integers(0, 256, (64, 64, 3), dtype=np.uint8)), format)
    damaged = [whole[:length] for length in np.linspace(1, len(whole) - 1, 20).astype(int)]
    for _ in range(40):
        flipped = bytearray(whole)
        for position in rng.integers(0, len(whole), 5):
            flipped[position] ^= 1 << int(rng.integers(8))
        damaged.append(bytes(flipped))
    results = decode_all(damaged, SIZE)
    assert sum(isinstance(result, UserError) for result in results[:20]) >= 15
    known = ("the image is damaged", "the image has", "the file is")
    assert all(str(result).startswith(known) for result in results if isinstance(result, UserError))


def test_what_is_not_a_regular_file_is_refused_and_the_others_are_still_decoded(tmp_path):
    (tmp_path / "good.png").write_bytes(saved(sample(), "PNG"))
    os.mkfifo(tmp_path / "pipe.png")
    missing, pipe, good = decode_all([tmp_path / f"{name}.png" for name in ("none", "pipe", "good")], SIZE)
    assert "cannot be read: No such file" in str(missing)
    assert str(pipe) == "this is not a regular file"
    assert good.shape == (3, SIZE, SIZE)


def test_an_image_that_is_too_large_to_be_shown_is_none(tmp_path, monkeypatch):
    Image.new("RGB", (20, 10)).save(tmp_path / "cat.png")
    assert read_rgb(tmp_path / "cat.png").size == (20, 10)
    monkeypatch.setattr(images, "_MAX_BYTES", 20)
    assert read_rgb(tmp_path / "cat.png") is None
    assert read_rgb(tmp_path / "none.png") is None
