"""The settings of a run: one frozen Config, the recipes, and reading either from text."""

import dataclasses
import math
import os
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from types import MappingProxyType
from typing import Any, get_args, get_type_hints

from cifar.errors import UsageError, UserError, known_name, short

PROJECT = Path(__file__).resolve().parent.parent


def _option(default: Any, help: str, *, known: tuple[str, ...] = (), others: str = "", least=None, most=None) -> Any:
    """A field of Config with its help text and the values that it takes; others: what it takes beside the known."""
    metadata = {"help": help, "known": known, "others": others, "least": least, "most": most}
    return dataclasses.field(default=default, metadata=metadata)


DATASETS = ("auto", "cifar10", "cifar100", "digits")
A_FOLDER = "the path of a folder of pictures"
DEVICES = ("auto", "cpu", "cuda", "mps")
MODELS = ("whitened", "whitened_deep", "simple", "convnet", "mlp", "resnet18")
_LAST_SEED = 2**32 - 1
MOST_EPOCHS = 100_000
OTHER_MODELS = "a classification network of torchvision, or package.module:factory"
_MUON_MODELS = ("whitened", "whitened_deep")  # whose layers its rates are for
_ANY_SIZE_MODELS = (*_MUON_MODELS, "convnet", "resnet18")  # the others are built for images of one size


@dataclass(frozen=True, kw_only=True)
class Config:
    """Every setting of a run. The defaults are the recipe `fast`; RECIPES names the others.

    Raises UserError for a value that is unknown or out of range.
    """

    recipe: str = _option("fast", "named settings to start from; plain is for any network that --model names")
    dataset: str = _option(
        "auto", "images; auto is cifar10, or digits where that cannot be had", known=DATASETS, others=A_FOLDER
    )
    data_dir: str = _option(
        "data", "folder or .tar.gz with CIFAR-10 or CIFAR-100; CIFAR_DATA_DIR in the environment stands for it"
    )
    image_size: int = _option(
        32, "side in pixels to which the pictures of a folder are brought, cropped to a square", least=32, most=128
    )
    mirror: str | None = _option(
        None,
        "address of the dataset's archive, or with / at its end of a folder that has it, asked before the official "
        "one; CIFAR_MIRROR in the environment adds one too",
    )
    output_dir: str = _option("outputs", "folder that receives a directory per run")
    device: str = _option("auto", "where to compute; auto takes cuda, then mps, then cpu", known=DEVICES)
    precision: str = _option(
        "auto",
        "number format of the network; auto is bfloat16 where the hardware has it",
        known=("auto", "bfloat16", "float32"),
    )
    seed: int = _option(0, "seed of the split, the weights, the order and the augmentation", least=0, most=_LAST_SEED)
    seeds: int = _option(
        1,
        "runs, with seed, seed + 1 and so on, in one directory; once interrupted, the same command goes on with it",
        least=1,
    )
    val_size: int | None = _option(
        None, "images held out for validation (a tenth of the training split: 5000 of CIFAR-10)", least=0
    )

    model: str = _option("whitened", "network", known=MODELS, others=OTHER_MODELS)
    epochs: int = _option(13, "passes over the training images", least=1, most=MOST_EPOCHS)
    minutes: float | None = _option(
        None,
        "time that the training may take on this machine, whose speed some steps show; chooses the epochs, whatever "
        "--epochs says",
        least=0.0,
        most=1_000_000,
    )
    batch_size: int = _option(
        2000,
        "images a step; lowered where an epoch would have under 20 steps, or a step over 2 million pixels",
        least=2,
    )
    optimizer: str = _option("muon", "update rule", known=("muon", "adam", "sgd"))
    lr: float = _option(
        0.24,
        "peak learning rate; muon's own, as the head and the biases that sgd trains beside it keep theirs",
        least=0.0,
    )
    momentum: float = _option(0.6, "momentum of muon, or of sgd", least=0.0, most=1.0)
    weight_decay: float = _option(
        0.004,
        "weight decay as adam and sgd define it; with muon, the share that the head and the biases lose in a step",
        least=0.0,
    )
    schedule: str = _option("linear", "decay of the learning rate to zero, step by step", known=("linear", "cosine"))
    label_smoothing: float = _option(0.2, "share of the target spread over all classes", least=0.0, most=1.0)
    patience: int = _option(0, "epochs without a better validation accuracy before training stops; 0 never", least=0)
    crop: int = _option(2, "pixels by which a training image is shifted at most", least=0, most=31)
    crop_mode: str = _option("reflect", "what a shift uncovers", known=("reflect", "zeros"))
    flip: str = _option(
        "alternating", "mirroring of training images; none of digits", known=("none", "random", "alternating")
    )
    cutout: int = _option(
        0, "side in pixels of the square of each training image that is blotted out, at most half its side", least=0
    )
    jitter: float = _option(0.0, "largest change of brightness, contrast and saturation", least=0.0, most=1.0)
    small_epochs: int = _option(7, "first epochs that train on shrunken images, at most two thirds of all", least=0)
    small_size: int | None = _option(
        None, "side of the shrunken images, in pixels; default three quarters of the whole ones'", least=9
    )
    hard_epochs: int = _option(
        3, "last epochs that train only on the images whose losses were highest, at most a quarter of all", least=0
    )
    hard_share: float = _option(0.64, "share of the training images that these epochs take", least=0.05, most=1.0)

    def __post_init__(self):
        for field in dataclasses.fields(self):
            check(field.name, getattr(self, field.name))
        known_name("recipe", self.recipe, RECIPES)
        if self.seed + self.seeds - 1 > _LAST_SEED:
            raise UserError(f"--seed {self.seed} with --seeds {self.seeds} goes beyond {_LAST_SEED}")
        if self.optimizer == "muon" and self.model not in _MUON_MODELS:
            raise UserError(f"muon's rates are for {' and '.join(_MUON_MODELS)}: {self.model} takes adam or sgd")
        if self.small_epochs and self.model not in _ANY_SIZE_MODELS:
            raise UserError(f"{self.model} takes images of one size: --small-epochs must be 0")

    @property
    def title(self) -> str:
        """The recipe, and the network where it is another than the recipe's."""
        own = RECIPES[self.recipe].get("model", Config.model)
        return self.recipe if self.model == own else f"{self.recipe} {self.model}"

    @classmethod
    def create(cls, given: Mapping[str, Any]) -> "Config":
        """The recipe's settings with the `given` ones laid over them.

        given: field name -> value, where a string is read as the field's type and None is not given. A model without
        a recipe brings its own, which for the networks from elsewhere is `plain`.
        Raises UsageError for text that cannot be read, UserError for a value out of range.
        """
        settings = {name: read(name, value) for name, value in given.items() if value is not None}
        own = {values.get("model", cls.model): name for name, values in reversed(RECIPES.items()) if name != "plain"}
        default = own.get(settings["model"], "plain") if "model" in settings else cls.recipe
        recipe = known_name("recipe", settings.get("recipe", default), RECIPES)
        settings.setdefault("data_dir", os.environ.get("CIFAR_DATA_DIR") or short(PROJECT / cls.data_dir))
        settings.setdefault("output_dir", short(PROJECT / cls.output_dir))
        return cls(**{"recipe": recipe, **RECIPES[recipe], **settings})


_CONVNET = {
    "epochs": 20,
    "batch_size": 64,
    "optimizer": "adam",
    "lr": 4e-3,
    "weight_decay": 0.0,
    "schedule": "cosine",
    "label_smoothing": 0.0,
    "patience": 5,
    "crop": 4,
    "crop_mode": "zeros",
    "flip": "random",
    "small_epochs": 0,
    "hard_epochs": 0,
}

# A recipe is what it changes of Config's defaults. README.md has what each was measured to reach.
RECIPES: Mapping[str, Mapping[str, Any]] = MappingProxyType(
    {
        # Jordan 2024 (arXiv:2404.00498) and its Muon successor, with small images first and the hardest ones last.
        "fast": {},
        # Its wide, deep form, as Jordan's airbench96 has it, with Muon; for a GPU, or an hour and a half.
        "best": {
            "model": "whitened_deep",
            "epochs": 40,
            "small_epochs": 16,
            "hard_epochs": 0,
            "crop": 4,
            "cutout": 12,
        },
        # The SimpleCNN of H4ph4z4rdz/cv-image-classifier.
        "simple": {
            **_CONVNET,
            "model": "simple",
            "epochs": 40,
            "lr": 1e-3,
            "weight_decay": 1e-4,
            "jitter": 0.2,
        },
        # The network and augmentation of ansonnchan/cifar10-image-classification; his rate of 1e-3, halved every ten
        # epochs, left it at 75.7% of validation, and 1e-3 with cosine decay at the same.
        "convnet": {**_CONVNET, "model": "convnet"},
        # A baseline without convolutions. At 1e-3 it stops learning at 32%.
        "mlp": {**_CONVNET, "model": "mlp", "lr": 3e-4},
        # He et al. 2015 with the settings of kuangliu/pytorch-cifar. For a GPU.
        "resnet18": {
            **_CONVNET,
            "model": "resnet18",
            "epochs": 200,
            "batch_size": 128,
            "optimizer": "sgd",
            "lr": 0.1,
            "momentum": 0.9,
            "weight_decay": 5e-4,
            "patience": 0,
        },
        # For the networks from elsewhere, of which nothing is known.
        "plain": {**_CONVNET, "epochs": 30, "batch_size": 128, "lr": 1e-3, "patience": 10},
    }
)


def most_small_epochs(epochs: int) -> int:
    """How many of them may train on shrunken images, as the last ones have to show what is judged."""
    return epochs * 2 // 3


def most_hard_epochs(epochs: int) -> int:
    """How many of them may leave out what is easy, as all images have to be learned before."""
    return epochs // 4


def flag(name: str) -> str:
    """The command line's spelling of a field: `val_size` -> `--val-size`."""
    return "--" + name.replace("_", "-")


def help_text(name: str) -> str:
    """A field's help, the values that it takes and its default in each recipe."""
    field = _FIELDS[name]
    known = tuple(RECIPES) if name == "recipe" else field.metadata["known"]
    others = field.metadata["others"]
    parts = [field.metadata["help"]]
    if known:
        parts.append("one of " + ", ".join(known) + (f", or {others}" if others else ""))
    if field.default is not None:
        others = [f"{recipe} {changed[name]}" for recipe, changed in RECIPES.items() if name in changed]
        parts.append("default " + ", ".join([str(field.default), *others]))
    return "; ".join(parts)


def read(name: str, value: Any) -> Any:
    """`value` as the type of the field `name`; a string is parsed. Raises UsageError if it cannot be."""
    if not isinstance(value, str):
        return value
    try:
        return _kind(name)(value)
    except ValueError:
        raise UsageError(f"{flag(name)} takes {_KINDS[_kind(name)]}, not '{value}'") from None


_KINDS = {int: "a whole number", float: "a number", str: "a text"}


def _kind(name: str) -> type:
    """The type of a field's values, None aside."""
    declared = get_type_hints(Config)[name]
    return next(kind for kind in (get_args(declared) or (declared,)) if kind is not type(None))


def check(name: str, value: Any) -> None:
    """Raise UserError unless the field `name` takes the value."""
    field = _FIELDS[name]
    known, least, most = (field.metadata[key] for key in ("known", "least", "most"))
    if value is None and field.default is None:
        return
    kind = _kind(name)
    if isinstance(value, bool) or not isinstance(value, (int, float) if kind is float else kind):
        raise UserError(f"{flag(name)} takes {_KINDS[kind]}, not {value!r}")
    if known and not field.metadata["others"]:  # what is open is looked up where it is used
        known_name(name, value, known)
    if kind is str:
        return _check_text(name, value)
    in_range = (least is None or value >= least) and (most is None or value <= most)
    if not (in_range and -math.inf < value < math.inf):
        bounds = f"from {least} to {most}" if most is not None else f"at least {least}"
        raise UserError(f"{flag(name)} must be {bounds}, not {value}")


def _check_text(name: str, text: str) -> None:
    """Raise UserError for what no file can be called, as a file of settings may hold it."""
    try:
        encoded = os.fsencode(text)
    except UnicodeEncodeError:
        encoded = b"\0"
    if b"\0" in encoded:
        raise UserError(f"{flag(name)} takes no {text!a}")


_FIELDS = {field.name: field for field in dataclasses.fields(Config)}
FIELDS = tuple(_FIELDS)
PLACES = ("data_dir", "mirror", "output_dir")  # the fields that say where, and not what, a run is
RESUME_HELP = "go on with a run that was interrupted, failed or killed: its directory, or its name in --output-dir"
