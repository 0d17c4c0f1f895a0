"""Image files of every kind: good ones, with the colors that a person sees, those that are refused, and costly ones."""

import io
import struct
import zlib

import numpy as np
import torch
from PIL import Image, ImageCms, PngImagePlugin

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


def big_endian() -> Image.Image:
    return Image.frombytes("I;16B", (64, 64), np.array(wide(np.uint16, 257)).astype(">u2").tobytes())


def lab() -> Image.Image:
    return ImageCms.profileToProfile(
        sample(), ImageCms.createProfile("sRGB"), ImageCms.createProfile("LAB"), outputMode="LAB"
    )


def twelve_bits() -> bytes:
    """A TIFF file of 12 bits a pixel: two pixels in three bytes."""
    values = np.array(sample().convert("L")).astype(np.uint32).reshape(-1, 2) * 16
    pairs = values[:, 0] << 12 | values[:, 1]
    data = np.stack([pairs >> 16, pairs >> 8 & 255, pairs & 255], axis=1).astype(np.uint8).tobytes()
    return tiff(64, 64, data, bits=(12,))


def unlike_srgb() -> bytes:
    """A color profile in which red and blue have changed places."""
    profile = ImageCms.ImageCmsProfile(ImageCms.createProfile("sRGB")).tobytes()
    for old, new in ((b"rXYZ", b"...."), (b"bXYZ", b"rXYZ"), (b"....", b"bXYZ"), (b"\0s\0R\0G\0B", b"\0X\0R\0G\0B")):
        profile = profile.replace(old, new)
    return profile


def with_profile(format: str, mode: str = "RGB", **options) -> bytes:
    swapped = Image.merge("RGB", sample().split()[::-1]).convert(mode)
    return saved(swapped, format, icc_profile=unlike_srgb(), **options)


def long_text() -> PngImagePlugin.PngInfo:
    text = PngImagePlugin.PngInfo()
    text.add_text("parameters", "x" * 2 * MB, zip=True)
    text.add_itxt("workflow", "y" * 2 * MB, zip=True)
    return text


def overshooting(top: float) -> Image.Image:
    """The sample in float, of which a pixel in a hundred is brighter than white or darker than black."""
    pixels = np.array(sample().convert("L")).astype(np.float32) / 255
    pixels[0, :40], pixels[1, 0] = 1.3, -0.2
    return Image.fromarray(pixels * top)


def signed() -> Image.Image:
    pixels = np.array(sample().convert("L")).astype(np.float32) / 127.5 - 1
    pixels[0, :8], pixels[1, :8] = -1, 1
    return Image.fromarray(pixels)


MB = 1_000_000


def tiff(width: int, height: int, data: bytes, *extra, bits=(8,), photometric: int = 1, compression: int = 1) -> bytes:
    """A TIFF file of one strip, written by hand.

    extra: further entries (tag, type, count, value); a value of None stands for the data's offset.
    """
    samples = len(bits)
    shared = struct.pack(f"<{samples}H", *bits)
    entries = [(256, 4, 1, width), (257, 4, 1, height), (259, 3, 1, compression), (262, 3, 1, photometric)]
    entries += [(273, 4, 1, None), (277, 3, 1, samples), (278, 4, 1, height), (279, 4, 1, len(data)), *extra]
    start = 8 + 2 + 12 * (len(entries) + 1) + 4
    entries.append((258, 3, samples, start if samples > 2 else int.from_bytes(shared, "little")))
    directory = [
        struct.pack("<HHII", *entry[:3], start + len(shared) if entry[3] is None else entry[3])
        for entry in sorted(entries)
    ]
    return b"II*\0" + struct.pack("<IH", 8, len(entries)) + b"".join(directory) + bytes(4) + shared + data


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
    "TIFF 12 bit": (twelve_bits, GREYS),
    "TIFF 16 bit big-endian": (lambda: saved(big_endian(), "TIFF"), GREYS),
    "TIFF 16 bit, white is 0": (
        lambda: tiff(64, 64, (~np.array(wide(np.uint16, 257))).tobytes(), bits=(16,), photometric=0),
        GREYS,
    ),
    "TIFF float overshooting 1": (lambda: saved(overshooting(1), "TIFF"), GREYS),
    "TIFF float overshooting 255": (lambda: saved(overshooting(255), "TIFF"), GREYS),
    "TIFF float from -1 to 1": (lambda: saved(signed(), "TIFF"), GREYS),
    "TIFF YCbCr": (lambda: saved(sample().convert("YCbCr"), "TIFF", compression="jpeg", quality=95), COLORS),
    "TIFF Lab": (lambda: saved(lab(), "TIFF"), COLORS),
    "PGM 16 bit dark": (lambda: b"P5 64 64 65535\n" + np.full((64, 64), 256, ">u2").tobytes(), np.ones((4, 3))),
    "PNG with long texts": (lambda: saved(sample(), "PNG", pnginfo=long_text()), COLORS),
    "PNG with a long profile": (lambda: saved(sample(), "PNG", icc_profile=bytes(2 * MB)), COLORS),
    "PNG not in sRGB": (lambda: with_profile("PNG"), COLORS),
    "PNG RGBA not in sRGB": (lambda: with_profile("PNG", "RGBA"), COLORS),
    "JPEG not in sRGB": (lambda: with_profile("JPEG", quality=95), COLORS),
    "JPEG L with a profile of RGB": (lambda: saved(sample().convert("L"), "JPEG", icc_profile=unlike_srgb()), GREYS),
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


def ico(count: int, content: bytes) -> bytes:
    entry = struct.pack("<BBBBHHII", 0, 0, 0, 0, 1, 32, len(content), 6 + 16 * count)
    return struct.pack("<HHH", 0, 1, count) + entry * count + content


REFUSED = {
    "empty": (lambda: b"", "the file is empty"),
    "text": (lambda: b"not an image\n" * 50, "not an image in a supported format"),
    "SVG": (lambda: b'<svg xmlns="http://www.w3.org/2000/svg"><rect width="9" height="9"/></svg>', "not an image"),
    "PostScript": (lambda: b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 9 9\nshowpage\n", "not an image"),
    "JPEG 2000": (lambda: saved(sample(), "JPEG2000"), "not an image"),
    "random bytes": (lambda: np.random.default_rng(0).bytes(5000), "not an image"),
    "100.02 megapixels": (lambda: bomb(10_001, 10_001), "has 10,001 x 10,001 pixels; the limit is 100 million"),
    "bomb": (lambda: bomb(60_000, 60_000), "has 60,000 x 60,000 pixels"),
    "HEIC": (
        lambda: b"\0\0\0\x18ftypheic\0\0\0\0mif1heic" + bytes(99),
        "HEIC images are not supported: convert it to JPEG",
    ),
    "HEIC of Canon": (lambda: b"\0\0\0\x18ftypmif1\0\0\0\0mif1heix" + bytes(99), "HEIC images are not supported"),
    "MOV": (lambda: b"\0\0\0\x14ftypqt  " + bytes(99), "not an image in a supported format"),
    "TIFF 16 bit with alpha": (
        lambda: tiff(9, 9, bytes(324), (338, 3, 1, 2), bits=(16, 16)),
        "kind of TIFF that is not sup",
    ),
    "TIFF float RGB": (
        lambda: tiff(9, 9, bytes(972), (339, 3, 1, 3), bits=(32, 32, 32), photometric=2),
        "kind of TIFF",
    ),
    "TIFF YCbCr without JPEG": (lambda: tiff(9, 9, bytes(243), bits=(8, 8, 8), photometric=6), "kind of TIFF"),
    "ICO of a bomb": (lambda: ico(1, bomb(60_000, 60_000)), "has over 100 million pixels"),
    "PNG header alone": (lambda: saved(sample(), "PNG")[:40], "damaged or incomplete|not an image"),
    "truncated JPEG": (lambda: saved(sample(), "JPEG")[:300], "damaged or incomplete|not an image"),
}
