import dataclasses
import itertools

import numpy as np
import pytest

from cifar import gallery, visualize
from handmade import TRUE, make_dataset, make_run


def figures(run, dataset) -> dict:
    results = visualize.read_results(run, dataset)
    return {name: visualize.draw(name, results) for name in ("misclassified", "sample_predictions")}


def captions(figure) -> list[str]:
    return [text.get_text() for text in figure.axes[0].texts]


def cell(figure, row: int, column: int, height: int, width: int) -> np.ndarray:
    """The 8x8 image in a cell of the drawn grid, whose cells are `height` x `width`."""
    (image,) = figure.axes[0].images
    return image.get_array()[row * height : row * height + 8, column * width : column * width + 8]


def test_images_of_a_folder_are_named_by_their_files(tmp_path):
    files = tuple(f"test/dog/IMG_{index}.png" for index in range(8)) + ("test/dog/IMG_at_the_sea_in_summer.jpg",) * 4
    found = figures(make_run(tmp_path), dataclasses.replace(make_dataset(), test_files=files))
    assert captions(found["misclassified"])[0] == "✗ 95.0% cat\nIMG_at_the_…_summer.jpg\ntrue ship"
    assert captions(found["sample_predictions"])[0] == "✓ 90.0% cat\nIMG_0.png"
    assert "with calibrated confidence and file name" in found["misclassified"].get_suptitle()


def test_misclassified_images_are_ordered_by_confidence(tmp_path):
    figure = figures(make_run(tmp_path), make_dataset())["misclassified"]
    assert captions(figure)[0] == "✗ 95.0% cat\n#8\ntrue ship"
    assert [text.split("#")[1] for text in captions(figure)] == ["8\ntrue ship", "9\ntrue ship", "3\ntrue cat"]
    assert "all of 3 among 12" in figure.get_suptitle()
    for column, value in enumerate((20, 21, 3)):  # 10 x class + position in the class
        assert (cell(figure, 0, column, height=12, width=10) == value).all()


def test_the_32_most_confident_mistakes_are_shown_the_earlier_of_equal_ones_first(tmp_path):
    run = make_run(tmp_path, true=[0] * 40, predicted=[1] * 40, confidence=[0.5] * 20 + [0.9] * 20)
    figure = figures(run, make_dataset(true=[0] * 40))["misclassified"]
    assert [int(text.split("#")[1].split()[0]) for text in captions(figure)] == [*range(20, 40), *range(12)]
    assert "the 32 most confident of 40 among 40" in figure.get_suptitle()


def test_a_perfect_network_gets_a_sentence_instead_of_images(tmp_path):
    figure = figures(make_run(tmp_path, predicted=TRUE), make_dataset())["misclassified"]
    assert captions(figure) == ["No image is misclassified."]


def test_sample_predictions_mark_right_and_wrong_without_color(tmp_path):
    texts = captions(figures(make_run(tmp_path), make_dataset())["sample_predictions"])
    assert texts[0] == "✓ 90.0% cat\n#0"
    assert [index for index, text in enumerate(texts) if text.startswith("✗")] == [3, 8, 9]


@pytest.mark.parametrize(("count", "rows"), [(3, [0, 1, 2]), (39, range(0, 39, 2))])
def test_dataset_samples_have_a_row_for_each_of_up_to_20_classes(count, rows):
    classes = [f"fish{number}" for number in range(count)]
    axes = gallery.dataset_samples(make_dataset(classes), "fast on digits").axes[0]
    assert [label.get_text() for label in axes.get_yticklabels()] == [f"fish{number}\n3" for number in rows]
    for (row, number), column in itertools.product(enumerate(rows), range(3)):
        assert (cell(axes.figure, row, column, height=8, width=8) == (10 * number + column) % 256).all()
    assert (cell(axes.figure, 0, 3, height=8, width=8) == 255).all(), "a class has three training images"


@pytest.mark.parametrize("name", ["a\x1b[31mb\nc", "long" * 50])
def test_names_are_escaped_and_shortened(tmp_path, name):
    classes = (name, "dog", "ship")
    results = figures(make_run(tmp_path, classes), make_dataset(classes))
    for text in captions(results["misclassified"]) + captions(results["sample_predictions"]):
        assert name[:1] in text or "dog" in text or "ship" in text
        assert text.count("\n") <= 2
        assert all(len(line) <= 23 and line.isprintable() for line in text.split("\n"))
