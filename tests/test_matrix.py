"""Small datasets that differ from CIFAR-10 in one property each, through the whole pipeline."""

import pytest

from cifar.runs import Run
from cifar.visualize import FIGURES
from commands import main
from image_sets import IMAGE_SETS

IN_SUITE = {("grey", "fast"), ("no blue", "convnet")}  # test_pipeline.py has odd names


@pytest.mark.parametrize(
    ("name", "recipe"),
    [
        pytest.param(name, recipe, marks=[] if (name, recipe) in IN_SUITE else pytest.mark.slow)
        for name in IMAGE_SETS
        for recipe in ("fast", "convnet")
    ],
)
def test_a_network_learns_from_any_images_and_the_pipeline_completes(tmp_path, name, recipe):
    made = IMAGE_SETS[name]
    made.write(tmp_path / "images")
    settings = ("--recipe", recipe, "--epochs", "2", "--precision", "float32", "--device", "cpu")
    images = ("--dataset", str(tmp_path / "images"), "--image-size", str(made.image_size))
    places = ("--data-dir", str(tmp_path / "data"), "--output-dir", str(tmp_path / "outputs"))
    code, out, err = main(*images, *settings, *places)
    assert (code, err) == (0, ""), out
    run = Run((tmp_path / "outputs" / "latest").resolve())
    assert run.status() == "completed"
    assert {path.stem for path in (run.path / "figures").iterdir()} == set(FIGURES)
    page = (run.path / "report.html").read_text(encoding="utf-8")
    assert page.rstrip().endswith("</html>")
    assert len(page) < 5e6
    metrics, chance = run.metrics, 1 / made.classes
    assert metrics.n == made.classes * made.test
    if made.learnable:
        assert metrics.accuracy >= chance + 0.5 * (1 - chance)
    if name == "all alike":
        assert "gives every test image the same class" in " ".join(out.replace("│", "").split())
