"""Train, evaluate and draw an image classifier in one go."""

import argparse
import os
import sys
from typing import Any

from cifar import console, settings, tables
from cifar.config import FIELDS, RESUME_HELP, Config, flag, help_text


def main(arguments: list[str] | None = None) -> int:
    """Run the pipeline with the settings of the command line; returns the exit code."""
    given = parse(arguments)
    file, assignments, resume = (given.pop(name) for name in ("config", "set", "resume"))

    def run() -> None:
        pipeline(settings.gather(given, file, assignments), resume)

    if int(os.environ.get("WORLD_SIZE", 1)) == 1:
        return console.exit_code(run)

    from cifar import distributed  # torchrun has started several processes

    distributed.leave(console.exit_code(lambda: distributed.lead(run)))


def parse(arguments: list[str] | None) -> dict[str, Any]:
    """Field name, `config`, `set` or `resume` -> its text, or None. Exits with code 2 on an unknown flag."""
    parser = argparse.ArgumentParser(prog="main.py", description=__doc__, allow_abbrev=False)
    for name in FIELDS:
        parser.add_argument(flag(name), metavar=name.split("_")[-1].upper(), help=help_text(name).replace("%", "%%"))
    parser.add_argument("--config", metavar="FILE", help=settings.HELP["config"])
    parser.add_argument("--set", metavar="KEY=VALUE", action="append", default=[], help=settings.HELP["set"])
    parser.add_argument("--resume", nargs="?", const="", metavar="RUN", help=f"{RESUME_HELP}; without RUN the newest")
    if os.environ.get("RANK", "0") != "0":  # of torchrun's processes the first says it
        parser._print_message = lambda *_: None
    return vars(parser.parse_args(arguments))


def pipeline(given: dict[str, Any], resume: str | None) -> None:
    """One run, or with --seeds several in a directory of their own, or the rest of the run to resume."""
    config = Config.create(given)  # a mistake is told before the import of torch, which takes seconds

    from cifar import train

    if resume is not None:
        return go_through(*train.take_up(resume, given))
    if config.seeds == 1:
        return go_through(*train.begin(config))

    from cifar import seeds

    group = seeds.begin(config)
    with group.claim():
        for member in group.missing():
            console.say(f"seed {member.seed}, {group.seeds.index(member.seed) + 1} of {config.seeds}", style="bold")
            go_through(*group.start(member))
        group.summarize()
    tables.show_seeds(group)


def go_through(run, dataset) -> None:
    """data -> train -> evaluate -> visualize -> report, all in the run's directory."""
    from cifar import evaluate, report, train, visualize

    if run.is_complete():
        console.say(f"{run.path.name} is complete: there is nothing to resume")
        return
    is_trained = run.record["status"] == "completed"
    with run.lifetime():
        dataset.check()
        if not is_trained:
            with run.stage("train"):
                train.fit(run, dataset)
        with run.stage("evaluate"):
            metrics = evaluate.evaluate(run, dataset, run.config.device)
        tables.show_metrics(metrics)
        with run.stage("visualize"):
            visualize.visualize(run, dataset)
        with run.stage("report"):
            report.write(run, dataset)
    tables.show_run(run)


if __name__ == "__main__":
    sys.exit(main())
