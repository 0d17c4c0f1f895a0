"""The tables and lines in which commands say what came of them."""

import os
import re
from collections.abc import Sequence
from itertools import accumulate
from pathlib import Path
from typing import Any

from rich.progress_bar import ProgressBar
from rich.table import Table
from rich.text import Text

from cifar import console
from cifar.errors import short, some

_ROWS = 100  # of a table of pictures
_SHOWN_SHARE = 0.005  # of a step, from which an operator is shown
_NAMED = 20  # classes that are listed, or that have a row
_CELLS = {  # formats of the columns that are no text
    **dict.fromkeys(("accuracy", "views", "calibration"), ".2%"),
    **{"loss": ".4f", "seconds": ",.0f"},
}
_NUMBER = re.compile(r"([-+]?[\d.,e-]+%?( .*)?)?$")
_COLOURS = {"completed": "green", "running": "cyan", "interrupted": "yellow", "killed": "yellow"}
_FIGURES = {  # title and format
    "accuracy": ("accuracy", ".2%"),
    "accuracy_tta": ("accuracy with views", ".2%"),
    "loss": ("loss (cross-entropy)", ".4f"),
    "expected_calibration_error": ("calibration error", ".2%"),
    "seconds_train": ("seconds of training", ",.1f"),
    "seconds": ("seconds together", ",.1f"),
}


def show_metrics(metrics: dict[str, Any]) -> None:
    """The tables of an evaluation, from metrics.json's content."""
    total = Table(
        title=Text(f"{metrics['recipe']} on {metrics['dataset']}: {metrics['split']} split, {metrics['n']:,} images")
    )
    total.add_column("")
    total.add_column("value", justify="right")
    total.add_column("95% interval", justify="right")
    for title, key in (("accuracy", ""), ("accuracy with test-time augmentation", "_tta")):
        low, high = metrics[f"interval_95{key}"]
        total.add_row(title, f"{metrics[f'accuracy{key}']:.2%}", f"{low:.2%} to {high:.2%}")
    total.add_row("loss (cross-entropy)", f"{metrics['loss']:.4f}", "")
    console.out.print(total)

    scores_of = sorted(metrics["per_class"].items(), key=lambda entry: entry[1]["f1"])[:_NAMED]
    all_fit = len(metrics["per_class"]) <= _NAMED
    which = "by class" if all_fit else f"the {_NAMED} classes of {len(metrics['per_class']):,} with the lowest F1"
    classes = Table(title=f"{which}, without test-time augmentation")
    classes.add_column("class")
    for column in ("precision", "recall", "F1", "images"):
        classes.add_column(column, justify="right")
    for name, scores in metrics["per_class"].items() if all_fit else scores_of:
        shares = (f"{scores[key]:.1%}" for key in ("precision", "recall", "f1"))
        classes.add_row(Text(name), *shares, f"{scores['support']:,}")
    console.out.print(classes)

    for pair in metrics["most_confused"][:3]:
        console.say(f"most confused: {pair['true']} taken for {pair['predicted']}, {pair['count']} times")


def show_corruptions(content: dict[str, Any]) -> None:
    """Accuracy by corruption and severity, from corruptions.json's content; the worst kind last."""
    title = f"accuracy by corruption and severity: {content['dataset']}, {content['n']:,} images of the test split"
    table = Table(title=title)
    table.add_column("corruption")
    for severity in range(1, 1 + max(map(len, content["corruptions"].values()))):
        table.add_column(str(severity), justify="right")
    table.add_column("mean", justify="right")
    table.add_column("calibration error", justify="right")
    means = {
        kind: [sum(row[key] for row in rows) / len(rows) for key in ("accuracy", "expected_calibration_error")]
        for kind, rows in content["corruptions"].items()
    }
    for kind in sorted(means, key=lambda kind: -means[kind][0]):
        cells = (f"{row['accuracy']:.1%}" for row in content["corruptions"][kind])
        table.add_row(kind, *cells, *(f"{mean:.1%}" for mean in means[kind]))
    console.out.print(table)
    mean, clean = content["mean"]["accuracy"], content["clean"]["accuracy"]
    console.say(f"mean over all {mean:.1%}, of the same images unharmed {clean:.1%}")


def show_answers(answers: Sequence[Any], predictor: Any) -> None:
    """The three most probable classes of each picture, from `predict.Answer`s, or why it was refused."""
    folder = os.path.commonpath([os.path.dirname(answer.source) or "." for answer in answers])
    table = Table(title=Text(f"{predictor.run.path.name} on {folder}"))
    table.add_column("picture", overflow="fold")
    for place in ("first", "second", "third")[: len(predictor.classes)]:
        table.add_column(place)
    for answer in answers[:_ROWS]:
        name = Text(os.path.relpath(answer.source, folder))
        top = [] if answer.refusal else answer.probabilities.argsort()[::-1][:3]
        cells = [_share(predictor.classes[n], answer.probabilities[n], bar=not place) for place, n in enumerate(top)]
        table.add_row(name, *(cells or [Text("refused", style="red")]))
    console.out.print(table)
    if len(answers) > _ROWS:
        console.say(f"and {len(answers) - _ROWS:,} more, all of which --output keeps")
    for answer in answers:
        if answer.refusal:
            console.say(f"refused {answer.source}: {answer.refusal}", style="red")
    if unsure := [answer.source for answer in answers if _is_unsure(answer, predictor)]:
        first = ", ".join(unsure[:3]) + (" and others" if len(unsure) > 3 else "")
        console.say(f"probably none of the classes (confidence below {predictor.threshold:.1%}): {first}")


def _share(name: str, share: float, bar: bool) -> Table:
    """A class with its probability in percent, and as a bar."""
    cell = Table.grid(padding=(0, 1))
    parts = [ProgressBar(total=1.0, completed=float(share), width=6)] if bar else []
    cell.add_column(overflow="fold")  # where it is narrow the name is folded, and the share stays whole
    for _ in [*parts, share]:
        cell.add_column(no_wrap=True)
    cell.add_row(Text(name), *parts, f"{share:.1%}")
    return cell


def _is_unsure(answer: Any, predictor: Any) -> bool:
    return answer.probabilities is not None and predictor.is_probably_none(answer.probabilities)


def show_seeds(group: Any) -> None:
    """What the runs of a group reach on average, from its summary.json."""
    summary, config = group.summary, group.config
    table = Table(title=f"{config.title} on {Path(config.dataset).name}, seeds {group.seeds[0]} to {group.seeds[-1]}")
    for column in ("", "mean", "standard deviation", "its 95% interval"):
        table.add_column(column, justify="right" if column else "left")
    for name, figure in summary["figures"].items():
        title, form = _FIGURES[name]
        mean, deviation, low, high = (
            format(value, form) for value in (figure["mean"], figure["standard_deviation"], *figure["interval_95"])
        )
        table.add_row(title, mean, deviation, f"{low} to {high}")
    console.out.print(table)
    console.say(f"directory of the {config.seeds} runs: {short(group.path)}")
    console.banner(summary["note"])


def show_comparison(comparison: dict[str, Any]) -> None:
    """The tables of `compare.compare`, and last what they come to."""
    runs, pairs, settings = comparison["runs"], comparison["pairs"], comparison["settings"]
    letters = [run["letter"] for run in runs]
    for run in runs:
        console.say(f"{run['letter']}  {run['path']}: {run['subject']}")
    cells = {"accuracy": [_interval(run, "accuracy", "interval_95") for run in runs]}
    cells["with views"] = [_interval(run, "accuracy_tta", "interval_95_tta") for run in runs]
    for title, key in (("seconds", "seconds"), ("loss", "loss"), ("calibration", "expected_calibration_error")):
        cells[title] = ["" if run[key] is None else format(run[key], _CELLS[title]) for run in runs]
    console.out.print(_fitting("on the test split, with 95% intervals", {"": letters} | cells))
    _show_classes(comparison["classes_shown"], letters, of=len(comparison["classes"]))
    if settings:
        columns = {run["letter"]: [str(setting["values"][n]) for setting in settings] for n, run in enumerate(runs)}
        names = {"setting": [setting["name"] for setting in settings]}
        console.out.print(_fitting("settings that differ", names | columns))
    if pairs:
        columns = {"": [f"{pair['first']} and {pair['second']}" for pair in pairs]}
        columns["the first"] = [f"{pair['only_first']:,}" for pair in pairs]
        columns["the second"] = [f"{pair['only_second']:,}" for pair in pairs]
        columns["of"] = [f"{pair['n']:,}" for pair in pairs]
        console.out.print(_fitting("images that one alone has right", columns))
    for note in comparison["notes"]:
        console.say(note, style="yellow")
    for pair in pairs:
        console.say(pair["verdict"], style="bold" if pair["better"] else None)
    if pairs:
        console.say(comparison["method"])


def _interval(run: dict[str, Any], key: str, interval: str) -> str:
    low, high = run[interval]
    return f"{run[key]:.2%} ({100 * low:.2f} to {100 * high:.2f})"


def _show_classes(classes: Sequence[dict[str, Any]], letters: Sequence[str], of: int) -> None:
    """The recall of each class, and how far the others are from the first."""
    first, *others = letters
    columns = {"class": [row["class"] for row in classes]}
    columns |= {letter: [f"{row['recall'][n]:.1%}" for row in classes] for n, letter in enumerate(letters)}
    columns |= {
        f"{letter} - {first}": [f"{100 * row['difference'][n]:+.1f}" for row in classes]
        for n, letter in enumerate(others)
    }
    which = f", the {len(classes)} of {of} that differ most" if len(classes) < of else ""
    if classes:
        console.out.print(_fitting(f"recall by class, and points apart{which}", columns))


def show_runs(rows: Sequence[dict[str, Any]], groups: Sequence[dict[str, Any]], columns: Sequence[str]) -> None:
    """All runs of a folder, from `headlines.table`, and its groups of seeds, from `headlines.groups`.

    columns: in the order of their weight, where not all of them fit.
    """
    cells = {column: [_cell(row, column) for row in rows] for column in columns}
    console.out.print(_fitting(f"{len(rows)} runs", cells))
    if groups:
        accuracies = {
            title: ["" if row[key] is None else "{:.2%} ± {:.2%}".format(*row[key]) for row in groups]
            for title, key in (("accuracy", "accuracy"), ("with views", "accuracy_tta"))
        }
        names = {"group": [row["group"] for row in groups], "status": [_state(row["status"]) for row in groups]}
        console.out.print(_fitting("several seeds, ± standard deviation", names | accuracies))


def _cell(row: dict[str, Any], column: str) -> str | Text:
    value = row[column]
    if column == "status":
        return _state("damaged:\n" + "\n".join(row["damaged"]) if row["damaged"] else value)
    return "" if value is None else format(value, _CELLS.get(column, ""))


def _state(status: str) -> Text:
    return Text(status, style=_COLOURS.get(status, "red"))


def _fitting(title: str, columns: dict[str, Sequence[str | Text]]) -> Table:
    """A table of the first columns that fit into the width, and which do not; numbers stand on the right."""
    lines = {name: "\n".join([name, *map(str, cells)]).split("\n") for name, cells in columns.items()}
    widths = accumulate(max(map(len, texts)) + 3 for texts in lines.values())  # with what is between columns
    count = max(2, sum(width - 3 <= console.out.width for width in widths))
    left_out = list(columns)[count:]
    table = Table(title=title, show_edge=False, pad_edge=False)
    table.caption = f"too narrow for: {', '.join(left_out)}" if left_out else None
    for name in list(columns)[:count]:
        is_number = all(_NUMBER.match(text) for text in lines[name][1:])
        table.add_column(name, justify="right" if is_number else "left", overflow="fold")
    for row in zip(*list(columns.values())[:count]):
        table.add_row(*(cell if isinstance(cell, Text) else Text(cell) for cell in row))
    return table


def show_speeds(dataset: str, speeds: dict[str, dict[str, Any]]) -> None:
    """The training speeds of recipes, from `bench.compare`."""
    table = Table(title=Text(f"images of {dataset} a second in training, on the CPU"))
    table.add_column("recipe")
    table.add_column("this suite", justify="right")
    workers = list(next(iter(speeds.values()))["loader_images_per_second"])
    for count in workers:
        table.add_column(f"DataLoader, {count} worker{'s' * (count != 1)}", justify="right")
    table.add_column("times the fastest", justify="right")
    for recipe, speed in speeds.items():
        loader = (f"{speed['loader_images_per_second'][count]:,.0f}" for count in workers)
        table.add_row(recipe, f"{speed['suite_images_per_second']:,.0f}", *loader, f"{speed['ratio']:.2f}")
    console.out.print(table)


def show_profile(profile: dict[str, Any]) -> None:
    """Where training steps spend their time, from `profiling.profile`: the operators and convolutions that matter."""
    rate = profile["matrix_flop_per_second"]
    console.say(
        f"{profile['recipe']}, {profile['batch_size']} images a step, {profile['precision']}, {profile['hardware']}, "
        f"{profile['threads']} threads: matrix product {rate / 1e12:.2f} TFLOP/s"
    )
    for side, step in profile["sides"].items():
        reached = step["flop_per_second"]
        title = (
            f"{side}x{side} pixels: {step['seconds']:.3g} s a step, {reached / 1e12:.2f} TFLOP/s, {reached / rate:.0%}"
        )
        table = Table(title=title, caption=_profile_caption(step))
        table.add_column("operator, or convolution", overflow="fold")  # cut short, the ways there and back look alike
        for column in ("calls", "ms", "of the step", "TFLOP/s", "of the rate", "GB/s"):
            table.add_column(column, justify="right")
        for part in ("operators", "convolutions"):
            shown = [row for row in step[part] if row["seconds"] > _SHOWN_SHARE * step["seconds"]]
            for row in shown:
                table.add_row(*_profile_cells(row, step["seconds"], rate), end_section=row is shown[-1])
        console.out.print(table)


def _profile_cells(row: dict[str, Any], seconds: float, rate: float) -> list[str]:
    flop = row["flop_per_second"]
    rates = (f"{flop / 1e12:.2f}", f"{flop / rate:.0%}") if flop else ("", "")
    share = f"{row['seconds'] / seconds:.1%}"
    return [
        row["name"],
        f"{row['calls']:.0f}",
        f"{row['seconds'] * 1e3:.1f}",
        share,
        *rates,
        f"{row['bytes_per_second'] / 1e9:.1f}",
    ]


def _profile_caption(step: dict[str, Any]) -> str:
    share = step["augmentation_seconds"] / step["seconds"]
    return f"augmentation {share:.1%} of the step; {step['page_faults']:.0f} page faults a step"


def show_findings(findings: Sequence[Any]) -> None:
    """A row for each `doctor.Finding`, with its cure under it."""
    styles = {"ok": "green", "note": "cyan", "warning": "yellow", "failure": "bold red"}
    if not console.is_live():
        for finding in findings:
            console.say(f"{finding.level:<8} {finding.subject:<9} {finding.says}")
            if finding.cure:
                console.say(f"{'cure:':>18} {finding.cure}")
        return
    table = Table.grid(padding=(0, 2))
    for finding in findings:
        says = Text(finding.says)
        if finding.cure:
            says.append(f"\ncure: {finding.cure}", style="bold")
        table.add_row(Text(finding.level, style=styles[finding.level]), finding.subject, says)
    console.out.print(table)


def show_dataset(dataset: Any) -> None:
    """What a dataset holds; reads, and so checks, all of it."""
    table = Table(title=Text(dataset.name))
    for column in ("split", "images", "size", "classes", "SHA-256"):
        table.add_column(column, justify="right" if column == "images" else "left")
    for name, split in (("train", dataset.train), ("test", dataset.test)):
        _, _, height, width = split.images.shape
        table.add_row(name, f"{len(split):,}", f"{width}x{height}", str(len(dataset.classes)), split.sha256()[:16])
    console.out.print(table)
    console.say(f"from {dataset.place}; classes: {some(dataset.classes, _NAMED)}")


def show_export(files: Sequence[Path]) -> None:
    """The files that `export` has written, and how they are used."""
    for file in files:
        console.say(f"{short(file)}, {file.stat().st_size / 1e6:.1f} MB")
    console.say(
        f"torch.export.load('{short(files[0])}').module() takes uint8 RGB pictures and gives calibrated probabilities"
    )
    if len(files) == 1:
        console.say("there is no .onnx file, as that takes two packages more: `pip install onnx onnxscript`")


def show_run(run: Any) -> None:
    """Where a run lies, how long its stages took, and what must not be overlooked about it."""
    seconds, note = run.record["seconds"], run.record.get("note")
    console.say(
        "  ".join(f"{stage} {taken:.1f} s" for stage, taken in seconds.items())
        + f"  stages together {sum(seconds.values()):.1f} s"
    )
    console.say(f"run directory: {short(run.path)}")
    if (run.path / "report.html").exists():
        console.say(f"all of it on one page: {short(run.path / 'report.html')}")
    console.banner(note)
