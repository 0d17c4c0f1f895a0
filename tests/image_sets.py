"""Small datasets of drawn images, as folders: what people's own images differ in, one property each.

Only differences that remain once files are decoded; image_files.py has the kinds of files.

An image of class k of K has stripes at an angle of 180 k / K degrees, with noise, so a network can learn it quickly,
and a mirrored image is of another class only by its angle. All random numbers come from a fixed seed.
"""

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from PIL import Image

Draw = Callable[[np.random.Generator, int, int, int], Image.Image]  # (random, label, classes, size) -> image


def stripes(random: np.random.Generator, label: int, classes: int, size: int) -> np.ndarray:
    """Draw uint8 (size, size): stripes whose angle is the label's, at a random phase, with noise."""
    down, right = np.mgrid[:size, :size] * (8 / size)
    angle = np.pi * label / classes
    waves = np.sin(down * np.cos(angle) * 2 + right * np.sin(angle) * 2 + random.uniform(0, 2 * np.pi))
    return np.clip(128 + 90 * waves + random.normal(0, 10, waves.shape), 0, 255).astype(np.uint8)


def grey(random, label, classes, size):
    return Image.fromarray(stripes(random, label, classes, size))


def color(random, label, classes, size):
    """Stripes in a random color, so that the color says nothing of the class."""
    return Image.fromarray(
        (stripes(random, label, classes, size)[..., None] * random.uniform(0.5, 1, 3)).astype("uint8")
    )


def two_colors(random, label, classes, size):
    pattern = stripes(random, label, classes, size)[..., None] > 128
    return Image.fromarray(np.where(pattern, [200, 30, 40], [20, 60, 180]).astype("uint8"))


def constant_channel(channel: int, value: int) -> Draw:
    def draw(*drawing):
        pixels = np.array(color(*drawing))
        pixels[..., channel] = value
        return Image.fromarray(pixels)

    return draw


def black_on_white(random, label, classes, size):
    """A thin black line on white, at the label's angle through a random point near the middle."""
    down, right = np.mgrid[:size, :size] - size / 2 - random.uniform(-size / 8, size / 8, (2, 1, 1))
    angle = np.pi * label / classes
    distance = np.abs(down * np.cos(angle) + right * np.sin(angle))
    return Image.fromarray(np.where(distance < max(1, size / 16), 0, 255).astype("uint8"))


def small_square(random, label, classes, size):
    """White, with one black square of 2x2 pixels in the label's part of the height."""
    pixels = np.full((size, size), 255, np.uint8)
    top = (2 * label + 1) * size // (2 * classes)
    left = random.integers(size - 2)
    pixels[top : top + 2, left : left + 2] = 0
    return Image.fromarray(pixels)


def all_alike(random, label, classes, size):
    return Image.new("RGB", (size, size), (90, 120, 30))


def nearly_grey(random, label, classes, size):
    """Grey with one step of color, as old photos and JPEG files have it."""
    pixels = np.repeat(stripes(random, label, classes, size)[..., None], 3, axis=2)
    return Image.fromarray(pixels // 2 * 2 + random.integers(0, 2, pixels.shape, dtype=np.uint8))


def dark(random, label, classes, size):
    return Image.fromarray(stripes(random, label, classes, size) // 64)


@dataclass(frozen=True)
class ImageSet:
    """How a dataset is made, and whether a network must do better than chance on it."""

    draw: Draw = color
    classes: int = 2
    train: int = 400  # images a class
    test: int = 40
    size: int = 32  # of the files, in pixels
    image_size: int = 32  # what --image-size asks for
    names: str = "class {}"
    learnable: bool = True

    def write(self, root: Path) -> Path:
        """Write the images to root/train/CLASS/ and root/test/CLASS/."""
        random = np.random.default_rng(0)
        for part, count in (("train", self.train), ("test", self.test)):
            for label in range(self.classes):
                folder = root / part / self.names.format(label)
                folder.mkdir(parents=True)
                for number in range(count):
                    image = self.draw(random, label, self.classes, self.size)
                    image.save(folder / f"{number}.png")
        return root


IMAGE_SETS = {
    "color": ImageSet(),
    "grey": ImageSet(grey, train=200),
    "grey, ten classes": ImageSet(grey, classes=10, train=100),
    "nearly grey": ImageSet(nearly_grey),
    "dark": ImageSet(dark),
    "two colors": ImageSet(two_colors),
    "no blue": ImageSet(constant_channel(2, 0)),
    "full red": ImageSet(constant_channel(0, 255)),
    "black on white": ImageSet(black_on_white),
    "small squares": ImageSet(small_square, train=20, test=5, learnable=False),  # pooling forgets where they are
    "all alike": ImageSet(all_alike, train=20, test=5, learnable=False),
    "three images a class": ImageSet(train=3, test=1, learnable=False),
    "eight pixels": ImageSet(size=8),
    "64 pixels": ImageSet(size=64, image_size=64, train=200),
    "128 pixels": ImageSet(grey, size=128, image_size=128, train=50),
    "odd size": ImageSet(size=45, image_size=45),
    "many classes": ImageSet(classes=120, train=4, test=1, learnable=False),
    "odd names": ImageSet(names="<b>[red]$x_{}^$ =1+1 \N{HEAVY BLACK HEART} 猫"),
    "long names": ImageSet(names="{}" + "x" * 200),
}
