"""Several seeds of one configuration: a group of runs in one directory, and their mean and standard deviation."""

import contextlib
import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from cifar import bench, compare, console, device, files, metrics, pipeline, runs
from cifar.config import LOCATIONS, Config
from cifar.data import Dataset
from cifar.errors import UserError, display_path
from cifar.records import Summary
from cifar.runs import Run

_METRICS = {  # of compare.headline: title, format and largest possible value
    "val_accuracy": ("validation accuracy", ".2%", 1),
    "accuracy": ("accuracy", ".2%", 1),
    "accuracy_tta": ("accuracy (TTA)", ".2%", 1),
    "loss": ("loss (cross-entropy)", ".4f", math.inf),
    "expected_calibration_error": ("calibration error", ".2%", 1),
    "seconds_train": ("seconds of training", ",.1f", math.inf),
    "seconds": ("seconds in total", ",.1f", math.inf),
}


@dataclass(frozen=True)
class Group:
    """A directory with one run for each seed, and summary.json."""

    path: Path
    config: Config  # resolved, with the first seed

    @property
    def seeds(self) -> range:
        return range(self.config.seed, self.config.seed + self.config.seeds)

    @property
    def summary(self) -> Summary:
        return runs.read_json(self.path / runs.SUMMARY)

    def members(self) -> dict[int, Run]:
        """Return the runs by seed, those that are complete and those to resume; says which are damaged."""
        members = {}
        for run in map(Run, runs.directories(self.path)):
            try:
                if run.dataset:  # raises where it is missing
                    members[run.config.seed] = run
            except UserError as error:
                console.say(f"{run.path.name} cannot be resumed: {error}")
        return members

    def summarize(self, finished: Sequence[Run]) -> None:
        """Complete summary.json: the main metrics of each run, and their mean over the seeds."""
        members: list[dict[str, Any]] = [
            {"seed": one.config.seed, "run": one.path.name, **compare.headline(one)} for one in finished
        ]
        figures = {}
        for name, (_, _, most) in _METRICS.items():
            values = [member[name] for member in members]
            if None not in values:
                figures[name] = metrics.mean_and_spread(values, 0, most)
        ending = {"status": "completed", "end": runs.now(), "runs": members, "figures": figures}
        files.write_json(self.path / runs.SUMMARY, self.summary.model_dump() | ending)


def run(config: Config) -> None:
    """Run the pipeline once for each seed, in one directory, and print the mean over the seeds.

    Of several processes all must call it; rank 0 decides and writes. Raises UserError if another command works on the
    group.
    """
    group, is_first = create(config), device.rank() == 0
    with runs.claim_group(group.path) if is_first else contextlib.nullcontext():
        members, finished = device.broadcast_object(group.members() if is_first else None), []
        for number, seed in enumerate(group.seeds, start=1):
            console.log_to(None)  # the last run's log has ended
            console.say(f"seed {seed}, {number} of {len(group.seeds)}", style="bold")
            member = group.config.replace(seed=seed, seeds=1, output_dir=display_path(group.path))
            if seed in members:
                started = pipeline.resume(str(members[seed].path), {"data_dir": member.data_dir})
            else:
                started = pipeline.create(member)
                if is_first:
                    started[0].update(note=group.summary.note)  # `member` names the dataset that was found
            pipeline.run_stages(*started)
            finished.append(started[0])
        if is_first:
            group.summarize(finished)
            show_seeds(group)


def create(config: Config) -> Group:
    """Resume the newest unfinished group with these settings in the output folder, or else make a group.

    --minutes is planned once, for all seeds. Raises UserError for a setting that does not fit the machine or the
    dataset, before any directory is made.
    """
    config, dataset = pipeline.prepare(config)
    group = (_find_unfinished(config, dataset) or _make(config, dataset)) if device.rank() == 0 else None
    return device.broadcast_object(group)


def _make(config: Config, dataset: Dataset) -> Group:
    planned = config if config.minutes is None else bench.plan_epochs(config, dataset)
    path = runs.make_directory(planned, f"_{planned.seeds}{runs.GROUP_SUFFIX}")
    state = {"status": "running", "start": runs.now(), "end": None, "note": dataset.note}
    files.write_json(path / runs.SUMMARY, {**state, "given": config.model_dump(), "config": planned.model_dump()})
    return Group(path, planned)


def _find_unfinished(config: Config, dataset: Dataset) -> Group | None:
    """Find the newest group with these settings and images whose process ended before all seeds were done."""
    for path in runs.groups(Path(config.output_dir)):
        try:
            summary = runs.read_json(path / runs.SUMMARY)
            recorded = Config.from_file(summary.config)
            given = Config.from_file(summary.given or summary.config)
            is_same = given.model_dump(exclude=set(LOCATIONS)) == config.model_dump(exclude=set(LOCATIONS))
            if is_same and runs.group_status(path) == "killed":
                group = Group(path, recorded.replace(**config.model_dump(include=set(LOCATIONS))))
                if {run.dataset.train_sha256 for run in group.members().values()} - {dataset.train.sha256()}:
                    raise UserError("its training images were others")
                console.say(f"resuming {display_path(path)}")
                return group
        except UserError as error:
            console.say(f"{display_path(path)} cannot be resumed: {error}")
    return None


def show_seeds(group: Group) -> None:
    """Print mean, standard deviation and interval of the group's metrics, from its summary.json."""
    summary, config = group.summary, group.config
    rows = []
    for name, spread in (summary.figures or {}).items():
        title, form, _ = _METRICS[name]
        row = {"": title, "mean": format(spread.mean, form)}
        row["standard deviation"] = format(spread.standard_deviation, form)
        if len(group.seeds) > 2:  # of two values it would be eighteen standard deviations wide
            ends = () if name.startswith("seconds") else spread.interval_95 or ()
            row["95% interval"] = " to ".join(format(end, form) for end in ends)
        rows.append(row)
    title = f"{config.title} on {Path(config.dataset).name}, seeds {group.seeds[0]} to {group.seeds[-1]}"
    compare.show_table(title, rows)
    console.say(f"directory of the {config.seeds} runs: {display_path(group.path)}")
    console.banner(summary.note)
