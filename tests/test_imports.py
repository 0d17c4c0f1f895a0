"""The modules of cifar/ import each other in one direction only, and the numeric ones can be lifted out."""

import ast
from graphlib import TopologicalSorter
from pathlib import Path

from cifar.config import PROJECT


def imported_by(path: Path) -> set[str]:
    """Return the modules of cifar that a file imports, also inside functions."""
    names = set()
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.ImportFrom) and node.module == "cifar":
            names |= {alias.name for alias in node.names if path.with_stem(alias.name).exists()}
        elif isinstance(node, ast.ImportFrom) and (node.module or "").startswith("cifar."):
            names.add(node.module.removeprefix("cifar."))
        elif isinstance(node, ast.Import):
            names |= {alias.name.removeprefix("cifar.") for alias in node.names if alias.name.startswith("cifar.")}
    return names


IMPORTS = {path.stem: imported_by(path) for path in (PROJECT / "cifar").glob("*.py")}


def test_there_is_no_cycle_and_training_does_not_depend_on_what_shows_its_results():
    assert len(list(TopologicalSorter(IMPORTS).static_order())) == len(IMPORTS)  # raises CycleError
    needed, left = set(), {"trainer"}
    while left:
        needed |= left
        left = set().union(*(IMPORTS[name] for name in left)) - needed
    assert not needed & {"analysis", "visualize", "gallery", "report", "compare", "predict", "demo", "doctor", "bench"}


def test_the_numeric_modules_import_nothing_but_device_and_errors():
    for name in ("data", "optim", "metrics", "layers"):
        assert IMPORTS[name] <= {"device", "errors"}
    assert not IMPORTS["decoder"]  # which is a program of its own
