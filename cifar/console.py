"""What a person sees in the terminal: banners, tables and progress, and their plain form without a terminal."""

import contextlib
import os
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.panel import Panel
from rich.progress import (
    BarColumn,
    DownloadColumn,
    Progress,
    SpinnerColumn,
    TextColumn,
    TimeRemainingColumn,
    TransferSpeedColumn,
)
from rich.progress_bar import ProgressBar
from rich.table import Table
from rich.text import Text

from cifar.config import UserError, short, some

_REFRESH_SECONDS = 0.25
_ROWS = 100  # of a table of pictures
_NAMED = 20  # classes that are listed, or that have a row

out = Console(highlight=False)
err = Console(stderr=True, highlight=False)


def is_live() -> bool:
    """Whether lines can be redrawn: not in a pipe, a file or a dumb terminal."""
    return out.is_terminal and not out.is_dumb_terminal


def say(message: str, style: str | None = None) -> None:
    """One line, never wrapped or interpreted as markup."""
    out.print(Text(message, style=style or ""), soft_wrap=True)


def exit_code(action: Callable[[], None]) -> int:
    """Run a command and turn what a user can mend into one sentence: 0, 1, 2 for a usage error, 130 for Ctrl-C."""
    try:
        action()
    except UserError as error:
        fail(str(error))
        return error.exit_code
    except KeyboardInterrupt:
        fail("interrupted")
        return 130
    return 0


def fail(message: str) -> None:
    """The one sentence of an error, on standard error."""
    err.print(Text.assemble(("error: ", "bold red"), message), soft_wrap=True)


def banner(message: str) -> None:
    """A sentence that must not be overlooked."""
    out.print(Panel(Text(message), border_style="yellow", title="note"))


@contextlib.contextmanager
def download_bar(name: str, size: int | None) -> Iterator[Callable[[int], None]]:
    """A bar of bytes, speed and time left; yields a function that takes the bytes that have come.

    size: in bytes, None if the server does not say.
    """
    if not is_live():
        say(f"downloading {name}" + (f", {size / 1e6:.0f} MB" if size else ""))
        yield lambda count: None
        return
    columns = (
        TextColumn("{task.description}"),
        BarColumn(),
        DownloadColumn(),
        TransferSpeedColumn(),
        TimeRemainingColumn(),
    )
    with Progress(*columns, console=out) as progress:
        task = progress.add_task(name, total=size)
        yield lambda count: progress.advance(task, count)


@contextlib.contextmanager
def counting_bar(name: str, total: int) -> Iterator[Callable[[int], None]]:
    """A bar that counts things; yields a function that takes how many more are done. Nothing without a terminal."""
    with Progress(*Progress.get_default_columns(), console=out, transient=True, disable=not is_live()) as progress:
        task = progress.add_task(name, total=total)
        yield lambda count: progress.advance(task, count)


class TrainingDisplay:
    """The live line of a training, and a lasting line for each epoch."""

    def __init__(self, epochs: int, steps: int, costs: Sequence[float]):
        """steps: in each epoch. costs: of one step of each epoch, in any unit that is proportional to time."""
        self.epochs, self.steps, self.costs = epochs, steps, costs
        self.work, self.done = steps * sum(costs), 0.0
        self.started = time.monotonic()
        self.drawn = 0.0
        self.progress = self._progress() if is_live() else None
        self.task = self.progress.add_task("training", total=self.work, status="") if self.progress else None

    @staticmethod
    def _progress() -> Progress:
        return Progress(
            SpinnerColumn(),
            TextColumn("{task.description}"),
            BarColumn(bar_width=None),
            TextColumn("{task.fields[status]}"),
            TimeRemainingColumn(),
            TextColumn("left"),
            console=out,
            transient=True,
            expand=True,
        )

    def __enter__(self) -> "TrainingDisplay":
        if self.progress:
            self.progress.start()
        return self

    def __exit__(self, *_) -> None:
        if self.progress:
            self.progress.stop()

    def is_due(self) -> bool:
        """Whether the live line is old enough to be drawn anew, so that the caller need not compute it each step."""
        return time.monotonic() - self.drawn >= _REFRESH_SECONDS

    def step(self, epoch: int, step: int, loss: float, accuracy: float, speed: float) -> None:
        """Draw the live line. epoch and step count from 1; speed is in images a second."""
        self.drawn = time.monotonic()
        self.done = self.steps * sum(self.costs[: epoch - 1]) + step * self.costs[epoch - 1]
        if self.progress:
            status = f"batch {step}/{self.steps} loss {loss:.3f} acc {accuracy:.1%} {speed:,.0f} images/s"
            self.progress.update(
                self.task, completed=self.done, description=f"epoch {epoch}/{self.epochs}", status=status
            )

    def end_epoch(self, record: dict[str, Any], best: bool) -> None:
        """Print the line that stays, with a star at the best epoch so far; record: as history.jsonl has it."""
        loss, accuracy = f"loss {record['train_loss']:.3f}", f"accuracy {record['train_accuracy']:.1%}"
        if record["val_accuracy"] is not None:
            loss += f" val {record['val_loss']:.3f}"
            accuracy += f" val {record['val_accuracy']:.2%}" + ("*" if best else " ")
        where = f"epoch {record['epoch']:>{len(str(self.epochs))}}/{self.epochs}"
        say(f"{where}  {loss}  {accuracy} {record['images_per_second']:,.0f}/s  {self._left()} left")

    def _left(self) -> str:
        seconds = (time.monotonic() - self.started) * (self.work - self.done) / max(self.done, 1e-9)
        return f"{int(seconds // 60)}:{int(seconds % 60):02d}"


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
    out.print(total)

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
    out.print(classes)

    for pair in metrics["most_confused"][:3]:
        say(f"most confused: {pair['true']} taken for {pair['predicted']}, {pair['count']} times")


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
    out.print(table)
    if len(answers) > _ROWS:
        say(f"and {len(answers) - _ROWS:,} more, all of which --output keeps")
    for answer in answers:
        if answer.refusal:
            say(f"refused {answer.source}: {answer.refusal}", style="red")
    if unsure := [answer.source for answer in answers if _is_unsure(answer, predictor)]:
        first = ", ".join(unsure[:3]) + (" and others" if len(unsure) > 3 else "")
        say(f"probably none of the classes (confidence below {predictor.threshold:.1%}): {first}")


def _share(name: str, share: float, bar: bool) -> Table:
    """A class with its probability in percent, and as a bar."""
    cell = Table.grid(padding=(0, 1))
    cell.add_column(no_wrap=True)
    parts = [ProgressBar(total=1.0, completed=float(share), width=6)] if bar else []
    cell.add_row(Text(name), *parts, f"{share:.1%}")
    return cell


def _is_unsure(answer: Any, predictor: Any) -> bool:
    return answer.probabilities is not None and predictor.is_probably_none(answer.probabilities)


def show_speeds(dataset: str, speeds: dict[str, dict[str, Any]]) -> None:
    """The training speeds of recipes, from `bench.compare`."""
    table = Table(title=Text(f"images of {dataset} a second in training, on the CPU"))
    table.add_column("recipe")
    table.add_column("this suite", justify="right")
    workers = list(next(iter(speeds.values()))["loader_images_per_second"])
    for count in workers:
        table.add_column(f"DataLoader, {count} workers", justify="right")
    table.add_column("times the fastest", justify="right")
    for recipe, speed in speeds.items():
        loader = (f"{speed['loader_images_per_second'][count]:,.0f}" for count in workers)
        table.add_row(recipe, f"{speed['suite_images_per_second']:,.0f}", *loader, f"{speed['ratio']:.2f}")
    out.print(table)


def show_dataset(dataset: Any) -> None:
    """What a dataset holds; reads, and so checks, all of it."""
    table = Table(title=Text(dataset.name))
    for column in ("split", "images", "size", "classes", "SHA-256"):
        table.add_column(column, justify="right" if column == "images" else "left")
    for name, split in (("train", dataset.train), ("test", dataset.test)):
        _, _, height, width = split.images.shape
        table.add_row(name, f"{len(split):,}", f"{width}x{height}", str(len(dataset.classes)), split.sha256()[:16])
    out.print(table)
    say(f"from {dataset.place}; classes: {some(dataset.classes, _NAMED)}")


def show_export(files: Sequence[Path]) -> None:
    """The files that `export` has written, and how they are used."""
    for file in files:
        say(f"{short(file)}, {file.stat().st_size / 1e6:.1f} MB")
    say(f"torch.export.load('{short(files[0])}').module() takes uint8 RGB pictures and gives calibrated probabilities")
    if len(files) == 1:
        say("there is no .onnx file, as that takes two packages more: `pip install onnx onnxscript`")


def show_run(run: Any) -> None:
    """Where a run lies, how long its stages took, and what must not be overlooked about it."""
    seconds, note = run.record["seconds"], run.record.get("note")
    say(
        "  ".join(f"{stage} {taken:.1f} s" for stage, taken in seconds.items())
        + f"  stages together {sum(seconds.values()):.1f} s"
    )
    say(f"run directory: {short(run.path)}")
    if note:
        banner(note)
