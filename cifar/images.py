"""The image decoder: from any image file, as a person sees it, to what a network takes.

Worker processes decode the files within limits (decoder.py), because a small file can ask for any amount of memory and
time, and because a file that makes a decoder crash must not end this program.
"""

import atexit
import contextlib
import io
import json
import os
import queue
import subprocess
import sys
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any, cast

import numpy as np
import torch
from joblib import cpu_count
from PIL import Image, ImageOps
from torch import Tensor

from cifar import decoder
from cifar.errors import UserError, describe

FITS = ("crop", "letterbox")
Source = Path | bytes
AnyImage = Source | str | Image.Image | np.ndarray | Tensor

MAX_BYTES = 400_000_000  # 100 million pixels of 4 bytes
_MEMORY = 950_000_000  # bytes of data, those of Python and its libraries included
_SECONDS = 5  # for each image
_GROUP, _GROUP_BYTES = 25, 200_000  # that a worker gets at once
_TIFF_MODES = ("1", "L", "LA", "RGB", "RGBA", "CMYK", "LAB", "I", "F")
_CORES = min(32, cpu_count())
# Workers, None for those that have not been started; at least 4, so that slow images do not keep others waiting.
_workers: queue.LifoQueue["_Worker | None"] = queue.LifoQueue()
for _ in range(max(4, _CORES)):
    _workers.put(None)


def decode(source: Source, size: int, fit: str = "crop") -> Tensor:
    """Decode an image to uint8 (3, size, size): upright, in sRGB, on white, square.

    source: a file's path or its bytes. fit: `crop` takes the largest square in the middle; `letterbox` keeps
    everything and pads with white. An image that has this size already is not resampled. May be called in threads.
    Raises UserError for what is not an image, is damaged, has over 100 million pixels, or takes over 1 GB or 5 seconds.
    """
    (result,) = _decode_group([source], size, fit)
    if isinstance(result, UserError):
        raise result
    return result


def decode_all(sources: Sequence[Source], size: int, fit: str = "crop") -> list[Tensor | UserError]:
    """Decode images in parallel; each result is what `decode` returns or raises."""
    with ThreadPoolExecutor(_CORES) as pool:
        groups = pool.map(lambda group: _decode_group(group, size, fit), _groups(sources))
        return [result for group in groups for result in group]


def as_source(image: AnyImage) -> Source:
    """Return a path, or the bytes of a file: an image in memory becomes a TIFF or PNG, to be decoded as any other.

    Arrays are (H, W), (H, W, 3) or (H, W, 4), tensors (H, W), (3, H, W) or (4, H, W): uint8, or float in 0..1.
    Raises UserError for what is no image.
    """
    if isinstance(image, str):
        return Path(image)
    if isinstance(image, Path | bytes):
        return image
    if hasattr(image, "read"):
        return _read_opened(image)
    if isinstance(image, Tensor):
        image = image.detach().cpu()
        image = (image.float() if image.is_floating_point() else image).numpy()  # NumPy has no bfloat16
        image = np.moveaxis(image, 0, -1) if image.ndim == 3 else image
    if isinstance(image, np.ndarray):
        image = Image.fromarray(_pixels(image))
    if not isinstance(image, Image.Image):
        raise UserError(f"{type(image).__name__} is no image: give a path, bytes, an array, a tensor or Pillow's image")
    return _saved(image)


def _read_opened(file: Any) -> bytes:
    """Read an opened file. Raises UserError if it cannot be read as bytes."""
    try:
        content = file.read()
    except UnicodeDecodeError:
        content = ""
    except (OSError, ValueError) as error:  # it is closed, or only for writing
        raise UserError(f"the file cannot be read: {describe(error)}") from None
    if not isinstance(content, bytes):
        raise UserError("the file is open as text: open(path, 'rb') opens it as bytes")
    return content


def _saved(image: Image.Image) -> bytes:
    """Save Pillow's image as a TIFF or PNG that the decoder takes for the same image. Raises UserError if it cannot."""
    try:
        decoder.load(image)
        upright = ImageOps.exif_transpose(image)
        has_many_bits = upright.mode.startswith("I;16")  # whose transparent grey a PNG keeps
        if not has_many_bits and ("transparency" in upright.info or upright.mode.startswith("P")):  # so can a palette
            upright = upright.convert("RGBA")
        file = io.BytesIO()
        tags = {decoder.PHOTOMETRIC: 0} if decoder.is_white_zero(image) else {}
        if has_many_bits or (upright.mode, image.format) == ("I", "PPM"):  # 16 bits by Pillow
            native = upright if upright.mode == "I;16" else upright.convert("I").convert("I;16")  # of other byte orders
            kind = "TIFF" if image.format == "TIFF" else "PNG"  # only a TIFF file can mean 12 of 16 bits
            native.save(file, kind, tiffinfo=tags)
        else:
            saved = upright if upright.mode in _TIFF_MODES else upright.convert("RGB")
            saved.save(file, "TIFF", compression="raw", tiffinfo=tags)
    except Exception as error:  # Pillow reads a file when the pixels are needed, and its decoders raise any type
        raise UserError(f"Pillow cannot read the image: {describe(error)}") from None
    return file.getvalue()


def _pixels(array: np.ndarray) -> np.ndarray:
    """Return an array as uint8 (H, W), (H, W, 3) or (H, W, 4). Raises UserError if it cannot be an image."""
    if array.ndim not in (2, 3) or array.shape[2:] not in ((), (3,), (4,)) or not array.size:
        raise UserError(f"an array of shape {array.shape} is no image: arrays are (H, W, 3), tensors (3, H, W)")
    if array.dtype == np.uint8:
        return np.ascontiguousarray(array)
    if array.dtype.kind != "f" or not (array.min() >= 0 and array.max() <= 1):
        raise UserError(f"images in memory are uint8, or float from 0 to 1, not {array.dtype} with other values")
    return (array.astype(np.float32) * 255).round().astype(np.uint8)


def read_rgb(path: Path) -> Image.Image | None:
    """Read an image file in RGB at its original size; None if it is missing, damaged or too large."""
    (image,) = _decode_group([path], 0, "whole")
    return None if isinstance(image, UserError) else Image.fromarray(image.permute(1, 2, 0).numpy())


def _groups(sources: Sequence[Source]) -> Iterator[list[Source]]:
    """Put small images together, because each request to a worker takes as long as decoding one."""
    group, total = [], 0
    for source in sources:
        group.append(source)
        with contextlib.suppress(OSError, ValueError):  # reported when it is read
            total += len(source) if isinstance(source, bytes) else source.stat().st_size
        if len(group) == _GROUP or total > _GROUP_BYTES:
            yield group
            group, total = [], 0
    if group:
        yield group


def _decode_group(sources: list[Source], size: int, fit: str) -> list[Tensor | UserError]:
    """Decode images in one worker, and in a new one after each that exceeds the limits."""
    read = [_read(source) for source in sources]
    results: dict[int, Tensor | UserError] = {n: error for n, error in enumerate(read) if isinstance(error, UserError)}
    while waiting := {n: content for n, content in enumerate(read) if n not in results and isinstance(content, bytes)}:
        with _worker() as worker:
            results.update(zip(waiting, worker.decode(list(waiting.values()), size, fit)))
    return [results[number] for number in range(len(sources))]


def _read(source: Source) -> bytes | UserError:
    try:
        if isinstance(source, Path) and source.exists() and not source.is_file():
            kind = "a folder, not an image" if source.is_dir() else "not a regular file"
            return UserError(f"this is {kind}")  # opening a named pipe would wait for its writer
        size = len(source) if isinstance(source, bytes) else source.stat().st_size
        if size > MAX_BYTES:
            return UserError(f"the file has over {MAX_BYTES / 1e6:.0f} MB: make the image smaller")
        return (source if isinstance(source, bytes) else source.read_bytes()) or UserError("the file is empty")
    except (OSError, ValueError) as error:  # a name that no file can have
        return UserError(getattr(error, "strerror", None) or describe(error))


@contextlib.contextmanager
def _worker() -> Iterator["_Worker"]:
    """Borrow a worker, and replace it if its process has ended."""
    worker = _workers.get()
    try:
        if worker and worker.process.poll() is not None:
            worker.stop()
            worker = None
        worker = worker or _Worker()
        yield worker
    except BaseException:  # such as Ctrl-C in the middle of an answer
        if worker:
            worker.stop()
        raise
    finally:
        _workers.put(worker)


class _Worker:
    """A process that decodes images and may be lost at any of them."""

    def __init__(self):
        command = [sys.executable, "-P", "-W", "ignore", decoder.__file__, str(_MEMORY), str(_SECONDS)]
        environment = {**os.environ, "OMP_NUM_THREADS": "1"}  # each thread of NumPy reserves memory
        try:
            self.process = subprocess.Popen(
                command,
                env=environment,
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=subprocess.DEVNULL,
                start_new_session=True,  # so that it does not get the terminal's Ctrl-C
            )
        except OSError as error:
            raise UserError(f"the image decoder cannot be started: {error.strerror}") from None
        self.requests = cast(io.BufferedWriter, self.process.stdin)
        self.answers = cast(io.BufferedReader, self.process.stdout)
        if not self.answers.readline():
            self.stop()
            raise UserError("the image decoder cannot be started: too little memory, or a limit of it (ulimit)")

    def decode(self, contents: list[bytes], size: int, fit: str) -> Iterator[Tensor | UserError]:
        """Yield the results, up to and including that of an image at which the process ended."""
        with contextlib.suppress(BrokenPipeError):  # it has ended while it read a large file
            request = {"size": size, "fit": fit, "lengths": [len(content) for content in contents]}
            self.requests.write(json.dumps(request).encode() + b"\n")
            for content in contents:
                self.requests.write(content)
            self.requests.flush()
        for _ in contents:
            width, height, error = decoder.ANSWER.unpack(self._read(decoder.ANSWER.size) or bytes(decoder.ANSWER.size))
            answer = self._read(error or width * height * 3)
            if not answer:
                yield UserError(self._why_it_ended())
                return
            pixels = None if error else torch.frombuffer(answer, dtype=torch.uint8).view(height, width, 3)
            yield UserError(answer.decode()) if pixels is None else pixels.permute(2, 0, 1)

    def _read(self, length: int) -> bytearray:
        """Return the next bytes of the answer; none if the process has ended."""
        answer = bytearray(length)
        return answer if self.answers.readinto(answer) == length else bytearray()

    def _why_it_ended(self) -> str:
        with contextlib.suppress(subprocess.TimeoutExpired):
            self.process.wait(1)
        self.stop()
        reasons = {
            decoder.OUT_OF_MEMORY: "takes over 1 GB of memory to decode",
            decoder.OUT_OF_TIME: f"takes over {_SECONDS} seconds to decode",
        }
        reason = reasons.get(self.process.returncode, "made its decoder crash")
        return f"the image {reason}: make it smaller, or save it again as PNG or JPEG"

    def stop(self) -> None:
        """End the process, if it has not ended."""
        with contextlib.suppress(BrokenPipeError), self.process:  # closes its pipes and waits for its end
            self.process.kill()


@atexit.register
def _stop_workers() -> None:
    while not _workers.empty():
        if worker := _workers.get():
            worker.stop()
