"""Runs beside each other: which is better and how sure that is, and in what they differ.

What is compared class by class and picture by picture is without test-time augmentation, of which runs keep no
predictions.
"""

import hashlib
import string
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from itertools import accumulate, combinations
from pathlib import Path
from typing import Any

import numpy as np

from cifar import headlines, predictions, significance
from cifar.config import PLACES
from cifar.errors import UserError, short
from cifar.runs import Run

LETTERS = string.ascii_uppercase
_CLASSES = 20  # that a table or a figure has room for
_COMMIT = 12  # digits
_LONGEST = 200  # characters of a directory's name; file systems take 255


@dataclass(frozen=True)
class _Answers:
    """A run's predictions.csv: the true class of each test image (N,), and whether it was predicted (N,)."""

    true: np.ndarray
    right: np.ndarray
    test_sha256: str | None

    def fits(self, other: "_Answers") -> bool:
        """Whether both are of one test set; where a hash was not saved, by the labels alone."""
        return len({self.test_sha256, other.test_sha256} - {None}) < 2 and np.array_equal(self.true, other.true)

    def minus(self, other: "_Answers") -> np.ndarray:
        """1.0 for each image on which this run alone was right, -1.0 where the other one was, else 0.0: (N,)."""
        return self.right.astype(float) - other.right


def compare(found: Sequence[Run]) -> dict[str, Any]:
    """The comparison of two runs or more, as comparison.json holds it; the runs are A, B and so on.

    Raises UserError if a run is given twice, has not been evaluated or its figures cannot be read; what else is
    missing or damaged is left out, and said in `notes`.
    """
    if len(found) < 2:
        raise UserError(
            "a comparison takes two runs or more: `invoke compare` without a name lists those that are there"
        )
    if len(found) > len(LETTERS):
        raise UserError(f"at most {len(LETTERS)} runs can be compared at once, not {len(found)}")
    if twice := next((run.path.name for run in found if found.count(run) > 1), None):
        raise UserError(f"{twice} is given twice")
    notes: list[str] = []
    rows = [_describe(letter, run, notes) for letter, run in zip(LETTERS, found)]
    answers = _answers(found, rows, notes)
    pairs = _pairs(answers, notes)
    classes = _by_class(rows, answers)
    return {
        "runs": rows,
        "pairs": pairs,
        "method": _method(len(pairs)),
        "notes": notes,
        "classes": classes,
        "classes_shown": _largest(classes),
        "settings": _differing([row["settings"] for row in rows]),
    }


def _describe(letter: str, run: Run, notes: list[str]) -> dict[str, Any]:
    """The figures of one run, its scores by class and its curves."""
    config, metrics = run.config, run.metrics
    try:
        curves = _curves(run)
    except UserError as error:
        notes.append(f"{letter} has no curves: {error}")
        curves = {}
    return {
        "letter": letter,
        "run": run.path.name,
        "path": short(run.path),
        "subject": f"{config.title} on {Path(config.dataset).name}, seed {config.seed}",
        **headlines.headline(run),
        **{key: metrics[key] for key in ("n", "interval_95", "interval_95_tta")},
        "test_sha256": metrics.get("test_sha256"),
        "settings": _made_by(run),
        "classes": {label: scores["recall"] for label, scores in metrics["per_class"].items()},
        "curves": curves,
    }


def _curves(run: Run) -> dict[str, list[float | None]]:
    """What the history has by epoch, and the seconds since the start; nothing where there is none."""
    if not (history := run.history()):
        return {}
    keys = ("epoch", "train_loss", "train_accuracy", "val_loss", "val_accuracy")
    curves = {key: [line[key] for line in history] for key in keys}
    return {**curves, "seconds": list(accumulate(line["seconds"] for line in history))}


def _answers(found: Sequence[Run], rows: list[dict[str, Any]], notes: list[str]) -> dict[str, _Answers]:
    """Letter -> answers, of the runs whose predictions can be read."""
    answers = {}
    for run, row in zip(found, rows):
        try:
            answers[row["letter"]] = _read_answers(run, row)
        except UserError as error:
            notes.append(f"{row['letter']} is not paired with the others: {error}")
    return answers


def _read_answers(run: Run, row: dict[str, Any]) -> _Answers:
    true, predicted = predictions.read_names(run)
    right = true == predicted
    if not len(right) or abs(right.sum() - row["accuracy"] * row["n"]) > 0.5:
        raise UserError(f"{short(run.path / 'predictions.csv')} is not what its metrics.json was computed from")
    return _Answers(true, right, row["test_sha256"])


def _pairs(answers: dict[str, _Answers], notes: list[str]) -> list[dict[str, Any]]:
    """McNemar's test on each two runs of one test set."""
    both = {two: [answers[letter] for letter in two] for two in combinations(answers, 2)}
    if apart := [" and ".join(two) for two, (first, second) in both.items() if not first.fits(second)]:
        notes.append(f"not paired, as they were measured on different test sets: {', '.join(apart)}")
    pairs = [
        {"first": two[0], "second": two[1], **_difference(second.minus(first))}
        for two, (first, second) in both.items()
        if first.fits(second)
    ]
    for pair, p in zip(pairs, significance.holm([pair["p"] for pair in pairs])):
        pair["p_corrected"] = p
        pair["better"] = pair["second" if pair["difference"] > 0 else "first"] if p < significance.LEVEL else None
        pair["verdict"] = _verdict(**pair)
    return pairs


def _difference(second_minus_first: np.ndarray) -> dict[str, Any]:
    """By how much the second is more often right than the first, as a share of the images."""
    only_first, only_second = int((second_minus_first < 0).sum()), int((second_minus_first > 0).sum())
    return {
        "n": len(second_minus_first),
        "only_first": only_first,
        "only_second": only_second,
        "difference": (only_second - only_first) / len(second_minus_first),
        "interval_95": significance.spread(second_minus_first)["interval_95"],
        "p": significance.mcnemar(only_first, only_second),
    }


def _verdict(
    *, first: str, second: str, better: str | None, difference: float, interval_95: list[float], p_corrected: float, **_
) -> str:
    """The pair's result as a sentence, from the point of view of the better one."""
    sign = -100 if better == first else 100
    low, high = sorted(sign * end for end in interval_95)
    points = f"{sign * difference:+.2f} points, 95% interval {low:+.2f} to {high:+.2f}, {p_text(p_corrected)}"
    if better:
        return f"{better} is better than {second if better == first else first}: {points}"
    return f"no significant difference between {first} and {second}: {second} - {first} is {points}"


def _method(comparisons: int) -> str:
    """What the p values are of."""
    correction = f", p corrected by Holm for {comparisons} comparisons" if comparisons > 1 else ""
    return (
        f"McNemar's exact test on the predictions without views{correction}. It tells apart these trained networks; "
        "how much another seed changes, `python main.py --seeds 5` shows."
    )


def p_text(p: float) -> str:
    """A p value as people write it."""
    return f"p = {p:.3f}" if p >= 0.001 else f"p = {p:.1e}" if p >= 1e-300 else "p < 1e-300"


def _by_class(rows: list[dict[str, Any]], answers: dict[str, _Answers]) -> list[dict[str, Any]]:
    """Each class with the recall of each run, and how much the others differ from the first; none of other classes.

    interval_95: of the difference, None where the runs are not paired.
    """
    first, *others = rows
    if any(row["classes"].keys() != first["classes"].keys() for row in others):
        return []
    start = answers.get(first["letter"])
    ends = [answers.get(row["letter"]) for row in others]
    paired = [end.minus(start) if start and end and start.fits(end) else None for end in ends]
    table = []
    for label, recall in first["classes"].items():
        recalls = [row["classes"][label] for row in rows]
        table.append(
            {
                "class": label,
                "recall": recalls,
                "difference": [other - recall for other in recalls[1:]],
                "interval_95": [None if pair is None else _interval(pair[start.true == label]) for pair in paired],
            }
        )
    return table


def _interval(differences: np.ndarray) -> list[float] | None:
    return significance.spread(differences)["interval_95"] if len(differences) > 1 else None


def _largest(classes: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """All classes, or of many those in which the runs differ most from the first; in the order of the classes."""
    largest = sorted(classes, key=lambda row: -max(map(abs, row["difference"])))[:_CLASSES]
    return [row for row in classes if row in largest]


def _made_by(run: Run) -> dict[str, Any]:
    """The settings, and what else made the run."""
    record = run.record
    settings = {name: value for name, value in asdict(run.config).items() if name not in PLACES}
    return {
        **settings,
        "computed in": record.get("precision"),
        "hardware": record.get("hardware"),
        "threads": record.get("threads"),
        "parameters": record.get("model", {}).get("parameters"),
        "PyTorch": record.get("versions", {}).get("torch"),
        "commit": (record.get("commit") or "unknown")[:_COMMIT] + (" and changes" if record.get("dirty") else ""),
    }


def _differing(settings: Sequence[dict[str, Any]]) -> list[dict[str, Any]]:
    """The settings that are not the same in all runs, each with its values."""
    rows = [{"name": name, "values": [one[name] for one in settings]} for name in settings[0]]
    return [row for row in rows if any(value != row["values"][0] for value in row["values"])]


def folder(output_dir: str, comparison: dict[str, Any]) -> Path:
    """Where a comparison is kept: compare/ in the output folder, by the names of its runs."""
    names = [row["run"] for row in comparison["runs"]]
    name = "_vs_".join(names)
    if len(name) > _LONGEST:
        name = f"{names[0][:_LONGEST]}_vs_{len(names) - 1}_more_{hashlib.sha256(name.encode()).hexdigest()[:8]}"
    return Path(output_dir) / "compare" / name
