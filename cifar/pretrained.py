"""Pretrained weights for fine-tuning: downloaded or from a file, and loaded into all of a network but its head.

timm and safetensors are optional, and imported where they are used, as is torchvision, which takes a second.
"""

import importlib
import logging
import re
import zipfile
from functools import partial
from pathlib import Path
from types import ModuleType
from typing import TYPE_CHECKING, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn.modules.utils import consume_prefix_in_state_dict_if_present

from cifar import checkpoint, console
from cifar.errors import UserError, first_line, listing, out_of_memory

if TYPE_CHECKING:
    from torchvision.models import WeightsEnum

TIMM = "timm/"  # what the names of timm's networks begin with here
# The second output of GoogLeNet and Inception, which only their training from scratch uses.
_AUXILIARY = re.compile(r"(aux\d|AuxLogits)\.")
# torchvision's files for DenseNet are from a version of PyTorch that allowed dots in the names of modules.
_OLD_DENSENET = re.compile(r"(?<=denselayer)(\d+\.(?:norm|conv))\.(?=\d\.)")


class Preprocessing(NamedTuple):
    """How the images were prepared that pretrained weights have learned from."""

    size: int  # in pixels
    mean: tuple[float, ...]  # of each channel, in 0..1
    std: tuple[float, ...]


def preprocessing(name: str) -> Preprocessing:
    """Return what the pretrained weights of a network expect; ImageNet's usual values for the user's own network.

    Raises UserError if torchvision has no weights for it.
    """
    if ":" in name:
        return Preprocessing(224, (0.485, 0.456, 0.406), (0.229, 0.224, 0.225))
    if name.startswith(TIMM):
        config = optional("timm").get_pretrained_cfg(name.removeprefix(TIMM))
        values = optional("timm.data").resolve_data_config(pretrained_cfg=config.to_dict())
        return Preprocessing(values["input_size"][-1], values["mean"], values["std"])
    transforms = _torchvision_weights(name).transforms()
    return Preprocessing(transforms.crop_size[0], tuple(transforms.mean), tuple(transforms.std))


def adapt(network: nn.Module, name: str, head: frozenset[str], body_lr: float) -> None:
    """Set the normalization that the weights expect, name the head's parameters, and freeze the body at a rate of zero.

    network: of `model.build`. head: see `zoo.head_names`.
    """
    expected = preprocessing(name)
    network.get_buffer("normalize.mean").copy_(torch.tensor(expected.mean).view(1, 3, 1, 1))
    network.get_buffer("normalize.std").copy_(torch.tensor(expected.std).view(1, 3, 1, 1))
    names = frozenset(f"network.{key}" for key in head)
    network.head_names = names  # type: ignore[assignment]  # torch's annotation leaves out other attributes
    for key, parameter in network.named_parameters():
        parameter.requires_grad_(parameter.requires_grad and (body_lr > 0 or key in names))


def load(network: nn.Module, config) -> None:
    """Load the weights that the settings name into all of an adapted network but its head.

    config: a config.Config. Raises UserError if they cannot be had or do not fit.
    """
    if config.weights:
        weights, source = read(Path(config.weights)), config.weights
    elif config.model.startswith(TIMM):
        weights, source = _download_timm(config.model), f"the pretrained weights of {config.model}"
    else:
        source = str(_download(_torchvision_weights(config.model)))
        weights = read(Path(source))
    head = {key.removeprefix("network.") for key in getattr(network, "head_names", ())}
    inner = network.get_submodule("network")
    body = {key: value for key, value in weights.items() if key not in head and not _AUXILIARY.match(key)}
    own = {key: value for key, value in inner.state_dict().items() if key not in head}
    if differences := _differences(body, own):
        hint = "; name the network that it is of with --model" if len(differences) > 3 else ""
        raise UserError(f"{source} does not fit {config.model}: {listing(differences)}{hint}")
    if not all(value.isfinite().all() for value in body.values()):
        raise UserError(f"the weights in {source} are not finite")
    inner.load_state_dict(body, strict=False)


def _differences(weights: dict[str, Tensor], own: dict[str, Tensor]) -> list[str]:
    """Describe how weights from a file differ in keys and shapes from those of a network."""
    missing = [key for key in own if key not in weights and not key.endswith("num_batches_tracked")]
    shapes = [
        f"{key} is {_shape(weights[key])} instead of {_shape(value)}"
        for key, value in own.items()
        if key in weights and weights[key].shape != value.shape
    ]
    extra = [f"it has {key}, which the network lacks" for key in weights if key not in own]
    return [f"it lacks {key}" for key in missing] + shapes + extra


def _shape(tensor: Tensor) -> str:
    return "x".join(map(str, tensor.shape)) or "a number"


def read(path: Path) -> dict[str, Tensor]:
    """Read a state dict from a .pt, .pth or .safetensors file, or from a checkpoint that has it as state_dict or model.

    Nothing in the file is executed. Raises UserError if it is missing or has no state dict.
    """
    load_file = partial(torch.load, map_location="cpu", weights_only=True)
    if path.suffix == ".safetensors":
        load_file = optional("safetensors.torch").load_file
    try:
        content = load_file(path) if not zipfile.is_zipfile(path) or checkpoint.is_stored(path) else None
    except OSError as error:
        raise UserError(f"cannot read {path}: {error.strerror or first_line(error)}") from None
    except Exception as error:  # a damaged file can make the unpickler raise anything
        if out_of_memory(error):
            raise
        content = None
    for key in ("state_dict", "model"):  # of the training scripts of timm and of torchvision
        if isinstance(content, dict) and isinstance(content.get(key), dict):
            content = content[key]
    if not isinstance(content, dict) or not content or not all(isinstance(value, Tensor) for value in content.values()):
        raise UserError(f"{path} contains no state_dict, as torch.save(network.state_dict(), FILE) writes it")
    weights = dict(content)
    consume_prefix_in_state_dict_if_present(weights, "module.")  # of DistributedDataParallel
    return {_OLD_DENSENET.sub(r"\1", key): value for key, value in weights.items()}


def _torchvision_weights(name: str) -> "WeightsEnum":
    from torchvision import models

    try:
        return models.get_model_weights(name).DEFAULT
    except (ValueError, AttributeError):
        raise UserError(f"torchvision has no pretrained weights for {name}: choose another --model") from None


def _download(weights: "WeightsEnum") -> Path:
    """Return the file of torchvision's weights in torch.hub's folder, after downloading it if it is not there.

    Raises UserError that names the folder and the file if they cannot be.
    """
    folder, file = Path(torch.hub.get_dir()) / "checkpoints", weights.url.rpartition("/")[2]
    if (folder / file).exists():
        return folder / file
    console.say(f"downloading {weights.url}, {weights.meta['_file_size']:.0f} MB")
    try:
        folder.mkdir(parents=True, exist_ok=True)
        digest = torch.hub.HASH_REGEX.findall(file)[0]
        torch.hub.download_url_to_file(weights.url, str(folder / file), digest, progress=False)
    except (OSError, RuntimeError) as error:  # no network; another hash
        problem = f"cannot download {weights.url} ({first_line(getattr(error, 'reason', error))})"
        raise UserError(f"{problem}: put {file} into {folder}, or name it with --weights") from None
    return folder / file


def _download_timm(name: str) -> dict[str, Tensor]:
    """Return timm's weights, downloaded from the Hugging Face Hub unless they are in its cache.

    Raises UserError that names where they are to be had.
    """
    timm, timm_name = optional("timm"), name.removeprefix(TIMM)
    location = timm.get_pretrained_cfg(timm_name).hf_hub_id
    if not location:
        raise UserError(f"timm has no pretrained weights for {timm_name}: choose another --model, or name --weights")
    optional("huggingface_hub.utils").disable_progress_bars()
    logging.disable()  # their warnings
    try:
        return timm.create_model(timm_name, pretrained=True).state_dict()
    except Exception as error:  # of many libraries
        reason = f"cannot download the weights of {name} ({first_line(error)})"
        raise UserError(f"{reason}: get the file from huggingface.co/{location} and name it with --weights") from None
    finally:
        logging.disable(logging.NOTSET)


def optional(name: str) -> ModuleType:
    """Import a module of an optional package. Raises UserError if it is not installed."""
    try:
        return importlib.import_module(name)
    except ImportError:
        package = name.partition(".")[0]
        raise UserError(f"this needs {package}, which is not installed: `pip install {package}`") from None
