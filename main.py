"""Train and evaluate an image classifier, and write a report."""

import argparse
import os
import sys
from typing import Any, NoReturn

from cifar import console
from cifar.config import CONFIG_HELP, FIELDS, RESUME_HELP, Config, flag, help_text, load_settings
from cifar.errors import UserError


def main(arguments: list[str] | None = None) -> int:
    """Run the pipeline with the settings of the command line; returns the exit code."""
    if "RANK" not in os.environ:
        return console.exit_code(lambda: run_pipeline(*parse(arguments)))
    os.environ.setdefault("TORCH_CPP_LOG_LEVEL", "ERROR")  # PyTorch warns in each process of layers that freeze later
    if os.environ["RANK"] != "0":
        console.out.quiet = console.err.quiet = True
    return _exit_now(console.exit_code(lambda: _run_as_process(*parse(arguments))))


def parse(arguments: list[str] | None) -> tuple[dict[str, Any], str | None]:
    """Return the settings that are given, by name, and the run to resume. Exits with code 2 on an unknown flag."""
    parser = argparse.ArgumentParser(prog="main.py", description=__doc__, allow_abbrev=False)
    for name in FIELDS:
        parser.add_argument(flag(name), metavar=name.split("_")[-1].upper(), help=help_text(name).replace("%", "%%"))
    parser.add_argument("--config", metavar="FILE", help=CONFIG_HELP)
    parser.add_argument("--resume", nargs="?", const="", metavar="RUN", help=f"{RESUME_HELP}; without RUN the newest")
    if console.err.quiet:
        parser._print_message = lambda *_: None
    given = vars(parser.parse_args(arguments))
    file, resume = given.pop("config"), given.pop("resume")
    settings = load_settings(given, file)
    Config.create(settings)  # a mistake is reported before the import of torch, which takes seconds
    return settings, resume


def run_pipeline(given: dict[str, Any], resume: str | None) -> None:
    """Make one run, or with --seeds several in one directory, or complete the run to resume."""
    from cifar import pipeline

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


if __name__ == "__main__":
    sys.exit(main())
