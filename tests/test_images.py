import io
import os
import queue
import sys
import threading
import time
import zlib
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from cifar import images
from cifar.errors import UserError
from cifar.images import FITS, as_source, decode, decode_all, read_rgb
from commands import run
from image_files import ANY, COLORS, COSTLY, GOOD, GREYS, REFUSED, SIZE, empty_scans, png, quarters, sample, saved, wide
from processes import slowly, wait_until


def from_file_and_memory(file: bytes) -> list[np.ndarray]:
    """Decode a file, and the image that Pillow has opened from it."""
    return [quarters(decode(source, SIZE)) for source in (file, as_source(Image.open(io.BytesIO(file))))]


@pytest.mark.parametrize("kind", GOOD)
def test_every_kind_of_image_is_seen_as_a_person_sees_it(kind):
    make, expected = GOOD[kind]
    seen = [quarters(decode(make(), SIZE))] if "long" in kind else from_file_and_memory(make())  # Pillow refuses those
    for colors in seen:
        np.testing.assert_allclose(colors, expected, atol=12)


@pytest.mark.parametrize("mode", ["YCbCr", "HSV"])
def test_an_image_in_memory_of_a_mode_that_few_files_have_is_seen_as_a_person_sees_it(mode):
    np.testing.assert_allclose(quarters(decode(as_source(sample().convert(mode)), SIZE)), COLORS, atol=12)


# EXIF orientation -> the Image.Transpose that it undoes; one out of range is ignored.
TURNS = {1: None, 2: 0, 3: 3, 4: 1, 5: 5, 6: 2, 7: 6, 8: 4, 77: None}


@pytest.mark.parametrize("orientation", TURNS)
@pytest.mark.parametrize("format", ["JPEG", "PNG", "TIFF", "WEBP"])
def test_a_photo_is_turned_upright_and_an_orientation_out_of_range_is_ignored(format, orientation):
    exif = Image.Exif()
    exif[0x0112] = orientation
    turned = sample() if TURNS[orientation] is None else sample().transpose(TURNS[orientation])
    for colors in from_file_and_memory(saved(turned, format, exif=exif)):
        np.testing.assert_allclose(colors, COLORS, atol=12)


@pytest.mark.parametrize("exif", [b"rubbish", b"II*\x00\xff\xff\xff\xff", b"\xff" * 500])
def test_malformed_exif_is_ignored(exif):
    file = saved(sample(), "JPEG", exif=b"Exif\x00\x00" + exif, quality=95)
    np.testing.assert_allclose(quarters(decode(file, SIZE)), COLORS, atol=12)


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
@pytest.mark.parametrize("format", ["PNG", "JPEG"])
@pytest.mark.parametrize("size", [(1, 1), (1, 1000), (3000, 2), (3000, 40), (5000, 5000), *slowly([(10_000, 10_000)])])
def test_any_size_up_to_100_megapixels_is_read(size, format, fit):
    color = decode(saved(Image.new("RGB", size, (9, 99, 199)), format), SIZE, fit)[:, 16, 16]
    assert color.tolist() == pytest.approx([9, 99, 199], abs=3)


def test_a_large_photo_that_jpeg_unpacks_at_a_part_of_its_size_is_the_same_image():
    noise = np.random.default_rng(0).integers(0, 256, (15, 20, 3), dtype=np.uint8)
    photo = Image.fromarray(noise).resize((2000, 1500), Image.Resampling.BICUBIC)
    file = saved(photo, "JPEG", quality=95, subsampling=0)
    whole = np.array(photo.resize((SIZE, SIZE), Image.Resampling.BICUBIC, box=(250, 0, 1750, 1500)))
    np.testing.assert_allclose(decode(file, SIZE).permute(1, 2, 0).numpy().astype(int), whole, atol=4)


@pytest.mark.parametrize("kind", REFUSED)
def test_a_bad_file_is_refused_in_one_sentence(kind):
    make, sentence = REFUSED[kind]
    content = make()
    started = time.perf_counter()
    with pytest.raises(UserError, match=sentence) as caught:
        decode(content, SIZE)
    assert time.perf_counter() - started < 5
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("shape", "key", "row", "expected"),  # width, height, bits and color type
    [
        ((8, 8, 16, 2), b"\x12\x34" * 3, b"\x12\x34" * 24, [255]),  # transparent, so white
        ((8, 8, 16, 2), b"\x12\x34" * 3, b"\x34\0" * 24, [0x34]),
        ((8, 8, 16, 0), b"\x12\x34", b"\x12\x34" * 8, [255]),
        ((8, 8, 16, 0), b"\x12\x34", b"\x34\0" * 8, [0x34]),
        ((8, 8, 16, 0), b"\x12\x34", b"\x12\x35" * 8, [0x12]),
        ((4, 4, 2, 0), b"\0\1", bytes([0b01_10_01_01]), [170, 255]),
        ((2, 4, 4, 0), b"\0\1", b"\x15", [85, 255]),
    ],
)
def test_the_transparent_color_of_a_png_is_white(shape, key, row, expected):
    content = png((b"tRNS", key), shape=shape, pixels=zlib.compress((b"\0" + row) * shape[1]))
    decoded = [decode(content, shape[0])]
    if shape[2:] != (16, 2):  # which Pillow does not have
        decoded.append(decode(as_source(Image.open(io.BytesIO(content))), shape[0]))
    assert [sorted(image.unique().tolist()) for image in decoded] == [expected] * len(decoded)


@pytest.mark.parametrize("seed", [0, *slowly(range(1, 20))])
@pytest.mark.parametrize("format", ["PNG", "JPEG", "WEBP", "GIF", "TIFF", "AVIF", "BMP", "PPM"])
def test_a_file_that_is_truncated_or_has_flipped_bits_never_crashes_the_decoder(format, seed):
    rng = np.random.default_rng(seed)
    whole = saved(Image.fromarray(rng.integers(0, 256, (64, 64, 3), dtype=np.uint8)), format)
    damaged = [whole[:length] for length in np.linspace(1, len(whole) - 1, 20).astype(int)]
    for _ in range(40):
        flipped = bytearray(whole)
        for position in rng.integers(0, len(whole), 5):
            flipped[position] ^= 1 << int(rng.integers(8))
        damaged.append(bytes(flipped))
    results = decode_all(damaged, SIZE)
    assert sum(isinstance(result, UserError) for result in results[:20]) >= 15
    known = ("the image is damaged", "the image has", "the file is", "the image takes over 1 GB")
    assert all(str(result).startswith(known) for result in results if isinstance(result, UserError))


def test_what_is_not_a_regular_file_is_refused_and_the_others_are_still_decoded(tmp_path):
    (tmp_path / "good.png").write_bytes(saved(sample(), "PNG"))
    os.mkfifo(tmp_path / "pipe.png")
    missing, pipe, good = decode_all([tmp_path / f"{name}.png" for name in ("none", "pipe", "good")], SIZE)
    assert str(missing) == "No such file or directory"
    assert str(pipe) == "this is not a regular file"
    assert good.shape == (3, SIZE, SIZE)


def test_an_image_that_is_too_large_to_be_shown_is_none(tmp_path, monkeypatch):
    Image.new("RGB", (20, 10)).save(tmp_path / "cat.png")
    assert read_rgb(tmp_path / "cat.png").size == (20, 10)
    monkeypatch.setattr(images, "MAX_BYTES", 20)
    assert read_rgb(tmp_path / "cat.png") is None
    assert read_rgb(tmp_path / "none.png") is None
    with pytest.raises(UserError, match="the file has over 0 MB: make the image smaller"):
        decode(bytes(21), SIZE)


# The worker processes


@pytest.fixture
def workers(monkeypatch):
    """Workers of this test alone: at most two."""
    own = queue.LifoQueue()
    own.put(None)
    own.put(None)
    monkeypatch.setattr(images, "_workers", own)
    yield own
    while not own.empty():
        if worker := own.get():
            worker.stop()


@pytest.mark.parametrize(
    ("kind", "limit"),
    [
        ("TIFF, 200 tags of the same 5 MB", "1 GB of memory"),
        ("JPEG, Exif of 300 tags of 4 MB", "1 GB of memory"),
        ("JPEG, 100,000 empty scans", "0.5 seconds"),
        ("JPEG, 80,000 Exif segments", "0.5 seconds"),
        ("GIF, 38,000 comments", "0.5 seconds"),
        ("PPM, 4,500,000 comments", "0.5 seconds"),
        ("BMP, RLE, 2,000,000 steps", "0.5 seconds"),
    ],
)
def test_an_image_that_exceeds_a_limit_is_refused_and_its_neighbors_are_decoded(workers, monkeypatch, kind, limit):
    monkeypatch.setattr(images, *(("_SECONDS", 0.5) if "seconds" in limit else ("_MEMORY", 300_000_000)))
    content, good = COSTLY[kind][0](), saved(sample(), "PNG")
    started = time.perf_counter()
    first, refused, last = images._decode_group([good, content, good], SIZE, "crop")
    assert time.perf_counter() - started < 6
    assert str(refused) == f"the image takes over {limit} to decode: make it smaller, or save it again as PNG or JPEG"
    assert torch.equal(first, last)
    np.testing.assert_allclose(quarters(last), COLORS, atol=12)


@pytest.mark.parametrize("kind", ["PNG, Exif of 300 tags of 4 MB", "WebP, Exif of 300 tags of 4 MB"])
def test_exif_that_exceeds_the_memory_is_ignored(workers, monkeypatch, kind):
    monkeypatch.setattr(images, "_MEMORY", 300_000_000)
    assert decode(COSTLY[kind][0](), SIZE).shape == (3, SIZE, SIZE)


@pytest.mark.slow
@pytest.mark.parametrize("kind", COSTLY)
def test_a_costly_image_takes_5_seconds_and_1_GB_at_most_and_others_are_answered_meanwhile(workers, kind):
    make, expected = COSTLY[kind]
    content, good = make(), saved(sample(), "PNG")
    with images._worker() as worker, ThreadPoolExecutor() as pool:
        started = time.perf_counter()
        answer = pool.submit(lambda: list(worker.decode([content], SIZE, "crop")))
        waits = []
        while not answer.done():
            asked = time.perf_counter()
            decode(good, SIZE)
            waits.append(time.perf_counter() - asked)
            try:
                status = Path(f"/proc/{worker.process.pid}/status").read_text()
                peak = int(status.split("VmHWM:")[1].split()[0]) * 1024
            except (OSError, IndexError):  # it has just ended
                continue
            assert peak < 10**9
        assert time.perf_counter() - started < 6
    (result,) = answer.result()
    assert max(waits, default=0) < 3  # none if it is answered at once
    if expected != ANY:
        assert isinstance(result, UserError) == bool(expected)
        assert not expected or expected in str(result)


def test_answers_in_many_threads_are_not_mixed_up(workers):
    files = [saved(Image.new("RGB", (40, 40), (value, 0, 255 - value)), "PNG") for value in range(256)]
    with ThreadPoolExecutor(16) as pool:
        colors = [image[:, 0, 0].tolist() for image in pool.map(lambda file: decode(file, SIZE), files)]
    assert colors == [[value, 0, 255 - value] for value in range(256)]
    assert workers.qsize() == 2


def test_a_worker_that_was_killed_is_replaced(workers):
    good = saved(sample(), "PNG")
    expected = decode(good, SIZE)
    process, slow = workers.queue[-1].process, empty_scans(100_000)
    threading.Timer(0.2, process.kill).start()
    with pytest.raises(UserError, match="the image made its decoder crash: make it smaller"):
        decode(slow, SIZE)
    assert torch.equal(decode(good, SIZE), expected)
    process = workers.queue[-1].process
    process.kill()
    process.wait()
    assert torch.equal(decode(good, SIZE), expected)


def test_an_interrupted_answer_is_not_given_to_the_next_image(workers, monkeypatch):
    def interrupt(*_):
        raise KeyboardInterrupt

    good, other = saved(sample(), "PNG"), saved(Image.new("RGB", (9, 9)), "PNG")
    with monkeypatch.context() as patch:
        patch.setattr(images._Worker, "_read", interrupt)
        with pytest.raises(KeyboardInterrupt):
            decode(other, SIZE)
    np.testing.assert_allclose(quarters(decode(good, SIZE)), COLORS, atol=12)


def test_a_worker_that_cannot_be_started_is_one_sentence(workers, monkeypatch):
    monkeypatch.setattr(images.decoder, "__file__", "/none")
    with pytest.raises(UserError, match="the image decoder cannot be started: too little memory"):
        decode_all([saved(sample(), "PNG")], SIZE)
    monkeypatch.setattr(sys, "executable", "/none")
    with pytest.raises(UserError, match="the image decoder cannot be started: No such file"):
        decode_all([saved(sample(), "PNG")], SIZE)


@pytest.mark.parametrize("end", ["pass", *slowly(["os.kill(os.getpid(), 9)"])])
def test_workers_end_with_the_program_and_take_no_module_from_the_working_directory(tmp_path, end):
    (tmp_path / "json.py").write_text("raise SystemExit")
    (tmp_path / "good.png").write_bytes(saved(sample(), "PNG"))
    program = f"""if True:
        import os, sys
        from pathlib import Path
        from cifar import images
        os.chdir({str(tmp_path)!r})
        assert images.decode(Path("good.png"), 32).shape == (3, 32, 32)
        print(images._workers.queue[-1].process.pid, flush=True)
        {end}"""
    _, process, err = run("-W", "error", "-c", program)
    assert err == ""
    wait_until(lambda: not Path(f"/proc/{int(process)}").exists(), seconds=5)
