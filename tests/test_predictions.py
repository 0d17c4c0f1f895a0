import pytest

from cifar import visualize
from cifar.errors import UserError
from handmade import make_dataset, make_run


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (lambda text: "", "is damaged"),
        (lambda text: text[:-5], "is damaged"),
        (lambda text: "\x00\x01", "is damaged"),
        (lambda text: text.replace("ship", "boat"), "is damaged"),
        (lambda text: text.replace("confidence", "sureness"), "is damaged"),
        (lambda text: text.replace("0.95", "nan"), "is damaged"),
        (lambda text: text.replace("0.95", "1.95"), "is damaged"),
        (lambda text: text.replace("0.95", "high"), "is damaged"),
        (lambda text: text.replace("\n3,cat", "\n" + "9" * 400 + ",cat"), "does not fit the test split"),
        (lambda text: "".join(text.splitlines(keepends=True)[:-1]), "does not fit the test split"),
        (lambda text: text.splitlines()[0], "does not fit the test split"),
        (lambda text: text.replace("3,cat,dog", "3,dog,dog"), "does not fit the test split"),
        (lambda text: text.replace("\n3,cat", "\n4,cat"), "does not fit the test split"),
    ],
)
def test_predictions_that_do_not_fit_are_refused_before_anything_is_drawn(tmp_path, damage, message):
    run = make_run(tmp_path)
    path = tmp_path / "predictions.csv"
    intact = path.read_text(encoding="utf-8")
    damaged = damage(intact)
    assert damaged != intact
    path.write_text(damaged, encoding="utf-8")
    with pytest.raises(UserError, match=message) as error:
        visualize.visualize(run, make_dataset())
    assert "predictions.csv" in str(error.value)
    assert "\n" not in str(error.value)
    assert not run.figures.exists()
