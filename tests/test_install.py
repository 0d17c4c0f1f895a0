"""The installed package: what pyproject.toml promises, and the command `cifar` outside of a clone."""

import os
import re
import shutil
import tomllib
from glob import glob
from pathlib import Path

import pytest
from packaging.requirements import Requirement

from cifar.config import PROJECT
from commands import QUICK, run

PYPROJECT = tomllib.loads((PROJECT / "pyproject.toml").read_text(encoding="utf-8"))
REQUIREMENTS = [
    line for line in (PROJECT / "requirements.txt").read_text().splitlines() if line and not line.startswith("#")
]


def test_requirements_are_those_of_the_package_its_demo_and_its_tests():
    project = PYPROJECT["project"]
    extras = project["optional-dependencies"]
    needed = {*project["dependencies"], *extras["demo"]}
    assert needed <= set(REQUIREMENTS) <= needed | set(extras["dev"])
    assert all(re.fullmatch(r"[a-z0-9-]+>=[\d.]+,<\d+", line) for line in REQUIREMENTS)


def test_the_readme_names_the_lowest_versions():
    lowest = {Requirement(line).name: line.split(">=")[1].split(",")[0] for line in REQUIREMENTS}
    readme = (PROJECT / "README.md").read_text(encoding="utf-8")
    for title, name in (("PyTorch", "torch"), ("NumPy", "numpy"), ("Pillow", "pillow"), ("Gradio", "gradio")):
        assert f"{title} {lowest[name]}" in readme


def test_every_file_of_the_package_is_installed():
    folder, patterns = PROJECT / "cifar", ["*.py", *PYPROJECT["tool"]["setuptools"]["package-data"]["cifar"]]
    installed = {folder / name for pattern in patterns for name in glob(pattern, root_dir=folder, recursive=True)}
    files = {path for path in folder.rglob("*") if path.is_file() and "__pycache__" not in path.parts}
    assert files <= installed
    assert {folder / "py.typed", folder / "templates" / "report.html"} <= files


@pytest.fixture(scope="module")
def installed(tmp_path_factory) -> Path:
    """A folder like site-packages, with the package alone."""
    folder = tmp_path_factory.mktemp("site-packages")
    shutil.copytree(PROJECT / "cifar", folder / "cifar", ignore=shutil.ignore_patterns("__pycache__"))
    return folder


def cifar(installed: Path, cwd: Path, *words: str) -> tuple[int, str, str]:
    """Run the installed command in a folder; returns its exit code, output and errors."""
    code = "import sys; from cifar.__main__ import main; sys.argv[0] = 'cifar'; sys.exit(main())"
    return run("-P", "-c", code, *words, cwd=cwd, env=os.environ | {"PYTHONPATH": str(installed)})


def test_installed_it_trains_into_the_working_directory_and_names_its_own_commands(installed, tmp_path):
    code, out, err = cifar(installed, tmp_path, "train", *QUICK)
    assert (code, err) == (0, "")
    (made,) = (tmp_path / "outputs").glob("*_mlp_digits")
    assert f"run directory: outputs/{made.name}\n" in out
    assert (made / "run.json").read_text().count('"commit": null') == 1  # not that of a repository around it
    assert f"; run `cifar evaluate --run outputs/{made.name}`\n" in cifar(installed, tmp_path, "predict", "x.png")[2]
    code, _, err = cifar(installed, tmp_path, "--resume")
    assert (code, err) == (1, "error: there is no run in outputs that can be resumed\n")


@pytest.mark.parametrize(
    ("words", "code", "text"),
    [
        (("--help",), 0, "usage: cifar [FLAGS]\n"),
        (("train", "--help"), 0, "usage: cifar train [FLAGS]\n"),
        (("list",), 0, "  evaluate    Measure a run's best checkpoint on the test split.\n"),
        (("trian",), 2, "error: there is no task 'trian': did you mean train?\n"),
        (("test",), 2, "error: there is no task 'test': `cifar list` lists them\n"),  # that is for clones
        (("--epoch", "1"), 2, "error: cifar has no flag --epoch: did you mean --epochs?\n"),
        (("evaluate",), 1, "error: there is no finished run in outputs; `cifar` makes one\n"),
    ],
)
def test_installed_it_is_the_pipeline_or_with_a_first_word_a_task(installed, tmp_path, words, code, text):
    found = cifar(installed, tmp_path, *words)
    assert found[0] == code
    assert text in found[1] + found[2]
    assert list(tmp_path.iterdir()) == []


def test_installed_it_runs_nothing_in_the_working_directory(installed, tmp_path):
    (tmp_path / "invoke.py").write_text("open('ran', 'w')")
    (tmp_path / "invoke.yaml").write_text("a: [")
    assert cifar(installed, tmp_path, "list")[::2] == (0, "")
    assert not (tmp_path / "ran").exists()
