"""Train, evaluate and draw an image classifier in one go."""

import argparse
import sys

from cifar import console
from cifar.config import FIELDS, Config, flag, help_text


def main(arguments: list[str] | None = None) -> int:
    """Run the pipeline with the settings of the command line; returns the exit code."""
    given = parse(arguments)
    return console.exit_code(lambda: pipeline(Config.create(given)))


def parse(arguments: list[str] | None) -> dict[str, str | None]:
    """Field name -> the text given for it, or None. Exits with code 2 on an unknown flag."""
    parser = argparse.ArgumentParser(prog="main.py", description=__doc__, allow_abbrev=False)
    for name in FIELDS:
        parser.add_argument(flag(name), metavar=name.split("_")[-1].upper(), help=help_text(name).replace("%", "%%"))
    return vars(parser.parse_args(arguments))


def pipeline(config: Config) -> None:
    """data -> train -> evaluate -> visualize -> report, all in one run directory."""
    from cifar import evaluate, report, train, visualize

    run, dataset = train.begin(config)
    with run.lifetime():
        dataset.check()
        with run.stage("train"):
            train.fit(run, dataset)
        with run.stage("evaluate"):
            metrics = evaluate.evaluate(run, dataset, config.device)
        console.show_metrics(metrics)
        with run.stage("visualize"):
            visualize.visualize(run, dataset)
        with run.stage("report"):
            report.write(run, dataset)
    console.show_run(run)


if __name__ == "__main__":
    sys.exit(main())
