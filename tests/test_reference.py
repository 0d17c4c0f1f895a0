"""The runs in outputs/reference can still be read, and the README's tables have their values and their commit."""

import json
import re
import shutil
import statistics
from pathlib import Path

import pytest
import torch

from cifar import compare, predict, report, runs
from cifar.config import PROJECT
from cifar.runs import Run

REFERENCE = PROJECT / "outputs" / "reference"
README = (PROJECT / "README.md").read_text(encoding="utf-8")
EXPERIMENTS = (PROJECT / "docs" / "experiments.md").read_text(encoding="utf-8")
(SEEDS,) = runs.groups(REFERENCE)
MEMBERS = [path for path in runs.directories(REFERENCE) if path.parent == SEEDS.resolve()]
SINGLE = [path for path in runs.directories(REFERENCE) if path.parent == REFERENCE.resolve()]
(CONVNET,) = [path for path in SINGLE if "_convnet_" in path.name]


def read(path: Path, file: str) -> dict:
    return json.loads((path / file).read_text(encoding="utf-8"))


def test_there_are_five_seeds_of_fast_on_cifar10():
    configs = [read(path, "config.json") for path in MEMBERS]
    assert sorted(config["seed"] for config in configs) == [0, 1, 2, 3, 4]
    assert {(config["recipe"], config["dataset"]) for config in configs} == {("fast", "cifar10")}


def test_every_reference_run_is_listed_undamaged_and_can_be_compared():
    rows = {row["run"]: row for row in compare.leaderboard(str(REFERENCE))}
    assert rows.keys() == {path.name for path in [*MEMBERS, *SINGLE]}
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


def test_the_reference_checkpoint_loads_without_the_dataset():
    probabilities = predict.Predictor(Run(CONVNET), "cpu").probabilities(torch.zeros(2, 3, 32, 32, dtype=torch.uint8))
    assert probabilities.sum(1) == pytest.approx(1)


def rows_of(start: str) -> list[list[str]]:
    """Return the cells of the README's table rows that start so, without the first."""
    lines = [line for line in README.splitlines() if line.startswith(f"| {start}")]
    return [[cell.strip(" *") for cell in line.split("|")[2:-1]] for line in lines]


def expected(paths: list[Path]) -> dict[str, str]:
    """Word the accuracies and the time of some runs of a recipe as the tables do."""
    seconds = [sum(read(path, "run.json")["seconds"].values()) for path in paths]
    values = {"seconds": f"{statistics.mean(seconds):.0f} s"}
    for key in ("accuracy", "accuracy_tta"):
        percent = [100 * read(path, "metrics.json")[key] for path in paths]
        deviation = f" ± {statistics.stdev(percent):.2f}" if len(paths) > 1 else ""
        values[key] = f"{statistics.mean(percent):.2f}%{deviation}"
    return values


@pytest.mark.parametrize(
    ("recipe", "paths"),
    [("fast", MEMBERS), *((read(path, "config.json")["recipe"], [path]) for path in SINGLE)],
)
def test_the_readme_has_the_values_of_the_runs(recipe, paths):
    values = expected(paths)
    first = rows_of(f"**`{recipe}`")
    assert values["accuracy"] in {row[0] for row in first}
    assert values["seconds"] in {row[2] for row in first}
    (of_recipes,) = [row for row in rows_of(f"`{recipe}`") if len(row) == 6]
    assert of_recipes[3:] == [values["accuracy"], values["accuracy_tta"], values["seconds"]]
    if recipe == "fast":
        assert first[0][0] == values["accuracy_tta"]


def test_the_experiments_start_from_the_values_of_fast():
    values = expected(MEMBERS)
    assert f"test split: {values['accuracy_tta']}, {len(MEMBERS)} seeds" in EXPERIMENTS
    assert f"## Where the {values['seconds'].removesuffix(' s')} seconds of `fast` go" in EXPERIMENTS


def test_the_runs_were_made_by_the_commits_that_the_readme_names_without_changes():
    named = set(re.findall(r"commit\s+`([0-9a-f]{9})`", README))
    records = [read(path, "run.json") for path in [*MEMBERS, *SINGLE]]
    assert {record["commit"][:9] for record in records} == named
    assert {(record["dirty"], record["status"]) for record in records} == {(False, "completed")}


def test_the_readmes_images_exist():
    images = re.findall(r"!\[[^\]]+\]\(([^)]+)\)", README)
    assert len(images) >= 5
    for image in images:
        assert (PROJECT / image).is_file()
