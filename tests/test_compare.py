import json
import shutil
from itertools import pairwise
from pathlib import Path

import numpy as np
import pytest
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from scipy.stats import ttest_rel

from cifar import compare, compare_figure, outputs
from cifar.errors import UserError
from cifar.runs import Run
from handmade import ESCAPED, erring_run, make_line

RUBBISH = ("", "{", "[1]", "null", '{"seconds": [1], "accuracy": "high", "recipe": 3}', "\0\xff")


def panels(figure: Figure) -> dict[str, Axes]:
    return {axes.get_label(): axes for axes in figure.axes}


def curves(axes: Axes) -> list[Line2D]:
    """The lines that have points; those without are for the legend."""
    return [line for line in axes.lines if len(line.get_xdata())]


def test_the_better_of_two_is_told_with_mcnemars_p(tmp_path):
    first = erring_run(tmp_path / "first", range(20))  # wrong on 20
    second = erring_run(tmp_path / "second", range(18, 24), seed=1)  # on 6 of which both have 2: 18 against 4
    (pair,) = compare.compare([first, second])["pairs"]
    assert (pair["only_first"], pair["only_second"], pair["n"]) == (4, 18, 300)
    # Twice the chance of at most 4 heads in 22 throws: (1 + 22 + 231 + 1540 + 7315) / 2**22.
    assert pair["p"] == pair["p_corrected"] == pytest.approx(2 * 9109 / 2**22)
    assert pair["difference"] == pytest.approx(14 / 300)
    right = [np.array([i not in wrong for i in range(300)], float) for wrong in (range(20), range(18, 24))]
    assert pair["interval_95"] == pytest.approx([*ttest_rel(right[1], right[0]).confidence_interval()])
    assert pair["better"] == "B"
    assert pair["verdict"].startswith("B is better than A: +4.67 points, 95% interval +1.6")
    assert pair["verdict"].endswith("p = 0.004")
    (mirrored,) = compare.compare([second, first])["pairs"]
    assert mirrored["verdict"] == pair["verdict"].replace("B is better than A", "A is better than B")


def test_a_difference_that_may_be_chance_is_called_not_significant(tmp_path):
    pair = [
        erring_run(tmp_path / "first", range(10)),
        erring_run(tmp_path / "second", range(8, 20)),
    ]  # 8 against 10
    (pair,) = compare.compare(pair)["pairs"]
    assert pair["better"] is None
    assert pair["verdict"].startswith(
        "no significant difference between A and B: B - A is -0.67 points, 95% interval -3."
    )
    assert pair["verdict"].endswith("p = 0.815")  # 1 - C(18,9) / 2**18


def test_of_more_than_two_runs_the_p_values_are_corrected(tmp_path):
    # 1 against 8 is 20 / 512 = 0.039, which three comparisons make 0.117.
    runs = [
        erring_run(tmp_path / "a", range(8)),
        erring_run(tmp_path / "b", [20]),
        erring_run(tmp_path / "c", [20]),
    ]
    assert compare.compare(runs[:2])["pairs"][0]["better"] == "B"
    made = compare.compare(runs)
    assert [pair["p_corrected"] for pair in made["pairs"]] == pytest.approx([60 / 512, 60 / 512, 1])
    assert [pair["better"] for pair in made["pairs"]] == [None] * 3
    assert "Holm for 3 comparisons" in made["method"]


def test_runs_of_other_test_sets_are_not_paired_but_have_their_figures(tmp_path):
    made = compare.compare(
        [
            erring_run(tmp_path / "a", range(8)),
            erring_run(tmp_path / "b", range(9), test_sha256="other"),
            erring_run(tmp_path / "c", range(30), test_sha256="other"),
            erring_run(tmp_path / "d", range(9), images=200, test_sha256=None),
            erring_run(tmp_path / "e", range(8), test_sha256=None),
        ]
    )
    pairs = [pair["first"] + pair["second"] for pair in made["pairs"]]
    assert pairs == ["AE", "BC", "BE", "CE"]
    (note,) = made["notes"]
    assert note.startswith("not paired, as they were measured on different test sets: A and B, A and C, A and D")
    assert [row["accuracy"] for row in made["runs"]] == pytest.approx([1 - 8 / 300, 0.97, 0.9, 0.955, 1 - 8 / 300])
    assert [ends is None for ends in made["classes"][0]["interval_95"]] == [True, True, True, False]


def test_classes_are_compared_where_they_are_the_same(tmp_path):
    first, second = erring_run(tmp_path / "a", [0, 3, 6, 1]), erring_run(tmp_path / "b", [0])
    cat, dog, ship = compare.compare([first, second])["classes"]
    assert (cat["class"], cat["recall"]) == ("cat", pytest.approx([0.97, 0.99]))
    assert cat["difference"] == pytest.approx([0.02])
    assert dog["difference"] == pytest.approx([0.01])
    assert (ship["difference"], ship["interval_95"]) == ([0], [[0, 0]])
    other = erring_run(tmp_path / "c", [0], classes=("a", "b"))
    made = compare.compare([first, other])
    assert (made["classes"], made["pairs"], len(made["notes"])) == ([], [], 1)


def test_of_many_classes_those_are_shown_that_differ_most(tmp_path):
    classes = [f"class {number}" for number in range(30)]
    # The first errs on classes 0 to 9, the second on 25 to 28; of equals the earlier ones are shown.
    made = compare.compare(
        [
            erring_run(tmp_path / "a", range(10), classes=classes),
            erring_run(tmp_path / "b", range(85, 89), classes=classes),
        ]
    )
    assert len(made["classes"]) == 30
    assert [row["class"] for row in made["classes_shown"]] == [*classes[:16], *classes[25:29]]


def test_only_the_settings_that_differ_are_told_and_no_places(tmp_path):
    first = erring_run(tmp_path / "a", [0])
    second = erring_run(
        tmp_path / "b", [0], recipe="mlp", model="resnet18", optimizer="sgd", data_dir="x", output_dir="y"
    )
    second.update(threads=4)
    assert compare.compare([first, second])["settings"] == [
        {"name": "recipe", "values": ["fast", "mlp"]},
        {"name": "model", "values": ["whitened", "resnet18"]},
        {"name": "optimizer", "values": ["muon", "sgd"]},
        {"name": "threads", "values": [None, 4]},
    ]


@pytest.mark.parametrize("content", ["", "index,true\n", "\0", 'index,true,predicted\n0,"cat', None])
def test_without_predictions_a_run_is_told_apart_and_still_tabulated(tmp_path, content):
    first, second = erring_run(tmp_path / "a", [0]), erring_run(tmp_path / "b", [0])
    path = second.path / "predictions.csv"
    path.unlink() if content is None else path.write_text(content)
    made = compare.compare([first, second])
    assert made["pairs"] == []
    assert made["notes"][0].startswith("B is not paired with the others: ")
    assert "predictions.csv" in made["notes"][0]
    assert len(made["runs"]) == len(made["classes"][0]["recall"]) == 2


def test_predictions_that_do_not_fit_the_metrics_are_not_paired(tmp_path):
    first, second = erring_run(tmp_path / "a", [0]), erring_run(tmp_path / "b", [0])
    shutil.copy(erring_run(tmp_path / "c", range(9)).path / "predictions.csv", second.path)
    assert "not what its metrics.json was computed from" in compare.compare([first, second])["notes"][0]


def test_runs_that_held_nothing_out_have_their_loss_drawn_alone(tmp_path):
    found = [erring_run(tmp_path / name, [0], history=0) for name in "ab"]
    for run in found:
        run.append_history(make_line(1, validated=False))
    axes = panels(compare_figure.draw(compare.compare(found)))
    assert axes.keys() == {"accuracy", "loss", "classes"}
    assert len(curves(axes["loss"])) == 2


def test_runs_without_any_history_have_a_figure_that_says_so(tmp_path):
    found = [erring_run(tmp_path / name, [0], history=0) for name in "ab"]
    axes = panels(compare_figure.draw(compare.compare(found)))
    assert [text.get_text() for text in axes["loss"].texts] == ["nothing was recorded"]


@pytest.mark.parametrize("content", ["", '{"epoch": 1}\n', "[1]\n", '"rubbish"\n', None])
def test_without_a_history_there_is_a_figure_without_curves(tmp_path, content):
    first, second = erring_run(tmp_path / "a", [0]), erring_run(tmp_path / "b", [0])
    path = second.path / "history.jsonl"
    path.unlink() if content is None else path.write_text(content)
    made = compare.compare([first, second])
    assert len(made["notes"]) == (1 if content else 0)
    axes = panels(compare_figure.draw(made))
    assert [len(curves(axes[name])) for name in ("loss", "epochs", "seconds")] == [1, 1, 1]


def test_a_mistake_is_one_sentence(tmp_path):
    first, second = erring_run(tmp_path / "a", [0]), erring_run(tmp_path / "b", [0])
    with pytest.raises(UserError, match="a is given twice"):
        compare.compare([first, second, first])
    with pytest.raises(UserError, match="takes two runs or more"):
        compare.compare([first])
    for file, kept in [(file, second.read(file)) for file in ("config.json", "run.json", "metrics.json")]:
        for content in RUBBISH:
            (second.path / file).write_text(content, encoding="latin-1")
            with pytest.raises(UserError, match=rf"/b/{file} [^\n]*$"):
                compare.compare([first, second])
        second.write(file, kept)
    assert compare.compare([first, second])["pairs"]
    (second.path / "metrics.json").unlink()
    with pytest.raises(UserError, match="b has not been evaluated"):
        compare.compare([first, second])


def test_there_are_as_many_letters_as_runs_can_be_compared(tmp_path):
    with pytest.raises(UserError, match="at most 26 runs can be compared at once, not 27"):
        compare.compare([Run(tmp_path / str(number)) for number in range(27)])


def test_the_name_of_a_group_stands_for_its_runs(tmp_path):
    for seed in (0, 1):
        erring_run(tmp_path / "group" / f"run {seed}", [seed], seed=seed)
    (tmp_path / "group" / "summary.json").write_text("{}")
    assert [run.path.name for run in outputs.find_all(str(tmp_path), "group")] == ["run 0", "run 1"]
    assert outputs.find_all(str(tmp_path), "run 1") == outputs.find_all(str(tmp_path), "group/run 1")
    shutil.rmtree(tmp_path / "group" / "run 0")
    (tmp_path / "group" / "run 1" / "metrics.json").unlink()
    with pytest.raises(UserError, match="none of the runs in"):
        outputs.find_all(str(tmp_path), "group")


def test_a_comparison_has_a_folder_by_its_runs_whatever_their_number(tmp_path):
    def folder(*names: str) -> str:
        return compare.folder("out", {"runs": [{"run": name} for name in names]}).as_posix()

    assert folder("a", "b") == "out/compare/a_vs_b"
    long = folder(*(f"run {number}" * 5 for number in range(20)))
    assert len(Path(long).name) < 255
    assert long != folder(*(f"run {number}" * 5 for number in (*range(19), 21)))


def test_the_figure_draws_the_saved_numbers(tmp_path):
    made = compare.compare([erring_run(tmp_path / "a", range(9)), erring_run(tmp_path / "b", [0], history=2, seed=1)])
    figure = compare_figure.draw(json.loads(json.dumps(made)))
    axes = panels(figure)
    dots = [line.get_xdata()[0] for line in curves(axes["accuracy"]) if line.get_marker() == "o"]
    assert dots == pytest.approx([0.97, 299 / 300])
    assert [list(line.get_ydata()) for line in curves(axes["loss"])] == [[1, 1 / 2, 1 / 3], [1, 1 / 2]]
    assert [list(line.get_ydata()) for line in curves(axes["epochs"])] == [[0.5, 0.75, 1 - 0.5 / 3], [0.5, 0.75]]
    assert [list(line.get_xdata()) for line in curves(axes["seconds"])] == [[2, 4, 6], [2, 4]]
    assert [label.get_text() for label in axes["classes"].get_yticklabels()] == [*ESCAPED]
    differences = [line.get_xdata()[0] for line in curves(axes["classes"]) if line.get_marker() == "o"]
    assert differences == pytest.approx([0.02, 0.03, 0.03])
    (legend,) = figure.legends
    assert [text.get_text() for text in legend.get_texts()] == [
        "A  a: fast on digits, seed 0",
        "B  b: fast on digits, seed 1",
    ]


def test_a_class_may_be_called_like_a_formula(tmp_path):
    classes = [f"$\\x{number}$" for number in range(10)]
    found = [erring_run(tmp_path / name, wrong, classes=classes) for name, wrong in (("a", range(9)), ("b", range(5)))]
    figure = compare_figure.draw(compare.compare(found))
    figure.draw_without_rendering()
    shown = {label.get_text() for label in panels(figure)["classes"].get_yticklabels()}
    assert shown <= set(classes)
    assert shown


def test_no_label_of_the_figure_is_cut_with_many_runs_and_classes(tmp_path):
    classes = [f"a class with a long name, {number}" for number in range(100)]
    found = [erring_run(tmp_path / f"run {n}", range(n, 60), classes=classes, seed=n) for n in range(9)]
    figure = compare_figure.draw(compare.compare(found))
    figure.draw_without_rendering()
    whole = figure.bbox
    for box in [axes.get_tightbbox() for axes in figure.axes] + [figure.legends[0].get_window_extent()]:
        assert whole.x0 <= box.x0 <= box.x1 <= whole.x1
        assert whole.y0 <= box.y0 <= box.y1 <= whole.y1
    rows = [label.get_window_extent() for label in panels(figure)["classes"].get_yticklabels()]
    assert len(rows) == 20
    assert not any(one.overlaps(other) for one, other in pairwise(rows))
