"""Image files of every kind: good ones, with the colors that a person sees, and those that are refused."""

import io
import struct
import zlib

import numpy as np
import torch
from PIL import Image

SIZE = 32


def sample(size: int = 64) -> Image.Image:
    """Four flat quarters in four colors, so that any rotation or flip shows."""
    pixels = np.zeros((size, size, 3), dtype=np.uint8)
    half = size // 2
    pixels[:half, :half], pixels[:half, half:] = (220, 40, 30), (30, 200, 60)
    pixels[half:, :half], pixels[half:, half:] = (40, 60, 210), (240, 230, 60)
    return Image.fromarray(pixels)


def saved(image: Image.Image, format: str, **options) -> bytes:
    file = io.BytesIO()
    image.save(file, format, **options)
    return file.getvalue()


def quarters(decoded: torch.Tensor) -> np.ndarray:
    """Return the colors in the middle of the four quarters: (4, 3)."""
    return decoded[:, [8, 8, 24, 24], [8, 24, 8, 24]].T.numpy().astype(int)


COLORS = quarters(torch.from_numpy(np.array(sample(32))).permute(2, 0, 1))
GREYS = np.repeat(np.array(sample(32).convert("L"))[[8, 8, 24, 24], [8, 24, 8, 24]][:, None], 3, axis=1).astype(int)
OVER_WHITE = np.concatenate([COLORS[:2], np.full((2, 3), 255)])
GREYS_OVER_WHITE = np.concatenate([GREYS[:2], np.full((2, 3), 255)])


def with_alpha(mode: str) -> Image.Image:
    """The sample, whose lower half is fully transparent and hides black."""
    pixels = np.array(sample().convert("RGBA"))
    pixels[32:] = 0
    return Image.fromarray(pixels).convert(mode)


def wide(dtype, scale: float) -> Image.Image:
    return Image.fromarray((np.array(sample().convert("L")).astype(np.float64) * scale).astype(dtype))


def frames(format: str, **options) -> bytes:
    return saved(sample(), format, save_all=True, append_images=[Image.new("RGB", (64, 64))] * 3, **options)


def color_key() -> bytes:
    pixels = np.array(sample())
    pixels[32:] = (1, 2, 3)
    return saved(Image.fromarray(pixels), "PNG", transparency=(1, 2, 3))


def one_bit() -> bytes:
    return saved(sample().convert("L").point(lambda value: 255 * (value > 100)).convert("1"), "PNG")


GOOD = {
    "PNG RGB": (lambda: saved(sample(), "PNG"), COLORS),
    "PNG RGBA": (lambda: saved(with_alpha("RGBA"), "PNG"), OVER_WHITE),
    "PNG LA": (lambda: saved(with_alpha("LA"), "PNG"), GREYS_OVER_WHITE),
    "PNG 1 bit": (one_bit, 255 * (GREYS > 100)),
    "PNG palette": (lambda: saved(sample().quantize(8), "PNG"), COLORS),
    "PNG palette transparent": (lambda: saved(with_alpha("RGBA").quantize(8), "PNG"), OVER_WHITE),
    "PNG transparent color": (color_key, OVER_WHITE),
    "PNG 16 bit": (lambda: saved(wide(np.uint16, 257), "PNG"), GREYS),
    "TIFF 16 bit": (lambda: saved(wide(np.uint16, 257), "TIFF"), GREYS),
    "TIFF 32 bit": (lambda: saved(wide(np.int32, 257), "TIFF"), GREYS),
    "TIFF 32 bit dark": (lambda: saved(wide(np.int32, 1), "TIFF"), GREYS),
    "TIFF float to 1": (lambda: saved(wide(np.float32, 1 / 255), "TIFF"), GREYS),
    "TIFF float to 255": (lambda: saved(wide(np.float32, 1), "TIFF"), GREYS),
    "TIFF CMYK": (lambda: saved(sample().convert("CMYK"), "TIFF"), COLORS),
    "TIFF LZW": (lambda: saved(sample(), "TIFF", compression="tiff_lzw"), COLORS),
    "JPEG": (lambda: saved(sample(), "JPEG", quality=95), COLORS),
    "JPEG progressive": (lambda: saved(sample(), "JPEG", quality=95, progressive=True), COLORS),
    "JPEG L": (lambda: saved(sample().convert("L"), "JPEG", quality=95), GREYS),
    "JPEG CMYK": (lambda: saved(sample().convert("CMYK"), "JPEG", quality=95), COLORS),
    "GIF": (lambda: saved(sample(), "GIF"), COLORS),
    "GIF animated": (lambda: frames("GIF"), COLORS),
    "PNG animated": (lambda: frames("PNG"), COLORS),
    "WebP": (lambda: saved(sample(), "WEBP", quality=95), COLORS),
    "WebP transparent": (lambda: saved(with_alpha("RGBA"), "WEBP", lossless=True), OVER_WHITE),
    "WebP animated": (lambda: frames("WEBP", lossless=True), COLORS),
    "AVIF": (lambda: saved(sample(), "AVIF", quality=95), COLORS),
    "BMP": (lambda: saved(sample(), "BMP"), COLORS),
    "PPM": (lambda: saved(sample(), "PPM"), COLORS),
    "ICO": (lambda: saved(sample(), "ICO", sizes=[(64, 64)]), COLORS),
    "MPO": (lambda: saved(sample(), "MPO", save_all=True, append_images=[sample()], quality=95), COLORS),
}


def bomb(width: int, height: int) -> bytes:
    """A small PNG whose header claims this size."""
    content = bytearray(saved(sample(), "PNG"))
    content[16:24] = struct.pack(">II", width, height)
    content[29:33] = struct.pack(">I", zlib.crc32(content[12:29]))
    return bytes(content)


REFUSED = {
    "empty": (lambda: b"", "the file is empty"),
    "text": (lambda: b"not an image\n" * 50, "not an image in a supported format"),
    "SVG": (lambda: b'<svg xmlns="http://www.w3.org/2000/svg"><rect width="9" height="9"/></svg>', "not an image"),
    "PostScript": (lambda: b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 9 9\nshowpage\n", "not an image"),
    "JPEG 2000": (lambda: saved(sample(), "JPEG2000"), "not an image"),
    "random bytes": (lambda: np.random.default_rng(0).bytes(5000), "not an image"),
    "100.02 megapixels": (lambda: bomb(10_001, 10_001), "has 10,001 x 10,001 pixels; the limit is 100 million"),
    "bomb": (lambda: bomb(60_000, 60_000), "has 60,000 x 60,000 pixels"),
    "PNG header alone": (lambda: saved(sample(), "PNG")[:40], "damaged or incomplete|not an image"),
    "truncated JPEG": (lambda: saved(sample(), "JPEG")[:300], "damaged or incomplete|not an image"),
}
