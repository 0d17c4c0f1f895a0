"""A run's network as a file that answers without this program: torch.export's, and ONNX's where its packages are."""

import contextlib
import importlib.util
import io
import json
import warnings
from pathlib import Path

import torch
from torch import Tensor, nn

from cifar.errors import UserError, told
from cifar.files import replacing
from cifar.predict import Predictor
from cifar.runs import Run

ABOUT = "about.json"  # in the .pt2 file, and under this name in the metadata of the .onnx file
_ONNX_PACKAGES = ("onnx", "onnxscript")


class Answering(nn.Module):
    """uint8 RGB pictures (N, 3, S, S), S the run's image size -> calibrated probabilities (N, classes), float32."""

    def __init__(self, network: nn.Module, temperature: float):
        super().__init__()
        self.network, self.temperature = network, temperature

    def forward(self, pictures: Tensor) -> Tensor:
        logits = self.network(pictures.to(torch.float32) / 255)
        return (logits / self.temperature).softmax(1)


def export(run: Run, path: Path) -> list[Path]:
    """Write the run's network to `path`, a .pt2 file, and to an .onnx file beside it if has_onnx().

    Both compute in float32 whatever the run did, take any number of pictures, and hold, as JSON, the classes in the
    order of the columns, the image size, and the confidence under which a picture is probably none of them.
    Returns the files. Raises UserError if the run has not been evaluated, or if torch cannot follow its network.
    """
    predictor = Predictor(run, "cpu")
    about = {
        "run": run.path.name,
        "classes": predictor.classes,
        "image_size": predictor.image_size,
        "threshold": predictor.threshold,
    }
    program = _program(predictor)
    content = io.BytesIO()
    torch.export.save(program, content, extra_files={ABOUT: json.dumps(about)})
    with replacing(path) as partial:
        path.parent.mkdir(parents=True, exist_ok=True)
        partial.write_bytes(content.getbuffer())
    return [path, _write_onnx(program, path.with_suffix(".onnx"), about)] if has_onnx() else [path]


def has_onnx() -> bool:
    """Whether the packages are installed that torch.onnx takes."""
    return all(importlib.util.find_spec(package) for package in _ONNX_PACKAGES)


def _program(predictor: Predictor) -> torch.export.ExportedProgram:
    network = Answering(predictor.network, predictor.temperature).eval()
    # torch.export warns of weights that are channels-last, and cannot follow what is there for gradients alone.
    network.to(memory_format=torch.contiguous_format).requires_grad_(False)
    pictures = torch.zeros(2, 3, predictor.image_size, predictor.image_size, dtype=torch.uint8)
    try:
        return torch.export.export(network, (pictures,), dynamic_shapes=({0: torch.export.Dim("pictures", min=1)},))
    except Exception as error:  # a user's network may do whatever torch cannot follow
        raise UserError(f"torch.export cannot follow the network of {predictor.run.path.name}: {told(error)}") from None


def _write_onnx(program: torch.export.ExportedProgram, path: Path, about: dict) -> Path:
    with warnings.catch_warnings(), contextlib.redirect_stdout(io.StringIO()):
        warnings.simplefilter("ignore")  # torch's own, of what it is about to change
        converted = torch.onnx.export(program, dynamo=True, output_names=["probabilities"])
    converted.model.metadata_props[ABOUT] = json.dumps(about)
    with replacing(path) as partial:
        converted.save(str(partial))
    return path
