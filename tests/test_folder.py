import io
import json
import os
import shutil
import tempfile
from contextlib import nullcontext
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from cifar import device, folder
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
    """Two classes in train/ and test/: 20 and 10 images of each."""
    for seed, (part, count) in enumerate((("train", 20), ("test", 10))):
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
    names = [name.split("/", 1)[1] for name in images.test_files]
    return images.classes, images.note, names, images.train.sha256(), images.test.sha256()


def pixels(split) -> set[bytes]:
    return {image.numpy().tobytes() for image in split.images}


@pytest.mark.parametrize("size", [32, 50])
def test_each_image_is_decoded_and_labelled_with_its_class(root, size):
    (root / "train" / "cat" / "inner").mkdir()
    (root / "train" / "cat" / "1-000.png").rename(root / "train" / "cat" / "inner" / "1-000.png")
    for litter in (".hidden", "Thumbs.db", "desktop.ini"):
        (root / "train" / "cat" / litter).write_bytes(b"not counted")
    for litter in ("__MACOSX/cat", "lost+found", "train/.ipynb_checkpoints", "test/cat/@eaDir"):
        fill(root / litter, 1, seed=60)
    images = load(root, size)
    assert (images.classes, images.note) == (("cat", "dog"), None)
    for split, part, count in ((images.train, "train", 20), (images.test, "test", 10)):
        assert split.images.shape == (2 * count, 3, size, size)
        for label, name in enumerate(images.classes):
            files = [file for file in (root / part / name).rglob("*.png") if "@eaDir" not in str(file)]
            assert pixels(split[split.labels == label]) == {decode(file, size).numpy().tobytes() for file in files}
    assert images.test_files == tuple(sorted(images.test_files))
    for name, image, label in zip(images.test_files, images.test.images, images.test.labels):
        assert name.split("/")[:2] == ["test", images.classes[label]]
        assert decode(root / name, size).equal(image)


def test_without_train_and_test_a_fifth_of_each_class_is_the_test_split(flat):
    images = load(flat)
    assert images.train.labels.bincount().tolist() == [16, 8]
    assert images.test.labels.bincount().tolist() == [4, 2]
    assert len(pixels(images.train) | pixels(images.test)) == 30


def test_the_chosen_test_split_depends_neither_on_names_nor_on_the_folders_location(flat):
    before = load(flat)
    for file in flat.rglob("*.png"):
        file.rename(file.with_name(f"renamed-{file.stem[::-1]}.PNG"))
    flat.rename(flat.parent / "moved")
    assert pixels(load(flat.parent / "moved").test) == pixels(before.test)


def test_copies_of_an_image_are_on_one_side_of_the_chosen_split(flat):
    for file in (flat / "a").glob("1-*5.png"):
        shutil.copy(file, flat / "a" / f"copy-{file.name}")
    images = load(flat)
    assert not pixels(images.train) & pixels(images.test)
    assert "Duplicates, which count twice: 2 of 32 images (a/" in images.note


@pytest.mark.parametrize("names", [("Train", "TEST"), ("training", "Testing")])
def test_the_folders_of_train_and_test_may_be_spelled_otherwise(root, names):
    expected = load(root)
    for part, name in zip(("train", "test"), names):
        (root / part).rename(root / name)
    assert content(load(root)) == content(expected)


def test_a_class_may_be_called_train(root):
    (root / "train" / "dog").rename(root / "train" / "train")
    assert load(root / "train").classes == ("cat", "train")


def test_linked_folders_are_followed_once_and_none_that_holds_the_class(root):
    fill(root.parent / "elsewhere", 3, seed=7)
    expected = len(load(root).train) + 3
    cat = root / "train" / "cat"
    links = {"up": "..", "here": ".", "root": root, "a": "../../../elsewhere", "b": "../../../elsewhere"}
    for name, target in {**links, "gone.png": "nowhere", "self.png": "self.png"}.items():
        (cat / name).symlink_to(target)
    os.mkfifo(cat / "pipe.png")
    images = load(root)
    assert len(images.train) == expected
    for kind in ("4 circular or repeated links (train/cat/", "2 broken links (train/cat/gone.png, train/cat/self.png)"):
        assert kind in images.note
    assert "1 special file (train/cat/pipe.png)" in images.note
    (root / "train" / "bear").symlink_to(root)
    (root / "test" / "bear").symlink_to("cat")
    with pytest.raises(UserError, match=r"too few images of bear: .* repeated links"):
        load(root)


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
# Of a file without damage: the pixels and the JSON beside them -> others.
FORGERIES = {
    "another size": lambda pixels, about: (pixels[..., :16], about),
    "another type": lambda pixels, about: (pixels.astype(np.float32), about),
    "fewer images": lambda pixels, about: (pixels[:-1], about),
    "half of the files": lambda pixels, about: (pixels[20:], about | {"train": about["train"][20:]}),
    "a file twice": lambda pixels, about: (pixels, about | {"train": about["train"][:1] * 40}),
    "a foreign file": lambda pixels, about: (pixels, about | {"test": ["../../etc/passwd", *about["test"][1:]]}),
    "no test split": lambda pixels, about: (pixels, about | {"train": about["train"] + about["test"], "test": []}),
    "no JSON object": lambda pixels, about: (pixels, 5),
    "a bomb": lambda pixels, about: (np.zeros(20_000_000, np.uint8), about),
}


def forge(whole: bytes, change) -> bytes:
    with np.load(io.BytesIO(whole)) as arrays:
        pixels, about = change(arrays["pixels"], json.loads(arrays["about"].tobytes()))
    forged = io.BytesIO()
    np.savez_compressed(forged, pixels=pixels, about=np.frombuffer(json.dumps(about).encode(), np.uint8))
    return forged.getvalue()


@pytest.mark.parametrize("damage", [*DAMAGES, *FORGERIES])
def test_a_damaged_or_forged_cache_is_not_used_but_replaced(root, damage):
    first = load(root)
    (cache,) = (root.parent / "cache" / ".decoded").iterdir()
    whole = cache.read_bytes()
    cache.write_bytes(DAMAGES[damage](whole) if damage in DAMAGES else forge(whole, FORGERIES[damage]))
    assert content(load(root)) == content(first)
    assert cache.read_bytes() == whole


def test_without_a_writable_cache_the_images_are_read_anyway(root, capsys):
    (root.parent / "cache").write_bytes(b"a file in its place")
    assert len(load(root).train) == 40
    assert "cannot be cached, and will be decoded again by the next run: cannot write" in capsys.readouterr().out


# Notes


def test_up_to_one_percent_of_files_may_be_unreadable_and_they_are_named(tmp_path):
    with tempfile.TemporaryDirectory() as name:  # pytest's own folders are closed to other users
        root = Path(name) / "flat"
        for label, seed in (("a", 1), ("b", 2)):
            fill(root / label, 100, seed)
        (root / "a" / "notes.png").write_text("not an image")
        (root / "b" / "2-007.png").chmod(0)
        Path(name).chmod(0o777)
        with as_nobody():
            images = load(root)
            assert content(load(root)) == content(images)
    assert len(images.train) + len(images.test) == 199
    assert images.note.startswith("2 of 201 files could not be read as images and were left out: a/notes.png (the file")
    assert "b/2-007.png (the file cannot be read: Permission denied)" in images.note


def test_an_image_in_train_and_test_is_reported_with_both_names(root):
    shutil.copy(root / "test" / "dog" / "2-001.png", root / "train" / "dog" / "copy.png")
    assert load(root).note == (
        "1 of 20 test images are also training images, so the test accuracy is too high: "
        "test/dog/2-001.png is train/dog/copy.png."
    )


def test_other_files_are_passed_over_and_counted(root):
    for name in ("a.heic", "b.HEIC", "c.mov", *(f"{number}.xml" for number in range(3))):
        (root / "train" / "cat" / name).write_bytes(b"not an image")
    for name in ("labels.csv", "README", "train/loose.png"):
        (root / name).write_bytes(b"not an image")
    kinds = ("3 .xml files", "2 .heic files: convert them to JPEG", "1 .mov file", "1 loose image (loose.png)")
    assert load(root).note == f"Skipped: {'; '.join(kinds)}."


def test_an_image_in_two_classes_is_reported_with_both_names(root):
    shutil.copy(root / "train" / "dog" / "0-001.png", root / "train" / "cat" / "same.png")
    pair = "train/dog/0-001.png is train/cat/same.png"
    assert load(root).note == f"In two classes: 1 of 61 images ({pair})."


def test_classes_with_too_few_images_to_learn_or_to_measure_are_reported(root):
    (root / "train" / "cat" / "1-000.png").unlink()
    (root / "test" / "dog" / "2-000.png").unlink()
    assert load(root).note == (
        "Too few images to learn well, fewer than 20 in train: cat: 19. "
        "Too few images to measure well, fewer than 10 in test: dog: 9."
    )


def test_more_images_than_memory_are_refused_before_any_is_opened(root, monkeypatch):
    monkeypatch.setattr(device, "memory", lambda: (1e9, 2 * 60 * 3 * 64**2))
    assert len(load(root, 64).train) == 40
    monkeypatch.setattr(folder, "_digest", None)
    with pytest.raises(UserError, match=r"60 images, which at 65x65 pixels need 0\.0 GB of .* smaller --image-size$"):
        load(root, 65)


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
        "train has only one class, cat: at least two are needed$",
    ),
    "one folder of classes": (
        lambda root: shutil.rmtree(root / "test"),
        "pets has train, but needs exactly one train and one test folder; without a test folder, use .*pets/train: a",
    ),
    "two spellings": (
        lambda root: fill(root / "Training" / "cat", 3, seed=80),
        "pets has Training, train, test, but needs exactly one train",
    ),
    "splits with unknown names": (
        lambda root: [(root / part).rename(root / name) for part, name in (("train", "a"), ("test", "b"))],
        "a, b in .*pets all have the same folders, cat, dog: if they are splits, rename them to train and test",
    ),
    "no images": (lambda root: [file.unlink() for file in root.rglob("*.png")], "too few images of cat, dog: each"),
    "photos of a phone": (
        lambda root: [file.rename(file.with_suffix(".heic")) for file in (root / "train" / "cat").iterdir()],
        r"too few images of cat: each class .*\. Skipped: 20 \.heic files: convert them to JPEG\.",
    ),
    "too few to train": (
        lambda root: [file.unlink() for file in sorted((root / "train" / "dog").iterdir())[1:]],
        "too few images of dog: each class needs at least 2 training images and 1 test image",
    ),
    "a class only in train": (
        lambda root: shutil.rmtree(root / "test" / "cat"),
        "pets needs each class in train and in test: only one of the two has cat",
    ),
    "too few to test": (
        lambda root: [file.unlink() for file in (root / "test" / "cat").iterdir()],
        "too few images of cat: each class",
    ),
    "too few without a split": (too_few_without_a_split, "too few images of bear: each class needs at least 2"),
    "no test split": (
        lambda root: (root / "test").rename(root / "Val"),
        r"pets has train, Val, but needs .*, so rename Val to test \(validation images are taken from train\)",
    ),
    "a class only in test": (
        lambda root: fill(root / "test" / "eel", 2, seed=70),
        "pets needs each class in train and in test: only one of the two has eel",
    ),
    "too many other files": (
        lambda root: [(root / "train" / "cat" / f"{number}.gif").write_text("no") for number in range(4)],
        r"cannot read 4 of 64 files as images \(at most 1% may fail\): fix or delete train/cat/0\.gif \(the ",
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
