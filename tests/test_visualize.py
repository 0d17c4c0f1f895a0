import dataclasses

import matplotlib
import pytest
from matplotlib import pyplot
from PIL import Image

from cifar import visualize
from cifar.errors import UserError
from drawn import figures
from handmade import make_dataset, make_run

NAMES = [
    "training_history.png",
    "confusion_matrix.png",
    "per_class_metrics.png",
    "precision_recall.png",
    "misclassified.png",
    "dataset_samples.png",
    "sample_predictions.png",
    "architecture.png",
    "calibration.png",
    "risk_coverage.png",
    "corruptions.png",
]


def test_every_figure_is_a_png_at_150_dpi(tmp_path):
    run, dataset = make_run(tmp_path), make_dataset()
    paths = visualize.visualize(run, dataset)
    assert paths == [run.figures / name for name in NAMES]
    assert sorted(path.name for path in run.figures.iterdir()) == sorted(NAMES)
    for path in paths:
        with Image.open(path) as picture:
            assert picture.format == "PNG"
            assert picture.info["dpi"] == pytest.approx((150, 150), abs=0.1)
            assert len(picture.convert("L").getcolors()) > 10, f"{path.name} is blank"
        assert str(tmp_path).encode() not in path.read_bytes()
    with Image.open(run.figures / "training_history.png") as picture:
        assert picture.size == (1950, 630)


def test_every_title_names_recipe_and_dataset_and_what_was_not_augmented(tmp_path):
    titles = {name: figure.get_suptitle() for name, figure in figures(make_run(tmp_path), make_dataset()).items()}
    assert [f"{name}.png" for name in titles] == NAMES
    assert all("fast on digits" in title for title in titles.values())
    plain = {name for name, title in titles.items() if "test split, without test-time augmentation" in title}
    assert plain == set(titles) - {"training_history", "dataset_samples", "architecture"}


@pytest.mark.parametrize("count", [2, 3, 100])
def test_nothing_is_cut_at_the_edge(tmp_path, count):
    classes = [f"aquarium_fish_{number}" for number in range(count)]
    true = list(range(count)) * 2
    predicted = [(label + index % 3) % count for index, label in enumerate(true)]
    run = make_run(tmp_path, classes, true=true, predicted=predicted, confidence=[0.5] * len(true))
    for name, figure in figures(run, make_dataset(classes, true)).items():
        figure.draw_without_rendering()
        inner, outer = figure.get_tightbbox(), figure.bbox_inches
        assert inner.xmin >= 0, name
        assert inner.ymin >= 0, name
        assert inner.xmax <= outer.xmax, name
        assert inner.ymax <= outer.ymax, name


def test_a_run_without_evaluation_draws_the_rest_and_leaves_the_test_split_closed(tmp_path):
    dataset = make_dataset()
    paths = visualize.visualize(make_run(tmp_path, evaluated=False), dataset)
    assert [path.name for path in paths] == ["training_history.png", "dataset_samples.png", "architecture.png"]
    assert "test" not in vars(dataset)


def test_a_run_that_measured_nothing_cannot_be_drawn(tmp_path):
    run = make_run(tmp_path, epochs=0, evaluated=False)
    with pytest.raises(UserError, match="has nothing to draw"):
        visualize.visualize(run, make_dataset())


def test_another_dataset_is_refused(tmp_path):
    other = dataclasses.replace(make_dataset(), key="cifar10")
    with pytest.raises(UserError, match="was trained on digits, not on cifar10"):
        visualize.visualize(make_run(tmp_path), other)


def test_a_folder_that_cannot_be_written_is_one_sentence(tmp_path):
    run = make_run(tmp_path)
    run.figures.write_text("in the way", encoding="utf-8")
    with pytest.raises(UserError, match=r"^cannot write .*training_history.png: "):
        visualize.visualize(run, make_dataset())


def test_the_users_matplotlib_stays_as_it_was(tmp_path):
    with matplotlib.rc_context({"axes.facecolor": "black", "figure.dpi": 40}):
        before = dict(matplotlib.rcParams)
        paths = visualize.visualize(make_run(tmp_path), make_dataset())
        assert dict(matplotlib.rcParams) == before
    assert pyplot.get_fignums() == []
    with Image.open(paths[0]) as picture:
        assert picture.convert("L").getextrema() == (0, 255)
        assert picture.convert("L").histogram()[255] > picture.width * picture.height / 2, "the user's black shows"
