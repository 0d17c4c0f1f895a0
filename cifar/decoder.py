"""The rules by which image files are decoded, and the worker program that applies them within limits.

`python decoder.py MEMORY SECONDS` writes a line once it is ready, and then answers requests until its input ends. A
request is a line of JSON, {"size", "fit", "lengths"}, and the contents of files of these lengths. The answer to each
file is three numbers, width, height and the length of an error, and then RGB pixels or the error. An image that takes
over MEMORY bytes or SECONDS ends the program.
"""

import contextlib
import ctypes
import faulthandler
import functools
import io
import json
import signal
import struct
import sys

import numpy as np
from PIL import AvifImagePlugin, Image, ImageCms, ImageOps, PngImagePlugin, UnidentifiedImageError

# What Popen.returncode is after a limit was exceeded.
OUT_OF_MEMORY = 3
OUT_OF_TIME = -signal.SIGALRM if hasattr(signal, "SIGALRM") else 1
ANSWER = struct.Struct("<III")  # width, height, length of the error
# Not EPS, which runs another program, not JPEG 2000, which can take 15 seconds to unpack, and not what hardly anybody
# has: each decoder is one more that may have a security hole. MPO, which many cameras write, is opened by JPEG's.
_FORMATS = ("PNG", "JPEG", "GIF", "WEBP", "AVIF", "BMP", "TIFF", "PPM", "ICO")
_BITS_PER_SAMPLE, PHOTOMETRIC = 258, 262  # tags of TIFF
_STEPS = {"L;2": 85, "L;4": 17}  # of the greys of a PNG file


def decode(content: bytes, size: int, fit: str) -> Image.Image:
    """Decode an image as a person sees it: upright, in sRGB, on white, 8 bits a channel.

    fit: `crop` and `letterbox` as in images.decode, at size x size pixels; `whole` keeps the original size.
    Raises exceptions of any type for what is not an image, is damaged, or has over 100 million pixels, which is checked
    before it is unpacked.
    """
    image: Image.Image = Image.open(io.BytesIO(content), formats=_FORMATS)
    # JPEG can be unpacked at a half to an eighth of its size, of which the last row and column may be a part.
    drafted = image.draft(None, (4 * size, 4 * size)) if fit != "whole" else None
    load(image)
    image = _to_eight_bits(image)
    if fit != "whole":
        image = _resize(image, drafted[1][2:] if drafted else image.size, size, fit)
    with contextlib.suppress(Exception):  # exceptions of any type for malformed EXIF
        ImageOps.exif_transpose(image, in_place=True)
    image = _over_white(_to_srgb(image))
    return ImageOps.pad(image, (size, size), color="white") if fit == "letterbox" else image


def load(image: Image.Image) -> None:
    """Load the pixels; of a PNG of 2 or 4 bits, Pillow scales them to 8, but not the grey that is transparent."""
    raw_mode = next((tile[3] for tile in getattr(image, "tile", ())), None)
    image.load()
    if raw_mode in _STEPS and "transparency" in image.info:
        image.info["transparency"] *= _STEPS[raw_mode]


def _to_eight_bits(image: Image.Image) -> Image.Image:
    """Convert any mode to L, LA, RGB, RGBA, CMYK or LAB, which Pillow resamples well."""
    if image.mode.startswith(("I", "F")):
        grey = _to_grey(image)
        grey.info = image.info
        if isinstance(key := image.info.get("transparency"), int):  # which Pillow compares at 8 bits only
            grey.putalpha(Image.fromarray(np.where(np.asarray(image) == key, np.uint8(0), np.uint8(255))))
            return grey
        return ImageOps.invert(grey) if is_white_zero(image) else grey
    if isinstance(key := image.info.get("transparency"), tuple) and max(key) > 255:  # Pillow has dropped the lower byte
        image.info["transparency"] = tuple(value >> 8 for value in key)
    if "transparency" in image.info or image.mode in ("La", "PA", "RGBa"):
        return image.convert("RGBA")
    return image if image.mode in ("L", "LA", "RGB", "RGBA", "CMYK", "LAB") else image.convert("RGB")


def is_white_zero(image: Image.Image) -> bool:
    """Whether white is 0 in an image of many bits; with 8 bits, Pillow has inverted it."""
    return image.mode.startswith(("I", "F")) and getattr(image, "tag_v2", {}).get(PHOTOMETRIC) == 0


def _to_grey(image: Image.Image) -> Image.Image:
    """Convert greyscale of many bits or float to 8 bits.

    Up to 16 bits, the depth is the range; of a TIFF file of 16 bits whose values need no more than 12, as cameras and
    microscopes write it, it is 12 bits. 32 bits and float do not say their range: it is 0 to 1 (float only), 255 or
    65535, the first that most pixels do not exceed by more than twice, as sharpening does; more is clipped. Images
    with negative values have the range of their pixels. In both cases a thousandth of the pixels may be outside.
    """
    if image.mode.startswith("I;16"):
        bits = getattr(image, "tag_v2", {}).get(_BITS_PER_SAMPLE, (16,))[0]
        native = image if image.mode == "I;16" else image.convert("I")  # from big-endian
        largest = native.getextrema()[1]
        if image.format == "TIFF" and isinstance(largest, (int, float)) and largest < 2**12:
            bits = 12
        return native.point(lambda value: value / 2 ** (bits - 8)).convert("L")
    reduced = image.reduce(max(1, min(image.size) // 1000))  # a pixel takes four times the memory of one of 8 bits
    values = np.nan_to_num(np.asarray(reduced, dtype=np.float32), nan=0.0, posinf=0.0, neginf=0.0)
    low, high = (float(value) for value in np.percentile(values, (0.1, 99.9)))
    if low > -0.1 * high:
        ranges = (1.0, 255.0, 65535.0) if image.mode == "F" else (255.0, 65535.0)
        low, high = 0.0, next((top for top in ranges if high <= 2 * top), high)
    if image.format == "PPM" and image.mode == "I":  # Pillow stretches its values to 16 bits
        low, high = 0.0, 65535.0
    return Image.fromarray(((values.clip(low, high) - low) * (255 / max(high - low, 1e-30))).astype(np.uint8))


def _resize(image: Image.Image, extent: tuple[float, float], size: int, fit: str) -> Image.Image:
    """Resize the middle square, or all, of the upper left part of the image that has this width and height."""
    width, height = extent
    if fit == "crop":
        side = min(extent)
        left, top = (width - side) / 2, (height - side) / 2
        return image.resize((size, size), Image.Resampling.BICUBIC, (left, top, left + side, top + side))
    shape = [max(1, round(length * size / max(extent))) for length in extent]
    return image.resize(shape, Image.Resampling.BICUBIC, (0, 0, width, height))


def _to_srgb(image: Image.Image) -> Image.Image:
    """Convert by the image's color profile, if it has one that can be used."""
    with contextlib.suppress(Exception):  # of any type, for malformed profiles and those of another mode
        profile = b"" if image.mode == "LAB" else image.info.get("icc_profile")
        if profile is not None and (transform := _transform(profile, image.mode)):
            return ImageCms.applyTransform(image, transform) or image  # None only for a change in place
    return image


@functools.lru_cache(maxsize=8)
def _transform(profile: bytes, mode: str) -> ImageCms.ImageCmsTransform | None:
    """Return the transform from a profile, or from CIELAB, to sRGB; None if it is sRGB already."""
    source = ImageCms.getOpenProfile(io.BytesIO(profile)) if profile else ImageCms.createProfile("LAB")
    if profile and "sRGB" in ImageCms.getProfileDescription(source):
        return None
    return ImageCms.buildTransform(source, ImageCms.createProfile("sRGB"), mode, "RGBA" if mode == "RGBA" else "RGB")


def _over_white(image: Image.Image) -> Image.Image:
    if image.mode not in ("LA", "RGBA"):
        return image.convert("RGB")
    white = Image.new("RGBA", image.size, "white")
    return Image.alpha_composite(white, image.convert("RGBA")).convert("RGB")


def _answer(content: bytes, size: int, fit: str) -> bytes:
    try:
        image = decode(content, size, fit)
        return ANSWER.pack(*image.size, 0) + image.tobytes()
    except UnidentifiedImageError:
        error = "the file is not an image in a supported format: convert it to JPEG or PNG"
    except Image.DecompressionBombError:
        error = "the image has over 100 million pixels: make it smaller"
    except Exception as raised:
        if "memory" in str(raised) or isinstance(raised, MemoryError):
            raise MemoryError from None
        problem = "the image is damaged, incomplete, or of a kind that is not supported"
        error = f"{problem}: save it again as PNG or JPEG"
    return ANSWER.pack(0, 0, len(error)) + error.encode()


def main(memory: int, seconds: float) -> None:
    """Answer requests; see the module."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C is for the program that started this one
    Image.MAX_IMAGE_PIXELS = 50_000_000  # Pillow refuses over twice this
    AvifImagePlugin.DEFAULT_MAX_THREADS = 4  # each reserves memory
    # Long texts and profiles are no damage; memory and time have other limits.
    PngImagePlugin.MAX_TEXT_CHUNK = PngImagePlugin.MAX_TEXT_MEMORY = 10**9
    with contextlib.suppress(ImportError):  # Windows has no limits
        import resource

        resource.setrlimit(resource.RLIMIT_DATA, (memory, memory))
    requests, answers = sys.stdin.buffer, sys.stdout.buffer
    answers.write(b"\n")
    answers.flush()
    while line := requests.readline():
        request = json.loads(line)
        try:
            for content in [requests.read(length) for length in request["lengths"]]:
                _set_deadline(seconds)
                answers.write(_answer(content, request["size"], request["fit"]))
                answers.flush()
                _set_deadline(0)
            _return_freed_memory()
        except MemoryError:
            sys.exit(OUT_OF_MEMORY)


def _return_freed_memory() -> None:
    """Return to the system what glibc keeps of freed memory: after 30,000 odd images it was as much as Python takes."""
    with contextlib.suppress(AttributeError, TypeError):  # another C library; Windows, which has no "None"
        ctypes.CDLL(None).malloc_trim(0)


def _set_deadline(seconds: float) -> None:
    """End this program in that many seconds, whatever it is doing then; 0: no more."""
    if hasattr(signal, "setitimer"):
        signal.setitimer(signal.ITIMER_REAL, seconds)  # by SIGALRM
    elif seconds:  # takes 0.1 ms, where that takes 0.001 ms
        faulthandler.dump_traceback_later(seconds, exit=True)
    else:
        faulthandler.cancel_dump_traceback_later()


if __name__ == "__main__":
    main(int(sys.argv[1]), float(sys.argv[2]))
