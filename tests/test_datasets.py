import dataclasses
import hashlib
import pickle
import shutil
import tarfile

import numpy as np
import pytest
import torch
from PIL import Image
from torchvision.datasets import CIFAR10, CIFAR100

from cifar import data, datasets
from cifar.archive import ARCHIVES
from cifar.config import Config
from cifar.errors import UserError
from conftest import as_nobody


def test_digits_are_scikit_learns_1797_pictures_as_rgb(digits):
    assert digits.train.images.shape == (1437, 3, 32, 32)
    assert digits.test.images.shape == (360, 3, 32, 32)
    assert digits.train.images.dtype == torch.uint8
    assert digits.train.images.max() == 255
    assert set(digits.test.labels.tolist()) == set(range(10))


def test_the_archives_are_those_that_torchvision_fetches_and_checks():
    for archive, reader in ((ARCHIVES["cifar10"], CIFAR10), (ARCHIVES["cifar100"], CIFAR100)):
        assert (archive.name, archive.folder, archive.urls[0]) == (reader.filename, reader.base_folder, reader.url)
        checked = [(reader.meta["filename"], reader.meta["md5"]), *reader.train_list, *reader.test_list]
        assert list(archive.files.items()) == [tuple(pair) for pair in checked]


def test_a_folder_its_parent_and_the_archive_hold_the_same_images(small_cifar10, tmp_path, monkeypatch):
    archive = tmp_path / "archive" / "cifar-10-python.tar.gz"
    archive.parent.mkdir()
    with tarfile.open(archive, "w:gz") as tar:
        tar.add(small_cifar10, "cifar-10-batches-py")
    content = archive.read_bytes()
    facts = {"size": len(content), "sha256": hashlib.sha256(content).hexdigest()}
    monkeypatch.setitem(ARCHIVES, "cifar10", dataclasses.replace(ARCHIVES["cifar10"], **facts))
    renamed = shutil.copytree(small_cifar10, tmp_path / "renamed")
    expected = np.concatenate(
        [pickle.loads((small_cifar10 / f"data_batch_{n}").read_bytes())["data"] for n in range(1, 6)]
    )
    for place in (small_cifar10.parent, small_cifar10, renamed, archive, archive.parent):
        dataset, note = datasets.find("cifar10", str(place))
        assert note is None
        assert np.array_equal(dataset.train.images.flatten(1).numpy(), expected)
        assert len(dataset.test) == 100


def test_a_damaged_batch_file_is_named(small_cifar10):
    (small_cifar10 / "data_batch_3").write_bytes(b"rubbish")
    with pytest.raises(UserError, match="data_batch_3 is damaged"):
        _ = datasets.find("cifar10", str(small_cifar10))[0].train


def test_training_images_are_read_where_the_test_file_is_missing_or_damaged(small_cifar10):
    expected = datasets.find("cifar10", str(small_cifar10))[0].train.sha256()
    (small_cifar10 / "test_batch").unlink()
    dataset = datasets.find("cifar10", str(small_cifar10))[0]
    assert dataset.train.sha256() == expected
    with pytest.raises(UserError, match="test_batch is missing"):
        _ = dataset.test


def test_an_archive_that_is_another_file_is_refused(tmp_path):
    archive = tmp_path / "cifar-10-python.tar.gz"
    archive.write_bytes(b"not an archive")
    with pytest.raises(UserError, match="is damaged or another file"):
        datasets.find("cifar10", str(archive))


def test_without_a_network_auto_takes_digits_and_cifar10_says_where_to_put_the_archive(tmp_path, monkeypatch):
    unreachable = dataclasses.replace(ARCHIVES["cifar10"], urls=("http://127.0.0.1:9/x",))
    monkeypatch.setitem(ARCHIVES, "cifar10", unreachable)
    dataset, note = datasets.find("auto", str(tmp_path))
    assert dataset.name == "digits"
    assert "not CIFAR-10" in note
    with pytest.raises(UserError, match="put the archive into"):
        datasets.find("cifar10", str(tmp_path))


@pytest.mark.parametrize("name", ["auto", "cifar10"])
def test_a_data_folder_that_may_not_be_read_is_told(tmp_path, name):
    (tmp_path / "data").mkdir(mode=0)
    with as_nobody(), pytest.raises(UserError, match=r"^cannot read .*data: Permission denied$"):
        datasets.find(name, str(tmp_path / "data"))


def test_a_folder_with_a_damaged_cifar10_is_not_replaced_by_digits(small_cifar10):
    (small_cifar10 / "data_batch_1").unlink()
    dataset, note = datasets.find("auto", str(small_cifar10))
    assert note is None
    with pytest.raises(UserError, match="data_batch_1 is missing"):
        _ = dataset.train


@pytest.mark.parametrize("val_size", [5, 1430, 60000])
def test_a_validation_split_that_does_not_fit_is_refused(digits, val_size):
    with pytest.raises(UserError, match=f"--val-size {val_size} does not fit: digits has 1437"):
        datasets.settle(Config(val_size=val_size), digits)


def test_the_settings_are_settled_on_a_small_dataset_that_mirrors_badly(digits):
    settled = datasets.settle(Config(), digits)
    assert (settled.dataset, settled.val_size, settled.flip) == ("digits", 143, "none")
    assert settled.batch_size == (1437 - 143) // 20


def test_cifar100_is_read_with_the_names_of_its_fine_classes(small_cifar100):
    dataset, note = datasets.find("cifar100", str(small_cifar100.parent))
    content = pickle.loads((small_cifar100 / "train").read_bytes())
    assert (dataset.name, len(dataset.classes), dataset.classes[7], note) == ("cifar100", 100, "class 7", None)
    assert np.array_equal(dataset.train.images.flatten(1).numpy(), content["data"])
    assert dataset.train.labels.tolist() == content["fine_labels"]
    dataset.check()


def test_a_damaged_file_of_cifar100_is_named_before_the_training(small_cifar100):
    dataset = datasets.find("cifar100", str(small_cifar100))[0]
    (small_cifar100 / "test").write_bytes(b"rubbish")
    with pytest.raises(UserError, match="cifar-100-python/test is damaged"):
        dataset.check()
    assert len(dataset.train) == 300


def test_without_cifar100_and_a_network_it_says_where_to_put_the_archive(small_cifar10, monkeypatch):
    monkeypatch.setitem(ARCHIVES, "cifar100", dataclasses.replace(ARCHIVES["cifar100"], urls=("http://127.0.0.1:9/x",)))
    with pytest.raises(UserError, match=r"cannot download cifar-100-python\.tar\.gz .*put the archive into"):
        datasets.find("cifar100", str(small_cifar10.parent))


@pytest.mark.parametrize(("name", "hint"), [("cifra10", "did you mean cifar10"), ("no/such/folder", "known are auto")])
def test_an_unknown_dataset_lists_the_known_ones_and_the_nearest(name, hint):
    with pytest.raises(UserError, match=f"^unknown dataset '{name}': {hint}.*, and the path of a folder of pictures$"):
        datasets.find(name, "nowhere")


def folder_of(place, images: torch.Tensor, labels: list[int]):
    """The images as PNG files in folders that are called by their labels."""
    for number, (image, label) in enumerate(zip(images, labels)):
        (place / str(label)).mkdir(parents=True, exist_ok=True)
        Image.fromarray(image.permute(1, 2, 0).numpy()).save(place / str(label) / f"{number:05}.png")


def test_a_dataset_as_a_folder_has_the_same_images_with_the_same_labels(digits, tmp_path):
    for part in ("train", "test"):
        split = getattr(digits, part)[:150]
        folder_of(tmp_path / "my digits" / part, split.images, split.labels.tolist())
    dataset, note = datasets.find(str(tmp_path / "my digits"), str(tmp_path))
    assert (dataset.name, dataset.key, note) == ("my digits", str(tmp_path / "my digits"), None)
    assert dataset.classes == digits.classes
    for part in ("train", "test"):
        found, expected = getattr(dataset, part), getattr(digits, part)[:150]
        pairs = lambda split: sorted(zip(split.labels.tolist(), (image.numpy().tobytes() for image in split.images)))  # noqa: E731
        assert pairs(found) == pairs(expected)


def test_an_image_size_is_for_folders(digits):
    with pytest.raises(UserError, match="--image-size is for folders of pictures: those of digits are 32x32"):
        datasets.settle(Config(image_size=64), digits)


def test_larger_images_come_in_smaller_batches_and_settling_twice_changes_nothing(digits):
    labels = torch.arange(20_000) % 2
    large = dataclasses.replace(digits, key="/my/pets", classes=("cat", "dog"))
    vars(large)["train"] = data.Split(torch.zeros(1, 3, 128, 128, dtype=torch.uint8).expand(20_000, -1, -1, -1), labels)
    settled = datasets.settle(Config(image_size=128), large)
    assert (settled.dataset, settled.batch_size, settled.small_size) == ("/my/pets", 125, 96)
    assert datasets.settle(settled, large) == settled


def test_the_default_validation_split_has_room_for_every_class(digits):
    many = dataclasses.replace(digits, classes=tuple(map(str, range(300))))
    assert datasets.settle(Config(), many).val_size == 300
