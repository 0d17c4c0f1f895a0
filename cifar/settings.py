"""The settings that a user gives in a file, as key=value and as flags, laid over one another."""

import tomllib
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from cifar.config import FIELDS, PLACES, check, help_text, read
from cifar.errors import UsageError, UserError, known_name
from cifar.files import parse_json

HELP = {
    "config": "file with settings, .toml or .json, such as a run's own config.json; flags overrule it",
    "set": "any setting as key=value, such as lr=0.1; may be given several times",
}


def gather(flags: Mapping[str, Any], file: str | None, assignments: Sequence[str]) -> dict[str, Any]:
    """Field name -> value: the file's, overruled by the assignments, and those by the flags.

    A run's own config.json says what the run was, and not where this one is to be: its places are left out.
    flags: None where one is not given. Raises UserError, with the setting's help, for what a setting does not take,
    and with the nearest name for a setting that there is not.
    """
    kept = _from_file(Path(file)) if file else {}
    given = _from_assignments(assignments) | {name: value for name, value in flags.items() if value is not None}
    if "recipe" in kept.keys() & given.keys() and kept["recipe"] != given["recipe"]:
        raise UsageError(f"{file} is for the recipe {kept['recipe']}, not {given['recipe']}: leave out one of the two")
    return kept | given


def _from_file(path: Path) -> dict[str, Any]:
    path = path / "config.json" if path.is_dir() else path
    readers = {".toml": tomllib.loads, ".json": parse_json}
    if path.suffix not in readers:
        raise UserError(f"--config takes a file that ends in .toml or .json, not '{path}'")
    try:
        content = readers[path.suffix](path.read_text(encoding="utf-8"))
    except OSError as error:
        raise UserError(f"cannot read {path}: {error.strerror}") from None
    except (ValueError, RecursionError) as error:
        raise UserError(f"{path} is not {path.suffix[1:].upper()}: {error}") from None
    if not isinstance(content, dict):
        raise UserError(f"{path} does not hold settings by their names")
    settings = dict(_checked(key, value, str(path)) for key, value in content.items())
    is_a_runs = path.name == "config.json" and (path.parent / "run.json").exists()
    return {name: value for name, value in settings.items() if not (is_a_runs and name in PLACES)}


def _from_assignments(texts: Sequence[str]) -> dict[str, Any]:
    settings = {}
    for text in texts:
        key, separator, value = text.partition("=")
        if not separator:
            raise UsageError(f"--set takes key=value, such as lr=0.1, not '{text}'")
        name, read_value = _checked(key.strip(), value.strip(), f"--set {text}")
        settings[name] = read_value
    return settings


def _checked(key: str, value: Any, place: str) -> tuple[str, Any]:
    """The field's name and its value, if it takes it; place: for the sentence."""
    try:
        name = known_name("setting", key.replace("-", "_"), FIELDS)
    except UserError as error:
        raise UserError(f"{place}: {error}") from None
    try:
        value = read(name, value)
        check(name, value)
    except UserError as error:
        raise type(error)(f"{place}: {error} ({help_text(name)})") from None
    return name, value
