"""The runs in outputs/reference can still be read, and the pages have their values and their commit."""

import json
import re
import shutil
import statistics
from pathlib import Path

import pytest
import torch

from cifar import analysis, compare, doctor, evaluate, predict, report, runs, visualize
from cifar.config import PROJECT
from cifar.runs import Run

REFERENCE = PROJECT / "outputs" / "reference"
README = (PROJECT / "README.md").read_text(encoding="utf-8")
(SEEDS,) = runs.groups(REFERENCE)
MEMBERS = sorted(path for path in runs.directories(REFERENCE) if path.parent == SEEDS.resolve())  # by seed
SINGLE = [path for path in runs.directories(REFERENCE) if path.parent == REFERENCE.resolve()]
(CONVNET,) = [path for path in SINGLE if "_convnet_" in path.name]


def read(path: Path, file: str) -> dict:
    return json.loads((path / file).read_text(encoding="utf-8"))


def test_every_reference_run_is_listed_undamaged_and_can_be_compared():
    rows = {row["run"]: row for row in compare.leaderboard(str(REFERENCE))}
    assert rows.keys() == {path.name for path in [*MEMBERS, *SINGLE]}
    facts = [tuple(rows[path.name][column] for column in ("recipe", "dataset", "seed")) for path in MEMBERS]
    assert facts == [("fast", "cifar10", seed) for seed in range(5)]
    for path in [*MEMBERS, *SINGLE]:
        assert rows[path.name]["damaged"] == []
        assert rows[path.name]["accuracy"] == read(path, "metrics.json")["accuracy"]
    comparison = compare.compare([Run(CONVNET), Run(MEMBERS[0])])
    assert [row["run"] for row in comparison["runs"]] == [CONVNET.name, MEMBERS[0].name]
    (group,) = compare.groups(str(REFERENCE))
    assert group["accuracy"][0] == pytest.approx(statistics.mean(rows[path.name]["accuracy"] for path in MEMBERS))


def test_a_reference_run_gets_a_report_and_predicts_what_it_did(real_cifar10, tmp_path):
    shutil.copytree(CONVNET, tmp_path / "run")
    page = report.write(Run(tmp_path / "run"), real_cifar10).read_text(encoding="utf-8")
    assert f"{100 * read(CONVNET, 'metrics.json')['accuracy']:.2f}%" in page
    predictor = predict.Predictor(Run(CONVNET), "cpu")
    predicted = predictor.probabilities(real_cifar10.test.images[:200]).argmax(1)
    lines = (CONVNET / "predictions.csv").read_text(encoding="utf-8").splitlines()[1:201]
    saved = [predictor.classes.index(line.split(",")[2]) for line in lines]
    assert sum(predicted == saved) >= 198  # it was made in bfloat16, which not every processor has


def test_a_run_of_the_first_version_can_still_be_used(real_cifar10, tmp_path, monkeypatch):
    monkeypatch.setattr(evaluate, "_TTA_CONFIDENCE", 0.0)  # TTA takes most of the time, and is the same for all runs
    shutil.copytree(PROJECT / "tests" / "old_run", tmp_path / "2026-11-21_10-12-15_convnet_cifar10")
    run = Run(tmp_path / "2026-11-21_10-12-15_convnet_cifar10")
    (row,) = compare.leaderboard(str(tmp_path))
    assert (row["recipe"], row["accuracy"], row["damaged"]) == ("convnet", 0.7919, [])
    evaluation = evaluate.evaluate(run, real_cifar10, "cpu")
    assert evaluation.metrics.accuracy == pytest.approx(0.7919, abs=0.002)  # it was made in another precision
    analysis.write(run, real_cifar10, evaluation)
    assert len(visualize.visualize(run, real_cifar10)) == len(visualize.FIGURES)
    assert "79." in report.write(run, real_cifar10).read_text(encoding="utf-8")
    assert doctor.examine_run(run)[0].level == "ok"


def test_the_reference_checkpoint_loads_without_the_dataset():
    probabilities = predict.Predictor(Run(CONVNET), "cpu").probabilities(torch.zeros(2, 3, 32, 32, dtype=torch.uint8))
    assert probabilities.sum(1) == pytest.approx(1)


def rows(file: str, section: str) -> dict[str, list[str]]:
    """Return the cells of the first table of a section, whose rows start with a recipe, by that recipe."""
    text = (PROJECT / file).read_text(encoding="utf-8").split(section, 1)[1]
    found = re.findall(r"^\| `(\w+)`[^|]*\|(.*)\|$", text.split("\n\n##", 1)[0], re.MULTILINE)
    return {recipe: [cell.strip(" *") for cell in cells.split("|")] for recipe, cells in found}


def expected(paths: list[Path]) -> list[str]:
    """Word seeds, accuracy, accuracy with TTA and time of some runs of a recipe as the tables do."""
    values = [str(len(paths))]
    for key in ("accuracy", "accuracy_tta"):
        percent = [100 * read(path, "metrics.json")[key] for path in paths]
        deviation = f" ± {statistics.stdev(percent):.2f}" if len(paths) > 1 else ""
        values.append(f"{statistics.mean(percent):.2f}%{deviation}")
    return [*values, f"{statistics.mean(sum(read(path, 'run.json')['seconds'].values()) for path in paths):.0f} s"]


@pytest.mark.parametrize(
    ("recipe", "paths"),
    [("fast", MEMBERS), *((read(path, "config.json")["recipe"], [path]) for path in SINGLE)],
)
def test_readme_and_results_have_the_values_of_the_runs(recipe, paths):
    seeds, accuracy, tta, seconds = expected(paths)
    assert rows("README.md", "# ")[recipe][1:] == [accuracy, tta, seeds, seconds]
    assert rows("docs/results.md", "## The recipes")[recipe][3:7] == [seeds, accuracy, tta, seconds]
    if recipe == "fast":
        results, experiments = (
            (PROJECT / "docs" / name).read_text(encoding="utf-8") for name in ("results.md", "experiments.md")
        )
        assert f"## Where the {seconds.removesuffix(' s')} seconds of `fast` go" in results
        assert f"{tta}, {seeds} seeds |" in experiments


def test_the_runs_were_made_by_the_commit_that_the_readme_names_without_changes():
    (named,) = re.findall(r"at\s+commit\s+`([0-9a-f]{9})`", README.split("## Start")[0])
    records = [read(path, "run.json") for path in [*MEMBERS, *SINGLE]]
    assert {record["commit"][:9] for record in records} == {named}
    assert {(record["dirty"], record["status"]) for record in records} == {(False, "completed")}


def test_the_shipped_network_is_that_of_the_first_reference_run():
    shipped, first = PROJECT / "cifar" / "weights" / "fast", MEMBERS[0]
    config = read(first, "config.json") | {"precision": "float32", "output_dir": "outputs"}
    assert read(shipped, "config.json") == config
    assert read(shipped, "run.json")["commit"] == read(first, "run.json")["commit"]
    results = (PROJECT / "docs" / "results.md").read_text(encoding="utf-8").split("## The trained network")[1]
    for path in (shipped, first):
        scores = read(path, "metrics.json")
        assert f"{scores['accuracy']:.2%}" in results
        assert f"{scores['accuracy_tta']:.2%}" in results


@pytest.mark.parametrize("page", ["README.md", *(f"docs/{path.name}" for path in (PROJECT / "docs").glob("*.md"))])
def test_every_link_of_a_page_within_the_repository_leads_somewhere(page):
    path = PROJECT / page
    for target, anchor in re.findall(r"\]\(([^)#:]*)(?:#([^)]*))?\)", path.read_text(encoding="utf-8")):
        other = path.parent / target if target else path
        assert other.exists(), target
        headings = re.findall(r"^#+ (.*)$", other.read_text(encoding="utf-8"), re.MULTILINE) if anchor else []
        assert not anchor or anchor in [re.sub(r"[^\w -]", "", title.lower()).replace(" ", "-") for title in headings]
