"""The leaderboard of all runs, and comparisons: which run is better, how sure that is, and how the settings differ.

torch, pandas and matplotlib are imported where they are used, so that the leaderboard appears at once.
"""

import hashlib
import string
from collections.abc import Sequence
from datetime import datetime
from itertools import combinations
from operator import itemgetter
from pathlib import Path
from typing import TYPE_CHECKING, Any

from rich.text import Text

from cifar import console, runs
from cifar.config import LOCATIONS
from cifar.errors import UserError, display_path, known_name
from cifar.records import Metrics
from cifar.runs import Run

if TYPE_CHECKING:
    import pandas

    from cifar.style import Axes, Figure

LETTERS = string.ascii_uppercase
TTA = "accuracy (TTA)"
COLUMNS = "run", "status", "accuracy", TTA, "seconds", "seed", "epochs", "loss", "calibration", "recipe", "dataset"
METHOD = (
    "p values are from McNemar's exact test on the predictions without TTA, with Holm's correction for several pairs; "
    "`python main.py --seeds 5` shows how much accuracy varies between seeds"
)
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
    seconds = run.record.seconds
    return {**_measured(run.metrics), "seconds_train": seconds.get("train"), "seconds": sum(seconds.values())}


def _measured(metrics: Metrics) -> dict[str, float]:
    return {
        "accuracy": metrics.accuracy,
        "accuracy_tta": metrics.accuracy_tta,
        "loss": metrics.loss,
        "expected_calibration_error": metrics.calibration.after.expected_calibration_error,
    }


def columns(sort: str | None = None) -> list[str]:
    """List the leaderboard's columns by importance; the one that it is sorted by is at least the third."""
    return sorted(COLUMNS, key=lambda column: 1.5 if column == _column(sort) else COLUMNS.index(column))


def _column(sort: str | None) -> str:
    """Return the column to sort by; by default the start, which is not shown."""
    return known_name("column", TTA if sort == "accuracy_tta" else sort, COLUMNS) if sort else "start"


def leaderboard(output_dir: str, sort: str | None = None) -> list[dict[str, Any]]:
    """List all runs in a folder and its groups: a row has COLUMNS, `start`, and `damaged`, the files that are.

    Newest first, or by a column: the best first, or alphabetically. Raises UserError if there is no such column or
    no run.
    """
    column = _column(sort)
    rows = [_row(Run(path)) for path in runs.directories(Path(output_dir))]
    if not rows:
        raise UserError(f"there is no run in {output_dir}; `python main.py` makes one")
    known = [row for row in rows if row[column] is not None]
    known.sort(key=itemgetter(column), reverse=column in ("accuracy", TTA, "epochs", "start"))
    return known + [row for row in rows if row[column] is None]


def _row(run: Run) -> dict[str, Any]:
    row = {**dict.fromkeys((*COLUMNS, "start")), "run": run.path.name, "damaged": []}
    for file in ("run.json", "config.json", "history.jsonl", "metrics.json"):
        try:
            row |= _cells_from(run, file)
        except UserError:
            row["damaged"].append(file)
    return row


def _cells_from(run: Run, file: str) -> dict[str, Any]:
    """Read the cells of a run's row that one of its files holds."""
    if file == "run.json":
        record = run.record
        start = datetime.fromisoformat(record.start).astimezone()
        return {"start": start, "status": run.status(), "seconds": sum(record.seconds.values())}
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


def show_runs(rows: Sequence[dict[str, Any]], groups: Sequence[dict[str, Any]], columns: Sequence[str]) -> None:
    """Print the rows of `leaderboard` and of `groups`. columns: by importance, where not all of them fit."""
    title = f"{len(rows):,} run{'s' * (len(rows) != 1)}"
    show_table(title, [{column: _cell(row, column) for column in columns} for row in rows])
    cells = []
    for row in groups:
        spreads = {name: "{:.2%} ± {:.2%}".format(*row[name]) if row[name] else "" for name in ("accuracy", TTA)}
        cells.append({"group": row["group"], "status": row["status"], **spreads})
    show_table("runs with several seeds: mean ± standard deviation", cells)


def _cell(row: dict[str, Any], column: str) -> str | Text:
    if column == "status" and row["damaged"]:
        return Text("damaged:\n" + "\n".join(row["damaged"]), style="red")
    return "" if row[column] is None else format(row[column], _FORMATS.get(column, ""))


# Comparisons.


def compare(found: Sequence[Run]) -> dict[str, Any]:
    """Compare two or more evaluated runs; returns the content of comparison.json, which calls them A, B and so on.

    Raises UserError if a run is given twice, is not evaluated or has a damaged record; anything else that is missing
    or damaged is left out, with a sentence in `notes`.
    """
    if not 2 <= len(found) <= len(LETTERS):
        raise UserError(f"a comparison takes 2 to {len(LETTERS)} runs, not {len(found)}; `invoke compare` lists them")
    if repeated := next((run.path.name for run in found if found.count(run) > 1), None):
        raise UserError(f"{repeated} is given twice")
    notes: list[str] = []
    rows = [_describe(letter, run, notes) for letter, run in zip(LETTERS, found)]
    differences = _differences(_read_outcomes(found, rows, notes), notes)
    names = dict.fromkeys(name for row in rows for name in row["settings"])
    settings = [{"name": name, "values": [row["settings"].get(name, "not set") for row in rows]} for name in names]
    return {
        "runs": rows,
        "pairs": _pairs(differences),
        "method": METHOD,
        "notes": notes,
        "classes": _by_class(rows, differences),
        "settings": [row for row in settings if any(value != row["values"][0] for value in row["values"])],
    }


def _describe(letter: str, run: Run, notes: list[str]) -> dict[str, Any]:
    """Collect one run's metrics, settings, recall by class and curve."""
    config, metrics, history = run.config, run.metrics, []
    try:
        history = run.history()
    except UserError as error:
        notes.append(f"{letter} has no curve: {error}")
    return {
        "letter": letter,
        "run": run.path.name,
        "path": display_path(run.path),
        "subject": f"{config.title} on {Path(config.dataset).name}, seed {config.seed}",
        **headline(run),
        **metrics.model_dump(mode="json", include={"n", "interval_95", "interval_95_tta", "test_sha256"}),
        "settings": _settings(run),
        "classes": {name: scores.recall for name, scores in metrics.per_class.items()},
        "curves": {name: [getattr(record, name) for record in history] for name in ("epoch", "val_accuracy")},
    }


def _settings(run: Run) -> dict[str, Any]:
    """Collect the settings that the run has recorded, and what else its result depends on."""
    record, recorded = run.record, runs.read_json(run.path / "config.json")
    settings = run.config.model_dump(include=recorded.keys() - set(LOCATIONS))
    facts = {
        "precision in use": record.precision,
        "hardware": record.hardware,
        "threads": record.threads,
        "parameters": record.model and record.model.parameters,
        "PyTorch": (record.versions or {}).get("torch"),
        "commit": record.commit and record.commit[:12] + (" with changes" if record.dirty else ""),
    }
    return {name: value for name, value in {**settings, **facts}.items() if value is not None}


def _read_outcomes(found: Sequence[Run], rows: list[dict[str, Any]], notes: list[str]) -> dict[str, "pandas.Series"]:
    """Return, by letter, 1.0 for each test image that the run predicted correctly, else 0.0, indexed by true class.

    Each is named by the test set's SHA-256. A run whose predictions.csv cannot be read, or is not of the evaluation
    that wrote metrics.json, has none.
    """
    import pandas

    from cifar import evaluate

    outcomes = {}
    for run, row in zip(found, rows):
        try:
            table = evaluate.read_predictions(run)
            correct = (table["true"] == table["predicted"]).to_numpy(float)
            if len(correct) != row["n"] or abs(correct.sum() - row["accuracy"] * row["n"]) > 0.5:
                raise UserError(f"{display_path(run.path / 'predictions.csv')} does not fit the run's metrics.json")
            outcomes[row["letter"]] = pandas.Series(correct, table["true"], name=row["test_sha256"])
        except UserError as error:
            notes.append(f"{row['letter']} is left out of the paired tests: {error}")
    return outcomes


def _differences(outcomes: dict[str, "pandas.Series"], notes: list[str]) -> dict[tuple[str, str], "pandas.Series"]:
    """Return, for each two runs of one test set, 1 for each image that only the second got right, -1 if only the first.

    Where a hash was not saved, the true classes decide whether the test sets are the same.
    """
    differences, unpaired = {}, []
    for (first, before), (second, after) in combinations(outcomes.items(), 2):
        if len({before.name, after.name} - {None}) < 2 and before.index.equals(after.index):
            differences[first, second] = after - before
        else:
            unpaired.append(f"{first} and {second}")
    if unpaired:
        notes.append(f"not tested, because the test sets differ: {', '.join(unpaired)}")
    return differences


def _interval(differences: "pandas.Series") -> list[float] | None:
    """Return the 95% interval of the mean; None for a single value."""
    from cifar.metrics import mean_and_spread

    return mean_and_spread(differences.to_numpy())["interval_95"] if len(differences) > 1 else None


def _pairs(differences: dict[tuple[str, str], "pandas.Series"]) -> list[dict[str, Any]]:
    """Apply McNemar's test to each pair of runs, with Holm's correction."""
    from cifar import metrics

    pairs = []
    for (first, second), difference in differences.items():
        counts = {"only_first": int((difference < 0).sum()), "only_second": int((difference > 0).sum())}
        effect = {"difference": float(difference.mean()), "interval_95": _interval(difference)}
        p = metrics.mcnemar(*counts.values())
        pairs.append({"first": first, "second": second, "n": len(difference), **counts, **effect, "p": p})
    for pair, p in zip(pairs, metrics.holm([pair["p"] for pair in pairs])):
        better = pair["second" if pair["difference"] > 0 else "first"]
        pair |= {"p_corrected": p, "better": better if p < metrics.SIGNIFICANCE_LEVEL else None}
        pair["verdict"] = _verdict(pair)
    return pairs


def _verdict(pair: dict[str, Any]) -> str:
    low, high = pair["interval_95"] or [pair["difference"]] * 2
    p = pair["p_corrected"]
    p_text = f"p = {p:.3f}" if p >= 0.001 else f"p = {p:.1e}" if p >= 1e-300 else "p < 1e-300"
    points = f"{100 * pair['difference']:+.2f} points, 95% interval {100 * low:+.2f} to {100 * high:+.2f}, {p_text}"
    conclusion = f"{pair['better']} is better" if pair["better"] else "no significant difference"
    return f"{pair['second']} - {pair['first']} is {points}: {conclusion}"


def _by_class(rows: list[dict[str, Any]], differences: dict[tuple[str, str], "pandas.Series"]) -> list[dict[str, Any]]:
    """List each class with the recall of every run and the differences from the first; empty if the classes differ.

    interval_95: of each difference, None where the runs share no test set.
    """
    recalls = [row["classes"] for row in rows]
    if any(one.keys() != recalls[0].keys() for one in recalls):
        return []
    of_first = [differences.get(("A", row["letter"])) for row in rows[1:]]
    return [
        {
            "class": name,
            "recall": [one[name] for one in recalls],
            "difference": [one[name] - recalls[0][name] for one in recalls[1:]],
            "interval_95": [None if each is None else _interval(each[each.index == name]) for each in of_first],
        }
        for name in recalls[0]
    ]


def most_different(classes: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Choose the classes for which there is room: those whose recall differs most from the first run's, in order."""
    largest = sorted(classes, key=lambda row: -max(map(abs, row["difference"])))[:_CLASSES]
    return [row for row in classes if row in largest]


def folder(output_dir: str, comparison: dict[str, Any]) -> Path:
    """Return where a comparison is saved: compare/ in the output folder, under the names of its runs."""
    names = [row["run"] for row in comparison["runs"]]
    name = "_vs_".join(names)
    if len(name) > 200:  # file systems take 255
        name = f"{names[0][:200]}_vs_{len(names) - 1}_more_{hashlib.sha256(name.encode()).hexdigest()[:8]}"
    return Path(output_dir) / "compare" / name


def write(comparison: dict[str, Any], folder: Path) -> Path:
    """Write comparison.json and comparison.png into the folder; returns it. Raises UserError if that is impossible."""
    from cifar import style

    with runs.writing(folder):
        folder.mkdir(parents=True, exist_ok=True)
    runs.write_json(folder / "comparison.json", comparison)
    with runs.atomic_write(folder / "comparison.png") as partial, style.drawing():
        draw(comparison).savefig(partial, format="png")
    return folder


def show_comparison(comparison: dict[str, Any]) -> None:
    """Print the comparison's tables, and last its conclusions."""
    rows, pairs, classes = comparison["runs"], comparison["pairs"], most_different(comparison["classes"])
    for run in rows:
        console.say(f"{run['letter']}  {run['path']}: {run['subject']}")
    letters = [run["letter"] for run in rows]
    show_table("test split, with 95% intervals", [_test_cells(run) for run in rows])
    recalls = [{letter: f"{recall:.1%}" for letter, recall in zip(letters, row["recall"])} for row in classes]
    cells = [{"class": row["class"], **recall} for row, recall in zip(classes, recalls)]
    show_table(f"recall of the {len(classes)} classes that differ most", cells)
    settings = [(row["name"], map(str, row["values"])) for row in comparison["settings"]]
    show_table("settings that differ", [{"setting": name, **dict(zip(letters, values))} for name, values in settings])
    for note in comparison["notes"]:
        console.say(note, style="yellow")
    for pair in pairs:
        console.say(pair["verdict"], style="bold" if pair["better"] else None)
    if pairs:
        console.say(comparison["method"])


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
    """Draw accuracies, validation accuracy by epoch and differences by class; inside `style.drawing`."""
    from cifar import style

    rows, classes = comparison["runs"], most_different(comparison["classes"])
    curves = [(color, line, run["curves"]) for run, (color, line) in zip(rows, _LOOKS)]
    curves = [one for one in curves if {*one[2]["val_accuracy"]} - {None}]
    figure = style.canvas(f"comparison of {len(rows)} runs", 14, 6 + 0.4 * len(rows))
    panels = ["accuracy", "epochs"] if curves else ["accuracy"]
    axes = figure.subplot_mosaic([[panel, "classes"] if classes else [panel] for panel in panels])
    _draw_accuracies(axes["accuracy"], rows)
    for color, line, curve in curves:
        axes["epochs"].plot(curve["epoch"], curve["val_accuracy"], line, color=color, marker=".")
        axes["epochs"].set(title="validation accuracy", xlabel="epoch")
        axes["epochs"].xaxis.set_major_locator(style.MaxNLocator(integer=True))
        style.label_percent(axes["epochs"], "y")
    if classes:
        _draw_classes(axes["classes"], classes)
    for panel in axes.values():
        panel.grid(alpha=0.3)
    figure.legend(loc="outside lower center")
    return figure


def _draw_accuracies(axes: "Axes", rows: Sequence[dict[str, Any]]) -> None:
    """Draw both accuracies of each run with their intervals, one row per run."""
    from cifar.style import label_percent

    for row, (run, (color, line)) in enumerate(zip(rows, _LOOKS)):
        axes.plot([], [], line, color=color, label=f"{run['letter']}  {run['run']}: {run['subject']}")
        for height, marker, suffix in ((row - 0.12, "o", ""), (row + 0.12, "D", "_tta")):
            axes.plot(run[f"interval_95{suffix}"], [height] * 2, color=color)
            axes.plot(run[f"accuracy{suffix}"], height, marker, color=color, markersize=5)
    axes.set(title="test accuracy (dot) and with TTA (diamond), 95% interval", ylim=(len(rows) - 0.5, -0.5))
    axes.set_yticks(range(len(rows)), [run["letter"] for run in rows])
    label_percent(axes, "x")


def _draw_classes(axes: "Axes", classes: Sequence[dict[str, Any]]) -> None:
    """Draw each class's difference in recall from the first run, with its interval if there is one."""
    from cifar.style import label

    for row, one in enumerate(classes):
        count = len(one["difference"])
        for n, (difference, interval) in enumerate(zip(one["difference"], one["interval_95"])):
            color, height = _LOOKS[n + 1][0], row + 0.7 * ((n + 0.5) / count - 0.5)
            axes.plot(100 * difference, height, "o", color=color, markersize=4)
            if interval:
                axes.plot([100 * end for end in interval], [height] * 2, color=color, linewidth=1)
    axes.axvline(0, color="grey", linewidth=1)
    axes.set(title="recall minus that of A, in points", ylim=(len(classes) - 0.4, -0.6))
    axes.set_yticks(range(len(classes)), [label(one["class"]) for one in classes])
    axes.xaxis.set_major_formatter("{x:+g}")
