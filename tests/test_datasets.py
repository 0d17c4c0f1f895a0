import dataclasses
import hashlib
import shutil
import tarfile
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
import torchvision.datasets
from PIL import Image

from cifar import config, datasets
from cifar.download import ARCHIVES
from cifar.errors import UserError
from conftest import as_nobody


def test_digits_are_scikit_learns_1797_scans_as_rgb(digits):
    assert (digits.train.images.shape, digits.test.images.shape) == ((1437, 3, 32, 32), (360, 3, 32, 32))
    assert (digits.train.images.dtype, int(digits.train.images.max())) == (torch.uint8, 255)
    assert set(digits.test.labels.tolist()) == set(range(10))


def assert_equals_torchvision(dataset: datasets.Dataset, parser: type, folder: Path) -> None:
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
    archive.parent.mkdir()
    with tarfile.open(archive, "w:gz") as tar:
        tar.add(small_cifar10, "cifar-10-batches-py")
    content = archive.read_bytes()
    facts = {"size": len(content), "sha256": hashlib.sha256(content).hexdigest()}
    monkeypatch.setitem(ARCHIVES, "cifar10", dataclasses.replace(ARCHIVES["cifar10"], **facts))
    renamed = shutil.copytree(small_cifar10, tmp_path / "renamed")
    for path in (small_cifar10.parent, small_cifar10, renamed, archive, archive.parent):
        dataset, note = datasets.find("cifar10", str(path))
        assert (dataset.name, dataset.can_flip, note) == ("cifar10", True, None)
        assert_equals_torchvision(dataset, torchvision.datasets.CIFAR10, small_cifar10)
        dataset.verify()


def test_cifar100_is_read_with_its_fine_classes_and_a_damaged_file_is_named_before_training(small_cifar100):
    dataset = datasets.find("cifar100", str(small_cifar100.parent))[0]
    assert_equals_torchvision(dataset, torchvision.datasets.CIFAR100, small_cifar100)
    (small_cifar100 / "test").write_bytes(b"rubbish")
    with pytest.raises(UserError, match="cifar-100-python/test is damaged"):
        dataset.verify()


def test_the_training_split_is_read_without_the_test_file(small_cifar10):
    expected = datasets.find("cifar10", str(small_cifar10))[0].train.sha256()
    (small_cifar10 / "test_batch").unlink()
    dataset = datasets.find("cifar10", str(small_cifar10))[0]
    assert dataset.train.sha256() == expected
    with pytest.raises(UserError, match="test_batch is missing"):
        _ = dataset.test


def test_without_a_network_auto_uses_digits_and_cifar10_says_where_to_put_the_archive(tmp_path, monkeypatch):
    unreachable = dataclasses.replace(ARCHIVES["cifar10"], urls=("http://127.0.0.1:9/x",))
    monkeypatch.setitem(ARCHIVES, "cifar10", unreachable)
    dataset, note = datasets.find("auto", str(tmp_path))
    assert dataset.name == "digits"
    assert note.startswith("This is not CIFAR-10 but scikit-learn's digits, which need no download: cannot download")
    with pytest.raises(UserError, match=r"\(127\.0\.0\.1:9: Connection refused\); put the archive into .*--data-dir"):
        datasets.find("cifar10", str(tmp_path))


def test_a_damaged_cifar10_is_not_replaced_by_digits(small_cifar10):
    (small_cifar10 / "data_batch_3").write_bytes(b"rubbish")
    dataset = datasets.find("auto", str(small_cifar10))[0]
    with pytest.raises(UserError, match="data_batch_3 is damaged"):
        _ = dataset.train


def test_a_data_folder_that_may_not_be_read_is_named(tmp_path):
    (tmp_path / "data").mkdir(mode=0)
    with as_nobody(), pytest.raises(UserError, match=r"^cannot write .*data: Permission denied$"):
        datasets.find("auto", str(tmp_path / "data"))


@pytest.mark.parametrize("name", ["cifra10", "no/such/folder", "", "~nobody-of-this-name/x"])
def test_an_unknown_dataset_is_refused_with_the_known_ones(name):
    with pytest.raises(UserError, match=rf"^unknown dataset '{name}': .*auto, cifar10, .* folder of images$"):
        datasets.find(name, "nowhere")


@pytest.fixture
def image_folder(digits, tmp_path) -> Path:
    """150 training and 150 test images of digits, in folders that have their labels as names."""
    for part in ("train", "test"):
        for number, (image, label) in enumerate(zip(*vars(getattr(digits, part)[:150]).values())):
            path = tmp_path / "my digits" / part / str(int(label)) / f"{number}.png"
            path.parent.mkdir(parents=True, exist_ok=True)
            Image.fromarray(image.permute(1, 2, 0).numpy()).save(path)
    return tmp_path / "my digits"


def test_a_dataset_saved_as_a_folder_has_the_same_images_and_labels(digits, image_folder, tmp_path):
    dataset, note = datasets.find(str(image_folder), str(tmp_path / "cache"))
    assert (dataset.name, dataset.key, dataset.classes, note) == ("my digits", str(image_folder), digits.classes, None)
    for part in ("train", "test"):
        found, expected = (
            sorted(zip(split.labels.tolist(), split.images.flatten(1).tolist()))
            for split in (getattr(dataset, part), getattr(digits, part)[:150])
        )
        assert found == expected


def test_the_images_of_a_folder_are_not_cached_in_a_shared_data_folder(image_folder, tmp_path, monkeypatch):
    monkeypatch.setenv("CIFAR_DATA_DIR", str(tmp_path / "shared"))
    monkeypatch.setattr(datasets, "PROJECT", tmp_path / "project")
    datasets.find(str(image_folder), str(tmp_path / "shared"))
    assert not (tmp_path / "shared").exists()
    assert len(list((tmp_path / "project" / "data" / "decoded").iterdir())) == 1


def test_a_folder_that_was_moved_is_found_by_data_dir(image_folder, tmp_path):
    settings = config.Config(dataset=str(image_folder), data_dir=str(tmp_path / "cache"))
    image_folder.rename(tmp_path / "moved")
    with pytest.raises(UserError, match="unknown dataset"):
        datasets.of_run(SimpleNamespace(config=settings), None)
    assert datasets.of_run(SimpleNamespace(config=settings), str(tmp_path / "moved")).key == str(tmp_path / "moved")


def test_show_dataset_lists_the_splits_and_escapes_names(digits, capsys):
    datasets.show_dataset(dataclasses.replace(digits, key="/data/[red]\x1b[31m", classes=("[bold]a", "b\x1b[0m")))
    shown = capsys.readouterr().out
    assert "\x1b" not in shown
    for part in ("[red]", "[bold]a, b", "1,437", "360", "32x32", digits.test.sha256()[:16]):
        assert part in shown
