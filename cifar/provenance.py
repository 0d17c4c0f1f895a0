"""What made a run: command, commit, versions and machine."""

import importlib.metadata
import platform
import subprocess
import sys
from pathlib import Path
from typing import Any

from cifar.config import PROJECT

_PACKAGES = ("torch", "torchvision", "scikit-learn", "numpy", "matplotlib", "seaborn")


def describe() -> dict[str, Any]:
    """The part of run.json that says what made the run; `commit` is None where there is no git, or no repository."""
    return {
        "command": [Path(sys.argv[0]).name, *sys.argv[1:]],
        "commit": _git("rev-parse", "HEAD"),
        "dirty": bool(_git("status", "--porcelain")),
        "versions": {"python": platform.python_version()}
        | {package: importlib.metadata.version(package) for package in _PACKAGES},
        "platform": platform.platform(),
    }


def _git(*arguments: str) -> str | None:
    """The output of git on this project; None where there is no git, or no repository."""
    try:
        done = subprocess.run(["git", *arguments], cwd=PROJECT, capture_output=True, text=True, timeout=10)
    except (OSError, subprocess.TimeoutExpired):
        return None
    return done.stdout.strip() if done.returncode == 0 else None
