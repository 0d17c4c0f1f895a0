"""The README's tables have the figures of the reference runs, and their commit."""

import json
import re
import statistics
from pathlib import Path

import pytest

from cifar import outputs
from cifar.config import PROJECT

REFERENCE = PROJECT / "outputs" / "reference"
README = (PROJECT / "README.md").read_text(encoding="utf-8")
EXPERIMENTS = (PROJECT / "docs" / "experiments.md").read_text(encoding="utf-8")
(SEEDS,) = outputs.groups(REFERENCE)
MEMBERS = [place for place in outputs.directories(REFERENCE) if place.parent == SEEDS.resolve()]
SINGLE = [place for place in outputs.directories(REFERENCE) if place.parent == REFERENCE.resolve()]


def read(place: Path, file: str) -> dict:
    return json.loads((place / file).read_text(encoding="utf-8"))


def rows(start: str) -> list[list[str]]:
    """The cells, the first aside, of the rows that begin so."""
    lines = [line for line in README.splitlines() if line.startswith(f"| {start}")]
    return [[cell.strip(" *") for cell in line.split("|")[2:-1]] for line in lines]


def expected(places: list[Path]) -> dict[str, str]:
    """What the tables say of some runs of a recipe."""
    seconds = [sum(read(place, "run.json")["seconds"].values()) for place in places]
    said = {"seconds": f"{statistics.mean(seconds):.0f} s"}
    for key in ("accuracy", "accuracy_tta"):
        percent = [100 * read(place, "metrics.json")[key] for place in places]
        spread = f" ± {statistics.stdev(percent):.2f}" if len(places) > 1 else ""
        said[key] = f"{statistics.mean(percent):.2f}%{spread}"
    return said


def test_there_are_five_seeds_of_fast_on_cifar10():
    members = [read(place, "config.json") for place in MEMBERS]
    assert sorted(member["seed"] for member in members) == [0, 1, 2, 3, 4]
    assert {(member["recipe"], member["dataset"]) for member in members} == {("fast", "cifar10")}


@pytest.mark.parametrize(
    ("recipe", "places"),
    [("fast", MEMBERS), *((read(place, "config.json")["recipe"], [place]) for place in SINGLE)],
)
def test_the_readme_has_the_figures_of_the_runs(recipe, places):
    said = expected(places)
    first = rows(f"**`{recipe}`")
    assert said["accuracy"] in {row[0] for row in first}
    assert said["seconds"] in {row[2] for row in first}
    (of_recipes,) = [row for row in rows(f"`{recipe}`") if len(row) == 6]
    assert of_recipes[3:] == [said["accuracy"], said["accuracy_tta"], said["seconds"]]
    if recipe == "fast":
        assert first[0][0] == said["accuracy_tta"]


def test_the_experiments_start_from_the_figures_of_fast():
    said = expected(MEMBERS)
    assert f"test split: {said['accuracy_tta']}, {len(MEMBERS)} seeds" in EXPERIMENTS
    assert f"## Where the {said['seconds'].removesuffix(' s')} seconds of `fast` go" in EXPERIMENTS


def test_they_were_made_by_the_commits_that_the_readme_names_without_changes():
    named = set(re.findall(r"commit\s+`([0-9a-f]{9})`", README))
    made_by = [read(place, "run.json") for place in [*MEMBERS, *SINGLE]]
    assert {record["commit"][:9] for record in made_by} == named
    assert {(record["dirty"], record["status"]) for record in made_by} == {(False, "completed")}


def test_the_readmes_pictures_are_there():
    pictures = re.findall(r"!\[[^\]]+\]\(([^)]+)\)", README)
    assert len(pictures) >= 5
    for picture in pictures:
        assert (PROJECT / picture).is_file()
