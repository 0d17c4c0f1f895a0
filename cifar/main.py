"""Train and evaluate an image classifier, and write a report."""

import gc
import os
import sys
import time
from collections import deque
from typing import Any, NoReturn

from cifar import console
from cifar.config import PIPELINE, STAGES, Config, flag
from cifar.errors import UsageError, UserError
from cifar.flags import HELP, SWITCHES, help_page, load_settings, take_flag

# Seconds that rank 0 has to say what is wrong: torchrun ends all processes as soon as one of them has failed.
_FIRST_WORD = 5
_TAKES_VALUE = {flag(name): None if name in ("resume", *SWITCHES) else True for name in HELP}


def main(arguments: list[str] | None = None) -> int:
    """Run the pipeline with the settings of the command line; returns the exit code."""
    arguments = sys.argv[1:] if arguments is None else arguments
    is_process = all(os.environ.get(name) for name in ("RANK", "WORLD_SIZE", "MASTER_ADDR"))  # of torchrun's
    if is_process and os.environ["RANK"] != "0":
        console.out.quiet = console.err.quiet = True
    if "-h" in arguments or "--help" in arguments:
        texts = {flag(name): text for name, text in HELP.items()}
        texts["--resume"] += "; without a name the newest"
        about = f"{__doc__} `{STAGES} list` lists its stages, which can be run one by one."
        return console.exit_code(lambda: console.out.out(help_page(PIPELINE, about, texts, _TAKES_VALUE)))
    if not is_process:
        return console.exit_code(lambda: run_pipeline(*parse(arguments)))
    os.environ.setdefault("TORCH_CPP_LOG_LEVEL", "ERROR")  # PyTorch warns in each process of layers that freeze later
    code = console.exit_code(lambda: _run_as_process(*parse(arguments)))
    if code and os.environ["RANK"] != "0":
        time.sleep(_FIRST_WORD)
    return _exit_now(code)


def parse(arguments: list[str]) -> tuple[dict[str, Any], str | None]:
    """Return the settings that are given, by name, and the run to resume, "" for the newest."""
    words = deque(arguments)
    given: dict[str, Any] = {}
    while words:
        if not words[0].startswith("-"):
            raise UsageError(f"{PIPELINE} takes only flags, not '{words[0]}'; `{PIPELINE} --help` lists them")
        name, value = take_flag(words, _TAKES_VALUE, PIPELINE)
        given[name.removeprefix("--").replace("-", "_")] = value
    file, resume = given.pop("config", None), given.pop("resume", None)
    settings = load_settings(given, file, resume is not None)
    Config.create(settings)  # a mistake is reported before the import of torch, which takes seconds
    return settings, "" if resume is True else resume


def run_pipeline(given: dict[str, Any], resume: str | None) -> None:
    """Make one run, or with --seeds several in one directory, or complete the run to resume."""
    gc.disable()  # looking for garbage again and again is a fifth of the time of the imports
    try:
        from cifar import pipeline
    finally:
        gc.freeze()  # what was imported stays
        gc.enable()
    config = Config.create(given)
    if resume is not None:
        return pipeline.run_stages(*pipeline.resume(resume, given))
    if config.seeds == 1:
        return pipeline.run_stages(*pipeline.create(config))

    from cifar import seeds

    seeds.run(config)


def _run_as_process(given: dict[str, Any], resume: str | None) -> None:
    """Run as one of the processes that torchrun has started; only rank 0 prints, but for the others' own errors."""
    from cifar import device

    with device.process_group():
        try:
            run_pipeline(given, resume)
        except UserError as error:
            if device.rank() == 0:
                raise
            console.err.quiet = False
            raise UserError(f"process {device.rank()}: {error}") from None


def _exit_now(code: int) -> NoReturn:
    """End this process without Python's own clean-up.

    A thread of gloo that frees a tensor in it aborts the process: 2 of 14 runs, pytorch/pytorch#179291.
    """
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(code)
