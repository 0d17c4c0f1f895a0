"""What is read off a figure."""

import numpy as np
from matplotlib.figure import Figure
from matplotlib.transforms import Bbox

from cifar import visualize


def figures(run, dataset):
    return dict(visualize._figures(run, dataset))


def texts(figure: Figure) -> list[str]:
    return [text.get_text() for text in figure.axes[0].texts]


def block(figure: Figure, row: int, column: int, height: int, width: int) -> np.ndarray:
    """The 8x8 image at a place of the drawn mosaic, whose cells are `height` x `width`."""
    (image,) = figure.axes[0].images
    return image.get_array()[row * height : row * height + 8, column * width : column * width + 8]


def boxes(figure: Figure, labels) -> list[Bbox]:
    figure.draw_without_rendering()
    return [label.get_window_extent() for label in labels if label.get_text()]
