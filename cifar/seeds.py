"""Several seeds of one configuration: a group of runs in a directory of its own, and what they reach on average."""

import math
from collections.abc import Iterator
from contextlib import AbstractContextManager
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

from cifar import budget, console, datasets, device, headlines, outputs, runs, significance, train
from cifar.config import PLACES, Config
from cifar.errors import UserError, short
from cifar.runs import Run

_BY_BUDGET = ("epochs", "small_epochs", "minutes")  # the settings that a budget of minutes chooses, and itself


@dataclass(frozen=True)
class Group:
    """A directory that holds a run for each seed, and summary.json."""

    path: Path
    config: Config  # settled on the dataset, with the first seed

    @property
    def seeds(self) -> range:
        return range(self.config.seed, self.config.seed + self.config.seeds)

    @property
    def summary(self) -> dict[str, Any]:
        return runs.read_json(self.path / runs.SUMMARY)

    def update(self, **changes: Any) -> None:
        """Set keys of summary.json."""
        runs.write_json(self.path / runs.SUMMARY, {**self.summary, **changes})

    def claim(self) -> AbstractContextManager[None]:
        """Keep other processes from working on the group. Raises UserError if one does."""
        return outputs.claim_group(self.path)

    def finished(self) -> dict[int, Run]:
        """The run of each seed that has one from beginning to end."""
        found = [Run(place) for place in outputs.directories(self.path)]
        return {run.config.seed: run for run in found if _is_finished(run)}

    def missing(self) -> Iterator[Config]:
        """The configuration of each seed that has no finished run, one after the other."""
        for seed in self.seeds:
            if seed not in self.finished():
                yield replace(self.config, seed=seed, seeds=1, output_dir=short(self.path))

    def start(self, config: Config) -> tuple[Run, datasets.Dataset]:
        """The run of one of the `missing` and its dataset: what was begun goes on, if it can, or else a new one."""
        for run in map(Run, outputs.directories(self.path)):
            try:
                if run.config.seed == config.seed and run.status() != "running" and not run.is_complete():
                    return train.take_up(str(run.path), {"data_dir": config.data_dir})
            except UserError as error:
                console.say(f"{run.path.name} is begun anew: {error}")
        return train.begin(config)

    def summarize(self) -> None:
        """Complete summary.json: the headline figures of each run, and their mean over the seeds.

        Raises UserError if a run has been lost since.
        """
        finished = self.finished()
        if lost := [str(seed) for seed in self.seeds if seed not in finished]:
            raise UserError(f"{self.path} lacks the run of seed {', '.join(lost)}: the same command makes it")
        rows = [headlines.headline(finished[seed]) for seed in self.seeds]
        members = [{"seed": seed, "run": finished[seed].path.name, **row} for seed, row in zip(self.seeds, rows)]
        figures = {name: significance.spread([row[name] for row in rows], 0, _most(name)) for name in rows[0]}
        self.update(status="completed", end=runs.now(), runs=members, figures=figures)


def begin(config: Config) -> Group:
    """The unfinished group with these settings in the output folder, newest first; or else a new one.

    Raises UserError for a setting that does not fit the machine or the dataset, before anything is made.
    """
    device.choose(config.device)
    runs.check_writable(config.output_dir)
    dataset, note = datasets.find(config.dataset, config.data_dir, config.image_size, config.mirror)
    config = datasets.settle(config, dataset)
    console.banner(note)
    if path := _unfinished(config):
        there = runs.read_json(path / runs.SUMMARY)["config"]
        group = Group(path, replace(config, **{name: there[name] for name in _BY_BUDGET if name in there}))
        console.say(f"going on with {short(path)}: {len(group.finished())} of {config.seeds} seeds are there")
        return group
    began = {"status": "running", "start": runs.now(), "end": None, "minutes": config.minutes}
    if config.minutes is not None:
        config = budget.fit(config, dataset)
    path = runs.make_directory(config, f"_{config.seeds}-seeds")
    runs.write_json(path / runs.SUMMARY, {**began, "note": note, "config": asdict(config)})
    return Group(path, config)


def _most(figure: str) -> float:
    return 1 if figure in headlines.SHARES else math.inf


def _unfinished(config: Config) -> Path | None:
    for path in outputs.groups(Path(config.output_dir)):
        try:
            summary = runs.read_json(path / runs.SUMMARY)
            there, wanted = (_settings(one, config.minutes) for one in (summary["config"], asdict(config)))
            if summary.get("minutes") == config.minutes and there == wanted and outputs.group_status(path) == "killed":
                return path
        except UserError as error:
            console.say(f"{short(path)} cannot be gone on with: {error}")
    return None


def _settings(config: dict[str, Any], budget: float | None) -> dict[str, Any]:
    """What must be the same for a group to go on with it: where there is a budget, that has chosen the epochs."""
    left_out = PLACES if budget is None else (*PLACES, *_BY_BUDGET)
    return {name: value for name, value in config.items() if name not in left_out}


def _is_finished(run: Run) -> bool:
    try:
        return run.is_complete() and None not in headlines.headline(run).values() and run.config.seeds == 1
    except UserError:  # damaged, so it is made anew
        return False
