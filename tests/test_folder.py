import os
import shutil
import tempfile
from contextlib import nullcontext
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from cifar import folder
from cifar.errors import UserError
from cifar.folder import ImageFolder
from cifar.images import decode
from conftest import as_nobody


def fill(path: Path, count: int, seed: int) -> None:
    """Save images of noise, no two alike."""
    path.mkdir(parents=True, exist_ok=True)
    rng = np.random.default_rng(seed)
    for number in range(count):
        Image.fromarray(rng.integers(0, 256, (20, 40, 3), dtype=np.uint8)).save(path / f"{seed}-{number:03}.png")


@pytest.fixture
def root(tmp_path) -> Path:
    """Two classes in train/ and test/: ten and four images of each."""
    for seed, (part, count) in enumerate((("train", 10), ("test", 4))):
        for number, name in enumerate(("dog", "cat")):
            fill(tmp_path / "pets" / part / name, count, seed=2 * seed + number)
    return tmp_path / "pets"


@pytest.fixture
def flat(tmp_path) -> Path:
    """Two classes without train/ and test/: 20 and 10 images."""
    fill(tmp_path / "flat" / "a", 20, seed=1)
    fill(tmp_path / "flat" / "b", 10, seed=2)
    return tmp_path / "flat"


def load(root: Path, size: int = 32) -> ImageFolder:
    return folder.load(root, size, root.parent / "cache")


def content(images: ImageFolder) -> tuple:
    return images.classes, images.note, images.train.sha256(), images.test.sha256()


def pixels(split) -> set[bytes]:
    return {image.numpy().tobytes() for image in split.images}


@pytest.mark.parametrize("size", [32, 50])
def test_each_image_is_decoded_and_labelled_with_its_class(root, size):
    (root / "train" / "cat" / "inner").mkdir()
    (root / "train" / "cat" / "1-000.png").rename(root / "train" / "cat" / "inner" / "1-000.png")
    for litter in (".hidden", "Thumbs.db"):
        (root / "train" / "cat" / litter).write_bytes(b"not counted")
    images = load(root, size)
    assert (images.classes, images.note) == (("cat", "dog"), None)
    for split, part, count in ((images.train, "train", 10), (images.test, "test", 4)):
        assert split.images.shape == (2 * count, 3, size, size)
        for label, name in enumerate(images.classes):
            expected = {decode(file, size).numpy().tobytes() for file in (root / part / name).rglob("*.png")}
            assert pixels(split[split.labels == label]) == expected


def test_without_train_and_test_a_fifth_of_each_class_is_the_test_split(flat):
    images = load(flat)
    assert images.train.labels.bincount().tolist() == [16, 8]
    assert images.test.labels.bincount().tolist() == [4, 2]
    assert len(pixels(images.train) | pixels(images.test)) == 30


def test_the_chosen_test_split_depends_neither_on_names_nor_on_the_folders_location(flat):
    before = load(flat)
    for file in flat.rglob("*.png"):
        file.rename(file.with_name("renamed-" + file.name[::-1]))
    flat.rename(flat.parent / "moved")
    assert pixels(load(flat.parent / "moved").test) == pixels(before.test)


def test_copies_of_an_image_are_on_one_side_of_the_chosen_split(flat):
    for file in (flat / "a").glob("1-*5.png"):
        shutil.copy(file, flat / "a" / f"copy-{file.name}")
    images = load(flat)
    assert not pixels(images.train) & pixels(images.test)
    assert images.note is None


# The cache


def rename_a_class(root: Path) -> None:
    for part in ("train", "test"):
        (root / part / "dog").rename(root / part / "wolf")


CHANGES = {
    "a newer file": lambda root: os.utime(root / "train" / "cat" / "1-000.png", (1, 1)),
    "one more": lambda root: fill(root / "train" / "cat", 1, seed=99),
    "one less": lambda root: (root / "test" / "dog" / "2-000.png").unlink(),
    "another name of a class": rename_a_class,
}


@pytest.mark.parametrize("change", CHANGES)
def test_images_are_decoded_again_only_after_a_change(root, change, monkeypatch):
    first = load(root)
    with monkeypatch.context() as patch:
        patch.setattr(folder, "_read", None)
        assert content(load(root)) == content(first)
        CHANGES[change](root)
        with pytest.raises(TypeError):  # _read is called
            load(root)
    changed = load(root)
    shutil.rmtree(root.parent / "cache")
    assert content(load(root)) == content(changed)


DAMAGES = {
    "truncated": lambda whole: whole[: len(whole) // 2],
    "empty": lambda _: b"",
    "a pickle": lambda _: b"\x80\x04.",
    "a flipped pixel": lambda whole: whole[: len(whole) // 2] + b"?" + whole[len(whole) // 2 + 1 :],
}


@pytest.mark.parametrize("damage", DAMAGES)
def test_a_damaged_cache_is_not_used_but_replaced(root, damage):
    first = load(root)
    (cache,) = (root.parent / "cache" / "decoded").iterdir()
    whole = cache.read_bytes()
    cache.write_bytes(DAMAGES[damage](whole))
    assert content(load(root)) == content(first)
    assert cache.read_bytes() == whole


def test_without_a_writable_cache_the_images_are_read_anyway(root, capsys):
    (root.parent / "cache").write_bytes(b"a file in its place")
    assert len(load(root).train) == 20
    assert "cannot be cached, and will be decoded again by the next run: cannot write" in capsys.readouterr().out


# Notes


def test_up_to_one_percent_of_files_may_be_unreadable_and_they_are_named(tmp_path):
    with tempfile.TemporaryDirectory() as name:  # pytest's own folders are closed to other users
        root = Path(name) / "flat"
        for label, seed in (("a", 1), ("b", 2)):
            fill(root / label, 100, seed)
        (root / "a" / "notes.txt").write_text("not an image")
        (root / "b" / "2-007.png").chmod(0)
        Path(name).chmod(0o777)
        with as_nobody():
            images = load(root)
            assert content(load(root)) == content(images)
    assert len(images.train) + len(images.test) == 199
    assert images.note.startswith("2 of 201 files could not be read as images and were left out: a/notes.txt (the file")
    assert "b/2-007.png (the file cannot be read: Permission denied)" in images.note


def test_an_image_in_train_and_test_is_reported_with_both_names(root):
    shutil.copy(root / "test" / "dog" / "2-001.png", root / "train" / "dog" / "copy.png")
    assert load(root).note == (
        "1 of 8 test images are also training images, so the test accuracy is too high: "
        "test/dog/2-001.png is train/dog/copy.png."
    )


def test_a_folder_beside_train_and_test_is_reported_as_ignored(root):
    fill(root / "val" / "cat", 3, seed=50)
    assert load(root).note == "val beside train and test: ignored; validation images are taken from train."


# What cannot be used


def without_classes(root):
    shutil.rmtree(root)
    fill(root, 3, seed=1)


def too_few_without_a_split(root):
    without_classes(root)
    fill(root / "cat", 9, seed=1)
    fill(root / "bear", 2, seed=2)


def rename_to_latin_1(root):
    (root / "train" / "dog").rename(root / "train" / os.fsdecode(b"chien\xe9"))


BROKEN = {
    "no classes": (without_classes, "pets has no folders: put the images of each class into a folder of its name"),
    "one class": (
        lambda root: shutil.rmtree(root / "train" / "dog"),
        "train has only one class, cat; at least two are needed",
    ),
    "no images": (lambda root: [file.unlink() for file in root.rglob("*.png")], "pets is empty"),
    "too few to train": (
        lambda root: [file.unlink() for file in sorted((root / "train" / "dog").iterdir())[1:]],
        "too few images of dog: each class needs at least 2 in train/ and 1 in test/",
    ),
    "a class only in train": (
        lambda root: shutil.rmtree(root / "test" / "cat"),
        "^cannot read .*test/cat: No such file",
    ),
    "too few to test": (
        lambda root: [file.unlink() for file in (root / "test" / "cat").iterdir()],
        "too few images of cat: each class",
    ),
    "too few without a split": (too_few_without_a_split, "too few images of bear: each class needs at least 3 diff"),
    "no test split": (
        lambda root: (root / "test").rename(root / "Val"),
        "pets has Val, train, and not both train and test: name the two splits train and test",
    ),
    "a class only in test": (
        lambda root: fill(root / "test" / "eel", 2, seed=70),
        "test has classes that train/ does not have: eel",
    ),
    "too many other files": (
        lambda root: [(root / "train" / "cat" / f"{number}.txt").write_text("no") for number in range(4)],
        r"cannot read 4 of 32 files as images \(at most 1% may fail\): fix or delete train/cat/0\.txt \(the file is",
    ),
    "a name in Latin-1": (rename_to_latin_1, r"the name 'chien\\udce9' is not valid UTF-8; rename it"),
    "closed": (lambda root: root.chmod(0), r"^cannot read .*pets.*: Permission denied$"),
}


@pytest.mark.parametrize("kind", BROKEN)
def test_a_folder_that_cannot_be_used_is_refused_in_one_sentence(root, kind):
    break_it, sentence = BROKEN[kind]
    break_it(root)
    with as_nobody() if kind == "closed" else nullcontext(), pytest.raises(UserError, match=sentence) as caught:
        load(root)
    root.chmod(0o755)
    assert "\n" not in str(caught.value)


def test_300_classes_have_one_label_each_and_training_images_are_mixed(tmp_path):
    for number in range(300):
        (tmp_path / "many" / f"{number:03}").mkdir(parents=True)
        for copy in range(3):
            pixel = Image.new("RGB", (1, 1), (number % 256, number // 256, copy))
            pixel.save(tmp_path / "many" / f"{number:03}" / f"{copy}.bmp")
    images = load(tmp_path / "many")
    assert images.train.labels.bincount().tolist() == [2] * 300
    assert images.test.labels.tolist() == list(range(300))
    assert len(images.train.labels[:100].unique()) > 60
