import dataclasses
import runpy
import shutil
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
import torchvision.datasets
from PIL import Image

from cifar import config, datasets, download, folder, pipeline
from cifar.data import Dataset, Split
from cifar.download import ARCHIVES
from cifar.errors import UserError
from conftest import as_nobody, pack_cifar10, quick_config
from image_sets import ImageSet


def test_digits_are_scikit_learns_1797_scans_as_rgb(digits):
    assert (digits.train.images.shape, digits.test.images.shape) == ((1437, 3, 32, 32), (360, 3, 32, 32))
    assert (digits.train.images.dtype, int(digits.train.images.max())) == (torch.uint8, 255)
    assert set(digits.test.labels.tolist()) == set(range(10))


def assert_equals_torchvision(dataset: Dataset, parser: type, folder: Path) -> None:
    """torchvision's parser is used without its hashes, as the files are small ones."""
    facts = {"_check_integrity": lambda _: True, "meta": parser.meta | {"md5": None}}
    reader = type(parser.__name__, (parser,), facts)
    for part in ("train", "test"):
        split, expected = getattr(dataset, part), reader(folder.parent, train=part == "train")
        assert np.array_equal(split.images.permute(0, 2, 3, 1).numpy(), expected.data)
        assert split.labels.tolist() == expected.targets
    assert list(dataset.classes) == expected.classes


def test_cifar10_is_read_from_its_folder_the_parent_or_the_archive_as_torchvision_reads_it(
    small_cifar10, tmp_path, monkeypatch
):
    archive = tmp_path / "archive" / "cifar-10-python.tar.gz"
    pack_cifar10(small_cifar10, archive, monkeypatch)
    renamed = shutil.copytree(small_cifar10, tmp_path / "renamed")
    for path in (small_cifar10.parent, small_cifar10, renamed, archive, archive.parent):
        dataset = datasets.find("cifar10", str(path))
        assert (dataset.name, dataset.can_flip, dataset.note) == ("cifar10", True, None)
        assert_equals_torchvision(dataset, torchvision.datasets.CIFAR10, small_cifar10)
        dataset.verify()


def test_the_program_of_the_docs_writes_cifar10_as_a_folder_of_images(small_cifar10, tmp_path, monkeypatch):
    monkeypatch.setenv("CIFAR_DATA_DIR", str(small_cifar10))
    runpy.run_path(str(config.PROJECT / "docs" / "example_folders.py"))["cifar10"](tmp_path / "made")
    original = datasets.find("cifar10", str(small_cifar10))
    for part, split in (("train", original.train), ("test", original.test)):
        for number, (image, label) in enumerate(zip(split.images, split.labels)):
            file = tmp_path / "made" / part / original.classes[label] / f"{number:05}.png"
            assert np.array_equal(np.asarray(Image.open(file)), image.permute(1, 2, 0))


def test_cifar100_is_read_with_its_fine_classes_and_a_damaged_file_is_named_before_training(small_cifar100):
    dataset = datasets.find("cifar100", str(small_cifar100.parent))
    assert_equals_torchvision(dataset, torchvision.datasets.CIFAR100, small_cifar100)
    (small_cifar100 / "test").write_bytes(b"rubbish")
    with pytest.raises(UserError, match="cifar-100-python/test is damaged"):
        dataset.verify()


def test_a_file_that_is_called_as_one_of_cifar100s_is_not_taken_for_it(tmp_path):
    (tmp_path / "train").write_text("a script")
    assert download.find(ARCHIVES["cifar100"], tmp_path) is None


def test_a_training_is_prepared_without_the_test_file(small_cifar10, tmp_path):
    expected = datasets.find("cifar10", str(small_cifar10)).train.sha256()
    (small_cifar10 / "test_batch").unlink()
    dataset = datasets.find("cifar10", str(small_cifar10))
    assert dataset.train.sha256() == expected
    pipeline.prepare(quick_config(tmp_path, dataset="cifar10", data_dir=str(small_cifar10)))
    with pytest.raises(UserError, match="test_batch is missing"):
        _ = dataset.test


def test_without_a_network_auto_uses_digits_and_cifar10_says_where_to_put_the_archive(tmp_path, monkeypatch):
    unreachable = dataclasses.replace(ARCHIVES["cifar10"], urls=("http://127.0.0.1:9/x",))
    monkeypatch.setitem(ARCHIVES, "cifar10", unreachable)
    dataset = datasets.find("auto", str(tmp_path))
    assert dataset.note.startswith("This is not CIFAR-10 but scikit-learn's digits, which need no download: cannot")
    with pytest.raises(UserError, match=r"\(127\.0\.0\.1:9: Connection refused\); put the archive into .*--data-dir"):
        datasets.find("cifar10", str(tmp_path))


def test_a_damaged_cifar10_is_not_replaced_by_digits(small_cifar10):
    (small_cifar10 / "data_batch_3").write_bytes(b"rubbish")
    dataset = datasets.find("auto", str(small_cifar10))
    with pytest.raises(UserError, match="data_batch_3 is damaged"):
        _ = dataset.train


def test_a_data_folder_that_may_not_be_read_is_named(tmp_path):
    (tmp_path / "data").mkdir(mode=0)
    with as_nobody(), pytest.raises(UserError, match=r"^cannot write .*data: Permission denied$"):
        datasets.find("auto", str(tmp_path / "data"))


UNKNOWN = {
    "cifra10": "^unknown dataset 'cifra10': did you mean cifar10? .*auto, cifar10, .* folder of images$",
    "": "^unknown dataset '': .* folder of images$",
    "no/such/folder": "^there is no folder no/such/folder, or it may not be read$",
    "x" * 5000: "^unknown dataset",
    "a\0/b": "^there is no folder a\0/b",
    __file__: "test_datasets.py is a file: --dataset takes the path of a folder of images$",
}


@pytest.mark.parametrize("name", UNKNOWN)
def test_what_is_not_a_dataset_is_refused_by_a_run_and_a_check(name):
    for action in (lambda name: datasets.find(name, "nowhere"), datasets.describe):
        with pytest.raises(UserError, match=UNKNOWN[name].replace("?", r"\?")):
            action(name)


@pytest.fixture
def image_folder(tmp_path) -> Path:
    return ImageSet(classes=10, train=15, test=15, names="{}").write(tmp_path / "my digits")


def test_a_folder_is_described_without_decoding_it(image_folder, monkeypatch):
    monkeypatch.setattr(folder, "_write_cache", None)
    assert datasets.describe(str(image_folder)) == "a folder of 10 classes, 300 files"
    assert datasets.describe("digits") == "digits"


def test_the_images_of_a_folder_are_not_cached_where_cifar_is_or_the_images_are(
    image_folder, small_cifar10, tmp_path, monkeypatch
):
    monkeypatch.setenv("CIFAR_DATA_DIR", f"{tmp_path}/./shared/")
    monkeypatch.setattr(datasets, "HOME", tmp_path / "project")
    for place in (tmp_path / "shared", small_cifar10, small_cifar10.parent, image_folder, image_folder / "train"):
        before = set(tmp_path.rglob("*"))
        datasets.find(str(image_folder), str(place))
        made = {path.relative_to(tmp_path).parts[0] for path in set(tmp_path.rglob("*")) - before}
        assert made <= {"project"}
    assert len(list((tmp_path / "project" / "data" / ".decoded").iterdir())) == 1
    monkeypatch.setattr(datasets, "HOME", image_folder / "train")
    with pytest.raises(UserError, match=r"train/data is within the images of .*train: start in another folder, or n"):
        datasets.find(str(image_folder / "train"), str(image_folder / "train"))


def test_runs_are_not_written_among_the_classes_of_a_folder(image_folder):
    for root, place in ((image_folder / "train", "../runs"), (image_folder, "runs")):  # beside train, runs are ignored
        datasets.check_output_dir(config.Config(dataset=str(root), output_dir=str(root / place)))
    for root in (image_folder / "train", image_folder):
        with pytest.raises(UserError, match=r"train/runs is within the images of .*, or name one with --output-dir"):
            datasets.check_output_dir(config.Config(dataset=str(root), output_dir=str(image_folder / "train" / "runs")))


def test_each_class_keeps_a_training_image():
    counts = {"a": 60, "b": 6, "c": 6}
    labels = torch.arange(3).repeat_interleave(torch.tensor(list(counts.values())))
    split = Split(torch.zeros(72, 3, 32, 32, dtype=torch.uint8), labels)
    pets = Dataset(key="pets", classes=tuple(counts), location="", can_flip=True, read=lambda part: split)
    with pytest.raises(UserError, match=r"^--val-size 68 leaves no training image of b, c: lower it$"):
        datasets.resolve(config.Config(dataset="pets", val_size=68, batch_size=2), pets)
    assert datasets.resolve(config.Config(dataset="pets", val_size=48), pets).val_size == 48


def test_a_folder_that_was_moved_is_found_by_data_dir_if_it_has_the_images(image_folder, tmp_path, monkeypatch):
    moved, dataset = tmp_path / "moved", datasets.find(str(image_folder), str(tmp_path / "cache"))
    assert dataset.key == str(image_folder)
    record = SimpleNamespace(train_sha256=dataset.train.sha256())
    settings = config.Config(dataset=str(image_folder), data_dir="elsewhere")
    run = SimpleNamespace(config=settings, dataset=record, path=Path("run"))
    image_folder.rename(moved)
    monkeypatch.chdir(moved.parent)
    monkeypatch.setattr(datasets, "HOME", tmp_path / "project")
    with pytest.raises(UserError, match="my digits is missing: if it was moved, name its new place with --data-dir"):
        datasets.of_run(run, None)
    found = datasets.of_run(run, str(moved))
    assert (found.key, found.name, found.location) == (str(image_folder), "my digits", str(moved))
    assert not Path("elsewhere").exists()
    shutil.copytree(moved, image_folder)
    next(image_folder.glob("train/0/*")).unlink()
    with pytest.raises(UserError, match=r"or train again \(--data-dir is for when .*my digits is missing\)$"):
        datasets.of_run(run, str(moved))
    shutil.rmtree(image_folder)
    record.train_sha256 = "0" * 64
    with pytest.raises(UserError, match="moved are not those that run was trained on: its files have changed, or"):
        datasets.of_run(run, str(moved))


def test_the_home_directory_in_the_variable_of_the_data_is_understood_by_training_and_later(monkeypatch, small_cifar10):
    monkeypatch.setenv("HOME", str(small_cifar10.parent))
    monkeypatch.setenv("CIFAR_DATA_DIR", f"~/{small_cifar10.name}")
    settings = config.Config.create({"dataset": "cifar10"})
    dataset = datasets.find("cifar10", settings.data_dir)
    record = SimpleNamespace(train_sha256=dataset.train.sha256())
    again = datasets.of_run(SimpleNamespace(config=settings, dataset=record, path=Path("run")), None)
    assert again.location == dataset.location


def test_a_table_of_labels_that_was_moved_with_its_folder_is_found_there(image_folder, tmp_path):
    files = [path.relative_to(image_folder) for path in sorted(image_folder.rglob("*.png"))]
    table = image_folder / "labels.csv"
    table.write_text("\n".join(["path,label", *(f"{file},{file.parts[-2]}" for file in files)]))
    cache = str(tmp_path / "cache")
    dataset = datasets.find(str(image_folder), cache, labels=str(table))
    settings = config.Config(dataset=str(image_folder), data_dir=cache, labels=str(table))
    record = SimpleNamespace(train_sha256=dataset.train.sha256())
    moved = image_folder.rename(tmp_path / "moved")
    found = datasets.of_run(SimpleNamespace(config=settings, dataset=record, path=Path("run")), str(moved))
    assert (found.classes, found.location) == (dataset.classes, str(moved))


def test_show_dataset_lists_the_splits_and_escapes_names(digits, capsys):
    names = ("[bold]a", "b\x1b[0m", *"23456789")
    datasets.show_dataset(dataclasses.replace(digits, key="/data/[red]\x1b[31m", classes=names))
    shown = capsys.readouterr().out
    assert "\x1b" not in shown
    for part in ("[red]", "[bold]a, b", "1,437", "360", "32x32", digits.test.sha256()[:16], "[bold]a: 142"):
        assert part in shown


def test_the_sizes_of_all_classes_are_said_in_two_bounded_lines(capsys):
    labels = torch.arange(1000).repeat_interleave(torch.arange(1000) % 7 + 3)
    train = Split(torch.zeros(len(labels), 3, 1, 1), labels, own_val=30)
    splits = {"train": train, "test": train[:6]}
    facts = {"key": "x", "location": "x", "can_flip": True}
    names = tuple(f"c{number}" for number in range(1000))
    datasets.say_class_sizes(Dataset(classes=names, read=splits.__getitem__, **facts))
    starts = "train: 5,997 images (30 of them for validation): c0: 3, ", "test: 6 images: c10: 0, "
    for line, start, end in zip(capsys.readouterr().out.splitlines(), starts, (", c993: 9", ", c1: 3"), strict=True):
        assert (line.startswith(start), ", 990 more classes, " in line, line.endswith(end)) == (True, True, True)
        assert len(line) < 160
    alike = Dataset(classes=("a", "b"), read=lambda _: Split(train.images[:6], labels[:6] % 2), **facts)
    datasets.say_class_sizes(alike)
    assert capsys.readouterr().out == "".join(f"{part}: 6 images: 3 in each class\n" for part in ("train", "test"))
