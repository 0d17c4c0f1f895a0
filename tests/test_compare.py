"""The leaderboard and comparisons, of hand-made runs whose results are worked out by hand or by SciPy."""

import json
import re
import shutil
import subprocess
import sys
from itertools import pairwise
from pathlib import Path

import numpy as np
import pytest
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from rich.console import Console
from scipy.stats import binomtest, ttest_rel

from cifar import compare, console, runs, style
from cifar.config import PROJECT
from cifar.errors import UserError
from cifar.runs import Run
from handmade import ESCAPED, erring_run, make_line

DAMAGED = ("", "{", "[1]", "null", '{"seconds": [1], "accuracy": "high", "recipe": 3, "start": "soon"}', "\0\xff")


def draw(comparison: dict) -> tuple[Figure, dict[str, Axes]]:
    """The figure and its panels by name."""
    with style.drawing():
        figure = compare.draw(comparison)
        figure.draw_without_rendering()
    return figure, {axes.get_label(): axes for axes in figure.axes}


def dots(axes: Axes) -> list[float]:
    return [line.get_xdata()[0] for line in axes.lines if line.get_marker() == "o"]


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
    assert pair["better"] == "B"
    assert pair["verdict"].startswith("B - A is +4.67 points, 95% interval +1.6")
    assert pair["verdict"].endswith("p = 0.004: B is better")
    (swapped,) = compare.compare([second, first])["pairs"]
    assert (swapped["better"], swapped["difference"]) == ("A", -pair["difference"])


def test_p_values_of_more_than_two_runs_are_corrected(tmp_path):
    # 1 against 8 is 20 / 512 = 0.039, which three comparisons make 0.117, too much for a difference.
    found = [erring_run(tmp_path / "a", range(8)), erring_run(tmp_path / "b", [20]), erring_run(tmp_path / "c", [20])]
    assert compare.compare(found[:2])["pairs"][0]["better"] == "B"
    comparison = compare.compare(found)
    assert [pair["p_corrected"] for pair in comparison["pairs"]] == pytest.approx([60 / 512, 60 / 512, 1])
    assert [pair["better"] for pair in comparison["pairs"]] == [None] * 3
    assert comparison["pairs"][0]["verdict"].endswith("p = 0.117: no significant difference")


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
    assert note.startswith("not tested, because the test sets differ: A and B, A and C, A and D")
    assert [interval is None for interval in comparison["classes"][0]["interval_95"]] == [True, True, True, False]


def test_classes_are_compared_if_all_runs_have_the_same(tmp_path):
    first, second = erring_run(tmp_path / "a", [0, 3, 6, 1]), erring_run(tmp_path / "b", [0])
    cat, dog, ship = compare.compare([first, second])["classes"]
    assert (cat["class"], cat["recall"]) == ("cat", pytest.approx([0.97, 0.99]))
    assert (cat["difference"], dog["difference"]) == (pytest.approx([0.02]), pytest.approx([0.01]))
    assert (ship["difference"], ship["interval_95"]) == ([0], [[0, 0]])
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
        {"name": "hard_epochs", "values": [3, 3, "not set"]},
        {"name": "threads", "values": ["not set", 4, "not set"]},
    ]


@pytest.mark.parametrize("content", ["", "index,true\n", "\0", 'index,true,predicted\n0,"cat', "another run's", None])
def test_a_run_without_valid_predictions_is_compared_without_a_test(tmp_path, content):
    first, second, other = (erring_run(tmp_path / name, range(wrong)) for name, wrong in zip("abc", (1, 1, 9)))
    path = second.path / "predictions.csv"
    path.unlink() if content is None else path.write_text(content)
    if content == "another run's":
        shutil.copy(other.path / path.name, path)
    comparison = compare.compare([first, second])
    assert comparison["pairs"] == []
    assert re.match(r"B is left out of the paired tests: .*predictions.csv", comparison["notes"][0])
    assert len(comparison["runs"]) == len(comparison["classes"][0]["recall"]) == 2


def test_a_mistake_is_one_sentence(tmp_path):
    first, second = erring_run(tmp_path / "a", [0]), erring_run(tmp_path / "b", [0])
    with pytest.raises(UserError, match="a is given twice"):
        compare.compare([first, second, first])
    with pytest.raises(UserError, match="a comparison takes 2 to 26 runs, not 1;"):
        compare.compare([first])
    with pytest.raises(UserError, match="2 to 26 runs, not 27"):
        compare.compare([Run(tmp_path / str(number)) for number in range(27)])
    for file in ("config.json", "run.json", "metrics.json"):
        kept = (second.path / file).read_bytes()
        for content in DAMAGED:
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
    rows = [{"run": f"run {number}" * 5} for number in range(20)]
    long, other = (compare.folder("out", {"runs": rows[:count]}).name for count in (20, 19))
    assert (len(long) < 255, long != other) == (True, True)


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
    *_, note, verdict, method = printed.splitlines()
    assert (note, verdict, method) == ("a [note]", comparison["pairs"][0]["verdict"], comparison["method"])


# The figure.


def test_the_figure_draws_the_saved_values(tmp_path):
    found = [erring_run(tmp_path / "a", range(9)), erring_run(tmp_path / "b", [0], history=2, seed=1)]
    figure, axes = draw(json.loads(json.dumps(compare.compare(found))))
    assert dots(axes["accuracy"]) == pytest.approx([0.97, 299 / 300])
    assert [list(line.get_xdata()) for line in axes["epochs"].lines] == [[1, 2, 3], [1, 2]]
    saved = [[epoch.val_accuracy for epoch in run.history()] for run in found]
    assert [list(line.get_ydata()) for line in axes["epochs"].lines] == saved
    assert [label.get_text() for label in axes["classes"].get_yticklabels()] == [*ESCAPED]
    assert dots(axes["classes"]) == pytest.approx([2, 3, 3])
    (legend,) = figure.legends
    labels = [text.get_text() for text in legend.get_texts()]
    assert labels == ["A  a: fast on digits, seed 0", "B  b: fast on digits, seed 1"]


def test_a_run_without_a_valid_history_or_validation_has_no_curve(tmp_path):
    first, second = erring_run(tmp_path / "a", [0]), erring_run(tmp_path / "b", [0], history=0)
    second.append_history(make_line(1, validated=False))
    axes = draw(compare.compare([first, second]))[1]
    assert len(axes["epochs"].lines) == 1
    for content in ('{"epoch": 1}\n', "[1]\n", '"text"\n', "\0"):
        (first.path / "history.jsonl").write_text(content)
        comparison = compare.compare([first, second])
        assert comparison["notes"][0].startswith("A has no curve: ")
    assert draw(comparison)[1].keys() == {"accuracy", "classes"}


def test_no_label_is_cut_off_with_many_runs_and_classes_that_look_like_formulas(tmp_path):
    classes = [f"$\\x{number}$ has a long name" for number in range(100)]
    found = [erring_run(tmp_path / f"run {n}", range(8 * n, 45), classes=classes, seed=n) for n in range(6)]
    figure, axes = draw(compare.compare(found))
    whole = figure.bbox
    for box in [panel.get_tightbbox() for panel in figure.axes] + [figure.legends[0].get_window_extent()]:
        assert whole.x0 <= box.x0 <= box.x1 <= whole.x1
        assert whole.y0 <= box.y0 <= box.y1 <= whole.y1
    labels = axes["classes"].get_yticklabels()
    assert [label.get_text() for label in labels] == classes[:10]  # of classes that differ as much, the first
    assert not any(one.overlaps(other) for one, other in pairwise(label.get_window_extent() for label in labels))


# The leaderboard.


@pytest.fixture
def outputs(tmp_path) -> Path:
    """An old and a new run, and between them one in a group."""
    for day, path in ((1, "old"), (2, "5-seeds/member"), (3, "new")):
        run = erring_run(tmp_path / path, range(day), images=60)
        run.update(start=f"2026-01-0{day}T00:00:00+00:00")
    runs.write_json(tmp_path / "5-seeds" / "summary.json", {"status": "running", "config": {"seeds": 5}})
    (tmp_path / "latest").symlink_to("new")
    return tmp_path


def test_the_leaderboard_has_every_run_once_newest_first(outputs):
    rows = compare.leaderboard(str(outputs))
    assert [row["run"] for row in rows] == ["new", "member", "old"]
    new = {column: rows[0][column] for column in compare.COLUMNS}
    assert new == {
        **{"run": "new", "status": "completed", "recipe": "fast", "dataset": "digits", "seed": 0},
        **{"accuracy": 0.95, "accuracy (TTA)": 0.95, "loss": 0.5, "calibration": 0.02, "epochs": 3, "seconds": 9.5},
    }
    with pytest.raises(UserError, match=r"there is no run in .*nowhere"):
        compare.leaderboard(str(outputs / "nowhere"))


def test_the_leaderboard_is_sorted_by_any_column_with_missing_values_last(outputs):
    for path, value in (("old", 0.9), ("new", 0.8)):
        run = Run(outputs / path)
        run.write("metrics.json", {**run.metrics.model_dump(), "accuracy_tta": value, "loss": value})
    (outputs / "5-seeds" / "member" / "metrics.json").unlink()

    def names(column: str) -> list[str]:
        return [row["run"] for row in compare.leaderboard(str(outputs), column)]

    assert names("accuracy (TTA)") == names("accuracy_tta") == ["old", "new", "member"]
    assert names("loss") == ["new", "old", "member"]
    assert names("run") == ["member", "new", "old"]
    for column in compare.COLUMNS:
        assert sorted(names(column)) == ["member", "new", "old"]
        assert column in compare.columns(column)[:3]
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
    spread = {"mean": 0.9341, "standard_deviation": 0.0019}
    summary = {"status": "completed", "config": {}, "figures": {"accuracy": spread, "accuracy_tta": spread}}
    runs.write_json(outputs / "5-seeds" / "summary.json", summary)
    (row,) = compare.groups(str(outputs))
    assert (row["status"], row["accuracy"]) == ("completed", (0.9341, 0.0019))
    compare.show_runs(compare.leaderboard(str(outputs)), [row], compare.columns())
    assert "93.41% ± 0.19%" in capsys.readouterr().out
    for content in (*DAMAGED, "{}"):
        (outputs / "5-seeds" / "summary.json").write_text(content, encoding="latin-1")
        assert compare.groups(str(outputs)) == [{**empty, "status": "damaged: summary.json"}]


@pytest.mark.parametrize("width", [60, 200])
def test_the_list_of_runs_fits_the_terminal_and_names_what_it_leaves_out(capsys, monkeypatch, outputs, width):
    monkeypatch.setattr(console, "out", Console(width=width, force_terminal=True, color_system=None))
    (outputs / "new").rename(outputs / "2026-01-01_00-00-00_fast_cifar10")
    rows = compare.leaderboard(str(outputs))
    broken = {**rows[0], "run": "broken", "accuracy": None, "damaged": ["run.json", "metrics.json"]}
    compare.show_runs([*rows, broken], [], compare.columns())
    printed = capsys.readouterr().out
    assert max(len(line.rstrip()) for line in printed.splitlines()) <= width
    for part in ("2026-01-01_00-00-00_fast_cifar10", "damaged:", "run.json", "metrics.json"):
        assert part in printed
    header, _, left_out = printed.partition("too narrow for:")
    shown = [column for column in compare.COLUMNS if f" {column} " in header.split("━")[0].replace("\n", " ")]
    assert all(column in shown or column in " ".join(left_out.split()) for column in compare.COLUMNS)


def test_the_leaderboard_does_not_import_torch_or_matplotlib(outputs):
    code = (
        "import sys; from cifar import compare; compare.leaderboard(sys.argv[1]); "
        "print({'torch', 'matplotlib', 'pandas'} & sys.modules.keys() or 'none')"
    )
    done = subprocess.run([sys.executable, "-c", code, outputs], cwd=PROJECT, capture_output=True, text=True)
    assert done.stdout.strip() == "none", done.stderr
