"""The leaderboard and comparisons, of hand-made runs whose results are worked out by hand or by SciPy."""

import json
import re
import shutil
from pathlib import Path

import numpy as np
import pytest
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from scipy.stats import binomtest, ttest_ind, ttest_rel

import commands
from cifar import compare, files, runs, style
from cifar.errors import UserError
from cifar.records import EpochRecord
from cifar.runs import Run
from handmade import erring_run, make_line

DAMAGED = ("", "{", "[1]", "null", '{"seconds": [1], "accuracy": "high", "recipe": 3, "start": "soon"}', "\0\xff")


def draw(comparison: dict) -> tuple[Figure, dict[str, Axes]]:
    """The figure and its panels by name."""
    with style.drawing():
        figure = compare.draw(comparison)
        figure.draw_without_rendering()
    return figure, {axes.get_label(): axes for axes in figure.axes}


# Comparisons.


def test_the_better_of_two_runs_is_named_with_mcnemars_p(tmp_path):
    classes = ("NA", "1.0", "$")
    first = erring_run(tmp_path / "first", range(20), classes=classes)
    second = erring_run(tmp_path / "second", range(18, 24), classes=classes)  # both err on 2: 18 against 4
    (pair,) = compare.compare([first, second])["pairs"]
    assert (pair["only_first"], pair["only_second"], pair["n"]) == (4, 18, 300)
    # Twice the chance of at most 4 heads in 22 throws: (1 + 22 + 231 + 1540 + 7315) / 2**22.
    assert pair["p"] == pair["p_corrected"] == pytest.approx(2 * 9109 / 2**22)
    assert pair["difference"] == pytest.approx(14 / 300)
    correct = [np.array([i not in wrong for i in range(300)], float) for wrong in (range(20), range(18, 24))]
    assert pair["interval_95"] == pytest.approx([*ttest_rel(correct[1], correct[0]).confidence_interval()])
    better = "{} (fast) is better than {} (fast) by 4.67 points of test accuracy, 95% interval 1.6".format
    assert pair["verdict"].startswith(better("B", "A"))
    assert pair["verdict"].endswith("p = 0.004 (McNemar's exact test on 300 images)")
    (swapped,) = compare.compare([second, first])["pairs"]
    assert (pair["better"], swapped["better"], swapped["difference"]) == ("B", "A", -pair["difference"])
    assert swapped["verdict"].startswith(better("A", "B"))


def test_p_values_of_more_than_two_runs_are_corrected(tmp_path):
    # 1 against 8 is 20 / 512 = 0.039, which three comparisons make 0.117, too much for a difference.
    found = [erring_run(tmp_path / "a", range(8)), erring_run(tmp_path / "b", [20]), erring_run(tmp_path / "c", [20])]
    assert compare.compare(found[:2])["pairs"][0]["better"] == "B"
    comparison = compare.compare(found)
    assert [pair["p_corrected"] for pair in comparison["pairs"]] == pytest.approx([60 / 512, 60 / 512, 1])
    assert [pair["better"] for pair in comparison["pairs"]] == [None] * 3
    assert comparison["pairs"][0]["verdict"].startswith("no difference shown: B (fast) leads A (fast) by 2.33 points ")
    assert "p = 0.117 (" in comparison["pairs"][0]["verdict"]


def seeds(path: Path, wrong: dict[int, int], **settings) -> list[Run]:
    """A directory of --seeds: seed -> on how many of 300 images the run errs."""
    found = [erring_run(path / str(n), range(count), seed=n, **settings) for n, count in wrong.items()]
    files.write_json(path / runs.SUMMARY, {"status": "completed", "config": {}})
    return found


def test_two_recipes_are_compared_by_their_means_over_seeds(tmp_path, capsys):
    first = seeds(tmp_path / "first", {0: 20, 1: 26, 2: 23})
    second = seeds(tmp_path / "second", {2: 16, 0: 14, 1: 17}, lr=1e-3)
    comparison = compare.compare(first + second)
    (pair,) = comparison["pairs"]
    # Paired by seed: 6, 9 and 7 of 300 images more, on average 7.33 with a standard deviation of 1.53, so t is 8.3.
    expected = ttest_rel([286, 283, 284], [280, 274, 277])
    assert (pair["difference"], pair["p"]) == (pytest.approx(22 / 900), pytest.approx(expected.pvalue))
    assert pair["interval_95"] == pytest.approx([end / 300 for end in expected.confidence_interval()])
    low, high = (end / 3 for end in expected.confidence_interval())
    assert pair["verdict"] == (
        f"B (fast) is better than A (fast) by 2.44 points of test accuracy, 95% interval {low:.2f} to {high:.2f}, "
        f"p = {expected.pvalue:.3f} (paired t-test over 3 seeds); with TTA 2.44 points, {low:.2f} to {high:.2f}"
    )
    assert [(row["run"], row["seeds"]) for row in comparison["runs"]] == [("first", [0, 1, 2]), ("second", [0, 1, 2])]
    assert comparison["runs"][0]["accuracy"] == pytest.approx(831 / 900)
    half = 4.302653 * (3 / 300) / 3**0.5  # Student's t for two degrees of freedom; errors of 20, 23 and 26
    assert comparison["runs"][0]["interval_95"] == pytest.approx([277 / 300 - half, 277 / 300 + half])
    assert comparison["settings"] == [{"name": "lr", "values": ["0.17", "0.001"]}]
    assert comparison["classes"][0]["recall"] == pytest.approx([1 - 24 / 300, 1 - 17 / 300])
    compare.show_comparison(json.loads(json.dumps(comparison)))
    assert capsys.readouterr().out.splitlines()[-1] == pair["verdict"]
    assert len(compare.compare(first + second, pairs=True)["pairs"]) == 15
    assert len(compare.compare(first)["pairs"]) == 3
    with_gaps = compare.compare(first + seeds(tmp_path / "gaps", {0: 3, 2: 4, 5: 5}))["runs"]
    assert [row["subject"].partition(", ")[2] for row in with_gaps] == ["3 seeds, 0 to 2", "3 seeds, 0, 2, 5"]


def test_recipes_with_other_seeds_are_compared_by_welchs_test(tmp_path):
    first, second = seeds(tmp_path / "a", {0: 20, 1: 26, 2: 23}), seeds(tmp_path / "b", {5: 28, 6: 15})
    (pair,) = compare.compare(first + second)["pairs"]
    expected = ttest_ind([285, 272], [280, 274, 277], equal_var=False)
    assert (pair["p"], pair["better"], pair["seeds"]) == (pytest.approx(expected.pvalue), None, [3, 2])
    assert pair["interval_95"] == pytest.approx([end / 300 for end in expected.confidence_interval()])
    assert pair["verdict"].startswith("no difference shown: B (fast) leads A (fast) by 0.50 points of test accuracy, ")
    assert "(Welch's t-test over 3 and 2 seeds)" in pair["verdict"]


@pytest.mark.parametrize(
    ("wrong", "settings", "reason"),
    [
        ({0: 9}, {}, "one seed does not show how much accuracy varies between seeds; --pairs tests single runs"),
        ({0: 9, 1: 12}, {"test_sha256": "other"}, "the test sets differ"),
        ({0: 9, 1: 12}, {}, "the seeds vary too little for a t-test: train more of them"),
    ],
)
def test_recipes_that_cannot_be_tested_are_listed_with_the_reason(tmp_path, wrong, settings, reason):
    found = seeds(tmp_path / "a", {0: 10, 1: 13}) + seeds(tmp_path / "b", wrong, **settings)
    comparison = compare.compare(found)
    assert (comparison["pairs"], comparison["notes"]) == ([], [f"not tested: A and B: {reason}"])
    assert len(comparison["runs"]) == 2


def test_recipes_of_equal_accuracy_with_tta_are_compared_without_it(tmp_path):
    found = seeds(tmp_path / "a", {0: 10, 1: 13}) + seeds(tmp_path / "b", {0: 9, 1: 14})
    for run in found:
        run.write("metrics.json", run.metrics.model_dump() | {"accuracy_tta": 1.0, "interval_95_tta": (1.0, 1.0)})
    (pair,) = compare.compare(found)["pairs"]
    assert pair["verdict"].endswith("(paired t-test over 2 seeds)")


def test_recipes_whose_means_differ_by_a_rounding_error_have_the_same_accuracy(tmp_path):
    found = seeds(tmp_path / "a", {0: 10, 1: 13, 2: 17}) + seeds(tmp_path / "b", {0: 17, 1: 10, 2: 13})
    (pair,) = compare.compare(found)["pairs"]
    assert pair["verdict"] == "A (fast) and B (fast) have the same test accuracy (paired t-test over 3 seeds)"


def test_runs_of_different_test_sets_are_not_paired(tmp_path):
    comparison = compare.compare(
        [
            erring_run(tmp_path / "a", range(8)),
            erring_run(tmp_path / "b", range(9), test_sha256="other"),
            erring_run(tmp_path / "c", range(30), test_sha256="other"),
            erring_run(tmp_path / "d", range(9), images=200, test_sha256=None),
            erring_run(tmp_path / "e", range(8), test_sha256=None),
        ]
    )
    assert [pair["first"] + pair["second"] for pair in comparison["pairs"]] == ["AE", "BC", "BE", "CE"]
    (note,) = comparison["notes"]
    assert re.fullmatch(r"not tested: A and B, A and C, A and D, .*: the test sets differ.*", note)


def test_classes_are_compared_if_all_runs_have_the_same(tmp_path):
    first, second = erring_run(tmp_path / "a", [0, 3, 6, 1]), erring_run(tmp_path / "b", [0])
    cat, dog, ship = compare.compare([first, second])["classes"]
    assert (cat["class"], cat["recall"]) == ("cat", pytest.approx([0.97, 0.99]))
    assert (dog["recall"], ship["recall"]) == (pytest.approx([0.99, 1]), [1, 1])
    comparison = compare.compare([first, erring_run(tmp_path / "c", [0], classes=("a", "b"))])
    assert (comparison["classes"], comparison["pairs"], len(comparison["notes"])) == ([], [], 1)


def test_only_settings_that_differ_are_listed_without_locations(tmp_path):
    first = erring_run(tmp_path / "a", [0])
    second = erring_run(tmp_path / "b", [0], model="resnet18", optimizer="sgd", data_dir="x", output_dir="y")
    second.update(threads=4)
    third = erring_run(tmp_path / "c", [0])
    content = runs.read_json(third.path / "config.json")
    del content["hard_epochs"]  # as in an older run, which also has an older name of the same network
    third.write("config.json", {**content, "model": "whitened"})
    assert compare.compare([first, second, third])["settings"] == [
        {"name": "model", "values": ["airbench94", "resnet18", "airbench94"]},
        {"name": "optimizer", "values": ["muon", "sgd", "muon"]},
        {"name": "hard_epochs", "values": ["2", "2", "not set"]},
        {"name": "threads", "values": ["not set", "4", "not set"]},
    ]


def test_settings_without_an_effect_are_no_difference(tmp_path):
    without = {"optimizer": "adam", "momentum": 0.9, "small_epochs": 0, "small_size": 16, "hard_epochs": 0}
    without |= {"hard_share": 0.5, "crop": 0, "crop_mode": "zeros"}
    first, second = erring_run(tmp_path / "a", [0]), erring_run(tmp_path / "b", [0], model="convnet", **without)
    names = {row["name"] for row in compare.compare([first, second])["settings"]}
    assert names == {"model", "optimizer", "small_epochs", "hard_epochs", "crop"}
    third = erring_run(tmp_path / "c", [0], hard_share=0.5)
    (row,) = [row for row in compare.compare([first, second, third])["settings"] if row["name"] == "hard_share"]
    assert row["values"] == ["0.64", "no effect", "0.5"]


@pytest.mark.parametrize("content", ["", "index,true\n", "\0", 'index,true,predicted\n0,"cat', "another run's", None])
def test_a_run_without_valid_predictions_is_compared_without_a_test(tmp_path, content):
    first, second, other = (erring_run(tmp_path / name, range(wrong)) for name, wrong in zip("abc", (1, 1, 9)))
    path = second.path / "predictions.csv"
    path.unlink() if content is None else path.write_text(content)
    if content == "another run's":
        shutil.copy(other.path / path.name, path)
    comparison = compare.compare([first, second])
    assert comparison["pairs"] == []
    assert re.match(r"not tested: A and B: .*predictions.csv", comparison["notes"][0])
    assert len(comparison["runs"]) == len(comparison["classes"][0]["recall"]) == 2


def test_a_mistake_is_one_sentence(tmp_path):
    first, second = erring_run(tmp_path / "a", [0]), erring_run(tmp_path / "b", [0])
    with pytest.raises(UserError, match=r"^a is given twice"):
        compare.compare([first, first, second, second])
    group = [erring_run(tmp_path / "seeds" / name, [0]) for name in ("a", "b")]
    (tmp_path / "seeds" / "summary.json").touch()
    with pytest.raises(UserError, match=r"^seeds is given twice"):
        compare.compare([*group, first, *group])
    with pytest.raises(UserError, match="a comparison takes 2 to 26 runs, not 1;"):
        compare.compare([first])
    with pytest.raises(UserError, match="2 to 26 runs, not 27"):
        compare.compare([Run(tmp_path / str(number)) for number in range(27)])
    for file in ("config.json", "run.json", "metrics.json", "history.jsonl"):
        kept = (second.path / file).read_bytes()
        for content in DAMAGED[file == "history.jsonl" :]:  # an empty history is none
            (second.path / file).write_text(content, encoding="latin-1")
            with pytest.raises(UserError, match=rf"b/{file} [^\n]*$"):
                compare.compare([first, second])
        (second.path / file).write_bytes(kept)
    (second.path / "metrics.json").unlink()
    with pytest.raises(UserError, match="b has not been evaluated"):
        compare.compare([first, second])


def test_a_comparison_is_written_into_a_folder_named_by_its_runs(tmp_path):
    found = [erring_run(tmp_path / "a", range(30)), erring_run(tmp_path / "b", range(3), seed=1)]
    comparison = compare.compare(found)
    folder = compare.write(comparison, compare.folder(str(tmp_path), comparison))
    assert folder == tmp_path / "compare" / "a_vs_b"
    assert {path.name for path in folder.iterdir()} == {"comparison.json", "comparison.png"}
    assert json.loads((folder / "comparison.json").read_text(encoding="utf-8")) == comparison
    with pytest.raises(UserError, match="cannot write"):
        compare.write(comparison, folder / "comparison.json" / "folder")
    rows = [{"run": f"run \u732b{number}" * 5} for number in range(20)]
    long, other = (compare.folder("out", {"runs": rows[:count]}).name for count in (20, 19))
    assert (len(long.encode()) < 255, long != other) == (True, True)


def test_a_comparison_is_shown_with_its_conclusions_last(capsys, tmp_path):
    found = [erring_run(tmp_path / "a", range(20)), erring_run(tmp_path / "b", [1], seed=7)]
    comparison = compare.compare(found)
    compare.show_comparison({**comparison, "notes": ["a [note]"]})
    printed = capsys.readouterr().out
    low, high = binomtest(280, 300).proportion_ci(method="wilson")
    lines = [line.split() for line in printed.splitlines()]
    assert f"93.33% ({low:.2%} to {high:.2%})" in printed
    assert ["seed", "│", "0", "│", "7"] in lines
    assert ["cat", "│", "93.0%", "│", "100.0%"] in lines
    assert printed.splitlines()[-3:-1] == ["a [note]", comparison["pairs"][0]["verdict"]]


# The figure.


def test_the_figure_draws_the_saved_values(tmp_path):
    found = [erring_run(tmp_path / "a", range(9)), erring_run(tmp_path / "b", [0], history=2, seed=1)]
    figure, axes = draw(json.loads(json.dumps(compare.compare(found))))
    dots = [line.get_xdata()[0] for line in axes["accuracy"].lines if line.get_marker() == "o"]
    assert dots == pytest.approx([0.97, 299 / 300])
    assert [list(line.get_xdata()) for line in axes["epochs"].lines] == [[1, 2, 3], [1, 2]]
    saved = [[epoch.val_accuracy for epoch in run.history()] for run in found]
    assert [list(line.get_ydata()) for line in axes["epochs"].lines] == saved
    (legend,) = figure.legends
    labels = [text.get_text() for text in legend.get_texts()]
    assert labels == ["A  a: fast on digits, seed 0", "B  b: fast on digits, seed 1"]


def test_runs_without_validation_have_no_curves(tmp_path):
    first, second = erring_run(tmp_path / "a", [0]), erring_run(tmp_path / "b", [0], history=0)
    second.write_history([EpochRecord(**make_line(1, validated=False))])
    curves = [curve["epoch"] for row in compare.compare([first, second])["runs"] for curve in row["curves"]]
    assert curves == [[1, 2, 3], []]
    third = erring_run(tmp_path / "c", [0], history=0)
    assert draw(compare.compare([second, third]))[1].keys() == {"accuracy"}


def test_no_label_is_cut_off_with_many_runs_and_odd_names(tmp_path):
    found = [erring_run(tmp_path / f"$\\x{n}$\033[31m", range(8 * n, 45), seed=n) for n in range(6)]
    figure, _ = draw(compare.compare(found))
    whole = figure.bbox
    for box in [panel.get_tightbbox() for panel in figure.axes] + [figure.legends[0].get_window_extent()]:
        assert whole.x0 <= box.x0 <= box.x1 <= whole.x1
        assert whole.y0 <= box.y0 <= box.y1 <= whole.y1
    assert "$\\x0$\\x1b[31m" in figure.legends[0].get_texts()[0].get_text()


# The leaderboard.


@pytest.fixture
def outputs(tmp_path) -> Path:
    """An old and a new run, and between them one in a group."""
    for day, path in ((1, "old"), (2, "5-seeds/member"), (3, "new")):
        run = erring_run(tmp_path / path, range(day), images=60)
        run.update(start=f"2026-01-0{day}T00:00:00+00:00")
    files.write_json(tmp_path / "5-seeds" / "summary.json", {"status": "running", "config": {"seeds": 5}})
    (tmp_path / "latest").symlink_to("new")
    return tmp_path


def test_the_leaderboard_has_every_run_once_newest_first(outputs):
    rows = compare.leaderboard(str(outputs))
    assert [row["run"] for row in rows] == ["new", "member", "old"]
    new = {column: rows[0][column] for column in compare.COLUMNS}
    assert new == {
        **{"run": "new", "status": "completed", "recipe": "fast", "dataset": "digits", "seed": 0},
        **{"accuracy": 57 / 60, "accuracy (TTA)": 58 / 60, "loss": 0.5, "calibration": 0.02},
        **{"epochs": 3, "seconds": 9.5},
    }
    with pytest.raises(UserError, match=r"there is no run in .*nowhere"):
        compare.leaderboard(str(outputs / "nowhere"))


def test_the_leaderboard_is_sorted_by_any_column_with_missing_values_last(outputs):
    for path, value in (("old", 0.9), ("new", 0.8)):
        run = Run(outputs / path)
        run.write("metrics.json", {**run.metrics.model_dump(), "accuracy_tta": value, "loss": value})
    (outputs / "5-seeds" / "member" / "metrics.json").unlink()

    def names(column: str) -> list[str]:
        rows = compare.leaderboard(str(outputs), column)
        assert column == "accuracy_tta" or column in list(rows[0])[:3]
        return [row["run"] for row in rows]

    assert names("accuracy (TTA)") == names("accuracy_tta") == ["old", "new", "member"]
    assert names("loss") == ["new", "old", "member"]
    assert names("run") == ["member", "new", "old"]
    for column in compare.COLUMNS:
        assert sorted(names(column)) == ["member", "new", "old"]
    with pytest.raises(UserError, match="unknown column 'speed': did you mean seed"):
        compare.leaderboard(str(outputs), "speed")


@pytest.mark.parametrize("file", ["run.json", "config.json", "history.jsonl", "metrics.json"])
def test_a_damaged_run_has_a_row_that_names_the_file(outputs, file):
    path = outputs / "new" / file
    harmless = {"history.jsonl": [None, ""], "metrics.json": [None]}.get(file, [])
    for content in (*DAMAGED, "{}", None):
        path.unlink() if content is None else path.write_text(content, encoding="latin-1")
        for sort in (None, "accuracy", "status", "seed"):
            damaged = {row["run"]: row["damaged"] for row in compare.leaderboard(str(outputs), sort)}
            assert damaged == {"new": [] if content in harmless else [file], "member": [], "old": []}


def test_groups_are_listed_with_mean_and_standard_deviation_even_if_damaged(outputs, capsys):
    empty = {"group": "5-seeds", "accuracy": None, "accuracy (TTA)": None}
    assert compare.groups(str(outputs)) == [{**empty, "status": "killed"}]
    spreads = [{"mean": mean, "standard_deviation": 0.0019} for mean in (0.9341, 0.9415)]
    summary = {"status": "completed", "config": {}, "figures": dict(zip(("accuracy", "accuracy_tta"), spreads))}
    files.write_json(outputs / "5-seeds" / "summary.json", summary)
    (row,) = compare.groups(str(outputs))
    assert (row["accuracy"], row["accuracy (TTA)"]) == ((0.9341, 0.0019), (0.9415, 0.0019))
    found = compare.leaderboard(str(outputs))
    compare.show_runs([*found, {**found[0], "damaged": ["run.json", "metrics.json"]}], [row])
    printed = capsys.readouterr().out
    assert all(part in printed for part in ("completed", "93.41% ± 0.19%", "damaged:", "run.json"))
    for content in (*DAMAGED, "{}"):
        (outputs / "5-seeds" / "summary.json").write_text(content, encoding="latin-1")
        assert compare.groups(str(outputs)) == [{**empty, "status": "damaged: summary.json"}]


def test_the_leaderboard_does_not_import_torch_or_matplotlib(outputs):
    code = (
        "import sys; from cifar import compare; compare.leaderboard(sys.argv[1]); "
        "print({'torch', 'matplotlib', 'pandas'} & sys.modules.keys() or 'none')"
    )
    assert commands.run("-c", code, str(outputs)) == (0, "none\n", "")
