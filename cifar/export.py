"""A run's network as files for others: .pt2 and .onnx, a folder for the Hugging Face Hub, weights in float16."""

import contextlib
import html
import importlib.util
import inspect
import io
import json
import shutil
import tempfile
import warnings
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from jinja2 import Environment, FileSystemLoader
from torch import Tensor, nn

from cifar import checkpoint, console, datasets, evaluate, files, model, runs
from cifar.config import LOCATIONS, Config
from cifar.errors import UserError, describe, display_path, listing, percent
from cifar.predict import Predictor
from cifar.runs import Run

ABOUT = "about.json"  # in the .pt2 file, and a key of the .onnx file's metadata
_TEMPLATES = Path(__file__).parent / "templates"
_RECORDED = {  # of run.json, in weights for others
    *("status", "start", "end", "seconds", "commit", "dirty", "versions", "device", "hardware", "precision", "threads"),
    *("processes", "seed", "dataset", "model"),
}
_HUB_FILES = ("model.safetensors", "config.json", "model.py", "load.py", "README.md")
_HUB_DATASETS = {"cifar10": "uoft-cs/cifar10", "cifar100": "uoft-cs/cifar100"}


class _Exported(nn.Module):
    """uint8 RGB images (N, 3, image_size, image_size) -> calibrated probabilities, float32 (N, classes)."""

    def __init__(self, network: nn.Module, temperature: float):
        super().__init__()
        self.network, self.temperature = network, temperature

    def forward(self, images: Tensor) -> Tensor:
        return (self.network(images.to(torch.float32) / 255) / self.temperature).softmax(1)


def export(run: Run, path: Path) -> list[Path]:
    """Export the run's network to `path`, a .pt2 file, and beside it to .onnx and a folder for the Hugging Face Hub.

    The last two only if the packages that they need are installed. Returns what was written. Raises UserError if the
    run has not been evaluated, torch.export does not support its network, or the folder has other files.
    """
    predictor = Predictor(run, "cpu")
    predictor.network.to(memory_format=torch.contiguous_format).requires_grad_(False)
    _require_own(path.with_suffix(""))
    return [*_write_programs(predictor, path), *_write_hub_folder(predictor, path.with_suffix(""))]


def _write_programs(predictor: Predictor, path: Path) -> list[Path]:
    """Write `path`, and the .onnx file if ONNX is installed.

    Both compute in float32 and take any number of images. Both hold, as JSON, the classes in the order of the
    columns, the image size, and the confidence below which an image is probably none of the classes.
    """
    about = json.dumps({"run": predictor.run.path.name, **_facts(predictor)})
    program = _program(predictor)
    content = io.BytesIO()
    torch.export.save(program, content, extra_files={ABOUT: about})
    with files.atomic_write(path) as partial:
        path.parent.mkdir(parents=True, exist_ok=True)
        partial.write_bytes(content.getbuffer())
    if not _are_installed("onnx", "onnxscript"):
        return [path]
    try:
        with warnings.catch_warnings(), contextlib.redirect_stdout(io.StringIO()):
            warnings.simplefilter("ignore")  # torch's own, about its future versions
            converted = torch.onnx.export(program, dynamo=True, output_names=["probabilities"])
    except Exception as error:  # ONNX lacks some of torch's operations
        console.say(f"no .onnx file was written: torch.onnx.export fails: {describe(error)}")
        return [path]
    assert converted is not None  # as it is without dynamo
    converted.model.metadata_props[ABOUT] = about
    with files.atomic_write(path.with_suffix(".onnx")) as partial:
        converted.save(str(partial))
    return [path, path.with_suffix(".onnx")]


def _are_installed(*packages: str) -> bool:
    return all(map(importlib.util.find_spec, packages))


def _facts(predictor: Predictor) -> dict[str, Any]:
    """Return what a user of the probabilities must know."""
    return {"classes": predictor.classes, "image_size": predictor.image_size, "threshold": predictor.threshold}


def _program(predictor: Predictor) -> torch.export.ExportedProgram:
    # torch.export warns of channels-last weights, and fails on code that runs only where gradients are needed.
    network = _Exported(predictor.network, predictor.temperature).eval()
    images = torch.zeros(2, 3, predictor.image_size, predictor.image_size, dtype=torch.uint8)
    try:
        return torch.export.export(network, (images,), dynamic_shapes=({0: torch.export.Dim("images", min=1)},))
    except Exception as error:  # a user's network may do whatever torch.export does not support
        raise UserError(f"torch.export fails for {predictor.run.path.name}: {describe(error)}") from None


def _write_hub_folder(predictor: Predictor, folder: Path) -> list[Path]:
    """Write the folder, if safetensors is installed: weights, config.json, code that loads them, and a model card."""
    if not _are_installed("safetensors"):
        return []
    from safetensors.torch import save

    architecture = predictor.run.config.model
    facts = {"architecture": architecture, **_facts(predictor), "temperature": predictor.temperature}
    state = predictor.network.state_dict()
    contents = {
        "model.safetensors": save(
            {name: tensor.clone(memory_format=torch.contiguous_format) for name, tensor in state.items()}
        ),
        "config.json": json.dumps(facts, indent=2).encode() + b"\n",
        "model.py": _source(architecture, predictor.run.config.is_pretrained).encode(),
        "load.py": (_TEMPLATES / "hub_load.py.txt").read_bytes(),
        "README.md": _card(predictor).encode(errors="backslashreplace"),
    }
    for name, content in contents.items():
        with files.atomic_write(folder / name) as partial:
            folder.mkdir(parents=True, exist_ok=True)
            partial.write_bytes(content)
    return [folder]


def _require_own(folder: Path) -> None:
    """Raise UserError if the folder has something that no export has written."""
    if folder.is_symlink() or folder.is_file():
        raise UserError(f"remove {display_path(folder)}: an export makes a folder of this name")
    names = [entry.name for entry in folder.iterdir()] if folder.is_dir() else []
    if others := sorted(name for name in names if name not in _HUB_FILES and not name.startswith(".")):
        raise UserError(f"{display_path(folder)} has other files ({listing(others)}): name another file with --output")


def _source(architecture: str, pretrained: bool) -> str:
    """Return a module with `build`: the networks of `model` on torch's own layers, or a call of this package."""
    if pretrained or architecture not in model.NETWORKS:
        allow = (
            f"from cifar.config import allow_model\n\nallow_model({architecture!r})\n" if ":" in architecture else ""
        )
        call = "import functools\n\nfrom cifar import model\n\nbuild = functools.partial(model.build, pretrained={})\n"
        return call.format(pretrained) + allow
    networks = inspect.getsource(model)
    networks = networks[networks.index("WHITENING_SIZE =") : networks.index("def require(")]
    parts = [(_TEMPLATES / "hub_layers.py.txt").read_text(encoding="utf-8"), networks]
    parts += [inspect.getsource(part) for part in (model._chain, model.Normalize)]
    build = "    return _chain(normalize=Normalize(), **NETWORKS[architecture](classes, image_size))\n"
    parts.append(f"def build(architecture: str, classes: int, image_size: int) -> nn.Sequential:\n{build}")
    return "\n\n\n".join(part.strip("\n") for part in parts) + "\n"


def _card(predictor: Predictor) -> str:
    """Return the model card, made from what the run has saved."""
    run, architecture = predictor.run, predictor.run.config.model
    metrics, record, corruptions = run.metrics, run.record, run.read_if_present("corruptions.json")
    packages = ["PyTorch", "safetensors"]
    if run.config.is_pretrained or architecture not in model.NETWORKS:
        packages += ["this project's package `cifar`", *(["timm"] if architecture.startswith("timm/") else [])]
    if ":" in architecture:
        packages += [f"the module `{architecture.partition(':')[0]}`"]
    environment = Environment(loader=FileSystemLoader(_TEMPLATES), trim_blocks=True, lstrip_blocks=True)
    environment.filters |= {"percent": percent, "cell": _cell}
    return environment.get_template("hub_card.md").render(
        name=run.path.name,
        title=f"{run.config.title} on {console.printable(metrics.dataset)}",
        architecture=architecture,
        parameters=sum(parameter.numel() for parameter in predictor.network.parameters()),
        image_size=predictor.image_size,
        threshold=predictor.threshold,
        packages=packages,
        load=(_TEMPLATES / "hub_load.py.txt").read_text(encoding="utf-8").strip(),
        hub_dataset=_HUB_DATASETS.get(metrics.dataset),
        metrics=metrics,
        corruptions=corruptions,
        config=run.config,
        record=record,
        epochs=len(run.history()) or run.config.epochs,
    )


def _cell(text: str) -> str:
    """Return a name as Markdown shows it, also within a table."""
    return html.escape(console.printable(text)).replace("|", "&#124;")


def write_weights(run: Run, folder: Path, data_dir: str | None, device_name: str) -> Run:
    """Write the run into a folder as those in cifar/weights are: weights in float16, and metrics measured with them.

    metrics.json has the accuracies of the run itself too. Raises UserError if the run has not been evaluated or the
    folder cannot be written.
    """
    original = run.metrics
    if folder.exists() and (not folder.is_dir() or any(folder.iterdir())):
        raise UserError(f"{display_path(folder)} is not an empty folder: name another one with --weights")
    dataset = datasets.of_run(run, data_dir)
    _, content, _ = evaluate.load_network(run, dataset.classes)
    weights = {
        name: tensor.half() if tensor.is_floating_point() else tensor for name, tensor in content["weights"].items()
    }
    defaults = {name: Config.model_fields[name].default for name in LOCATIONS}  # another machine has other folders
    defaults["precision"] = "float32"  # so that predictions are the same on every processor, to 1e-4
    kept = {key: content[key] for key in ("model", "classes", "image_size", "epoch")}
    itself = {"run": run.path.name, "accuracy": original.accuracy, "accuracy_tta": original.accuracy_tta}
    with files.writing(folder):
        folder.mkdir(parents=True, exist_ok=True)
        temporary = tempfile.TemporaryDirectory(dir=folder)  # in it, so that a folder that is closed is known at once
    with temporary as place:
        made = Run(Path(place))
        with files.writing(folder):
            made.checkpoints.mkdir()
            shutil.copy(run.path / runs.HISTORY, made.path / runs.HISTORY)
        made.write(runs.CONFIG, run.config.model_dump() | defaults)
        made.write(runs.RECORD, run.record.model_dump(include=_RECORDED, exclude_unset=True))
        checkpoint.save(made.checkpoints / "best.pt", {**kept, "weights": weights})
        measured = evaluate.measure(made, dataset, device_name).metrics.model_dump()
        made.write(runs.METRICS, {**measured, "original": itself})
        with files.writing(folder):
            for path in made.path.iterdir():
                shutil.move(path, folder)
    return Run(folder.resolve())


def show_export(written: Sequence[Path]) -> None:
    """Print what `export` has written, and how to use it."""
    for file in written:
        size = sum(part.stat().st_size for part in (file.iterdir() if file.is_dir() else [file]))
        console.say(f"{display_path(file)}, {size / 1e6:.1f} MB")
    loaded = f"torch.export.load('{display_path(written[0])}').module()"
    console.say(f"{loaded} takes uint8 RGB images and returns calibrated probabilities")
    if not _are_installed("onnx", "onnxscript"):
        console.say("no .onnx file was written: that needs two more packages, `pip install onnx onnxscript`")
    if (folder := written[-1]).is_dir():
        console.say(f"{display_path(folder)} can be uploaded to the Hugging Face Hub as it is; README.md is its card")
    else:
        console.say("no folder for the Hugging Face Hub was written: that needs `pip install safetensors`")
