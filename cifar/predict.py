"""Any picture to a prediction: one decoder and one network behind the command line, a folder and the demo."""

import contextlib
import csv
import glob
import io
import json
import sys
import warnings
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np
import torch
from PIL import Image, ImageOps
from scipy.special import softmax
from torch import Tensor

from cifar import device, evaluate
from cifar.config import UserError, known_name
from cifar.runs import Run, writing

FITS = ("crop", "letterbox")
_MOST_PIXELS = 25_000_000
# What a picture may be. Not EPS, which runs another program, not JPEG 2000, which can take 15 seconds to unpack, and
# not what hardly anybody sends: each decoder is one more that may have a hole.
_FORMATS = ("PNG", "JPEG", "MPO", "GIF", "WEBP", "AVIF", "BMP", "TIFF", "PPM", "ICO")
_WIDE_SIDE = 1000  # pixels, to which wide greyscale is averaged first, as it takes four times the memory
_BATCH = 500  # pictures decoded before the network sees them

Source = Path | bytes | np.ndarray | Image.Image


@dataclass(frozen=True)
class Answer:
    """What came of one picture: the calibrated probabilities (classes,), or the sentence why it was refused."""

    source: str
    probabilities: np.ndarray | None
    refusal: str | None = None


class Predictor:
    """The network of an evaluated run with its classes, ready to answer."""

    def __init__(self, run: Run, device_name: str = "auto"):
        """Raises UserError if the run has no checkpoint or has not been evaluated."""
        if not run.has_metrics:
            raise UserError(f"{run.path.name} has not been evaluated: `invoke evaluate --run {run.path.name}` does it")
        try:
            calibration = run.read("metrics.json")["calibration"]
            self.run = run
            self.classes: tuple[str, ...] = tuple(run.record["dataset"]["classes"])
            self.temperature: float = calibration["temperature"]
            self.threshold: float | None = calibration["threshold"]  # confidence below which it is probably no class
        except KeyError as missing:
            raise UserError(f"{run.path.name} has no {missing} in its files: evaluate it anew") from None
        self.network, content = evaluate.load(run, self.classes)
        self.image_size: int = content["image_size"]
        hardware = device.choose(device_name)
        self.network.to(hardware, memory_format=torch.channels_last)
        self.precision = device.resolve_precision(run.config.precision, hardware)

    def logits(self, images: Tensor) -> Tensor:
        """uint8 images (N, 3, S, S) with S the run's image size -> float32 logits (N, classes) on the CPU."""
        return evaluate.infer(self.network, images, precision=self.precision)

    def probabilities(self, images: Tensor) -> np.ndarray:
        """uint8 images (N, 3, S, S) -> calibrated probabilities (N, classes), float64."""
        return softmax(self.logits(images).double().numpy() / self.temperature, axis=1)

    def is_probably_none(self, probabilities: np.ndarray) -> bool:
        """Whether the most probable class is less so than for all but a few of the validation images."""
        return self.threshold is not None and bool(probabilities.max() < self.threshold)

    def answer(self, sources: Iterable[tuple[str, Source]], fit: str = "crop") -> Iterator[Answer]:
        """An answer for each named picture, in order; one that is refused does not stop the others."""
        known_name("fit", fit, FITS)
        remaining = iter(sources)
        while batch := list(islice(remaining, _BATCH)):
            yield from self._answer_batch(batch, fit)

    def _answer_batch(self, batch: Sequence[tuple[str, Source]], fit: str) -> Iterator[Answer]:
        images, refusals = [], {}
        for index, (_, source) in enumerate(batch):
            try:
                images.append(decode(source, self.image_size, fit))
            except UserError as error:
                refusals[index] = str(error)
        rows = iter(self.probabilities(torch.stack(images)) if images else [])
        for index, (name, _) in enumerate(batch):
            yield Answer(name, None, refusals[index]) if index in refusals else Answer(name, next(rows))


def decode(source: Source, size: int, fit: str = "crop") -> Tensor:
    """A picture as the network takes it: uint8 (3, size, size), upright, on white, square.

    source: a file's path, its bytes, an array (H, W), (H, W, 3) or (H, W, 4) of uint8, or a Pillow image.
    fit: `crop` takes the largest square in the middle; `letterbox` keeps all and fills up with white.
    A picture that has the size already is not resampled. Raises UserError, in one sentence, for what is no
    picture, is damaged, or has over 25 million pixels, which is found out before it is unpacked.
    """
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # Pillow's, on metadata that does not matter here
            with _open(source) as image:
                return _to_tensor(_over_white(_to_square(_to_eight_bits(_upright(image)), size, fit)))
    except UserError:
        raise
    except Image.DecompressionBombError:
        raise UserError(_too_large("over 100")) from None
    except Exception:  # a damaged file makes Pillow's decoders stumble in any way there is
        raise UserError("the picture is damaged or incomplete") from None


def _open(source: Source) -> Image.Image:
    if isinstance(source, Image.Image):
        image = source.copy()
    elif isinstance(source, np.ndarray):
        image = Image.fromarray(source)
    else:
        image = _open_file(io.BytesIO(source) if isinstance(source, bytes) else source)
    if image.width * image.height > _MOST_PIXELS:
        raise UserError(_too_large(f"{image.width * image.height / 1e6:.0f}"))
    return image


def _open_file(file: BinaryIO | Path) -> Image.Image:
    if isinstance(file, Path) and file.is_dir():
        raise UserError("the folder holds no pictures")
    if isinstance(file, Path) and file.exists() and not file.is_file():
        raise UserError("this is not a file")
    try:
        if not (file.stat().st_size if isinstance(file, Path) else len(file.getbuffer())):
            raise UserError("the file is empty")
        Image.init()  # registers the formats that this Pillow was built with
        return Image.open(file, formats=[format for format in _FORMATS if format in Image.OPEN])
    except Image.UnidentifiedImageError:
        raise UserError("the file is not a picture in a format known here, such as PNG, JPEG or WebP") from None
    except (FileNotFoundError, PermissionError) as error:
        raise UserError(f"the file cannot be read: {error.strerror}") from None


def _too_large(megapixels: str) -> str:
    return f"the picture has {megapixels} million pixels, and {_MOST_PIXELS // 10**6} million is the most taken here"


def _upright(image: Image.Image) -> Image.Image:
    """The first frame, turned as the camera's orientation tag says; a tag that cannot be read is passed over."""
    image.load()
    with contextlib.suppress(Exception):  # malformed EXIF raises what its parser happens to stumble over
        ImageOps.exif_transpose(image, in_place=True)
    return image


def _to_eight_bits(image: Image.Image) -> Image.Image:
    """Any mode as L, LA, RGB or RGBA, which are the ones that are resampled well; wide greyscale is rescaled."""
    if image.mode.startswith(("I", "F")):
        return _narrowed(image)
    if "transparency" in image.info or image.mode in ("La", "PA", "RGBa"):
        return image.convert("RGBA")
    return image if image.mode in ("L", "LA", "RGB", "RGBA") else image.convert("RGB")


def _narrowed(image: Image.Image) -> Image.Image:
    """Greyscale of 16 or 32 bits, or float, as 8 bits, on the scale of the narrowest type that holds the values."""
    if image.mode.startswith("I;16"):
        return Image.fromarray((np.asarray(image) >> 8).astype(np.uint8))
    averaged = image.reduce(max(1, min(image.size) // _WIDE_SIDE))
    values = np.nan_to_num(np.asarray(averaged, dtype=np.float32), nan=0.0, posinf=0.0, neginf=0.0)
    low, high = min(0.0, float(values.min())), float(values.max())
    scales = (1.0, 255.0, 65535.0) if image.mode == "F" else (255.0, 65535.0)
    span = next((scale for scale in scales if high <= scale), high) - low
    return Image.fromarray(((values - low) * (255 / span)).astype(np.uint8))


def _to_square(image: Image.Image, size: int, fit: str) -> Image.Image:
    if fit == "letterbox":
        return ImageOps.pad(image, (size, size), Image.Resampling.BICUBIC, color="white")
    return ImageOps.fit(image, (size, size), Image.Resampling.BICUBIC)


def _over_white(image: Image.Image) -> Image.Image:
    if image.mode in ("L", "RGB"):
        return image.convert("RGB")
    white = Image.new("RGBA", image.size, "white")
    return Image.alpha_composite(white, image.convert("RGBA")).convert("RGB")


def _to_tensor(image: Image.Image) -> Tensor:
    return torch.from_numpy(np.array(image)).permute(2, 0, 1)


def find_pictures(names: Sequence[str]) -> list[tuple[str, Source]]:
    """The pictures that files, folders, globs and `-` for standard input name, each with its name.

    A folder gives all its files but the hidden ones, sorted. A name that leads nowhere stays, to be refused in its
    place.
    """
    found: list[tuple[str, Source]] = []
    for name in names:
        if name == "-":
            found.append(("standard input", sys.stdin.buffer.read()))
            continue
        matches = [] if Path(name).exists() else [Path(match) for match in sorted(glob.glob(name, recursive=True))]
        for place in matches or [Path(name)]:
            inside = [path for path in sorted(place.rglob("[!.]*")) if path.is_file()] if place.is_dir() else []
            found += [(str(path), path) for path in inside or [place]]
    return found


def write(path: Path, answers: Sequence[Answer], predictor: Predictor) -> None:
    """Answers as .csv or .json: picture, predicted class, confidence, whether it is probably none, or the refusal."""
    rows = [_row(answer, predictor) for answer in answers]
    with writing(path), path.open("w", newline="", encoding="utf-8") as file:
        if path.suffix == ".json":
            json.dump(rows, file, indent=2)
            return
        columns = ["picture", "predicted", "confidence", "probably_none", "refusal", *predictor.classes]
        writer = csv.DictWriter(file, columns, restval="")
        writer.writeheader()
        writer.writerows(rows)


def _row(answer: Answer, predictor: Predictor) -> dict[str, Any]:
    if answer.probabilities is None:
        return {"picture": answer.source, "refusal": answer.refusal}
    shares = [round(float(share), 6) for share in answer.probabilities]
    winner = int(answer.probabilities.argmax())
    return {
        "picture": answer.source,
        "predicted": predictor.classes[winner],
        "confidence": shares[winner],
        "probably_none": predictor.is_probably_none(answer.probabilities),
        **dict(zip(predictor.classes, shares)),
    }
