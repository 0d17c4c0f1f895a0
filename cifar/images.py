"""The image decoder: from any image file, as a person sees it, to what a network takes."""

import contextlib
import io
import os
import warnings
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import BinaryIO

import numpy as np
import torch
from PIL import Image, ImageOps
from torch import Tensor

from cifar.errors import UserError

FITS = ("crop", "letterbox")
_MAX_PIXELS = 25_000_000
# Not EPS, which runs another program, not JPEG 2000, which can take 15 seconds to unpack, and not what hardly anybody
# has: each decoder is one more that may have a security hole.
_FORMATS = ("PNG", "JPEG", "MPO", "GIF", "WEBP", "AVIF", "BMP", "TIFF", "PPM", "ICO")

Source = Path | bytes


def decode(source: Source, size: int, fit: str = "crop") -> Tensor:
    """Decode an image to uint8 (3, size, size): upright, on white, square.

    source: a file's path or its bytes. fit: `crop` takes the largest square in the middle; `letterbox` keeps
    everything and pads with white. An image that has this size already is not resampled. Raises UserError for what is
    not an image, is damaged, or has over 25 million pixels, which is checked before it is unpacked.
    """
    with warnings.catch_warnings(action="ignore"):
        return _decode(source, size, fit)


def decode_all(sources: Sequence[Source], size: int, fit: str = "crop") -> list[Tensor | UserError]:
    """Decode images in parallel threads; each result is what `decode` returns or raises."""

    def attempt(source: Source) -> Tensor | UserError:
        try:
            return _decode(source, size, fit)
        except UserError as error:
            return error

    # Pillow's warnings are silenced in all threads, so this is entered in one only.
    with warnings.catch_warnings(action="ignore"), ThreadPoolExecutor(os.cpu_count()) as pool:
        return list(pool.map(attempt, sources))


def read_rgb(path: Path) -> Image.Image | None:
    """Read an image file in RGB at its original size; None if it is missing, damaged or too large."""
    ignored = warnings.catch_warnings(action="ignore")
    with ignored, contextlib.suppress(Exception), _open(path) as image:  # any exception, as in _decode
        return image.convert("RGB")
    return None


def _decode(source: Source, size: int, fit: str) -> Tensor:
    try:
        with _open(source) as image:
            square = _to_square(_to_eight_bits(_upright(image)), size, fit)
            return torch.from_numpy(np.array(_over_white(square))).permute(2, 0, 1)
    except UserError:
        raise
    except Exception:  # Pillow's decoders raise exceptions of any type for damaged files
        raise UserError("the image is damaged or incomplete") from None


@contextlib.contextmanager
def _open(source: Source) -> Iterator[Image.Image]:
    """Open an image without unpacking its pixels; its file is closed in any case."""
    with _open_file(source) as file:
        Image.init()  # registers the formats that this Pillow was built with
        try:
            image = Image.open(file, formats=[format for format in _FORMATS if format in Image.OPEN])
        except Image.UnidentifiedImageError:
            raise UserError("the file is not an image in a supported format, such as PNG, JPEG or WebP") from None
        except Image.DecompressionBombError:
            image = None
        if image is None or image.width * image.height > _MAX_PIXELS:
            raise UserError(f"the image has more than {_MAX_PIXELS // 10**6} million pixels")
        yield image


def _open_file(source: Source) -> BinaryIO:
    """Open the file. Raises UserError if it cannot be read, is empty or is not a regular file."""
    try:
        if isinstance(source, Path) and source.exists() and not source.is_file():
            raise UserError("this is not a regular file")  # opening a named pipe would wait for its writer
        if not (len(source) if isinstance(source, bytes) else source.stat().st_size):
            raise UserError("the file is empty")
        return io.BytesIO(source) if isinstance(source, bytes) else source.open("rb")
    except OSError as error:
        raise UserError(f"the file cannot be read: {error.strerror}") from None


def _upright(image: Image.Image) -> Image.Image:
    """Unpack the first frame and turn it as the camera's orientation tag says, if that can be read."""
    image.load()
    with contextlib.suppress(Exception):  # exceptions of any type for malformed EXIF
        ImageOps.exif_transpose(image, in_place=True)
    return image


def _to_eight_bits(image: Image.Image) -> Image.Image:
    """Convert any mode to L, LA, RGB or RGBA, which Pillow resamples well."""
    if image.mode.startswith(("I", "F")):
        return _rescale_greyscale(image)
    if "transparency" in image.info or image.mode in ("La", "PA", "RGBa"):
        return image.convert("RGBA")
    return image if image.mode in ("L", "LA", "RGB", "RGBA") else image.convert("RGB")


def _rescale_greyscale(image: Image.Image) -> Image.Image:
    """Convert greyscale of 16 or 32 bits or float to 8 bits, by the range of the narrowest type that holds it."""
    if image.mode.startswith("I;16"):
        return Image.fromarray((np.asarray(image) >> 8).astype(np.uint8))
    reduced = image.reduce(max(1, min(image.size) // 1000))  # a pixel takes four times the memory of one of 8 bits
    values = np.nan_to_num(np.asarray(reduced, dtype=np.float32), nan=0.0, posinf=0.0, neginf=0.0)
    low, high = min(0.0, float(values.min())), float(np.percentile(values, 99.9))  # a few pixels may be brighter
    ranges = (1.0, 255.0, 65535.0) if image.mode == "F" else (255.0, 65535.0)
    top = next((top for top in ranges if high <= top), high)
    return Image.fromarray(((values.clip(low, top) - low) * (255 / (top - low))).astype(np.uint8))


def _to_square(image: Image.Image, size: int, fit: str) -> Image.Image:
    if fit == "letterbox":
        width, height = (max(1, round(length * size / max(image.size))) for length in image.size)
        square = Image.new(image.mode, (size, size), "white")
        resized = image.resize((width, height), Image.Resampling.BICUBIC)
        square.paste(resized, (round((size - width) / 2), round((size - height) / 2)))
        return square
    return ImageOps.fit(image, (size, size), Image.Resampling.BICUBIC)


def _over_white(image: Image.Image) -> Image.Image:
    if image.mode in ("L", "RGB"):
        return image.convert("RGB")
    white = Image.new("RGBA", image.size, "white")
    return Image.alpha_composite(white, image.convert("RGBA")).convert("RGB")
