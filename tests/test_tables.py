import re
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
from rich.console import Console
from scipy.stats import binomtest

from cifar import compare, console, headlines, tables
from cifar.doctor import Finding
from handmade import erring_run


def metrics_of(per_class: dict, dataset: str = "digits") -> dict:
    return {
        "recipe": "fast",
        "dataset": dataset,
        "split": "test",
        "n": 8,
        "accuracy": 0.75,
        "interval_95": [0.41, 0.93],
        "accuracy_tta": 0.875,
        "interval_95_tta": [0.53, 0.98],
        "loss": 0.1234,
        "per_class": per_class,
        "most_confused": [{"true": "cat", "predicted": "dog", "count": 2}],
    }


def test_of_many_classes_those_with_the_lowest_f1_are_shown(capsys):
    scores = {"precision": 0.5, "recall": 0.5, "support": 1}
    tables.show_metrics(metrics_of({f"n{number:03}": {**scores, "f1": number / 1000} for number in range(999, -1, -1)}))
    printed = capsys.readouterr().out
    assert "the 20 classes of 1,000 with the lowest F1" in " ".join(printed.split())
    assert all(f"n{number:03}" in printed for number in range(20))
    assert "n020" not in printed


def test_names_with_brackets_are_shown_as_they_are(capsys):
    scores = {"precision": 0.5, "recall": 0.5, "f1": 0.5, "support": 1}
    tables.show_metrics(metrics_of({"[red]": scores}, dataset="my [bold] cats"))
    printed = capsys.readouterr().out
    assert "fast on my [bold] cats" in printed
    assert "[red]" in printed


def test_the_metrics_are_shown_with_their_intervals_and_confusions(capsys):
    scores = {"precision": 0.5, "recall": 1.0, "f1": 2 / 3, "support": 4}
    tables.show_metrics(metrics_of({"cat": scores, "dog": scores}))
    printed = capsys.readouterr().out
    for part in ("75.00%", "41.00% to 93.00%", "87.50%", "0.1234", "66.7%", "cat taken for dog, 2 times"):
        assert part in printed


FINDINGS = [
    Finding("port", "ok", "7860 is free"),
    Finding("disk", "failure", "1 MB free, and 20 needed [in all]", "make room"),
]


def test_findings_are_lines_with_their_cures(capsys):
    tables.show_findings(FINDINGS)
    assert capsys.readouterr().out.splitlines() == [
        "ok       port      7860 is free",
        "failure  disk      1 MB free, and 20 needed [in all]",
        "             cure: make room",
    ]


def test_a_terminal_shows_findings_in_columns(terminal):
    tables.show_findings(FINDINGS)
    written = re.sub(r"\x1b\[[\d;]*m", "", terminal.getvalue()).split("\n")
    assert [line.rstrip() for line in written] == [
        "ok       port  7860 is free",
        "failure  disk  1 MB free, and 20 needed [in all]",
        "               cure: make room",
        "",
    ]


ROW = {
    **{"run": "2026-01-01_00-00-00_fast_cifar10", "status": "completed", "accuracy": 0.9352, "views": 0.9415},
    **{"seconds": 1234.5, "seed": 3, "epochs": 12, "loss": 0.5, "calibration": 0.008},
    **{"recipe": "fast", "dataset": "cifar10", "damaged": []},
}


@pytest.mark.parametrize("width", [60, 80, 100, 120, 200])
def test_the_list_of_runs_fits_and_names_what_it_leaves_out(capsys, monkeypatch, width):
    monkeypatch.setattr(console, "out", Console(width=width))
    broken = {**ROW, "run": "broken", "accuracy": None, "damaged": ["run.json", "metrics.json"]}
    tables.show_runs([ROW, broken], [], headlines.COLUMNS)
    printed = capsys.readouterr().out
    assert max(len(line.rstrip()) for line in printed.splitlines()) <= width
    head, _, left_out = printed.partition("too narrow for:")
    named = {column for column in headlines.COLUMNS if re.search(rf"\b{column}\b", head.split("━")[0])}
    assert named | set(re.findall(r"\w+", left_out)) == set(headlines.COLUMNS)
    for part in (ROW["run"], "damaged:", "run.json", "metrics.json", *(["93.52%", "1,234"] if width >= 80 else [])):
        assert part in printed


def test_groups_of_seeds_are_listed_with_mean_and_deviation(capsys):
    group = {"group": "5-seeds", "status": "killed", "accuracy": None, "accuracy_tta": None}
    done = {**group, "status": "completed", "accuracy": [0.9341, 0.0019], "accuracy_tta": [0.9415, 0.0011]}
    tables.show_runs([ROW], [group, done], headlines.COLUMNS)
    printed = capsys.readouterr().out
    for part in ("killed", "93.41% ± 0.19%", "94.15% ± 0.11%"):
        assert part in printed


def test_a_comparison_ends_with_what_it_comes_to(capsys, tmp_path):
    found = [erring_run(tmp_path / "a", range(20)), erring_run(tmp_path / "b", [1], seed=7)]
    comparison = compare.compare(found)
    tables.show_comparison({**comparison, "notes": ["a [note]"]})
    printed = capsys.readouterr().out
    low, high = binomtest(280, 300).proportion_ci(method="wilson")
    for part in (
        f"93.33% ({100 * low:.2f} to {100 * high:.2f})",
        "seed    │ 0 │ 7",
        "+6.0",
        "A and B │         0 │         19 │ 300",
    ):
        assert part in printed
    *_, note, verdict, method = printed.splitlines()
    assert (note, verdict, method) == ("a [note]", comparison["pairs"][0]["verdict"], comparison["method"])


def test_corruptions_are_shown_the_mildest_first_with_their_means(capsys):
    def rows(*accuracies):
        return [{"accuracy": accuracy, "expected_calibration_error": 0.1 * accuracy} for accuracy in accuracies]

    tables.show_corruptions(
        {
            "dataset": "digits",
            "n": 360,
            "clean": {"accuracy": 0.9},
            "mean": {"accuracy": 0.45},
            "corruptions": {"noise": rows(0.4, 0.2), "shift": rows(0.8, 0.4)},
        }
    )
    printed = capsys.readouterr().out
    assert re.search(r"shift .*80.0% .*40.0% .*60.0% .*6.0%", printed)
    assert printed.index("shift") < printed.index("noise")
    assert "mean over all 45.0%, of the same images unharmed 90.0%" in printed
    assert max(map(len, printed.splitlines())) <= 80


def test_speeds_are_shown_with_the_ratio_to_the_fastest_way(capsys):
    speed = {"suite_images_per_second": 4965.1, "loader_images_per_second": {0: 1714.0, 2: 1522.4}, "ratio": 2.8967}
    tables.show_speeds("my [bold] cats", {"convnet": speed})
    printed = capsys.readouterr().out
    assert "images of my [bold] cats a second in training" in printed
    (row,) = re.findall(r"convnet.*", printed)
    assert re.findall(r"[\d,.]+", row) == ["4,965", "1,714", "1,522", "2.90"]


def test_of_many_answers_the_first_are_shown_and_the_others_counted(capsys):
    predictor = SimpleNamespace(
        classes=("cat", "dog"),
        run=SimpleNamespace(path=Path("my-run")),
        is_probably_none=lambda probabilities: False,
    )
    answers = [
        SimpleNamespace(source=f"{n:02}.png", refusal=None, probabilities=np.array([0.9, 0.1]))
        for n in range(tables._ROWS + 1001)
    ]
    tables.show_answers(answers, predictor)
    printed = capsys.readouterr().out
    assert printed.count(".png") == tables._ROWS
    assert "and 1,001 more, all of which --output keeps" in printed


def test_long_names_of_classes_hide_no_probability(terminal, monkeypatch):
    monkeypatch.setattr(console.out, "width", 60)
    predictor = SimpleNamespace(
        run=SimpleNamespace(path=Path("run")),
        classes=[f"a class with a long name, number {number}" for number in range(3)],
        is_probably_none=lambda probabilities: False,
    )
    answer = SimpleNamespace(source="cat.png", refusal=None, probabilities=np.array([0.123, 0.456, 0.421]))
    tables.show_answers([answer], predictor)
    assert all(share in terminal.getvalue() for share in ("45.6%", "42.1%", "12.3%"))
