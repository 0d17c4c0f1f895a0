"""The flags of the command lines: read, explained, and taken from a file of settings."""

import argparse
import json
import os
import tomllib
from collections import deque
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from cifar.config import FIELDS, LOCATIONS, NO, YES, Config, allow_model, help_text
from cifar.errors import UsageError, UserError, did_you_mean
from cifar.files import read

# The settings that are on without a value.
SWITCHES = tuple(name for name in FIELDS if Config.model_fields[name].annotation is bool)
HELP = {name: help_text(name) for name in FIELDS} | {
    "config": "file with settings, .toml or .json, such as a run's config.json; flags take precedence",
    "resume": "resume an interrupted, failed or killed run: its directory, or its name in --output-dir",
}


def take_flag(
    words: deque[str], takes_value: Mapping[str, bool | None], command: str, others: Mapping[str, str] | None = None
) -> tuple[str, str | bool]:
    """Take a flag and its value from the front of a command line; returns both, the flag as `takes_value` spells it.

    takes_value: of each flag, whether it has a value; None where that may be left out. others: the flags of earlier
    commands, and whose they are. The value is True where there is none. Underscores count as dashes, `~` as the home
    directory. Raises UsageError for an unknown flag, and for a value that is missing, empty, as that of an unset shell
    variable, itself a flag, or one too many.
    """
    word, equals, value = words.popleft().partition("=")
    name = word.replace("_", "-").lower()
    if name not in takes_value:
        hint = did_you_mean(name, takes_value) or f"`{command} --help` lists its flags"
        if others and name in others:
            hint = f"write it right behind `{others[name]}`, which has it"
        raise UsageError(f"{command} has no flag {word}: {hint.strip()}")
    is_switch = name.removeprefix("--").replace("-", "_") in SWITCHES  # whose value is yes or no, if it has one
    follows = words and not words[0].startswith("--") and (not is_switch or words[0].lower() in (*YES, *NO))
    if takes_value[name] is not False and not equals and follows:
        equals, value = "=", words.popleft()
    if takes_value[name] is not None and takes_value[name] != bool(equals):
        missing = f"{name} needs a value: `{command} --help` says which"
        raise UsageError(f"{name} takes no value, so not '{value}'" if equals else missing)
    if equals and not value.strip():
        raise UsageError(f"{name} must not be empty")
    if value.startswith("--"):
        raise UsageError(f"{name} needs a value, not '{value}'")
    return name, os.path.expanduser(value) if equals else True


def help_page(command: str, description: str, texts: Mapping[str, str], takes_value: Mapping[str, bool | None]) -> str:
    """Lay out the help of a command.

    texts: of each flag, or of the words without a flag by a name without dashes. takes_value: as for `take_flag`.
    """
    words = [f"[{name.upper()} ...]" for name in texts if not name.startswith("-")]
    usage = " ".join((command, "[FLAGS]", *words))
    parser = argparse.ArgumentParser(usage=usage, description=description, add_help=False)
    for name, text in texts.items():
        value = {"metavar": name.split("-")[-1].upper(), "nargs": "?" if takes_value.get(name) is None else None}
        options = {"action": "store_true"} if takes_value.get(name) is False else value
        parser.add_argument(name, help=text.replace("%", "%%"), **options)
    return parser.format_help()


def load_settings(flags: Mapping[str, Any], file: str | None, is_resumed: bool = False) -> dict[str, Any]:
    """Return field name -> value: those of the settings file, overridden by the flags, which may name code to import.

    flags: None where one is not given; `minutes` are planned with the file's share of small epochs. file: .toml,
    .json or a run's directory; the locations in a run's own config.json are ignored. is_resumed: the settings of a run
    count, so that a file is refused.
    Raises UserError for an invalid setting, which names the file if that alone is invalid.
    """
    given = {name: value for name, value in flags.items() if value is not None}
    allow_model(given.get("model"))
    _require_one_length(given)
    if file is None:
        return given
    if is_resumed:
        raise UsageError("--resume takes the settings of the run: leave out --config")
    path = Path(os.path.expanduser(file))
    path = path / "config.json" if path.is_dir() else path
    settings = _read_settings(path)
    if "epochs" in given:
        settings.pop("minutes", None)
    elif "minutes" not in given:
        _require_one_length(settings, f"{path}: ")
    if "recipe" in given and str(settings.get("recipe", given["recipe"])).lower() != str(given["recipe"]).lower():
        raise UsageError(f"{file} is for the recipe {settings['recipe']}: leave out --recipe {given['recipe']}")
    try:
        config = Config.create(settings | given)
        is_own = "lr" in settings and "lr" not in given and {"recipe", "model", "optimizer"} & settings.keys()
        optimizer = Config.create(settings).optimizer if is_own else config.optimizer
    except UserError as error:
        try:
            Config.create(settings)
        except UserError:
            raise type(error)(f"{path}: {error}") from None
        raise
    config.require_lr_for(optimizer, str(path))
    return settings | given


def _require_one_length(settings: Mapping[str, Any], source: str = "") -> None:
    if {"minutes", "epochs"} <= settings.keys():
        raise UsageError(f"{source}--minutes chooses the number of epochs: leave out --epochs or --minutes")


def _read_settings(path: Path) -> dict[str, Any]:
    """Return the settings in a file by name."""
    parsers = {".toml": tomllib.loads, ".json": json.loads}
    suffix = path.suffix.lower()
    if suffix not in parsers:
        raise UserError(f"--config takes a file that ends in .toml or .json, not '{path}'")
    text = read(path)
    try:
        content = parsers[suffix](text.decode("utf-8-sig"))  # editors on Windows begin with a mark
    except (ValueError, RecursionError) as error:
        raise UserError(f"{path} is not valid {suffix[1:].upper()}: {error}") from None
    if not isinstance(content, dict):
        raise UserError(f"{path} must contain settings by name")
    settings = {key.replace("-", "_"): value for key, value in content.items() if value is not None}
    is_of_run = path.name == "config.json" and (path.parent / "run.json").exists()
    return {name: value for name, value in settings.items() if not (is_of_run and name in LOCATIONS)}
