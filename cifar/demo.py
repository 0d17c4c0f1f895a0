"""The demo in the browser: any image in, a run's prediction out, and how good the run is."""

import base64
import contextlib
import functools
import io
import tempfile
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from html import escape
from pathlib import Path
from typing import Any

import gradio as gr
import numpy as np
from gradio.utils import get_upload_folder
from PIL import Image
from torch import Tensor

from cifar import analysis, console, datasets, device, images, runs, server
from cifar.config import PIPELINE
from cifar.errors import UserError, known_name, listing
from cifar.predict import Predictor
from cifar.runs import Run
from cifar.visualize import FIGURES

_MAX_LOADED = 3  # runs in memory at once
_FILE_AGE = (60, 900)  # seconds: how often Gradio looks for old files, and when a file is old
_CSS = Path(__file__).parent / "templates" / "demo.css"
# The package's semi-bold Source Sans lacks most letters; grey text is a step darker than Gradio's, to be readable.
_FONT = (gr.themes.LocalFont("Source Sans Pro", weights=(400, 700)), "sans-serif")
_THEME = gr.themes.Default(primary_hue="blue", secondary_hue="blue", neutral_hue="slate", font=_FONT)
_THEME.set(body_text_color_subdued="*neutral_500", body_text_color_subdued_dark="*neutral_400")
_MAX_FIGURE = 20_000_000  # bytes
# Of events that only the page sends.
_INTERNAL: dict[str, Any] = {"api_visibility": "private", "show_progress": "hidden"}


def serve(
    run: Run | None,
    *,
    output_dir: str,
    data_dir: str | None,
    host: str,
    port: int,
    share: bool,
    auth: str | None,
    device: str,
) -> None:
    """Serve the demo until Ctrl-C.

    run: the run selected at first; by default the latest in `output_dir`, if it is evaluated and can be loaded, or else
    the newest such one. port: 0 picks a free one. auth: USER:PASSWORD. share: get a public address from Gradio.
    Raises UserError if no run can be loaded, or the server cannot start.
    """
    credentials = server.credentials(auth)
    with server.listen(host, port) as listener, tempfile.TemporaryDirectory(prefix="cifar-demo-") as folder:
        server.set_upload_folder(folder)
        page = build(Demo(run, output_dir, data_dir, device))
        server.serve(page, listener, host=host, auth=credentials, share=share, theme=_THEME, css_paths=_CSS)


class Demo:
    """The evaluated runs of a folder, loaded when first used, and what they predict."""

    def __init__(self, first: Run | None, output_dir: str, data_dir: str | None, device_name: str):
        """Load the run `first`, by default as `serve`. Raises UserError if none can be loaded."""
        self._first, self._output_dir, self._data_dir = first, output_dir, data_dir
        # One thread for all networks: every thread that calls torch gets a pool of threads, which compete.
        self._thread = ThreadPoolExecutor(1)
        self._predictor = functools.lru_cache(_MAX_LOADED)(lambda name: Predictor(self.run(name), device_name))
        self.examples = functools.lru_cache(_MAX_LOADED)(self._examples)
        device.choose(device_name)  # raises what would otherwise be said of each run
        self.default = self._load_first()

    def _load_first(self) -> str:
        """Return the name of the first run that can be loaded, and say of each one before it why it cannot."""
        latest = runs.latest(self._output_dir)
        known = sorted(self.find(), key=lambda name: not latest or name != latest.name)  # the others newest first
        names = [self._first.path.name] if self._first else known
        for name in names:
            try:
                if self._thread.submit(self._predictor, name).result().run.is_shipped and not self._first:
                    shipped = f"the network that comes with this program ({name})"
                    console.say(f"no evaluated run in {self._output_dir}: using {shipped}")
                return name
            except UserError as error:
                if name == names[-1]:
                    raise
                console.say(f"{name} cannot be loaded: {error}")
        raise UserError(f"no evaluated run in {self._output_dir}; train one with `{PIPELINE}`")

    def find(self) -> dict[str, Run]:
        """Find the evaluated runs, by name, newest first, and then those that come with the program."""
        found: dict[str, Run] = {}
        for path in (*runs.directories(Path(self._output_dir)), *runs.directories(runs.SHIPPED)):
            found.setdefault(path.name, Run(path))
        given = {self._first.path.name: self._first} if self._first else {}
        return {name: run for name, run in found.items() if run.has_metrics} | given

    def run(self, name: str) -> Run:
        """Return the run of this name. Raises UserError if there is none."""
        known = self.find()
        return known[known_name("run", name, known)]

    def choices(self) -> list[tuple[str, str]]:
        """Return title and name of each run that has its weights and can be described."""
        titles = []
        for name, run in self.find().items():
            with contextlib.suppress(UserError):
                metrics, origin = run.metrics, run.record.start[:16].replace("T", " ")
                if run.is_shipped:
                    origin = "comes with this program"
                if run.config and (run.checkpoints / "best.pt").exists():
                    titles.append((f"{metrics.recipe} on {metrics.dataset}, {metrics.accuracy:.1%}, {origin}", name))
        return titles

    def show(self, image: dict | None, name: str) -> tuple[str, dict[str, float] | None, str]:
        """Classify an uploaded image for the page: a note, the confidences and the network's input."""
        if image is None:
            return "", None, ""
        try:
            return self._ask(_show, image, name)
        except UserError as error:
            return _note("error", server.sentence(error)), None, ""

    def predict(self, image: dict | None, run: str | None = None) -> dict[str, Any]:
        """Classify an image file of at most 10 MB and 100 million pixels by the run of this name.

        Returns {"label", "confidences": [{"label", "confidence"}, ...], "probably_none", "threshold", "run"}. The
        confidences are calibrated, highest first; below the threshold, the image is probably of none of the classes.
        """  # Gradio shows this in the API's documentation
        return self._ask(_classify, image, run or self.default)

    def _ask(self, question: Callable[[Predictor, Tensor], Any], image: dict | None, name: str) -> Any:
        """Answer a question about an uploaded image with a run; meanwhile, other images are decoded."""
        path = Path((image or {}).get("path") or "/").resolve()
        if not path.is_relative_to(Path(get_upload_folder()).resolve()):  # any other file of this machine
            raise UserError("upload the image as a file")
        predictor = self._thread.submit(self._predictor, name).result()
        pixels = images.decode(path, predictor.image_size)
        return self._thread.submit(question, predictor, pixels).result()

    def _examples(self, name: str) -> list[list[np.ndarray]]:
        """Return rows of one test image (S, S, 3) for 10 classes; none if the dataset is not on this machine."""
        run = self.run(name)
        try:
            if datasets.needs_download(run, self._data_dir):
                return []
            split = datasets.of_run(run, self._data_dir).test
        except UserError:
            return []
        indices = np.unique(split.labels.numpy(), return_index=True)[1]
        return [[split.images[index].permute(1, 2, 0).numpy()] for index in indices[:10]]


def _classify(predictor: Predictor, image: Tensor) -> dict[str, Any]:
    """Return what the API answers for an image, uint8 (3, S, S)."""
    probabilities = predictor.probabilities(image[None])[0]
    order = (-probabilities).argsort(kind="stable")
    return {
        "label": predictor.classes[order[0]],
        "confidences": [{"label": predictor.classes[i], "confidence": float(probabilities[i])} for i in order],
        "probably_none": predictor.is_probably_none(probabilities),
        "threshold": predictor.threshold,
        "run": predictor.run.path.name,
    }


def _show(predictor: Predictor, image: Tensor) -> tuple[str, dict[str, float], str]:
    """Return what the page shows for an image, uint8 (3, S, S)."""
    answer = _classify(predictor, image)
    label = predictor.classes.index(answer["label"])
    saliency = analysis.saliency(predictor.network, image, label, precision=predictor.precision)
    confidences = {row["label"]: row["confidence"] for row in answer["confidences"]}
    note = ""
    if answer["probably_none"]:
        note = _note(
            "unsure",
            f"Probably none of the classes: the confidence is below {answer['threshold']:.1%}. Few validation images, "
            "which all show one of the classes, score that low.",
        )
    return note, confidences, _inputs(image, saliency, answer["label"])


def build(demo: Demo) -> server.Page:
    """Build the page: choose a run, try it on images, read how good it is."""
    with server.Page(title="Image classification", analytics_enabled=False, delete_cache=_FILE_AGE) as page:
        with gr.Row(elem_id="head"):
            heading = gr.HTML(_heading(demo.run(demo.default)))
            chosen = gr.Dropdown(demo.choices(), value=demo.default, label="Run", elem_id="run")
        with gr.Tab("Try it"), gr.Row():
            examples = _build_prediction(demo, chosen)
        with gr.Tab("The run") as tab:
            report = gr.HTML()
        to: dict[str, Any] = {"inputs": chosen, **_INTERNAL}
        gr.on([page.load], lambda _: gr.Dropdown(demo.choices()), outputs=chosen, **to)
        gr.on([chosen.change], lambda name: _heading(demo.run(name)), outputs=heading, **to)
        # Examples come after the page, because reading the dataset takes a while.
        gr.on([page.load, chosen.change], lambda name: gr.Dataset(samples=demo.examples(name)), outputs=examples, **to)
        gr.on([tab.select, chosen.change], lambda name: _report(demo.run(name)), outputs=report, **to)
    return page


def _build_prediction(demo: Demo, chosen: gr.Dropdown) -> gr.Dataset:
    """Build the tab that classifies images, and return its list of examples, still empty."""
    with gr.Column(min_width=300):
        image = gr.Image(format="png", label="Image", height=320, buttons=[], elem_id="image")
        thumbnail = gr.Image(format="png", render=False)
        examples = gr.Dataset(
            components=[thumbnail], samples=[], type="index", label="Or try a test image", elem_id="examples"
        )
    with gr.Column(min_width=300):
        note = gr.HTML(elem_id="note")
        label = gr.Label(label="Prediction", num_top_classes=3)
        inputs = gr.HTML()
    # In the API's documentation: Gradio's example is an address, which this server would not download.
    example = {"path": "image.png", "url": "image.png", "meta": {"_type": "gradio.FileData"}}
    image.example_payload = lambda: example  # type: ignore[method-assign]  # of this image alone
    # Without preprocessing the file arrives as it was sent: Gradio would rotate, convert and save it.
    asking = {"inputs": [image, chosen], "preprocess": False, "concurrency_id": "predict", "concurrency_limit": 4}
    shown = {"outputs": [note, label, inputs], "trigger_mode": "always_last"}
    gr.on([image.change, chosen.change], demo.show, **shown, **asking, **_INTERNAL)
    result = gr.JSON(label="prediction", visible=False)
    gr.on([], demo.predict, outputs=result, api_name="predict", **asking)
    examples.click(lambda index, name: demo.examples(name)[index][0], [examples, chosen], image, **_INTERNAL)
    return examples


def _heading(run: Run) -> str:
    classes, origin = run.dataset.classes, " that comes with this program" if run.is_shipped else ""
    names = escape(listing(classes, 20))
    return f"<h1>What is in the image?</h1><p>The network{origin} knows {len(classes)} classes: {names}.</p>"


def _note(kind: str, text: str) -> str:
    return f'<p class="note {kind}" role="status">{escape(text)}</p>'


def _inputs(image: Tensor, saliency: Tensor, label: str) -> str:
    pixels = image.permute(1, 2, 0).numpy()
    captions = (f"Input of the network: {len(pixels)} by {len(pixels)} pixels", f'Saliency for "{label}"')
    figures = ""
    for caption, shown in zip(captions, (pixels, analysis.overlay(pixels, saliency.numpy()))):
        Image.fromarray(shown).save(file := io.BytesIO(), "PNG")
        figures += f"<figure>{_embed(file.getvalue(), caption)}<figcaption>{escape(caption)}</figcaption></figure>"
    kind = "inputs" if len(pixels) > 64 else "inputs small"
    return f'<div class="{kind}">{figures}</div>'


def _embed(png: bytes, alt: str) -> str:
    """Return an <img> that holds its image, so that no file has to be served."""
    return f'<img src="data:image/png;base64,{base64.b64encode(png).decode()}" alt="{escape(alt)}">'


def _is_own(figure: Path) -> bool:
    """Say whether a figure is the run's own file, of ordinary size, and not a link to another one of this computer."""
    run = figure.parent.parent
    return figure.resolve() == run.resolve() / "figures" / figure.name and (
        figure.is_file() and figure.stat().st_size < _MAX_FIGURE
    )


def _report(run: Run) -> str:
    """Return the most important metrics of a run, and its figures, as HTML."""
    metrics, seconds = run.metrics, run.record.seconds.get("train")
    span = "95% interval {:.2%} to {:.2%}".format
    tile = '<div class="tile">{}<strong>{}</strong><small>{}</small></div>'.format
    texts = [
        ("Accuracy", f"{metrics.accuracy:.2%}", span(*metrics.interval_95)),
        ("Accuracy with test-time augmentation (TTA)", f"{metrics.accuracy_tta:.2%}", span(*metrics.interval_95_tta)),
        ("Test images", f"{metrics.n:,}", f"{metrics.dataset}, never trained on"),
        ("Training time", "unknown" if seconds is None else f"{seconds:,.0f} s", f"recipe {metrics.recipe}"),
    ]
    tiles = "".join(tile(*map(escape, row)) for row in texts)
    files = [(run.figures / f"{name}.png", figure.alt) for name, figure in FIGURES.items()]
    figures = [f'<div class="figure">{_embed(file.read_bytes(), alt)}</div>' for file, alt in files if _is_own(file)]
    hint = f"<p>No figures yet; draw them with <code>{escape(run.command('visualize'))}</code></p>"
    return f'<div class="tiles">{tiles}</div>{"".join(figures) or ("" if run.is_shipped else hint)}'
