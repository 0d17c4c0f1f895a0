"""The datasets: CIFAR-10, CIFAR-100, scikit-learn's digits, or a folder of images.

To add a dataset, write a function like `_digits`, call it in `find`, and add its name to config.DATASETS.
"""

import os
import pickle
import warnings
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F

from cifar import config as settings
from cifar import console, device, download, folder
from cifar.config import DATASETS, HOME, IMAGE_FOLDER, Config, shared_data_dir
from cifar.data import Dataset, Split, train_val_split
from cifar.download import ARCHIVES
from cifar.errors import UserError, display_path, known_name, listing
from cifar.runs import Run

# Archive -> the files of each split and the key of their labels, the file of the classes' names and its key.
_BATCHES = tuple(f"data_batch_{number}" for number in range(1, 6))
_CIFAR: Mapping[str, tuple[Mapping[str, Sequence[str]], str, str, str]] = {
    "cifar10": ({"train": _BATCHES, "test": ("test_batch",)}, "labels", "batches.meta", "label_names"),
    "cifar100": ({"train": ("train",), "test": ("test",)}, "fine_labels", "meta", "fine_label_names"),
}


def find(
    name: str, data_dir: str, image_size: int = 32, mirror: str | None = None, labels: str | None = None
) -> Dataset:
    """Find a dataset, or download it.

    name: one of DATASETS, or the path of a folder of images. data_dir: a folder that holds the dataset or receives it
    (see `download.ensure`), and that receives a cache of decoded images. image_size: of a folder's images, in pixels.
    mirror: see `download.addresses`. labels: a CSV file, see `folder.load`. Raises UserError if the dataset is neither
    on disk nor can be downloaded.
    """
    _check_labels(name, labels)
    if image_size != 32 and name in DATASETS:
        raise UserError("--image-size is for folders of images; those of other datasets are 32x32: leave it out")
    if name == "auto":
        try:
            return _cifar("cifar10", Path(data_dir), mirror)
        except download.UnavailableError as error:
            note = f"This is not CIFAR-10 but scikit-learn's digits, which need no download: {error}."
            return replace(_digits(), note=note)
    if name in _CIFAR:
        return _cifar(name, Path(data_dir), mirror)
    if name == "digits":
        return _digits()
    return _folder(name, Path(data_dir), image_size, labels)


def check_output_dir(config: Config) -> None:
    """Raise UserError if runs would be written among the images of a folder, where they would be taken for a class."""
    if config.dataset not in DATASETS and not config.labels:
        _require_elsewhere(_folder_root(config.dataset), config.output_dir, "--output-dir")


def _require_elsewhere(root: Path, path: str | Path, flag: str) -> None:
    """Raise UserError if the path is among the classes of a folder of images."""
    place = Path(os.path.realpath(path))
    if place.is_relative_to(root) and any(map(place.is_relative_to, folder.find_splits(root).values())):
        where = f"{display_path(path)} is within the images of {root}"
        raise UserError(f"{where}: start in another folder, or name one with {flag}")


def of_config(config: Config) -> Dataset:
    """Find the dataset that the settings name, or download it, and print what must not be overlooked."""
    dataset = find(config.dataset, config.data_dir, config.image_size, config.mirror, config.labels)
    if config.dataset in DATASETS and os.path.isdir(config.dataset):
        console.say(f"using the dataset {config.dataset}; for your folder of this name, write ./{config.dataset}")
    console.banner(dataset.note)
    return dataset


def resolve(config: Config, dataset: Dataset) -> Config:
    """Adapt the settings to the dataset and the number of processes, and say what changes."""
    config, changes = settings.resolve(config, dataset, device.world_size())
    for change in changes:
        console.say(change)
    for seed in range(config.seed, config.seed + config.seeds):
        train_set, _ = train_val_split(dataset.train, config.val_size or 0, seed)
        counts = torch.bincount(train_set.labels, minlength=len(dataset.classes)).tolist()
        if missing := [name for name, count in zip(dataset.classes, counts) if not count]:
            raise UserError(f"--val-size {config.val_size} leaves no training image of {listing(missing)}: lower it")
    return config


def describe(name: str, labels: str | None = None) -> str:
    """Describe a dataset in a few words, without downloading or decoding it.

    Raises UserError as `find` does, unless only decoding shows what is wrong.
    """
    _check_labels(name, labels)
    if name in DATASETS:
        return name
    found = folder.list_images(_folder_root(name), _labels_file(labels))
    return f"a folder of {len(found.classes):,} classes, {len(found.files):,} files"


def of_run(run: Run, data_dir: str | None, mirror: str | None = None) -> Dataset:
    """Find the run's dataset in `data_dir`, or else in CIFAR_DATA_DIR, or else where the run found it.

    mirror: as for `find`; the one that the run has saved lacks its password. If the run's folder of images is no longer
    in its place, data_dir is the folder. Raises UserError if it does not have the images that the run was trained on.
    """
    config = run.config
    if config.dataset in DATASETS:
        return find(config.dataset, _archive_dir(run, data_dir), config.image_size, mirror or config.mirror)
    place = config.dataset if os.path.isdir(config.dataset) else data_dir
    if not place:
        raise UserError(f"{config.dataset} is missing: if it was moved, name its new place with --data-dir")
    labels = config.labels
    if labels and place != config.dataset and Path(labels).is_relative_to(config.dataset):  # moved with the folder
        labels = str(Path(place) / Path(labels).relative_to(config.dataset))
    cache = data_dir if data_dir and place != data_dir else _recorded_dir(run)
    dataset = _folder(place, Path(cache), config.image_size, labels)
    if dataset.train.sha256() != run.dataset.train_sha256:
        raise UserError(
            f"the training images of {dataset.location} are not those that {run.path.name} was trained on: its files "
            "have changed, or this version decodes them differently; restore the files, or train again"
            + (f" (--data-dir is for when {place} is missing)" if data_dir and place != data_dir else "")
        )
    return replace(dataset, key=config.dataset)


def needs_download(run: Run, data_dir: str | None) -> bool:
    """Tell whether `of_run` would download the run's dataset."""
    archive, place = ARCHIVES.get(run.config.dataset), Path(_archive_dir(run, data_dir))
    return archive is not None and not (download.find(archive, place) or download.find_file(archive, place))


def _archive_dir(run: Run, data_dir: str | None) -> str:
    """Return where `of_run` looks for the archive of the run's dataset."""
    if given := data_dir or shared_data_dir():
        return given
    archive, places = ARCHIVES.get(run.config.dataset), (_recorded_dir(run), str(HOME / "data"))
    return next((place for place in places if archive and download.find(archive, Path(place))), places[0])


def _recorded_dir(run: Run) -> str:
    """Return the run's data_dir, unless that was relative to another working directory."""
    return run.config.data_dir if os.path.exists(run.config.data_dir) else str(HOME / "data")


def say_class_sizes(dataset: Dataset) -> None:
    """Print how many images each split and each class has; reads both splits."""
    for part, split in (("train", dataset.train), ("test", dataset.test)):
        counts = torch.bincount(split.labels, minlength=len(dataset.classes)).tolist()
        sizes = [f"{name}: {count:,}" for count, name in sorted(zip(counts, dataset.classes))]
        if min(counts) == max(counts):
            sizes = [f"{counts[0]:,} in each class"]
        elif len(sizes) > 10:
            sizes[5:-5] = [f"{len(sizes) - 10:,} more classes"]
        own_val = f" ({split.own_val:,} of them for validation)" if split.own_val else ""
        console.say(f"{part}: {len(split):,} images{own_val}: {', '.join(sizes)}")


def show_dataset(dataset: Dataset) -> None:
    """Print the sizes and hashes of the splits; reads, and so verifies, all of them."""
    splits = {"train": dataset.train, "test": dataset.test}
    columns = {
        "split": list(splits),
        "images": [f"{len(split):,}" for split in splits.values()],
        "size": [f"{split.image_size}x{split.image_size}" for split in splits.values()],
        "classes": [str(len(dataset.classes)) for _ in splits],
        "SHA-256": [split.sha256()[:16] for split in splits.values()],
    }
    console.out.print(console.table(dataset.name, columns))
    console.say(f"location: {dataset.location}")
    console.say(f"classes: {listing(dataset.classes, 10)}")
    say_class_sizes(dataset)


# Each of them


def _cifar(name: str, data_dir: Path, mirror: str | None) -> Dataset:
    """Find or download an archive of pickled dictionaries."""
    files, labels_key, classes_file, classes_key = _CIFAR[name]
    archive = ARCHIVES[name]
    location = download.ensure(archive, data_dir, mirror)

    def unpickle(file: str) -> dict:
        download.verify(archive, location, [file])  # first, because a pickle can run code
        with warnings.catch_warnings():  # NumPy 2.4.0 deprecates how these files of 2009 describe their arrays
            warnings.simplefilter("ignore", np.exceptions.VisibleDeprecationWarning)
            return pickle.loads((location / file).read_bytes(), encoding="latin1")

    def read(part: str) -> Split:
        batches = [unpickle(file) for file in files[part]]
        images = np.concatenate([batch["data"] for batch in batches]).reshape(-1, 3, 32, 32)
        labels = np.concatenate([batch[labels_key] for batch in batches])
        return Split(torch.from_numpy(images), torch.from_numpy(labels).long())

    return Dataset(
        key=name,
        classes=tuple(unpickle(classes_file)[classes_key]),
        location=str(location),
        can_flip=True,
        read=read,
        verify=lambda: download.verify(archive, location),
    )


def _digits() -> Dataset:
    return Dataset(
        key="digits", classes=tuple("0123456789"), location="scikit-learn", can_flip=False, read=_read_digits
    )


def _read_digits(part: str) -> Split:
    """Read scikit-learn's 1,797 scanned digits, 8x8 in 17 greys, as 32x32 RGB; a fixed fifth is the test split."""
    from sklearn.datasets import load_digits
    from sklearn.model_selection import train_test_split

    scans, labels = load_digits(return_X_y=True)
    indices = train_test_split(range(len(labels)), test_size=0.2, stratify=labels, random_state=0)[part == "test"]
    images = torch.from_numpy(scans[indices]).float().view(-1, 1, 8, 8) * (255 / 16)
    images = F.interpolate(images, size=(32, 32), mode="bilinear").round().to(torch.uint8)
    return Split(images.expand(-1, 3, -1, -1).contiguous(), torch.from_numpy(labels[indices]).long())


def _folder(name: str, data_dir: Path, image_size: int, labels: str | None) -> Dataset:
    root = _folder_root(name)
    # Where others look for CIFAR, and among the images themselves, the decoded images would be in the way.
    place, shared = os.path.realpath(data_dir), shared_data_dir()
    is_shared = (shared and place == os.path.realpath(shared)) or Path(place).is_relative_to(root)
    if is_shared or data_dir.is_file() or any(download.find(archive, data_dir) for archive in ARCHIVES.values()):
        data_dir = HOME / "data"
        if not labels:
            _require_elsewhere(root, data_dir, "--data-dir")
    return folder.load(root, image_size, data_dir, _labels_file(labels))


def _check_labels(name: str, labels: str | None) -> None:
    if labels and name in DATASETS:
        raise UserError(f"--labels is for a folder of images: leave it out, or name the folder instead of {name}")


def _labels_file(labels: str | None) -> Path | None:
    return Path(os.path.realpath(labels)) if labels else None


def _folder_root(name: str) -> Path:
    """Return the absolute path of a folder of images. Raises UserError if there is none of that name."""
    if os.path.isdir(name):
        return Path(name).resolve()
    if os.path.exists(name):
        raise UserError(f"{name} is a file: --dataset takes {IMAGE_FOLDER}")
    if "/" in name or os.sep in name:
        raise UserError(f"there is no folder {name}, or it may not be read")
    return Path(known_name("dataset", name, DATASETS, others=IMAGE_FOLDER))  # raises: it is not one of them
