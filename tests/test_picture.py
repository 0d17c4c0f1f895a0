import os
import struct
import subprocess
import sys
import time

import numpy as np
import pytest
import torch
from PIL import Image, TiffImagePlugin

from cifar.config import PROJECT
from cifar.errors import UserError
from cifar.picture import FITS, decode, read_rgb
from picture_files import COLOURS, GOOD, GREYS, OVER_WHITE, REFUSED, SIZE, picture, quarters, saved, wide, with_alpha


@pytest.mark.parametrize("kind", GOOD)
def test_every_kind_of_picture_is_seen_as_a_person_sees_it(kind):
    make, expected = GOOD[kind]
    np.testing.assert_allclose(quarters(decode(make(), SIZE)), expected, atol=12)


TURNS = {
    1: None,
    2: Image.Transpose.FLIP_LEFT_RIGHT,
    3: Image.Transpose.ROTATE_180,
    4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE,
    6: Image.Transpose.ROTATE_90,
    7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_270,
}


@pytest.mark.parametrize("orientation", TURNS)
@pytest.mark.parametrize("format", ["JPEG", "PNG", "TIFF", "WEBP"])
def test_a_turned_photo_is_turned_upright(format, orientation):
    exif = Image.Exif()
    exif[0x0112] = orientation
    turned = picture().transpose(TURNS[orientation]) if TURNS[orientation] is not None else picture()
    np.testing.assert_allclose(quarters(decode(saved(turned, format, exif=exif), SIZE)), COLOURS, atol=12)


@pytest.mark.parametrize(
    "exif", [b"Exif\x00\x00rubbish", b"Exif\x00\x00II*\x00\xff\xff\xff\xff", b"Exif\x00\x00" + b"\xff" * 500]
)
def test_malformed_exif_is_passed_over(exif):
    np.testing.assert_allclose(
        quarters(decode(saved(picture(), "JPEG", exif=exif, quality=95), SIZE)), COLOURS, atol=12
    )


def test_an_orientation_out_of_range_is_passed_over():
    exif = Image.Exif()
    exif[0x0112] = 77
    np.testing.assert_allclose(quarters(decode(saved(picture(), "JPEG", exif=exif), SIZE)), COLOURS, atol=20)


def test_a_picture_of_the_networks_size_keeps_its_every_pixel(digits):
    for image in digits.test.images[:20]:
        array = image.permute(1, 2, 0).numpy()
        for source in (array, Image.fromarray(array), saved(Image.fromarray(array), "PNG")):
            assert torch.equal(decode(source, SIZE), image)


@pytest.mark.parametrize("kind", [(np.uint16, 257), (np.int32, 257), (np.float32, 1 / 255)])
def test_large_wide_greyscale_is_taken(kind):
    dtype, scale = kind
    large = wide(dtype, scale).resize((3000, 3000), Image.Resampling.NEAREST)
    np.testing.assert_allclose(quarters(decode(saved(large, "TIFF"), SIZE)), GREYS, atol=12)


def test_a_wide_picture_is_cropped_to_its_middle_or_kept_whole_on_white():
    pixels = np.zeros((30, 90, 3), dtype=np.uint8)
    pixels[:, 30:60] = (200, 100, 50)
    cropped, kept = (decode(pixels, SIZE, fit) for fit in FITS)
    assert cropped[:, 2:-2, 2:-2].flatten(1).float().std(1).max() < 1
    assert kept[:, 2, 16].tolist() == [255, 255, 255]
    assert kept[:, 16, 16].tolist() == pytest.approx([200, 100, 50], abs=3)
    assert kept[:, 16, 3].tolist() == pytest.approx([0, 0, 0], abs=3)


@pytest.mark.parametrize("size", [(1, 1), (1, 1000), (3000, 2), (5000, 5000)])
def test_any_size_up_to_25_megapixels_is_taken(size):
    started = time.perf_counter()
    assert decode(saved(Image.new("RGB", size, (9, 99, 199)), "PNG"), SIZE)[:, 16, 16].tolist() == [9, 99, 199]
    assert time.perf_counter() - started < 2


def test_a_large_webp_is_turned_and_laid_over_white_as_a_small_one():
    exif = Image.Exif()
    exif[0x0112] = 6  # turned by a quarter: the camera's top is the right
    large = with_alpha("RGBA").resize((2100, 2100), Image.Resampling.NEAREST)
    options = {"lossless": True, "exif": exif}
    turned = OVER_WHITE[[2, 0, 3, 1]]
    for image in (large, with_alpha("RGBA")):
        np.testing.assert_allclose(quarters(decode(saved(image, "WEBP", **options), SIZE)), turned, atol=2)


MEMORY = """
import re, sys
from pathlib import Path
from cifar.picture import decode

def peak():
    return int(re.search(r"VmHWM:\\s*(\\d+) kB", Path("/proc/self/status").read_text())[1]) / 1024

decode(Path(sys.argv[1]), 32)  # a small one first, for what is imported on the way
before = peak()
decode(Path(sys.argv[2]), 32)
print(peak() - before)
"""


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="reads /proc")
def test_a_webp_of_25_megapixels_takes_under_300_megabytes(tmp_path):
    for name, side in (("small", 2001), ("large", 5000)):
        (tmp_path / name).write_bytes(saved(Image.new("RGB", (side, side), "red"), "WEBP", method=0))
    command = [sys.executable, "-c", MEMORY, str(tmp_path / "small"), str(tmp_path / "large")]
    megabytes = float(subprocess.run(command, cwd=PROJECT, capture_output=True, text=True, check=True).stdout)
    assert 60 < megabytes < 300


@pytest.mark.parametrize("kind", REFUSED)
def test_what_is_no_good_picture_is_refused_in_one_sentence(kind):
    make, sentence = REFUSED[kind]
    content = make()
    started = time.perf_counter()
    with pytest.raises(UserError, match=sentence) as caught:
        decode(content, SIZE)
    assert time.perf_counter() - started < 2
    assert "\n" not in str(caught.value)


def outcome(content: bytes) -> str:
    """The sentence of refusal, or nothing for a picture that is decoded."""
    try:
        return "" if decode(content, SIZE).shape == (3, SIZE, SIZE) else "wrong shape"
    except UserError as error:
        return str(error)


@pytest.mark.parametrize("format", ["PNG", "JPEG", "WEBP", "GIF", "TIFF", "AVIF", "BMP", "PPM"])
def test_a_file_truncated_anywhere_is_refused_or_seen_but_never_breaks(format):
    noise = Image.fromarray(np.random.default_rng(0).integers(0, 256, (64, 64, 3), dtype=np.uint8))
    whole = saved(noise, format)
    lengths = np.linspace(1, len(whole) - 1, 20).astype(int).tolist()
    outcomes = [outcome(whole[:length]) for length in lengths]
    assert sum(len(sentence) > 0 for sentence in outcomes) >= 15
    assert all(
        sentence.startswith(("the picture is damaged", "the file is not a picture"))
        for sentence in outcomes
        if sentence
    )


@pytest.mark.parametrize("format", ["PNG", "JPEG", "WEBP", "GIF", "TIFF", "AVIF"])
def test_flipped_bits_never_break_the_decoder(format):
    whole = bytearray(saved(picture(), format))
    rng = np.random.default_rng(0)
    for _ in range(40):
        damaged = bytearray(whole)
        for place in rng.integers(0, len(whole), 5):
            damaged[place] ^= 1 << int(rng.integers(8))
        assert "\n" not in outcome(bytes(damaged))


def test_a_tiff_that_claims_more_than_it_has_is_refused():
    tags = TiffImagePlugin.ImageFileDirectory_v2()
    content = bytearray(saved(picture(), "TIFF", tiffinfo=tags))
    width = content.index(struct.pack("<HHI", 256, 4, 1)) + 8 if struct.pack("<HHI", 256, 4, 1) in content else None
    if width is None:
        width = content.index(struct.pack("<HHI", 256, 3, 1)) + 8
    content[width : width + 2] = struct.pack("<H", 5000)
    with pytest.raises(UserError):
        decode(bytes(content), SIZE)


@pytest.mark.skipif(not hasattr(os, "mkfifo"), reason="no named pipes here")
def test_a_named_pipe_is_refused_and_not_waited_for(tmp_path):
    os.mkfifo(tmp_path / "pipe.png")
    with pytest.raises(UserError, match="this is not a file"):
        decode(tmp_path / "pipe.png", SIZE)


def test_missing_files_and_folders_are_refused(tmp_path):
    with pytest.raises(UserError, match="cannot be read: No such file"):
        decode(tmp_path / "none.png", SIZE)
    with pytest.raises(UserError, match="the folder holds no pictures"):
        decode(tmp_path, SIZE)


def test_a_picture_that_is_too_large_to_be_shown_is_none(tmp_path, monkeypatch):
    Image.new("RGB", (20, 10)).save(tmp_path / "cat.png")
    assert read_rgb(tmp_path / "cat.png").size == (20, 10)
    monkeypatch.setattr("cifar.picture._MOST_PIXELS", 199)
    assert read_rgb(tmp_path / "cat.png") is None
