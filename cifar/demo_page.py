"""The demo's page: pictures in, answers out, and what the run is worth."""

import base64
import functools
import io
from collections.abc import Callable
from html import escape
from pathlib import Path
from typing import Any

import gradio as gr
import numpy as np
from PIL import Image

from cifar.demo_runs import THUMBNAILS, DemoRuns, Opinion
from cifar.errors import UserError
from cifar.picture import read_rgb
from cifar.runs import Run
from cifar.saliency import overlay

_TOP = 3  # classes shown
_NAMED = 20  # classes that the heading lists
_FIGURES = {  # in the order of the page, with what a screen reader says
    "training_history": "Loss and accuracy by epoch",
    "confusion_matrix": "Confusion matrix",
    "calibration": "Confidence against accuracy",
    "misclassified": "The most confident mistakes",
}
_SQUARE = ("confusion_matrix",)
_FILE_AGE = (60, 900)  # seconds: how often temporary files are looked through, and how old they get
# In the API's documentation, where Gradio's own example is an address, which this server does not fetch.
_EXAMPLE_FILE = {"path": "picture.png", "url": "picture.png", "meta": {"_type": "gradio.FileData"}}

Payload = dict[str, Any] | None  # a picture as Gradio hands it over: a dict with the path of its file

# The package's semi-bold Source Sans holds almost no letters; grey text is a step darker than Gradio's, to be readable.
THEME = gr.themes.Default(
    primary_hue="blue",
    secondary_hue="blue",
    neutral_hue="slate",
    font=(gr.themes.LocalFont("Source Sans Pro", weights=(400, 700)), "sans-serif"),
).set(body_text_color_subdued="*neutral_500", body_text_color_subdued_dark="*neutral_400")

CSS = """
.gradio-container { max-width: 66rem !important; width: 100%; margin-inline: auto; }
.html-container { padding: 0 !important; }
footer img, footer .divider { display: none !important; }
#head { align-items: end; }
#head h1 { font-size: 1.6rem; margin: 0; }
#head p, .views figcaption, .tile small { color: var(--body-text-color-subdued); }
#run input { text-overflow: ellipsis; }
#picture img { width: 100%; height: 100%; object-fit: contain; }
#examples img { image-rendering: pixelated; }
#note:not(:has(.note)) { display: none; }
.note { border-left: 4px solid; border-radius: var(--radius-sm); padding: .6rem .8rem; margin: 0; }
.note.unsure { border-color: #d55e00; background: color-mix(in srgb, #d55e00 12%, transparent); }
.note.refused { border-color: #b00020; background: color-mix(in srgb, #b00020 12%, transparent); }
.views { display: grid; grid-template-columns: 1fr 1fr; gap: 1rem; }
.views figure { margin: 0; }
.views figcaption { margin-top: .3rem; }
.views img { width: 100%; image-rendering: pixelated; border-radius: var(--radius-md); }
.tiles { display: grid; grid-template-columns: repeat(auto-fit, minmax(9.5rem, 1fr)); gap: 1rem; }
.tile { display: flex; flex-direction: column; border-radius: var(--radius-md); padding: .8rem 1rem; }
.tile { background: var(--background-fill-secondary); }
.tile strong { margin-top: auto; font-size: 1.6rem; line-height: 1.4; }
.sheet { overflow-x: auto; background: white; border-radius: var(--radius-md); padding: .5rem; margin-top: 1rem; }
.sheet img { width: 100%; min-width: 42rem; }
.sheet.square img { display: block; max-width: 42rem; min-width: 27rem; margin-inline: auto; }
@media (max-width: 40rem) {
  #picture { height: 15rem !important; }
  #examples .gallery { flex-wrap: nowrap; overflow-x: auto; }
  #examples .gallery button { flex: none; }
}
"""


def _gallery() -> gr.Dataset:
    """Test images to pick from, hidden until they have been read."""
    return gr.Dataset(
        components=[gr.Image(type="filepath", render=False)],
        type="index",
        label="Or one of the test images",
        samples=[],
        samples_per_page=100,
        elem_id="examples",
        visible=False,
    )


def build(runs: DemoRuns, uploads: Path) -> gr.Blocks:
    """The page over the runs; pictures are taken from the folder `uploads` alone."""
    answer, predict = _handlers(runs, uploads)
    with gr.Blocks(title="What is in the picture?", analytics_enabled=False, delete_cache=_FILE_AGE) as page:
        with gr.Row(elem_id="head"):
            with gr.Column(min_width=280):
                heading = gr.HTML(_heading(runs, runs.default))
            with gr.Column(min_width=280):
                chosen = gr.Dropdown(_menu(runs), value=runs.default, label="Network", elem_id="run")
        with gr.Tab("Try it"), gr.Row():
            with gr.Column(min_width=300):
                picture = gr.Image(type="filepath", label="Picture", height=320, buttons=[], elem_id="picture")
                picture.example_payload = lambda: _EXAMPLE_FILE
                examples = _gallery()
            with gr.Column(min_width=300):
                note = gr.HTML(elem_id="note")
                label = gr.Label(label="Answer", num_top_classes=_TOP)
                views = gr.HTML()
        with gr.Tab("The run") as tab:
            report = gr.HTML()

        own = {"api_visibility": "private", "show_progress": "hidden"}
        # Without preprocessing the file arrives as it was sent: Gradio would turn, convert and save it anew.
        asking = {"preprocess": False, "concurrency_id": "asking", "concurrency_limit": 2}
        gr.on(
            [picture.change, chosen.change],
            answer,
            [picture, chosen],
            [note, label, views],
            trigger_mode="always_last",
            **asking,
            **own,
        )
        gr.on([], predict, [picture, chosen], gr.JSON(label="answer", visible=False), api_name="predict", **asking)
        show_example = _telling(lambda index, name: str(runs.examples(name)[index]))
        examples.click(show_example, [examples, chosen], picture, preprocess=False, **own)
        chosen.change(_telling(lambda name: _heading(runs, name)), chosen, heading, **own)
        # Examples come after the page, so that reading the dataset does not hold up the first answer.
        show_examples = _telling(lambda name: gr.Dataset(**_samples(runs, name)))
        gr.on([page.load, chosen.change], show_examples, chosen, examples, **own)
        gr.on([tab.select, chosen.change], _telling(lambda name: _report(runs.run(name))), chosen, report, **own)
        page.load(lambda: gr.Dropdown(_menu(runs)), None, chosen, **own)
    return page


def _handlers(runs: DemoRuns, uploads: Path) -> tuple[Callable, Callable]:
    """What answers the page, and what answers a program."""

    def answer(picture: Payload, name: str) -> tuple[str, dict[str, float] | None, str]:
        """The note, the top classes and the two views."""
        if picture is None:
            return "", None, ""
        try:
            opinion = runs.ask(name, _file(picture, uploads), explain=True)
        except UserError as error:
            return _note("refused", _sentence(error)), None, ""
        return _doubt(opinion), opinion.confidences, _views(opinion)

    def predict(picture: Payload, run: str | None = None) -> dict[str, Any]:
        """Classify a picture file of at most 10 MB and 25 million pixels, by the run of that name.

        Returns {"label", "confidences": [{"label", "confidence"}, ...], "probably_none", "threshold", "run"}, the
        confidences calibrated and largest first; a picture under the threshold is probably none of the classes.
        """  # Gradio shows this in the API's documentation
        name = run or runs.default
        opinion = runs.ask(name, _file(picture, uploads), explain=False)
        return {
            "label": opinion.label,
            "confidences": [{"label": label, "confidence": share} for label, share in opinion.confidences.items()],
            "probably_none": opinion.is_probably_none,
            "threshold": opinion.threshold,
            "run": name,
        }

    return answer, _telling(predict)


def _telling(handler: Callable) -> Callable:
    """The handler with each UserError, as of a run that has been damaged since, as a message on the page."""

    @functools.wraps(handler)
    def tell(*arguments: Any) -> Any:
        try:
            return handler(*arguments)
        except UserError as error:
            raise gr.Error(_sentence(error), print_exception=False) from None

    return tell


def _file(picture: Payload, uploads: Path) -> Path:
    """The file that a client has sent. Raises UserError for any other that it names."""
    path = Path((picture or {}).get("path") or "/").resolve()
    if not path.is_relative_to(uploads.resolve()):
        raise UserError("send the picture as a file")
    return path


def _sentence(error: UserError) -> str:
    text = str(error)
    return f"{text[0].upper()}{text[1:]}."


def _menu(runs: DemoRuns) -> list[tuple[str, str]]:
    return [(_title(run), name) for name, run in runs.find().items()]


def _title(run: Run) -> str:
    metrics = run.metrics
    started = run.record["start"][:16].replace("T", " ")
    return f"{metrics['recipe']} on {metrics['dataset']}, {metrics['accuracy']:.1%}, {started}"


def _heading(runs: DemoRuns, name: str) -> str:
    classes = runs.run(name).dataset["classes"]
    known = f": {', '.join(classes)}" if len(classes) <= _NAMED else ""
    return f"<h1>What is in the picture?</h1><p>The network knows {len(classes)} classes{escape(known)}.</p>"


def _samples(runs: DemoRuns, name: str) -> dict[str, Any]:
    # Not the examples themselves: Gradio deletes its copy of a picture that has been shown for a while.
    thumbnails = [path.parent / THUMBNAILS / path.name for path in runs.examples(name)]
    return {"samples": [[str(path)] for path in thumbnails], "visible": bool(thumbnails)}


def _note(kind: str, text: str) -> str:
    return f'<p class="note {kind}" role="status">{escape(text)}</p>'


def _doubt(opinion: Opinion) -> str:
    if not opinion.is_probably_none:
        return ""
    confidence = opinion.confidences[opinion.label]
    return _note(
        "unsure",
        f"Probably none of the classes: the confidence in {opinion.label}, {confidence:.1%}, "
        f"is under the threshold of {opinion.threshold:.1%}.",
    )


def _views(opinion: Opinion) -> str:
    size = opinion.image.shape[-1]
    image = opinion.image.permute(1, 2, 0).numpy()
    seen = _view(image, f"What the network sees: {size} by {size} pixels")
    decided = _view(overlay(image, opinion.heat.numpy()), f"The pixels that decided for {opinion.label}")
    return f'<div class="views">{seen}{decided}</div>'


def _view(image: np.ndarray, caption: str) -> str:
    file = io.BytesIO()
    Image.fromarray(image).save(file, "PNG")
    return f"<figure>{_image(file.getvalue(), caption)}<figcaption>{escape(caption)}</figcaption></figure>"


def _image(png: bytes, meaning: str) -> str:
    """An image that is part of the page, so that no file has to be served."""
    return f'<img src="data:image/png;base64,{base64.b64encode(png).decode()}" alt="{escape(meaning)}">'


def _report(run: Run) -> str:
    """What the run is worth: its numbers and its figures."""
    metrics, seconds = run.metrics, run.record["seconds"].get("train")
    calibration = metrics["calibration"]
    tiles = [
        _accuracy("Accuracy", metrics, ""),
        _accuracy("With test-time augmentation", metrics, "_tta"),
        _tile("Test images", f"{metrics['n']:,}", f"of {metrics['dataset']}, never trained on"),
        _tile("Training", "not recorded" if seconds is None else f"{seconds:,.0f} s", f"recipe {metrics['recipe']}"),
    ]
    if calibration["threshold"] is not None:
        share = f"{1 - calibration['threshold_share']:.0%} of validation is surer"
        tiles.append(_tile("Unsure below", f"{calibration['threshold']:.1%}", share))
    sheets = [_sheet(run.figures / f"{name}.png", meaning, name in _SQUARE) for name, meaning in _FIGURES.items()]
    if not any(sheets):
        sheets = [f"<p>No figures yet: <code>invoke visualize --run {escape(run.path.name)}</code> draws them.</p>"]
    return f'<div class="tiles">{"".join(tiles)}</div>{"".join(sheets)}'


def _sheet(file: Path, meaning: str, is_square: bool) -> str:
    kind = "sheet square" if is_square else "sheet"
    return f'<div class="{kind}">{_image(file.read_bytes(), meaning)}</div>' if read_rgb(file) else ""


def _accuracy(title: str, metrics: dict[str, Any], kind: str) -> str:
    low, high = metrics[f"interval_95{kind}"]
    return _tile(title, f"{metrics[f'accuracy{kind}']:.2%}", f"95% interval {low:.2%} to {high:.2%}")


def _tile(title: str, value: str, detail: str) -> str:
    return f'<div class="tile">{escape(title)}<strong>{escape(value)}</strong><small>{escape(detail)}</small></div>'
