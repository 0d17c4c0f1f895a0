import itertools

from cifar import mosaics
from drawn import block, figures, texts
from handmade import TRUE, make_dataset, make_run


def test_misclassified_are_ordered_by_confidence(tmp_path):
    figure = figures(make_run(tmp_path), make_dataset())["misclassified"]
    assert texts(figure) == [
        "true ship\npredicted cat\n95.0%   #8",
        "true ship\npredicted cat\n75.0%   #9",
        "true cat\npredicted dog\n60.0%   #3",
    ]
    assert "3 among 12" in figure.get_suptitle()
    for column, value in enumerate((20, 21, 3)):  # 10 x class + place in the class
        assert (block(figure, 0, column, height=12, width=10) == value).all()


def test_of_many_errors_the_32_most_confident_are_shown_the_earlier_first_of_equals(tmp_path):
    confidence = [0.5] * 20 + [0.9] * 20
    run = make_run(tmp_path, true=[0] * 40, predicted=[1] * 40, confidence=confidence)
    figure = figures(run, make_dataset(true=[0] * 40))["misclassified"]
    shown = [int(text.rsplit("#")[1]) for text in texts(figure)]
    assert shown == [*range(20, 40), *range(12)]
    assert "the 32 most confident of 40 among 40" in figure.get_suptitle()


def test_no_errors_are_said_in_words(tmp_path):
    figure = figures(make_run(tmp_path, predicted=TRUE), make_dataset())["misclassified"]
    assert texts(figure) == ["No image is misclassified."]
    assert not figure.axes[0].images


def test_sample_predictions_mark_right_and_wrong_without_colour(tmp_path):
    captions = texts(figures(make_run(tmp_path), make_dataset())["sample_predictions"])
    assert len(captions) == 12
    assert captions[0] == "✓ cat\n90.0%   #0\n"
    assert captions[3] == "✗ dog\n60.0%   #3\ntrue cat"
    assert [index for index, text in enumerate(captions) if text.startswith("✗")] == [3, 8, 9]


def test_sample_predictions_are_spread_over_the_whole_split(tmp_path):
    labels = [0] * 311
    run = make_run(tmp_path, true=labels, predicted=labels, confidence=[1] * 311)
    captions = texts(figures(run, make_dataset(true=labels))["sample_predictions"])
    assert [int(text.split("#")[1]) for text in captions] == list(range(0, 311, 10))


def test_dataset_samples_have_a_row_for_each_class():
    figure = mosaics.dataset_samples(make_dataset(), "fast on digits")
    for row, column in itertools.product(range(3), range(3)):
        assert (block(figure, row, column, height=8, width=8) == 10 * row + column).all()
    assert (block(figure, 0, 3, height=8, width=8) == 255).all(), "a class has three training images"
    assert [label.get_text() for label in figure.axes[0].get_yticklabels()] == ["cat\n3", "dog\n3", "ship\n3"]
    assert figure.axes[0].images[0].get_interpolation() == "nearest"


def test_dataset_samples_of_100_classes_show_20():
    classes = [f"fish{number}" for number in range(100)]
    figure = mosaics.dataset_samples(make_dataset(classes), "fast on digits")
    names = [label.get_text().split("\n")[0] for label in figure.axes[0].get_yticklabels()]
    assert len(names) == 20
    assert (names[0], names[-1]) == ("fish0", "fish99")
    assert "20 of 100 classes" in figure.get_suptitle()
