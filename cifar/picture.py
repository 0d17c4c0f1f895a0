"""The decoder: any picture file, as a person sees it, to what a network takes."""

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
_MOST_PIXELS = 25_000_000
# What a picture may be. Not EPS, which runs another program, not JPEG 2000, which can take 15 seconds to unpack, and
# not what hardly anybody sends: each decoder is one more that may have a hole.
_FORMATS = ("PNG", "JPEG", "MPO", "GIF", "WEBP", "AVIF", "BMP", "TIFF", "PPM", "ICO")
_LARGE_PIXELS = 4_000_000
_WIDE_SIDE = 1000  # pixels, to which wide greyscale is averaged first, as it takes four times the memory

Source = Path | bytes | np.ndarray | Image.Image


def decode(source: Source, size: int, fit: str = "crop") -> Tensor:
    """A picture as the network takes it: uint8 (3, size, size), upright, on white, square.

    source: a file's path, its bytes, an array (H, W), (H, W, 3) or (H, W, 4) of uint8, or a Pillow image.
    fit: `crop` takes the largest square in the middle; `letterbox` keeps all and fills up with white.
    A picture that has the size already is not resampled. Raises UserError, in one sentence, for what is no
    picture, is damaged, or has over 25 million pixels, which is found out before it is unpacked.
    """
    with _without_warnings():
        return _decode(source, size, fit)


def decode_all(sources: Sequence[Source], size: int, fit: str = "crop") -> list[Tensor | UserError]:
    """Each picture as `decode` gives it, or its refusal; several at once, as unpacking lets other threads run."""

    def attempt(source: Source) -> Tensor | UserError:
        try:
            return _decode(source, size, fit)
        except UserError as refusal:
            return refusal

    with _without_warnings(), ThreadPoolExecutor(os.cpu_count()) as pool:
        return list(pool.map(attempt, sources))


def read_rgb(path: Path) -> Image.Image | None:
    """A picture file as it is, in RGB; None if it is missing, damaged or too large."""
    with _without_warnings(), contextlib.suppress(Exception), _opened(path) as image:  # as in `_decode`
        if image.width * image.height <= _MOST_PIXELS:
            return image.convert("RGB")
    return None


@contextlib.contextmanager
def _without_warnings() -> Iterator[None]:
    """Pillow's warnings are on metadata that does not matter here. For all threads, so enter it in one alone."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        yield


def _decode(source: Source, size: int, fit: str) -> Tensor:
    try:
        with _opened(source) as image:
            if image.width * image.height > _MOST_PIXELS:
                raise UserError(_too_large(f"{image.width * image.height / 1e6:.0f}"))
            return _to_tensor(_over_white(_to_square(_to_eight_bits(_upright(image)), size, fit)))
    except UserError:
        raise
    except Image.DecompressionBombError:
        raise UserError(_too_large("over 100")) from None
    except Exception:  # a damaged file makes Pillow's decoders stumble in any way there is
        raise UserError("the picture is damaged or incomplete") from None


@contextlib.contextmanager
def _opened(source: Source) -> Iterator[Image.Image]:
    """The picture, its pixels not yet unpacked, and its file closed in the end whatever becomes of it."""
    if isinstance(source, Image.Image):
        yield source.copy()
    elif isinstance(source, np.ndarray):
        yield Image.fromarray(source)
    else:
        with _file(source) as file:
            Image.init()  # registers the formats that this Pillow was built with
            try:
                image = Image.open(file, formats=[format for format in _FORMATS if format in Image.OPEN])
            except Image.UnidentifiedImageError:
                raise UserError("the file is not a picture in a format known here, such as PNG, JPEG or WebP") from None
            yield image


def _file(source: bytes | Path) -> BinaryIO:
    """What holds the picture, open. Raises UserError if it cannot be, or is empty or none."""
    if not isinstance(source, bytes):
        if source.is_dir():
            raise UserError("the folder holds no pictures")
        if source.exists() and not source.is_file():
            raise UserError("this is not a file")
    try:
        if not (len(source) if isinstance(source, bytes) else source.stat().st_size):
            raise UserError("the file is empty")
        return io.BytesIO(source) if isinstance(source, bytes) else source.open("rb")
    except OSError as error:
        raise UserError(f"the file cannot be read: {error.strerror}") from None


def _too_large(megapixels: str) -> str:
    return f"the picture has {megapixels} million pixels, and {_MOST_PIXELS // 10**6} million is the most taken here"


def _upright(image: Image.Image) -> Image.Image:
    """The first frame, turned as the camera's orientation tag says; a tag that cannot be read is passed over."""
    image = _unpacked(image)
    with contextlib.suppress(Exception):  # malformed EXIF raises what its parser happens to stumble over
        ImageOps.exif_transpose(image, in_place=True)
    return image


def _unpacked(image: Image.Image) -> Image.Image:
    """The first frame's pixels. A large WebP's are torchvision's, which are the same: both ask libwebp.

    Pillow takes any WebP for an animation, whose canvases take 390 MB at 25 megapixels; torchvision takes 180 MB.
    """
    if image.format != "WEBP" or image.is_animated or image.width * image.height < _LARGE_PIXELS:
        image.load()
        return image
    from torchvision.io import decode_webp

    image.fp.seek(0)
    pixels = decode_webp(torch.frombuffer(bytearray(image.fp.read()), dtype=torch.uint8))
    unpacked = Image.fromarray(pixels.permute(1, 2, 0).numpy())
    unpacked.info = image.info  # where the orientation is
    return unpacked


def _to_eight_bits(image: Image.Image) -> Image.Image:
    """Any mode as L, LA, RGB or RGBA, which are the ones that are resampled well; wide greyscale is rescaled."""
    if image.mode.startswith(("I", "F")):
        return _narrowed(image)
    if "transparency" in image.info or image.mode in ("La", "PA", "RGBa"):
        return image.convert("RGBA")
    return image if image.mode in ("L", "LA", "RGB", "RGBA") else image.convert("RGB")


def _narrowed(image: Image.Image) -> Image.Image:
    """Greyscale of 16 or 32 bits, or float, as 8 bits, on the scale of the narrowest type that holds the values."""
    if image.mode.startswith("I;16"):
        return Image.fromarray((np.asarray(image) >> 8).astype(np.uint8))
    averaged = image.reduce(max(1, min(image.size) // _WIDE_SIDE))
    values = np.nan_to_num(np.asarray(averaged, dtype=np.float32), nan=0.0, posinf=0.0, neginf=0.0)
    low, high = min(0.0, float(values.min())), float(values.max())
    scales = (1.0, 255.0, 65535.0) if image.mode == "F" else (255.0, 65535.0)
    span = next((scale for scale in scales if high <= scale), high) - low
    return Image.fromarray(((values - low) * (255 / span)).astype(np.uint8))


def _to_square(image: Image.Image, size: int, fit: str) -> Image.Image:
    if fit == "letterbox":
        return ImageOps.pad(image, (size, size), Image.Resampling.BICUBIC, color="white")
    return ImageOps.fit(image, (size, size), Image.Resampling.BICUBIC)


def _over_white(image: Image.Image) -> Image.Image:
    if image.mode in ("L", "RGB"):
        return image.convert("RGB")
    white = Image.new("RGBA", image.size, "white")
    return Image.alpha_composite(white, image.convert("RGBA")).convert("RGB")


def _to_tensor(image: Image.Image) -> Tensor:
    return torch.from_numpy(np.array(image)).permute(2, 0, 1)
