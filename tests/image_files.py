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


def picture(pixels: torch.Tensor) -> Image.Image:
    """Return the image whose pixels are (3, H, W)."""
    return Image.fromarray(pixels.permute(1, 2, 0).numpy())


def random_images(count: int, size: int = 8) -> torch.Tensor:
    return torch.from_numpy(np.random.default_rng(0).integers(0, 256, (count, 3, size, size), dtype=np.uint8))


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
    "PNG 16 bit of which 12 are used": (lambda: saved(wide(np.uint16, 16), "PNG"), GREYS // 16),
    "TIFF 16 bit of which 12 are used": (lambda: saved(wide(np.uint16, 16), "TIFF"), GREYS),
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
    "PFM": (lambda: b"Pf\n64 64\n-1.0\n" + np.full((64, 64), 0.5, "<f4").tobytes(), np.full((4, 3), 127)),
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


def ico(count: int, content: bytes) -> bytes:
    entry = struct.pack("<BBBBHHII", 0, 0, 0, 0, 1, 32, len(content), 6 + 16 * count)
    return struct.pack("<HHH", 0, 1, count) + entry * count + content


INCOMPLETE = "damaged, incomplete, or of a kind that is not supported|not an image"
REFUSED = {
    "empty": (lambda: b"", "the file is empty"),
    "text": (lambda: b"not an image\n" * 50, "not an image in a supported format"),
    "SVG": (lambda: b'<svg xmlns="http://www.w3.org/2000/svg"><rect width="9" height="9"/></svg>', "not an image"),
    "PostScript": (lambda: b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 9 9\nshowpage\n", "not an image"),
    "JPEG 2000": (lambda: saved(sample(), "JPEG2000"), "not an image"),
    "random bytes": (lambda: np.random.default_rng(0).bytes(5000), "not an image"),
    "100.02 megapixels": (lambda: png(shape=(10_001, 10_001, 8, 2)), "has over 100 million pixels: make it smaller"),
    "bomb": (lambda: png(shape=(60_000, 60_000, 8, 2)), "has over 100 million pixels"),
    "HEIC": (lambda: b"\0\0\0\x18ftypheic\0\0\0\0mif1heic" + bytes(99), "not an image in a supported format"),
    "MOV": (lambda: b"\0\0\0\x14ftypqt  " + bytes(99), "not an image in a supported format"),
    "TIFF 16 bit with alpha": (lambda: tiff(9, 9, bytes(324), (338, 3, 1, 2), bits=(16, 16)), INCOMPLETE),
    "TIFF float RGB": (lambda: tiff(9, 9, bytes(972), (339, 3, 1, 3), bits=(32,) * 3, photometric=2), INCOMPLETE),
    "TIFF YCbCr without JPEG": (lambda: tiff(9, 9, bytes(243), bits=(8, 8, 8), photometric=6), INCOMPLETE),
    "ICO of a bomb": (lambda: ico(1, png(shape=(60_000, 60_000, 8, 2))), "has over 100 million pixels"),
    "PNG header alone": (lambda: saved(sample(), "PNG")[:40], INCOMPLETE),
    "truncated JPEG": (lambda: saved(sample(), "JPEG")[:300], INCOMPLETE),
}


# Costly files: small ones that ask for much memory or time.


def zeros(count: int) -> bytes:
    """Compressed zeros, without having them all in memory."""
    compress = zlib.compressobj(9)
    return b"".join(compress.compress(bytes(MB)) for _ in range(count // MB)) + compress.flush()


def png(*chunks: tuple[bytes, bytes], shape=(1, 1, 8, 2), pixels: bytes = zlib.compress(b"\0abc")) -> bytes:
    """A PNG file, written by hand. shape: width, height, bits, color type; pixels: compressed."""
    parts = [(b"IHDR", struct.pack(">IIBBBBB", *shape, 0, 0, 0)), *chunks, (b"IDAT", pixels), (b"IEND", b"")]
    parts = [
        struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data)) for kind, data in parts
    ]
    return b"\x89PNG\r\n\x1a\n" + b"".join(parts)


def many_tags(count: int, size: int) -> bytes:
    """A TIFF file, or Exif, of which many tags point to the same bytes."""
    return tiff(1, 1, bytes(size), *((1000 + tag, 1, size, None) for tag in range(count)))


def jpeg(marker: int, *segments: bytes) -> bytes:
    """A JPEG file with further segments."""
    whole = saved(sample(), "JPEG")
    inserted = [b"\xff" + bytes([marker]) + struct.pack(">H", len(data) + 2) + data for data in segments]
    return whole[:2] + b"".join(inserted) + whole[2:]


def large_exif(tags: int, size: int) -> bytes:
    exif = many_tags(tags, size)
    return jpeg(0xE1, *(b"Exif\0\0" + exif[start : start + 65_000] for start in range(0, len(exif), 65_000)))


def empty_scans(count: int, size: int = 5000) -> bytes:
    """A progressive JPEG file with scans that say of all blocks that nothing changes."""
    blocks, bits = ((size + 7) // 8) ** 2, ""
    while blocks >= 1 << 14:  # runs of 16,384 to 32,767 blocks have the code 0 and 14 more bits
        run = min(blocks, (1 << 15) - 1)
        bits, blocks = bits + f"0{run - (1 << 14):014b}", blocks - run
    bits += "1" * (-len(bits) % 8)
    data = int(bits, 2).to_bytes(len(bits) // 8, "big").replace(b"\xff", b"\xff\0")
    codes = b"\xff\xc4" + struct.pack(">H", 20) + b"\x10" + bytes([1] + [0] * 15) + b"\xe0"
    scan = b"\xff\xda" + struct.pack(">HBBBBBB", 8, 1, 1, 0, 1, 63, 0) + data
    return saved(Image.new("L", (size, size)), "JPEG", progressive=True)[:-2] + codes + scan * count + b"\xff\xd9"


def rle_bmp(width: int, height: int, data: bytes) -> bytes:
    header = struct.pack("<IiiHHIIiiII", 40, width, height, 1, 8, 1, len(data), 0, 0, 256, 0)
    return b"BM" + struct.pack("<IHHI", 1078 + len(data), 0, 0, 1078) + header + bytes(1024) + data


def gif_comments(count: int) -> bytes:
    whole = saved(sample(), "GIF")
    start = 13 + 3 * (2 << (whole[10] & 7))
    return whole[:start] + (b"\x21\xfe\xff" + b"x" * 255 + b"\0") * count + whole[start:]


def webp(exif: bytes) -> bytes:
    whole = saved(sample(), "WEBP", lossless=True, exif=b"II*\0" + bytes(8))
    body, chunk = whole[12 : whole.index(b"EXIF")], b"EXIF" + struct.pack("<I", len(exif)) + exif
    return b"RIFF" + struct.pack("<I", 4 + len(body + chunk)) + b"WEBP" + body + chunk


def exif_loop() -> bytes:
    entries = [(0x112, 3, 1, 1), (0x8769, 4, 1, 8), (0x8825, 4, 1, 8)]  # Exif and GPS begin where this begins
    directory = b"".join(struct.pack("<HHII", *entry) for entry in entries)
    return jpeg(0xE1, b"Exif\0\0II*\0" + struct.pack("<IH", 8, 3) + directory + struct.pack("<I", 8))


def flat(mode: str, format: str, side: int = 10_000, **options) -> bytes:
    return saved(Image.new(mode, (side, side)), format, **options)


def moving(format: str, count: int) -> bytes:
    others = [Image.new("RGB", (9, 9), (number % 256, 0, 0)) for number in range(count)]
    return saved(Image.new("RGB", (9, 9)), format, save_all=True, append_images=others)


MEMORY, TIME, LIMIT, READ, ANY = "takes over 1 GB of memory", "takes over 5 seconds", "takes over", None, ""
# What a file must lead to; LIMIT and ANY where that depends on the computer.
COSTLY = {
    "TIFF, 200 tags of the same 5 MB": (lambda: many_tags(200, 5 * MB), MEMORY),
    "TIFF, 1,500 tags of the same 4 MB": (lambda: many_tags(1500, 4 * MB), MEMORY),
    "PNG, Exif of 300 tags of 4 MB": (lambda: png((b"eXIf", many_tags(300, 4 * MB))), ANY),
    "WebP, Exif of 300 tags of 4 MB": (lambda: webp(many_tags(300, 4 * MB)), ANY),
    "JPEG, Exif of 300 tags of 4 MB": (lambda: large_exif(300, 4 * MB), ANY),
    "JPEG, 1,000 empty scans": (lambda: empty_scans(1000), ANY),
    "JPEG, 100,000 empty scans": (lambda: empty_scans(100_000), TIME),
    "JPEG, 80,000 Exif segments": (lambda: jpeg(0xE1, *[b"Exif\0\0" + bytes(100)] * 80_000), ANY),
    "JPEG, Exif that points to itself": (exif_loop, READ),
    "GIF, 38,000 comments": (lambda: gif_comments(38_000), ANY),
    "GIF, 3,000 frames": (lambda: moving("GIF", 3000), READ),
    "WebP, 3,000 frames": (lambda: moving("WEBP", 3000), READ),
    "WebP, 100 megapixels": (lambda: flat("RGB", "WEBP", lossless=True, method=0, quality=0), MEMORY),
    "AVIF, 60 megapixels": (lambda: flat("RGB", "AVIF", 7745, speed=10), ANY),
    "PPM, 4,500,000 comments": (lambda: b"P3 1000 1000 255\n" + b"#\n" * 4_500_000, TIME),
    "PPM, a number of 9 MB": (lambda: b"P6\n" + b"1" * 9 * MB + b" 1\n255\nabc", "damaged"),
    "BMP, RLE, a pixel a line": (lambda: rle_bmp(30_000, 3300, b"\1\1\0\0" * 3300 + b"\0\1"), ANY),
    "BMP, RLE, 2,000,000 steps": (lambda: rle_bmp(10_000, 10_000, b"\0\2\0\0" * 2 * MB), ANY),
    "PNG, 800,000 private chunks": (lambda: png(*[(b"prIv", b"")] * 800_000), ANY),
    "PNG, 2 GB of text": (lambda: png((b"zTXt", b"a\0\0" + zeros(2000 * MB))), LIMIT),
    "PNG, 2 GB of profile": (lambda: png((b"iCCP", b"a\0\0" + zeros(2000 * MB))), LIMIT),
    "PNG, 100 megapixels with alpha of 16 bits": (
        lambda: png(shape=(10_000, 10_000, 16, 6), pixels=zeros(10_000 * (1 + 8 * 10_000) + MB)),
        ANY,
    ),
    "TIFF, 100 megapixels of float": (
        lambda: tiff(10_000, 10_000, zeros(400 * MB), (339, 3, 1, 3), bits=(32,), compression=8),
        ANY,
    ),
    "ICO, 5,000 entries": (lambda: ico(5000, saved(sample(256), "PNG")), READ),
}
