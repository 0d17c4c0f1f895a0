"""Picture files of every kind: those that are good, with what is seen on them, and those that are refused."""

import io
import struct
import zlib

import numpy as np
import torch
from PIL import Image

SIZE = 32


def picture(side: int = 64) -> Image.Image:
    """Four flat quarters in four colours, so that any turn or mirroring shows."""
    pixels = np.zeros((side, side, 3), dtype=np.uint8)
    half = side // 2
    pixels[:half, :half], pixels[:half, half:] = (220, 40, 30), (30, 200, 60)
    pixels[half:, :half], pixels[half:, half:] = (40, 60, 210), (240, 230, 60)
    return Image.fromarray(pixels)


def saved(image: Image.Image, format: str, **options) -> bytes:
    file = io.BytesIO()
    image.save(file, format, **options)
    return file.getvalue()


def quarters(decoded: torch.Tensor) -> np.ndarray:
    """The colours in the middle of the four quarters: (4, 3)."""
    return decoded[:, [8, 8, 24, 24], [8, 24, 8, 24]].T.numpy().astype(int)


COLOURS = quarters(torch.from_numpy(np.array(picture(32))).permute(2, 0, 1))
GREYS = np.repeat(np.array(picture(32).convert("L"))[[8, 8, 24, 24], [8, 24, 8, 24]][:, None], 3, axis=1).astype(int)


def with_alpha(mode: str) -> Image.Image:
    """The picture, whose lower half is fully transparent and hides black."""
    pixels = np.array(picture().convert("RGBA"))
    pixels[32:] = 0
    return Image.fromarray(pixels).convert(mode)


OVER_WHITE = np.concatenate([COLOURS[:2], np.full((2, 3), 255)])
GREYS_OVER_WHITE = np.concatenate([GREYS[:2], np.full((2, 3), 255)])


def wide(dtype, scale: float) -> Image.Image:
    return Image.fromarray((np.array(picture().convert("L")).astype(np.float64) * scale).astype(dtype))


def frames(format: str, **options) -> bytes:
    return saved(picture(), format, save_all=True, append_images=[Image.new("RGB", (64, 64))] * 3, **options)


def indexed_with_transparency() -> bytes:
    palette = picture().quantize(8)
    hidden = palette.getpixel((10, 60)), palette.getpixel((60, 60))
    return saved(palette, "PNG", transparency=bytes(0 if index in hidden else 255 for index in range(8)))


def colour_key() -> bytes:
    pixels = np.array(picture())
    pixels[32:] = (1, 2, 3)
    return saved(Image.fromarray(pixels), "PNG", transparency=(1, 2, 3))


GOOD = {
    "PNG RGB": (lambda: saved(picture(), "PNG"), COLOURS),
    "PNG RGBA": (lambda: saved(with_alpha("RGBA"), "PNG"), OVER_WHITE),
    "PNG LA": (lambda: saved(with_alpha("LA"), "PNG"), GREYS_OVER_WHITE),
    "PNG L": (lambda: saved(picture().convert("L"), "PNG"), GREYS),
    "PNG 1 bit": (
        lambda: saved(picture().convert("L").point(lambda v: 255 * (v > 100)).convert("1"), "PNG"),
        255 * (GREYS > 100),
    ),
    "PNG palette": (lambda: saved(picture().quantize(8), "PNG"), COLOURS),
    "PNG palette transparent": (indexed_with_transparency, OVER_WHITE),
    "PNG transparent colour": (colour_key, OVER_WHITE),
    "PNG 16 bit": (lambda: saved(wide(np.uint16, 257), "PNG"), GREYS),
    "TIFF 16 bit": (lambda: saved(wide(np.uint16, 257), "TIFF"), GREYS),
    "TIFF 32 bit": (lambda: saved(wide(np.int32, 257), "TIFF"), GREYS),
    "TIFF 32 bit dark": (lambda: saved(wide(np.int32, 1), "TIFF"), GREYS),
    "TIFF float to 1": (lambda: saved(wide(np.float32, 1 / 255), "TIFF"), GREYS),
    "TIFF float to 255": (lambda: saved(wide(np.float32, 1), "TIFF"), GREYS),
    "TIFF CMYK": (lambda: saved(picture().convert("CMYK"), "TIFF"), COLOURS),
    "TIFF LZW": (lambda: saved(picture(), "TIFF", compression="tiff_lzw"), COLOURS),
    "JPEG": (lambda: saved(picture(), "JPEG", quality=95), COLOURS),
    "JPEG progressive": (lambda: saved(picture(), "JPEG", quality=95, progressive=True), COLOURS),
    "JPEG L": (lambda: saved(picture().convert("L"), "JPEG", quality=95), GREYS),
    "JPEG CMYK": (lambda: saved(picture().convert("CMYK"), "JPEG", quality=95), COLOURS),
    "GIF": (lambda: saved(picture(), "GIF"), COLOURS),
    "GIF animated": (lambda: frames("GIF"), COLOURS),
    "PNG animated": (lambda: frames("PNG"), COLOURS),
    "WebP": (lambda: saved(picture(), "WEBP", quality=95), COLOURS),
    "WebP lossless": (lambda: saved(picture(), "WEBP", lossless=True), COLOURS),
    "WebP transparent": (lambda: saved(with_alpha("RGBA"), "WEBP", lossless=True), OVER_WHITE),
    "WebP animated": (lambda: frames("WEBP", lossless=True), COLOURS),
    "AVIF": (lambda: saved(picture(), "AVIF", quality=95), COLOURS),
    "BMP": (lambda: saved(picture(), "BMP"), COLOURS),
    "PPM": (lambda: saved(picture(), "PPM"), COLOURS),
    "ICO": (lambda: saved(picture(), "ICO", sizes=[(64, 64)]), COLOURS),
    "MPO": (lambda: saved(picture(), "MPO", save_all=True, append_images=[picture()], quality=95), COLOURS),
}


def bomb(width: int, height: int) -> bytes:
    """A PNG of a few kilobytes that claims to be that large, one bit deep, all zeros."""
    rows = zlib.compressobj(9)
    line = bytes(1 + (width + 7) // 8)
    packed = b"".join(rows.compress(line) for _ in range(height)) + rows.flush()

    def chunk(kind: bytes, content: bytes) -> bytes:
        return struct.pack(">I", len(content)) + kind + content + struct.pack(">I", zlib.crc32(kind + content))

    header = struct.pack(">IIBBBBB", width, height, 1, 0, 0, 0, 0)
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + chunk(b"IDAT", packed) + chunk(b"IEND", b"")


REFUSED = {
    "empty": (lambda: b"", "the file is empty"),
    "text": (lambda: b"not a picture\n" * 50, "not a picture in a format known here"),
    "HTML": (lambda: b"<!doctype html><p>hello", "not a picture"),
    "SVG": (lambda: b'<svg xmlns="http://www.w3.org/2000/svg"><rect width="9" height="9"/></svg>', "not a picture"),
    "PostScript": (lambda: b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 9 9\nshowpage\n", "not a picture"),
    "PDF": (lambda: b"%PDF-1.7\n%%EOF\n", "not a picture"),
    "JPEG 2000": (lambda: saved(picture(), "JPEG2000"), "not a picture"),
    "ZIP": (lambda: b"PK\x03\x04" + bytes(100), "not a picture"),
    "rubbish": (lambda: np.random.default_rng(0).bytes(5000), "not a picture"),
    "26 megapixels": (lambda: saved(Image.new("1", (5200, 5000)), "PNG"), "has 26 million pixels, and 25 million"),
    "bomb": (lambda: bomb(13_000, 13_000), "has 169 million pixels|has over 100 million pixels"),
    "larger bomb": (lambda: bomb(60_000, 2000), "million pixels"),
    "PNG header alone": (lambda: saved(picture(), "PNG")[:40], "damaged or incomplete|not a picture"),
    "PNG with a wrong checksum": (lambda: saved(picture(), "PNG").replace(b"IHDR", b"IHDr"), "damaged|not a picture"),
    "JPEG renamed and cut": (lambda: saved(picture(), "JPEG")[:300], "damaged or incomplete|not a picture"),
}
