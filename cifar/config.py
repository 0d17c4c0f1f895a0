"""Every setting of a run, and the recipes, which are named sets of them."""

import os
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Literal, NoReturn, get_args, get_origin

from pydantic import BaseModel, ConfigDict, Field, ValidationError, ValidationInfo, field_validator

from cifar.errors import UsageError, UserError, did_you_mean, display_path, known_name

# Jordan 2024 (arXiv:2404.00498) with Muon, progressive resizing and hard-example mining.
_FAST = {
    "model": "airbench94",
    "epochs": 11,
    "batch_size": 1000,
    "optimizer": "muon",
    "lr": 0.17,
    "momentum": 0.6,
    "weight_decay": 0.004,
    "schedule": "linear",
    "label_smoothing": 0.2,
    "patience": 0,
    "early_stopping": "loss",  # less noisy than accuracy, which often kept an epoch before the last
    "crop": 2,
    "crop_mode": "reflect",
    "flip": "alternating",
    "cutout": 0,
    "jitter": 0.0,
    "small_epochs": 6,
    "hard_epochs": 2,
}
# For any network that --model names: Adam with cosine decay.
_PLAIN = {
    **_FAST,
    "epochs": 30,
    "batch_size": 128,
    "optimizer": "adam",
    "lr": 1e-3,
    "weight_decay": 0.0,
    "schedule": "cosine",
    "label_smoothing": 0.0,
    "patience": 10,
    "early_stopping": "accuracy",
    "crop": 4,
    "crop_mode": "zeros",
    "flip": "random",
    "small_epochs": 0,
    "hard_epochs": 0,
}
# README.md has the accuracy and time that each recipe was measured to reach.
RECIPES: Mapping[str, Mapping[str, Any]] = {
    "fast": _FAST,
    # The wide, deep airbench96 of the same author. For a GPU, or an hour and a half on two CPU cores.
    "best": dict(
        _FAST,
        model="airbench96",
        epochs=40,
        batch_size=2000,
        lr=0.24,
        crop=4,
        cutout=12,
        small_epochs=16,
        hard_epochs=0,
    ),
    # The SimpleCNN of H4ph4z4rdz/cv-image-classifier.
    "simple": dict(_PLAIN, model="simple", epochs=40, batch_size=64, weight_decay=1e-4, patience=5, jitter=0.2),
    # The network and augmentation of ansonnchan/cifar10-image-classification. At its own learning rate of 1e-3,
    # halved every ten epochs, it reached 75.7% on validation, and no more with cosine decay.
    "convnet": dict(_PLAIN, model="convnet", epochs=20, batch_size=64, lr=4e-3, patience=5),
    # A baseline without convolutions. At a learning rate of 1e-3 it stops learning at 32%.
    "mlp": dict(_PLAIN, model="mlp", epochs=20, batch_size=64, lr=3e-4, patience=5),
    # He et al. 2015 with the settings of kuangliu/pytorch-cifar. For a GPU.
    "resnet18": dict(
        _PLAIN, model="resnet18", epochs=200, optimizer="sgd", lr=0.1, momentum=0.9, weight_decay=5e-4, patience=0
    ),
    "plain": _PLAIN,
    # Weights from ImageNet: the usual settings of AdamW, with a tenth of the learning rate for all but the head.
    "finetune": dict(
        _PLAIN,
        model="mobilenet_v3_large",
        pretrained=True,
        epochs=10,
        batch_size=32,
        optimizer="adamw",
        weight_decay=0.01,
        label_smoothing=0.1,
        patience=0,
    ),
}

PROJECT = Path(__file__).resolve().parent.parent
IS_CLONE = (PROJECT / "pyproject.toml").is_file()
HOME = PROJECT if IS_CLONE else Path()  # of data/ and outputs/: of an installed package, the working directory
PIPELINE, STAGES = ("python main.py", "invoke") if IS_CLONE else ("cifar", "cifar")  # commands, for messages
DATASETS = ("auto", "cifar10", "cifar100", "digits")
IMAGE_FOLDER = "the path of a folder of images"
MODELS = ("airbench94", "airbench96", "simple", "convnet", "mlp", "resnet18")
OTHER_MODELS = "a classification network of torchvision, timm/NAME of timm, or package.module:factory"
MAX_EPOCHS = 100_000
MAX_IMAGE_SIZE = 384  # pixels
MAX_CLASSES = 3000  # whose confusion matrix has nine million cells, and metrics.json 80 MB
YES, NO = ("yes", "y", "true", "t", "on", "1"), ("no", "n", "false", "f", "off", "0")  # for pydantic
LOCATIONS = ("data_dir", "mirror", "output_dir")  # settings that say where a run is, and not what it is

allowed_models: set[str] = set()  # networks of the user's own whose code may run: the user has named them
# The networks' names in runs of the first version, and what some call a GPU.
_ALIASES = {"whitened": "airbench94", "whitened_deep": "airbench96", "gpu": "cuda"}
_SEEDS = 2**32  # as many as NumPy knows
_PATHS = ("dataset", "data_dir", "labels", "output_dir", "weights")
_LR_KIND = {"muon": 0, "adam": 1, "adamw": 1, "sgd": 2}  # optimizers of one kind take similar learning rates
_MUON_MODELS = ("airbench94", "airbench96")  # muon's learning rates are for their layers
_ANY_SIZE_MODELS = (*_MUON_MODELS, "convnet", "resnet18")  # the others are built for images of one size
_OWN_MODELS = tuple(name for name in MODELS if name != "resnet18")  # torchvision has one of that name, too
_REQUIRED = ("recipe", "dataset", "seed", "val_size", "model", "flip", "precision")  # in a run's config.json
_SMALL, _CROP_SCALE = 64, 0.35  # pixels; above them, images get random resized crops, as fastai's Imagenette baselines
_LEAST_ALPHA = 0.01  # of the Beta distribution
_MIN_STEPS = 20  # per epoch; with fewer, `fast` does not converge
_MAX_STEP_PIXELS = 2000 * 32**2  # for images above 32x32; `fast` takes 3 GB of memory for them
_ADDRESS = re.compile(r"https?://([^\s/?#]*@)?(\[[\da-f:.]+\]|[^\s/?#@:\[\]]+)(:\d+)?([/?][^\s#]*)?", re.IGNORECASE)
_WORDINGS = {  # by pydantic's type of error, or its first word
    "bool": "takes yes or no",
    "int": "takes a whole number",
    "float": "takes a number",
    "string": "takes text",
    "literal": "takes text",
    "finite": "must be finite",
    "greater_than_equal": "must be at least {ge}",
    "greater_than": "must be greater than {gt}",
    "less_than_equal": "must be at most {le}",
    "less_than": "must be less than {lt}",
}


class Config(BaseModel):
    """Every setting of a run. What is not given comes from the recipe. Raises UserError for an invalid value."""

    model_config = ConfigDict(frozen=True, extra="forbid", allow_inf_nan=False)

    recipe: str = Field("fast", description="settings to start from; plain is for any --model")
    dataset: str = Field(
        "auto",
        description=f"{', '.join(DATASETS)}, or {IMAGE_FOLDER}; auto: CIFAR-10, or digits if it cannot be downloaded",
    )
    data_dir: str = Field(
        "data",
        description="folder or .tar.gz with CIFAR-10 or CIFAR-100, or set CIFAR_DATA_DIR; decoded images are cached "
        "there too, unless CIFAR or the images are there; if the folder of a run's images was moved, its new path",
    )
    labels: str | None = Field(
        None, description="CSV file for a folder of images, with columns path, label and, optionally, split"
    )
    image_size: int = Field(
        32,
        ge=32,
        le=MAX_IMAGE_SIZE,
        description="size in pixels to which a folder's images are scaled; with pretrained weights, by default theirs",
    )
    mirror: str | None = Field(None, description="URL to try first: the archive's, or its folder's if it ends in /")
    output_dir: str = Field("outputs", description="folder that receives a directory per run")
    device: Literal["auto", "cpu", "cuda", "mps"] = Field("auto", description="auto: cuda, else mps, else cpu")
    precision: Literal["auto", "bfloat16", "float16", "float32"] = Field(
        "auto", description="auto: bfloat16 if supported, else float16 on NVIDIA GPUs, else float32"
    )
    compile: Literal["off", "default", "reduce-overhead", "max-autotune"] = Field(
        "off", description="mode of torch.compile for the training steps, which needs a C++ compiler"
    )
    deterministic: Literal["off", "on"] = Field(
        "off", description="on: cuDNN's convolutions on NVIDIA GPUs repeat bit for bit, but are slower"
    )
    track: Literal["none", "tensorboard", "wandb", "trackio"] = Field(
        "none", description="also log the training to a tracker, whose package must be installed"
    )
    seed: int = Field(0, ge=0, lt=_SEEDS, description="random seed of split, weights, order and augmentation")
    seeds: int = Field(1, ge=1, le=1000, description="runs: seed, seed + 1 and so on; the same command resumes them")
    val_size: int | None = Field(
        None, ge=0, description="images held out for validation; default a tenth, with --patience 0 at most 2000"
    )

    model: str = Field(description=f"network: {', '.join(MODELS)}, {OTHER_MODELS}")
    pretrained: bool = Field(
        False, description="fine-tune weights from ImageNet, downloaded if need be, of a network of torchvision or timm"
    )
    weights: str | None = Field(
        None, description="fine-tune the weights in this .pt, .pth or .safetensors file instead of downloaded ones"
    )
    body_lr: float = Field(
        0.1, ge=0, le=1, description="fine-tuning: learning rate of all but the head, relative to --lr; 0: frozen"
    )
    epochs: int = Field(ge=1, le=MAX_EPOCHS, description="passes over the training images")
    minutes: float | None = Field(None, gt=0, le=1e6, description="training time, in minutes; chooses --epochs to fit")
    batch_size: int = Field(ge=2, description="images per step; reduced for small datasets and for large images")
    optimizer: Literal["muon", "adam", "adamw", "sgd"] = Field(description="optimizer")
    lr: float = Field(ge=0, description="peak learning rate; with muon, that of the convolutions")
    momentum: float = Field(ge=0, le=1, description="momentum of muon and sgd")
    weight_decay: float = Field(ge=0, description="weight decay; with muon, of head and biases, in each step")
    schedule: Literal["linear", "cosine", "exponential", "step"] = Field(
        description="decay of the learning rate: linear and cosine to zero, the others by --decay-rate"
    )
    decay_rate: float = Field(
        0.1, gt=0, le=1, description="factor of the learning rate every --decay-epochs, at once (step) or gradually"
    )
    decay_epochs: float | None = Field(
        None, gt=0, le=MAX_EPOCHS, description="epochs for a change by --decay-rate; default a third of the epochs"
    )
    warmup_epochs: int = Field(0, ge=0, description="number of initial epochs of linear warm-up to --lr")
    clip_grad: float = Field(0.0, ge=0, description="gradient clipping: maximum norm; 0: none")
    ema: float = Field(
        0.0, ge=0, lt=1, description="decay of the moving average of the weights that is validated and kept; 0: none"
    )
    label_smoothing: float = Field(ge=0, le=1, description="fraction of the target spread over all classes")
    balance: Literal["none", "loss", "sampling"] = Field(
        "none", description="for classes of unequal size: weight them in the loss, or sample all equally often"
    )
    patience: int = Field(ge=0, description="epochs without improvement on validation before stopping; 0: never")
    early_stopping: Literal["accuracy", "loss"] = Field(
        description="validation metric that decides when to stop, and which epoch is kept"
    )
    crop: int = Field(ge=0, le=31, description="random-crop padding, in pixels")
    crop_mode: Literal["reflect", "zeros"] = Field(description="what fills the padding of random crops")
    crop_scale: float | None = Field(
        None,
        ge=0.01,
        le=1,
        description="random resized crops: minimum fraction of the area; 1: random crops instead; default 1, or 0.35 "
        "above 64x64 pixels",
    )
    flip: Literal["none", "random", "alternating"] = Field(description="horizontal flips, random or every other epoch")
    cutout: int = Field(ge=0, description="Cutout size, in pixels; at most half the image size")
    jitter: float = Field(ge=0, le=1, description="largest relative change of brightness, contrast and saturation")
    auto_augment: Literal["none", "randaugment", "trivialaugment"] = Field(
        "none", description="automatic augmentation by torchvision, drawn once for every four images"
    )
    mixup: float = Field(0.0, ge=0, description="mixup: alpha of the Beta distribution, such as 0.2; 0: none")
    cutmix: float = Field(
        0.0, ge=0, description="CutMix: alpha, such as 1; with mixup too, each batch gets one of them; 0: none"
    )
    small_epochs: int = Field(ge=0, description="progressive resizing: number of initial epochs at --small-size")
    small_size: int | None = Field(None, ge=9, description="image size in --small-epochs; default three quarters")
    hard_epochs: int = Field(ge=0, description="hard-example mining: number of final epochs on the hardest images")
    hard_share: float = Field(0.64, ge=0.05, le=1, description="fraction of the images that --hard-epochs train on")

    def __init__(self, /, **settings):
        recipe = known_name("recipe", known_spelling("recipe", str(settings.get("recipe", "fast"))), RECIPES)
        try:
            super().__init__(**{**RECIPES[recipe], **settings})
        except ValidationError as error:
            _raise_sentence(error)
        if self.seed + self.seeds > _SEEDS:
            raise UserError(f"--seed {self.seed} with --seeds {self.seeds} exceeds the largest seed, {_SEEDS - 1}")
        for name in ("mixup", "cutmix"):  # torch draws wrong values for less: mostly one half, where most are 0 or 1
            if 0 < getattr(self, name) < _LEAST_ALPHA:
                raise UserError(f"{flag(name)} must be 0 or at least {_LEAST_ALPHA}, not {getattr(self, name):g}")
        if self.optimizer == "muon" and self.model not in _MUON_MODELS:
            cause = "--optimizer muon" if "optimizer" in settings else f"--recipe {recipe}"
            raise UserError(f"muon is for {' and '.join(_MUON_MODELS)} only: leave out {cause} for {self.model}")
        if self.is_pretrained and (self.model in _OWN_MODELS or (":" in self.model and not self.weights)):
            cause = "a network of torchvision or timm with --model" if self.model in _OWN_MODELS else "its --weights"
            raise UserError(f"there are no pretrained weights for {self.model}: name {cause}")
        if self.small_epochs and self.model not in _ANY_SIZE_MODELS:
            models = ", ".join(_ANY_SIZE_MODELS)
            raise UserError(f"--small-epochs is for {models}: use --small-epochs 0 with {self.model}")

    @field_validator("*", mode="before")
    @classmethod
    def _check_value(cls, value: Any, info: ValidationInfo) -> Any:
        """Take known names in any case; refuse true for 1, which pydantic would accept, and what cannot be a path."""
        name, value = str(info.field_name), os.fspath(value) if isinstance(value, os.PathLike) else value
        is_flag = cls.model_fields[name].annotation is bool
        if (isinstance(value, bool) and not is_flag) or (isinstance(value, str) and not _is_text(value)):
            raise UserError(f"{flag(name)} does not take {value!a}")
        if not isinstance(value, str):
            return value
        if name == "mirror":
            check_addresses(value.split())
        return os.path.expanduser(value) if name in _PATHS and value[0] == "~" else known_spelling(name, value)

    @classmethod
    def create(cls, given: Mapping[str, Any]) -> "Config":
        """Return the recipe's settings, overridden by the given ones.

        given: field name -> value, or its text; None is ignored. A model without a recipe brings its recipe,
        weights bring `finetune`.
        Raises UsageError for text that is not a number, UserError for other mistakes.
        """
        settings = {name: value for name, value in given.items() if value is not None}
        if settings.get("weights") or str(settings.get("pretrained", "no")).lower() not in NO:
            settings.setdefault("recipe", "finetune")
        elif "model" in settings:
            model = known_spelling("model", str(settings["model"]))
            recipe = next((name for name, values in RECIPES.items() if values["model"] == model), "plain")
            settings.setdefault("recipe", "plain" if recipe == "finetune" else recipe)
        settings.setdefault("data_dir", shared_data_dir() or display_path(HOME / "data"))
        settings.setdefault("output_dir", display_path(HOME / "outputs"))
        config = cls(**settings)
        preset = RECIPES[config.recipe]
        if "lr" not in settings:
            config.require_lr_for(preset["optimizer"], config.recipe)
        return config

    @classmethod
    def from_file(cls, content: Mapping[str, Any]) -> "Config":
        """Return the settings of a run's config.json; what an older file lacks comes from its recipe.

        Raises UserError for an invalid file, and for one that lacks a setting whose default could be wrong.
        """
        if missing := [name for name in _REQUIRED if content.get(name) is None]:
            raise UserError(f"it lacks {', '.join(missing)}")
        return cls(**content)

    def replace(self, **changes: Any) -> "Config":
        """Return a copy with other values, validated."""
        return Config(**{**self.model_dump(), **changes})

    def require_lr_for(self, optimizer: str, source: str) -> None:
        """Raise UserError if the learning rate, which `source` has for that optimizer, does not suit this one."""
        if _LR_KIND.get(self.optimizer) != _LR_KIND.get(optimizer):
            problem = f"--optimizer {self.optimizer} needs --lr, too"
            raise UserError(f"{problem}: {self.lr:g} of {source} is for {optimizer}")

    @property
    def is_pretrained(self) -> bool:
        """Whether the network starts from weights that have been trained before."""
        return self.pretrained or self.weights is not None

    @property
    def title(self) -> str:
        """The recipe, and the network if it is not the recipe's."""
        return self.recipe if self.model == RECIPES[self.recipe]["model"] else f"{self.recipe} {self.model}"

    @property
    def crops_resized(self) -> bool:
        """Whether training crops parts of random sizes, and resizes them, instead of shifting images."""
        return self.crop_scale is not None and self.crop_scale < 1

    @property
    def unused(self) -> set[str]:
        """The settings that have no effect with the other settings."""
        is_unused = {
            "pretrained": self.weights is not None,
            "body_lr": not self.is_pretrained,
            "momentum": self.optimizer in ("adam", "adamw"),
            "decay_rate": self.schedule in ("linear", "cosine"),
            "decay_epochs": self.schedule in ("linear", "cosine"),
            "patience": not self.val_size,
            "early_stopping": not self.val_size,
            "crop": self.crops_resized,
            "crop_mode": not self.crop or self.crops_resized,
            "small_size": not self.small_epochs,
            "hard_share": not self.hard_epochs,
        }
        return {name for name, holds in is_unused.items() if holds}


FIELDS = tuple(Config.model_fields)


def shared_data_dir() -> str:
    """Return the folder that the environment variable CIFAR_DATA_DIR names, or nothing."""
    return os.path.expanduser(os.environ.get("CIFAR_DATA_DIR", ""))


def allow_model(name: str | None) -> None:
    """Allow the code of package.module:factory to be imported, because the user, and not only a file, names it."""
    if name:
        allowed_models.add(name)


def epoch_limits(epochs: int) -> dict[str, int]:
    """Return how many epochs may be small (the last ones must see the full size), warm up, or leave out easy images."""
    return {"small_epochs": epochs * 2 // 3, "warmup_epochs": epochs // 2, "hard_epochs": epochs // 4}


def flag(name: str) -> str:
    """Return the flag of a setting: `val_size` -> `--val-size`."""
    return "--" + name.replace("_", "-")


def _choices(name: str) -> tuple[str, ...]:
    """Return the values of a setting that takes nothing else."""
    if name == "recipe":
        return tuple(RECIPES)
    annotation = Config.model_fields[name].annotation
    return get_args(annotation) if get_origin(annotation) is Literal else ()


def help_text(name: str) -> str:
    """Return a setting's description, choices and default, and the recipes with another default."""
    field = Config.model_fields[name]
    parts = [str(field.description)]
    if choices := _choices(name):
        parts.append(f"one of {', '.join(choices)}")
    default = _FAST.get(name, None if field.is_required() else field.default)
    if default is not None:
        by_recipe = {recipe: values.get(name, default) for recipe, values in RECIPES.items()}
        others = [f"{recipe}: {value}" for recipe, value in by_recipe.items() if value != default]
        parts.append(f"default {default}" + (f" ({', '.join(others)})" if others else ""))
    return "; ".join(parts)


def check_addresses(urls: list[str]) -> None:
    """Raise UsageError unless all are http or https addresses; they are not shown, as they may hold a password."""
    if not all(map(_ADDRESS.fullmatch, urls)):
        raise UsageError("--mirror and CIFAR_MIRROR take addresses that begin with http:// or https://")


def resolve(config: Config, dataset, processes: int = 1) -> tuple[Config, list[str]]:
    """Fit the settings to a data.Dataset; returns them, and a sentence for each that had to change or has no effect.

    Raises UserError for a validation size that does not fit, and for a batch smaller than the number of processes.
    """
    val_size, image_size = _val_size(config, dataset), dataset.train.image_size
    size = f"{image_size}x{image_size}"
    most = epoch_limits(config.epochs if config.minutes is None else MAX_EPOCHS)  # else the planned ones are limited
    limits = {
        "small_epochs": (most["small_epochs"], "at most two thirds of the epochs may use small images"),
        "warmup_epochs": (most["warmup_epochs"], "warm-up may take at most half of the epochs"),
        "hard_epochs": (most["hard_epochs"], "at most a quarter of the epochs may leave out easy images"),
        "batch_size": _batch_limit(config.batch_size, len(dataset.train) - val_size, image_size, processes),
        "small_size": (image_size, f"the images are {size}"),
        "cutout": (image_size // 2, f"at most half of {size} images may be cut out"),
    }
    changes = {name: limit for name, limit in limits.items() if (getattr(config, name) or 0) > limit[0]}
    if not dataset.can_flip and config.flip != "none":
        changes["flip"] = ("none", f"a flipped image of {dataset.name} may show another class")
    sentences = [
        f"{flag(name)} {value} instead of {getattr(config, name)}: {reason}"
        for name, (value, reason) in changes.items()
    ]
    resolved = {"dataset": dataset.key, "val_size": val_size, "small_size": config.small_size or image_size * 3 // 4}
    resolved["crop_scale"] = config.crop_scale or (1.0 if image_size <= _SMALL else _CROP_SCALE)
    resolved["labels"] = config.labels and os.path.realpath(config.labels)
    resolved["weights"] = config.weights and os.path.abspath(config.weights)
    resolved |= {name: value for name, (value, _) in changes.items()}
    config = config.replace(**resolved)
    preset = {**RECIPES[config.recipe], "small_size": image_size * 3 // 4}
    for name in sorted(config.unused - {"pretrained"}):
        if getattr(config, name) != preset.get(name, Config.model_fields[name].default):
            sentences.append(f"{flag(name)} {getattr(config, name)} has no effect with the other settings")
    return config, sentences


def _val_size(config: Config, dataset) -> int:
    """Return how many images are for validation. Raises UserError for a size that does not fit."""
    images, classes, own_val = len(dataset.train), len(dataset.classes), dataset.train.own_val
    # Without early stopping, validation chooses an epoch and a temperature, for which 2,000 images suffice.
    default = max(classes, images // 10 if config.patience else min(images // 10, 2000))
    val_size = (own_val or default) if config.val_size is None else config.val_size
    if own_val and val_size != own_val:
        raise UserError(f"leave out --val-size {val_size}: {dataset.name} has {own_val:,} validation images of its own")
    if val_size and not own_val and not classes <= val_size <= images - classes:
        raise UserError(
            f"--val-size {val_size} does not fit: {dataset.name} has {images:,} training images in {classes:,} "
            f"classes; use 0, or {classes} to {images - classes}"
        )
    return val_size


def _batch_limit(wanted: int, images: int, image_size: int, processes: int) -> tuple[int, str]:
    """Return the largest batch size up to the wanted one that is possible, and what limits it."""
    limits = [(wanted, ""), (max(2, images // _MIN_STEPS), f"an epoch of {images:,} images needs at least 20 steps")]
    if image_size > 32:
        reason = f"a step of {image_size}x{image_size} images needs too much memory"
        limits.append((_MAX_STEP_PIXELS // image_size**2, reason))
    size, reason = min(limits)
    if size < processes:
        raise UserError(f"a step of {size} images is too small for {processes} processes: start at most {size}")
    if remainder := size % processes:
        return size - remainder, reason or f"it must be a multiple of the {processes} processes"
    return size, reason


def known_spelling(name: str, value: str) -> str:
    """Return the value as the setting spells it, if it is a known one in another case or by another name."""
    known = {"model": MODELS, "dataset": DATASETS}.get(name, _choices(name))
    lower = value.lower()
    lower = _ALIASES.get(lower, lower)
    return lower if lower in known and not (name == "dataset" and os.path.exists(value)) else value


def _is_text(value: str) -> bool:
    """Return whether a value is not empty and can be a path, and be written to a file."""
    return bool(value.strip()) and "\0" not in value and value == value.encode(errors="ignore").decode()


def _raise_sentence(error: ValidationError) -> NoReturn:
    """Turn the first of pydantic's errors into a UserError that names flag, value and what is allowed."""
    first = error.errors(include_url=False)[0]
    name, kind, value = str(first["loc"][0]), first["type"], first["input"]
    if kind == "value_error":
        raise first["ctx"]["error"]
    if kind == "extra_forbidden":
        hint = did_you_mean(name, FIELDS) or f"`{PIPELINE} --help` lists them"
        raise UserError(f"unknown setting '{name}': {hint.strip()}")
    if choices := _choices(name):
        known_name(name.replace("_", " "), str(value), choices)
    wording = (_WORDINGS.get(kind) or _WORDINGS[kind.split("_")[0]]).format(**first.get("ctx", {}))
    shown = str(value).strip()[:40]
    if "parsing" in kind:
        raise UsageError(f"{flag(name)} {wording}, not '{shown}'")
    raise UserError(f"{flag(name)} {wording}, not {shown}")
