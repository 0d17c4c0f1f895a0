"""The leaderboard of all runs, and comparisons: which run is better, how sure that is, and how the settings differ.

torch, pandas and matplotlib are imported where they are used, so that the leaderboard appears at once.
"""

import contextlib
import functools
import hashlib
import os
import statistics
import string
from collections import defaultdict
from collections.abc import Callable, Mapping, Sequence
from itertools import combinations
from operator import itemgetter
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from rich.text import Text

from cifar import console, files, runs
from cifar.config import LOCATIONS, PIPELINE, STAGES
from cifar.errors import UserError, display_path, known_name, listing, plural
from cifar.records import Metrics
from cifar.runs import Run

if TYPE_CHECKING:
    from cifar.style import Figure

LETTERS = string.ascii_uppercase
TTA = "accuracy (TTA)"
COLUMNS = "run", "status", "accuracy", TTA, "seconds", "seed", "epochs", "loss", "calibration", "recipe", "dataset"
NOT_SET, NO_EFFECT = "not set", "no effect"
_FORMATS = {"accuracy": ".2%", TTA: ".2%", "calibration": ".2%", "loss": ".4f", "seconds": ",.0f"}
_CLASSES = 10  # that a table or a figure has room for
# Okabe and Ito 2008: safe if color-blind.
_COLORS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#56B4E9", "#E69F00", "#666666")
_LOOKS = [(color, line) for line in ("-", "--", ":", "-.") for color in _COLORS]


def show_table(title: str, rows: Sequence[dict[str, Any]]) -> None:
    """Print rows, each of them column -> cell; nothing if there are none."""
    if rows:
        console.out.print(console.table(title, {name: [row[name] for row in rows] for name in rows[0]}))


# The leaderboard.


def headline(run: Run) -> dict[str, float | None]:
    """Return the main metrics of a run. Raises UserError if it has not been evaluated or a file is damaged."""
    seconds, kept = run.record.seconds, None
    with contextlib.suppress(UserError):  # a damaged history takes nothing else away
        kept = run.kept_epoch
    validation = {"val_accuracy": kept.val_accuracy if kept else None}
    times = {"seconds_train": seconds.get("train"), "seconds": run.record.total_seconds}
    return {**validation, **_measured(run.metrics), **times}


def _measured(metrics: Metrics) -> dict[str, float]:
    return {
        "accuracy": metrics.accuracy,
        "accuracy_tta": metrics.accuracy_tta,
        "loss": metrics.loss,
        "expected_calibration_error": metrics.calibration.after.expected_calibration_error,
    }


def leaderboard(output_dir: str, sort: str | None = None) -> list[dict[str, Any]]:
    """List all runs in a folder and its groups: a row has COLUMNS by importance, and `damaged`, the files that are.

    Newest first, or by a column, which then is the third at least: the best first, or alphabetically. Raises UserError
    if there is no such column or no run.
    """
    column = known_name("column", TTA if sort == "accuracy_tta" else sort, COLUMNS) if sort else None
    columns = sorted(COLUMNS, key=lambda name: 1.5 if name == column else COLUMNS.index(name))
    rows = [_row(Run(path), columns) for path in runs.directories(Path(output_dir))]
    if not rows:
        raise UserError(f"there is no run in {output_dir}; `{PIPELINE}` makes one")
    if not column:
        return rows
    known = [row for row in rows if row[column] is not None]
    known.sort(key=itemgetter(column), reverse=column in ("accuracy", TTA, "epochs"))
    return known + [row for row in rows if row[column] is None]


def _row(run: Run, columns: Sequence[str]) -> dict[str, Any]:
    row: dict[str, Any] = {**dict.fromkeys(columns), "run": run.path.name, "damaged": []}
    for file in ("run.json", "config.json", "history.jsonl", "metrics.json"):
        try:
            row |= _cells_from(run, file)
        except UserError:
            row["damaged"].append(file)
    return row


def _cells_from(run: Run, file: str) -> dict[str, Any]:
    """Read the cells of a run's row that one of its files holds."""
    if file == "run.json":
        return {"status": run.status(), "seconds": run.record.total_seconds}
    if file == "config.json":
        config = run.config
        return {"recipe": config.title, "dataset": Path(config.dataset).name, "seed": config.seed}
    if file == "history.jsonl":
        return {"epochs": len(run.history())}
    measured = _measured(run.metrics).values() if run.has_metrics else ()
    return dict(zip(("accuracy", TTA, "loss", "calibration"), measured))


def groups(output_dir: str) -> list[dict[str, Any]]:
    """List the groups of seeds, newest first: name, status, (mean, standard deviation) of both accuracies or None."""
    rows = []
    for path in runs.groups(Path(output_dir)):
        try:
            spreads, status = runs.read_json(path / runs.SUMMARY).figures or {}, runs.group_status(path)
        except UserError:
            spreads, status = {}, f"damaged: {runs.SUMMARY}"
        pairs = {name: (spread.mean, spread.standard_deviation) for name, spread in spreads.items()}
        accuracies = {"accuracy": pairs.get("accuracy"), TTA: pairs.get("accuracy_tta")}
        rows.append({"group": path.name, "status": status, **accuracies})
    return rows


def show_runs(rows: Sequence[dict[str, Any]], groups: Sequence[dict[str, Any]]) -> None:
    """Print the rows of `leaderboard` and of `groups`."""
    cells = [{column: _cell(row, column) for column in row if column != "damaged"} for row in rows]
    show_table(plural(len(rows), "run"), cells)
    spread = "{:.2%} ± {:.2%}".format
    cells = [row | {name: spread(*row[name]) if row[name] else "" for name in ("accuracy", TTA)} for row in groups]
    show_table("runs with several seeds: mean ± standard deviation", cells)


def _cell(row: dict[str, Any], column: str) -> str | Text:
    if column == "status" and row["damaged"]:
        return Text("damaged:\n" + "\n".join(row["damaged"]), style="red")
    return "" if row[column] is None else format(row[column], _FORMATS.get(column, ""))


# Comparisons.


def compare(found: Sequence[Run], pairs: bool = False) -> dict[str, Any]:
    """Compare evaluated runs; returns the content of comparison.json, which calls them A, B and so on.

    The runs of one directory of --seeds are compared as one, by their means, unless `pairs` is true or there are no
    others. `notes` say which are not tested, and why. Raises UserError if a run is given twice, is not evaluated or is
    damaged.
    """
    if repeated := {run.path for run in found if found.count(run) > 1}:
        path = min(repeated)
        is_group = len(repeated) > 1 and Run(path).is_in_group
        raise UserError(f"{path.parent.name if is_group else path.name} is given twice")
    groups: dict[Path, list[Run]] = defaultdict(list)
    for run in found:
        groups[run.path.parent if run.is_in_group else run.path].append(run)
    if pairs or len(groups) == 1:
        groups = {run.path: [run] for run in found}
    if not 2 <= len(groups) <= len(LETTERS):
        raise UserError(
            f"a comparison takes 2 to {len(LETTERS)} runs, not {len(groups)}; `{STAGES} compare` lists them"
        )
    recipes = dict(zip(LETTERS, (sorted(members, key=lambda run: run.config.seed) for members in groups.values())))
    rows = [_describe(letter, members) for letter, members in recipes.items()]
    tested, notes = _pairs(recipes)
    recalls = [row["classes"] for row in rows]
    names = [name for name in recalls[0] if all(name in recall for recall in recalls)]
    return {
        "runs": rows,
        "pairs": tested,
        "notes": notes,
        "classes": [{"class": name, "recall": [recall[name] for recall in recalls]} for name in names],
        "settings": _different_settings([row["settings"] for row in rows]),
    }


def _describe(letter: str, members: Sequence[Run]) -> dict[str, Any]:
    """Collect the metrics, settings, recall by class and curves of a run, or of several seeds: their means."""
    config, metrics = members[0].config, [run.metrics for run in members]
    path, seeds = members[0].path, [run.config.seed for run in members]
    path = path if len(members) == 1 else path.parent
    is_gapless = seeds == list(range(seeds[0], seeds[-1] + 1))
    listed = f"{seeds[0]} to {seeds[-1]}" if is_gapless else ", ".join(map(str, seeds))
    numbers = f"seed {seeds[0]}" if len(seeds) == 1 else f"{len(seeds)} seeds, {listed}"
    headlines = [headline(run) for run in members]
    recalls = [{name: scores.recall for name, scores in one.measured_classes.items()} for one in metrics]
    return {
        "letter": letter,
        "run": path.name,
        "path": display_path(path),
        "subject": f"{config.title} on {Path(config.dataset).name}, {numbers}",
        "seeds": seeds,
        **{name: _mean([one[name] for one in headlines]) for name in headlines[0]},
        "interval_95": _interval(metrics, ""),
        "interval_95_tta": _interval(metrics, "_tta"),
        "n": metrics[0].n,
        "test_sha256": metrics[0].test_sha256,
        "settings": [_settings(run) for run in members],
        "classes": {
            name: _mean([one[name] for one in recalls]) for name in recalls[0] if all(name in one for one in recalls)
        },
        "curves": [_curve(run) for run in members],
    }


def _curve(run: Run) -> dict[str, list]:
    epochs = [epoch for epoch in run.history() if epoch.val_accuracy is not None]
    return {name: [getattr(epoch, name) for epoch in epochs] for name in ("epoch", "val_accuracy")}


def _mean(values: Sequence[Any]) -> float | None:
    return None if None in values else statistics.fmean(values)


def _interval(metrics: Sequence[Metrics], suffix: str) -> list[float]:
    """Return the 95% interval of a run's accuracy, or of the mean over several."""
    if len(metrics) == 1:
        return list(getattr(metrics[0], f"interval_95{suffix}"))
    from cifar.metrics import mean_and_spread

    return mean_and_spread([getattr(one, f"accuracy{suffix}") for one in metrics], 0, 1)["interval_95"]


def _settings(run: Run) -> dict[str, Any]:
    """Collect the settings that the run has recorded, and what else its result depends on."""
    record, config = run.record, run.config
    settings = config.model_dump(include=runs.read_json(run.path / runs.CONFIG).keys() - set(LOCATIONS))
    facts = {
        "device": record.hardware,
        "precision": record.precision,
        "threads": record.threads,
        "parameters": record.model and record.model.parameters,
        "PyTorch": (record.versions or {}).get("torch"),
        "commit": record.commit and record.commit[:12] + (" with changes" if record.dirty else ""),
    }
    known = {name: value for name, value in (*settings.items(), *facts.items()) if value is not None}
    return known | dict.fromkeys(config.unused, NO_EFFECT)


def _different_settings(settings: Sequence[Sequence[dict[str, Any]]]) -> list[dict[str, Any]]:
    """List the settings that differ where they have an effect. settings: of each run, or of each seed of it."""
    rows = []
    for name in dict.fromkeys(name for members in settings for one in members for name in one):
        by_run = [tuple(dict.fromkeys(str(one.get(name, NOT_SET)) for one in members)) for members in settings]
        if len({*by_run} - {(NO_EFFECT,)}) > 1:
            rows.append({"name": name, "values": list(map(listing, by_run))})
    return rows


# Tests of significance.


def _pairs(recipes: Mapping[str, Sequence[Run]]) -> tuple[list[dict[str, Any]], list[str]]:
    """Test the difference of each two, with Holm's correction; returns, too, why some cannot be tested."""
    from cifar.metrics import SIGNIFICANCE_LEVEL, holm

    names = {letter: f"{letter} ({members[0].config.title})" for letter, members in recipes.items()}
    pairs, reasons, read = [], defaultdict(list), functools.cache(_read_outcomes)
    for (first, before), (second, after) in combinations(recipes.items(), 2):
        try:
            pairs.append({"first": first, "second": second, **_difference(before, after, read)})
        except UserError as reason:
            reasons[str(reason)].append(f"{first} and {second}")
    for pair, p in zip(pairs, holm([pair["p"] for pair in pairs])):
        better = pair["second" if pair["difference"] > 0 else "first"]
        pair |= {"p_corrected": p, "better": better if p < SIGNIFICANCE_LEVEL else None}
        pair["verdict"] = _verdict(pair, names)
    return pairs, [f"not tested: {', '.join(names)}: {reason}" for reason, names in reasons.items()]


def _difference(before: Sequence[Run], after: Sequence[Run], read: Callable) -> dict[str, Any]:
    """Test the difference of two runs, or of two recipes over seeds. Raises UserError with a reason if it cannot be."""
    metrics = [run.metrics for run in (*before, *after)]
    supports = [[(name, scores.support) for name, scores in one.per_class.items()] for one in metrics]
    if len({one.test_sha256 for one in metrics} - {None}) > 1 or any(one != supports[0] for one in supports):
        sizes = sorted({str(run.config.image_size) for run in (*before, *after)})
        cause = f" (--image-size {' and '.join(sizes)})" if len(sizes) > 1 else ""
        raise UserError(f"the test sets differ{cause}")
    if len(before) == len(after) == 1:
        return _mcnemar(read(before[0]), read(after[0]))
    if 1 in (len(before), len(after)):
        raise UserError("one seed does not show how much accuracy varies between seeds; --pairs tests single runs")
    return _t_test(before, after)


def _read_outcomes(run: Run) -> tuple[np.ndarray, np.ndarray]:
    """Return the true class of each test image, and 1.0 where the run predicted it correctly, else 0.0.

    Raises UserError if predictions.csv cannot be read, or is not of the evaluation that wrote metrics.json.
    """
    from cifar.evaluate import read_predictions

    table, metrics = read_predictions(run), run.metrics
    correct = (table["true"] == table["predicted"]).to_numpy(float)
    if len(correct) != metrics.n or abs(correct.sum() - metrics.accuracy * metrics.n) > 0.5:
        raise UserError(f"{display_path(run.path / 'predictions.csv')} does not fit the run's metrics.json")
    return table["true"].to_numpy(), correct


def _mcnemar(first: tuple[np.ndarray, np.ndarray], second: tuple[np.ndarray, np.ndarray]) -> dict[str, Any]:
    """Apply McNemar's exact test (1947) to the outcomes of two runs on the same images."""
    from scipy.stats import binomtest

    from cifar.metrics import mean_and_spread

    if not np.array_equal(first[0], second[0]) or len(first[0]) < 2:
        raise UserError("the test sets differ, or have a single image")
    difference = second[1] - first[1]  # 1 where only the second was right, -1 where only the first was
    only_first, only_second = int((difference < 0).sum()), int((difference > 0).sum())
    discordant = only_first + only_second
    return {
        "n": len(difference),
        "only_first": only_first,
        "only_second": only_second,
        "difference": float(difference.mean()),
        "interval_95": mean_and_spread(difference)["interval_95"],
        "p": float(binomtest(only_first, discordant).pvalue) if discordant else 1.0,
        "test": f"McNemar's exact test on {len(difference):,} images",
    }


def _t_test(before: Sequence[Run], after: Sequence[Run]) -> dict[str, Any]:
    """Apply the t-test to the accuracies over seeds: paired (Student 1908) if the seeds are the same, else Welch's."""
    from scipy.stats import ttest_ind, ttest_rel

    is_paired = [run.config.seed for run in before] == [run.config.seed for run in after]
    result: dict[str, Any] = {"seeds": [len(before), len(after)]}
    for suffix in ("", "_tta"):
        first, second = (
            np.array([getattr(run.metrics, f"accuracy{suffix}") for run in members]) for members in (before, after)
        )
        if max(np.ptp(values) for values in ([second - first] if is_paired else [first, second])) < 1e-9:
            if suffix:
                continue  # where all have the same accuracy (TTA)
            raise UserError("the seeds vary too little for a t-test: train more of them")
        test = ttest_rel(second, first) if is_paired else ttest_ind(second, first, equal_var=False)
        result |= {
            f"difference{suffix}": round(float(second.mean() - first.mean()), 12),  # so that equal means are equal
            f"interval_95{suffix}": [float(end) for end in test.confidence_interval()],
        }
        result.setdefault("p", float(test.pvalue))
    kind, count = "paired" if is_paired else "Welch's", " and ".join(dict.fromkeys(map(str, result["seeds"])))
    return {**result, "test": f"{kind} t-test over {count} seeds"}


def _verdict(pair: dict[str, Any], names: Mapping[str, str]) -> str:
    """Say which is better, or ahead, and by how many points."""
    sign, p = 1 if pair["difference"] > 0 else -1, pair["p_corrected"]
    ahead, behind = (names[pair[place]] for place in (("second", "first") if sign > 0 else ("first", "second")))

    def points(suffix: str) -> list[float]:
        ends = sorted(sign * end for end in pair[f"interval_95{suffix}"])
        return [100 * value + 0.0 for value in (sign * pair[f"difference{suffix}"], *ends)]  # without -0.0

    if not pair["difference"]:
        return f"{ahead} and {behind} have the same test accuracy ({pair['test']})"
    start = f"{ahead} is better than {behind}" if pair["better"] else f"no difference shown: {ahead} leads {behind}"
    p_text = f"p = {p:.3f}" if p >= 0.001 else f"p = {p:.1e}" if p >= 1e-300 else "p < 1e-300"
    interval = "{:.2f} points of test accuracy, 95% interval {:.2f} to {:.2f}".format(*points(""))
    tta = "; with TTA {:.2f} points, {:.2f} to {:.2f}".format(*points("_tta")) if "interval_95_tta" in pair else ""
    return f"{start} by {interval}, {p_text} ({pair['test']}){tta}"


# Output.


def folder(output_dir: str, comparison: dict[str, Any]) -> Path:
    """Return where a comparison is saved: compare/ in the output folder, under the names of its runs."""
    name = "_vs_".join(row["run"] for row in comparison["runs"])
    if len(encoded := os.fsencode(name)) > 200:  # file systems take 255
        name = f"{encoded[:200].decode(errors='ignore')}_{hashlib.sha256(encoded).hexdigest()[:8]}"
    return Path(output_dir) / "compare" / name


def write(comparison: dict[str, Any], folder: Path) -> Path:
    """Write comparison.json and comparison.png into the folder; returns it. Raises UserError if that is impossible."""
    from cifar import style

    with files.writing(folder):
        folder.mkdir(parents=True, exist_ok=True)
    files.write_json(folder / "comparison.json", comparison)
    with files.atomic_write(folder / "comparison.png") as partial, style.drawing():
        draw(comparison).savefig(partial, format="png")
    return folder


def show_comparison(comparison: dict[str, Any]) -> None:
    """Print the comparison's tables, and last its conclusions."""
    rows, pairs = comparison["runs"], comparison["pairs"]
    for run in rows:
        console.say(f"{run['letter']}  {run['path']}: {run['subject']}")
    letters = [run["letter"] for run in rows]
    show_table("test split, with 95% intervals", [_test_cells(run) for run in rows])
    classes = sorted(comparison["classes"], key=lambda row: min(row["recall"]) - max(row["recall"]))[:_CLASSES]
    cells = [{"class": row["class"], **dict(zip(letters, map("{:.1%}".format, row["recall"])))} for row in classes]
    which = f"of the {len(classes)} classes that differ most" if len(comparison["classes"]) > _CLASSES else "by class"
    show_table(f"recall {which}", cells)
    settings = [{"setting": row["name"], **dict(zip(letters, row["values"]))} for row in comparison["settings"]]
    show_table("settings that differ", settings)
    for note in comparison["notes"]:
        console.say(note, style="yellow")
    for pair in pairs:
        console.say(pair["verdict"], style="bold" if pair["better"] else None)
    if len(pairs) > 1:
        console.say("p values are corrected for the number of pairs (Holm)")
    if any("seeds" not in pair for pair in pairs):
        console.say("this compares single networks; to compare recipes, name two directories of several seeds")


def _test_cells(run: dict[str, Any]) -> dict[str, str]:
    interval = "{:.2%} ({:.2%} to {:.2%})".format
    return {
        "": run["letter"],
        "accuracy": interval(run["accuracy"], *run["interval_95"]),
        TTA: interval(run["accuracy_tta"], *run["interval_95_tta"]),
        "seconds": f"{run['seconds']:,.0f}",
        "loss": f"{run['loss']:.4f}",
        "calibration": f"{run['expected_calibration_error']:.2%}",
    }


# The figure.


def draw(comparison: dict[str, Any]) -> "Figure":
    """Draw test accuracies with their intervals, and validation accuracy by epoch; inside `style.drawing`."""
    from cifar import style

    rows = comparison["runs"]
    has_curves = any(curve["epoch"] for run in rows for curve in run["curves"])
    figure = style.canvas(f"comparison of {len(rows)} runs", 10, 3 + 3 * has_curves + 0.5 * len(rows))
    panels: list[Any] = [["accuracy"], ["epochs"]]
    axes = figure.subplot_mosaic(panels[: 1 + has_curves])
    for number, (run, (color, line)) in enumerate(zip(rows, _LOOKS)):
        label = style.label(f"{run['letter']}  {run['run']}: {run['subject']}", 150)
        axes["accuracy"].plot([], [], line, color=color, label=label)
        for height, marker, suffix in ((number - 0.12, "o", ""), (number + 0.12, "D", "_tta")):
            axes["accuracy"].plot(run[f"interval_95{suffix}"], [height] * 2, color=color)
            axes["accuracy"].plot(run[f"accuracy{suffix}"], height, marker, color=color, markersize=5)
        for curve in run["curves"]:
            if curve["epoch"]:
                axes["epochs"].plot(curve["epoch"], curve["val_accuracy"], line, color=color, marker=".")
    title = "test accuracy (dot) and with TTA (diamond), 95% interval"
    axes["accuracy"].set(title=title, ylim=(len(rows) - 0.5, -0.5))
    axes["accuracy"].set_yticks(range(len(rows)), [run["letter"] for run in rows])
    style.label_percent(axes["accuracy"], "x")
    if has_curves:
        axes["epochs"].set(title="validation accuracy", xlabel="epoch")
        axes["epochs"].xaxis.set_major_locator(style.MaxNLocator(integer=True))
        style.label_percent(axes["epochs"], "y")
    for panel in axes.values():
        panel.grid(alpha=0.3)
    figure.legend(loc="outside lower center")
    return figure
