"""Make the two folders of images that docs/own-images.md measures.

python docs/example_folders.py cifar10 FOLDER    CIFAR-10's 60,000 images as PNG files
python docs/example_folders.py photos FOLDER     1,000 drawn photos of 8 shapes, of any size
"""

import sys
from pathlib import Path

import numpy as np
from PIL import Image, ImageDraw, ImageFilter

SHAPES = ("circle", "cross", "crescent", "ring", "square", "star", "stripes", "triangle")
PHOTOS = 125  # of each shape


def cifar10(root: Path) -> None:
    """Save CIFAR-10, found as by `python main.py`, as root/train/CLASS/NUMBER.png and root/test/CLASS/NUMBER.png."""
    sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
    from cifar import datasets
    from cifar.config import Config

    dataset = datasets.find("cifar10", Config.create({}).data_dir)
    for part in ("train", "test"):
        split = getattr(dataset, part)
        for number, (image, label) in enumerate(zip(split.images, split.labels)):
            path = root / part / dataset.classes[label] / f"{number:05}.png"
            path.parent.mkdir(parents=True, exist_ok=True)
            Image.fromarray(image.permute(1, 2, 0).numpy()).save(path)


def photos(root: Path) -> None:
    """Save photos as root/SHAPE/NUMBER.jpg: of any size, color and light, some of them grey."""
    random = np.random.default_rng(0)
    for shape in SHAPES:
        (root / shape).mkdir(parents=True, exist_ok=True)
        for number in range(PHOTOS):
            photo(random, shape).save(root / shape / f"{number:03}.jpg", quality=85)


def photo(random: np.random.Generator, shape: str) -> Image.Image:
    """Draw one shape, turned, somewhere in the middle of a blurred background, with the noise of a camera."""
    width = int(random.integers(200, 900))
    height = int(width * random.uniform(3 / 4, 4 / 3))
    blotches = random.integers(0, 256, (6, 8, 3), dtype=np.uint8)
    image = Image.fromarray(blotches).resize((width, height), Image.Resampling.BICUBIC)
    middle = min(width, height)
    size = int(middle * random.uniform(0.4, 0.9))
    mask = outline(shape).rotate(random.uniform(0, 360)).resize((size, size))
    corner = [(length - middle) // 2 + int(random.integers(middle - size + 1)) for length in (width, height)]
    # Darker or lighter than what is behind it, or the shape could not be seen.
    behind = image.resize((1, 1), Image.Resampling.BOX).convert("L").getpixel((0, 0))
    color = random.integers(0, 90, 3) if behind > 128 else random.integers(165, 256, 3)
    image.paste(tuple(int(value) for value in color), tuple(corner), mask)
    image = image.filter(ImageFilter.GaussianBlur(middle / 300))
    pixels = np.asarray(image, float) * random.uniform(0.6, 1.1) + random.normal(0, 8, (height, width, 1))
    image = Image.fromarray(pixels.clip(0, 255).astype(np.uint8))
    return image.convert("L") if random.random() < 0.1 else image


def outline(shape: str) -> Image.Image:
    """Draw a shape of 400 pixels in white on black, within the circle that stays whole when it is turned."""
    image = Image.new("L", (400, 400))
    draw, box = ImageDraw.Draw(image), (60, 60, 340, 340)
    if shape == "circle":
        draw.ellipse(box, 255)
    elif shape == "ring":
        draw.ellipse(box, outline=255, width=50)
    elif shape == "crescent":
        draw.ellipse(box, 255)
        draw.ellipse((130, 40, 370, 280), 0)
    elif shape == "cross":
        draw.rectangle((165, 40, 235, 360), 255)
        draw.rectangle((40, 165, 360, 235), 255)
    elif shape == "stripes":
        for top in range(80, 320, 80):
            draw.rectangle((80, top, 320, top + 35), 255)
    else:
        corners = {"square": 4, "triangle": 3, "star": 10}[shape]
        angles = np.arange(corners) * 2 * np.pi / corners
        radii = np.where((shape != "star") | (np.arange(corners) % 2 == 0), 160, 65)
        draw.polygon([(200 + r * np.sin(a), 200 - r * np.cos(a)) for r, a in zip(radii, angles)], 255)
    return image


if __name__ == "__main__":
    makers = {"cifar10": cifar10, "photos": photos}
    if len(sys.argv) != 3 or sys.argv[1] not in makers:
        sys.exit(__doc__)
    makers[sys.argv[1]](Path(sys.argv[2]))
