import json
import os
import shutil
import tempfile
import unicodedata
from contextlib import nullcontext
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from cifar import cache, data, folder
from cifar.data import Dataset, Split
from cifar.errors import UserError
from cifar.images import decode, decode_all
from commands import start
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


def load(root: Path, size: int = 32) -> Dataset:
    return folder.load(root, size, root.parent / "cache")


def content(images: Dataset) -> tuple:
    names = [name.split("/", 1)[1] for name in images.test_files]
    return images.classes, images.note, names, images.train.sha256(), images.test.sha256()


def pixels(split) -> set[bytes]:
    return {image.numpy().tobytes() for image in split.images}


@pytest.mark.parametrize("size", [32, 50])
def test_each_image_is_decoded_and_labelled_with_its_class(root, size):
    (root / "train" / "cat" / "inner").mkdir()
    (root / "train" / "cat" / "1-000.png").rename(root / "train" / "cat" / "inner" / "1-000.png")
    for litter in (".hidden", "Thumbs.db", "desktop.ini", "Icon\r"):
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
    for name, image, label in zip(images.test_files, images.test.images, images.test.labels, strict=True):
        assert name.split("/")[:2] == ["test", images.classes[label]]
        assert decode(root / name, size).equal(image)


def test_the_chosen_test_split_depends_neither_on_names_nor_on_the_folders_location(root):
    flat = root / "train"
    before = load(flat)
    for file in flat.rglob("*.png"):
        file.rename(file.with_name(f"renamed-{file.stem[::-1]}.PNG"))
    flat.rename(flat.parent / "moved")
    assert pixels(load(flat.parent / "moved").test) == pixels(before.test)


def test_copies_of_an_image_are_on_one_side_of_the_chosen_split(root):
    for file in (root / "train" / "cat").glob("1-*5.png"):
        shutil.copy(file, file.with_name(f"copy-{file.name}"))
    images = load(root / "train")
    assert not pixels(images.train) & pixels(images.test)
    assert "Duplicates, which count twice: 2 of 42 images (cat/" in images.note


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


CHANGES = {
    "a newer file": lambda root: os.utime(root / "train" / "cat" / "1-000.png", (1, 1)),
    "one more": lambda root: fill(root / "train" / "cat", 1, seed=99),
    "another name of a class": lambda root: [
        (root / part / "dog").rename(root / part / "wolf") for part in cache.PARTS
    ],
}


@pytest.mark.parametrize("change", CHANGES)
def test_images_are_decoded_again_only_after_a_change(root, change, monkeypatch):
    first = load(root)
    with monkeypatch.context() as patch:
        patch.setattr(folder, "_write_cache", None)
        assert content(load(root)) == content(first)
        CHANGES[change](root)
        with pytest.raises(TypeError):  # _write_cache is called
            load(root)
    changed = load(root)
    shutil.rmtree(root.parent / "cache")
    assert content(load(root)) == content(changed)


def flip(content: bytes) -> bytes:
    middle = len(content) // 2
    return content[:middle] + bytes([content[middle] ^ 1]) + content[middle + 1 :]


DAMAGES = {
    "truncated": lambda whole: whole[: len(whole) // 2],
    "empty": lambda _: b"",
    "longer": lambda whole: whole * 2,
    "a flipped bit": flip,
}
# Of about.json without damage -> another.
FORGERIES = {
    "half of the files": lambda about: about | {"train": about["train"][20:]},
    "a file twice": lambda about: about | {"train": about["train"][:1] * 40},
    "files in another order": lambda about: about | {"train": about["train"][::-1]},
    "a foreign file": lambda about: about | {"test": ["../../etc/passwd", *about["test"][1:]]},
    "no test split": lambda about: about | {"train": about["train"] + about["test"], "test": []},
    "all for validation": lambda about: about | {"own_val": 40},
    "no JSON object": lambda about: 5,
}


@pytest.mark.parametrize("damage", [*DAMAGES, *FORGERIES, "a missing file"])
def test_a_damaged_or_forged_cache_is_not_used_but_replaced(root, damage):
    first = content(load(root))
    (place,) = (root.parent / "cache" / ".decoded").iterdir()
    pixels, about = place / "train.pixels", place / "about.json"
    whole = pixels.read_bytes()
    for file in (pixels, about):
        damaged = file.with_suffix(".damaged")  # a mapped file is replaced, and not changed
        if damage in FORGERIES:
            damaged.write_text(json.dumps(FORGERIES[damage](json.loads(about.read_text()))))
        elif damage == "a missing file":
            file.unlink()
        else:
            damaged.write_bytes(DAMAGES[damage](file.read_bytes()))
        if damaged.exists():
            damaged.replace(about if damage in FORGERIES else file)
        assert content(load(root)) == first
        assert pixels.read_bytes() == whole


def test_the_pixels_of_a_large_cache_are_compared_only_if_the_file_has_changed(root, monkeypatch):
    monkeypatch.setattr(cache, "_ALWAYS_HASHED", 0)
    first = content(load(root))
    (place,) = (root.parent / "cache" / ".decoded").iterdir()
    file = place / "train.pixels"
    with monkeypatch.context() as patch:
        patch.setattr(Split, "chunks", None)
        load(root)
    status = file.stat()
    file.with_suffix(".other").write_bytes(flip(file.read_bytes()))
    file.with_suffix(".other").replace(file)
    os.utime(file, ns=(status.st_atime_ns, status.st_mtime_ns + 1))
    assert content(load(root)) == first


def test_two_processes_decode_one_folder_once(root):
    script = "import sys, pathlib as p, cifar.folder as f; f.load(p.Path(sys.argv[1]), 32, p.Path(sys.argv[2]))"
    (root.parent / "cache" / ".decoded").mkdir(parents=True)
    processes = [start("-c", script, str(root), str(root.parent / "cache")) for _ in range(2)]
    said = "".join(process.communicate()[0] for process in processes)
    assert said.count("decoding 60 images") == 1


def test_without_a_writable_cache_the_images_are_read_anyway_and_stay_readable(root, capsys):
    (root.parent / "cache").write_bytes(b"a file in its place")
    images = load(root)  # mapped from a temporary file, which is deleted by now
    assert pixels(images.train) == {decode(file, 32).numpy().tobytes() for file in (root / "train").rglob("*.png")}
    assert "cannot be cached, and will be decoded again by the next run: cannot write" in capsys.readouterr().out


# Notes


NO_IMAGES = ("a.heic", "b.HEIC", "c.mov", "1.xml", "2.xml", "3.xml")
NOTES = {
    "an image in train and test": (
        lambda root: shutil.copy(root / "test" / "dog" / "2-001.png", root / "train" / "dog" / "copy.png"),
        "1 of 20 test images are in another split too, so the test accuracy is too high: "
        "test/dog/2-001.png is train/dog/copy.png.",
    ),
    "an image in two classes": (
        lambda root: shutil.copy(root / "train" / "dog" / "0-001.png", root / "train" / "cat" / "same.png"),
        "In two classes: 1 of 61 images (train/dog/0-001.png is train/cat/same.png).",
    ),
    "classes with few images": (
        lambda root: [(root / file).unlink() for file in ("train/cat/1-000.png", "test/dog/2-000.png")],
        "Too few images to learn well, fewer than 20 in train: cat: 19. "
        "Too few images to measure well, fewer than 10 in test: dog: 9.",
    ),
    "files that are no images": (
        lambda root: [
            (root / name).write_bytes(b"not an image")
            for name in ("labels.csv", "README", "train/loose.png", *(f"train/cat/{file}" for file in NO_IMAGES))
        ],
        "Skipped: 3 .xml files; 2 .heic files: convert them to JPEG; 1 .mov file; 1 loose image (loose.png).",
    ),
    "a folder beside train": (lambda root: fill(root / "old" / "cat", 3, seed=50), "old beside train: ignored."),
}


@pytest.mark.parametrize("kind", NOTES)
def test_what_may_be_a_mistake_is_said_in_a_note(root, kind):
    change, note = NOTES[kind]
    change(root)
    assert load(root).note == note


def test_up_to_one_percent_of_files_may_be_unreadable_and_they_are_named():
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
    assert "b/2-007.png (Permission denied)" in images.note


def test_an_image_that_could_not_be_read_is_read_by_the_next_run_that_can(root, monkeypatch):
    fill(root / "train" / "cat", 80, seed=9)

    def decode_but_one(sources, size):
        failed = UserError("Input/output error")
        decoded = zip(sources, decode_all(sources, size))
        return [failed if path.name == "9-003.png" else image for path, image in decoded]

    for _ in range(2):
        monkeypatch.setattr(folder, "decode_all", decode_but_one)
        assert "1 of 140 files could not be read" in load(root).note
    monkeypatch.setattr(folder, "decode_all", decode_all)
    for _ in range(2):
        images = load(root)
        assert (len(images.train), "could not be read" in (images.note or "")) == (120, False)


def test_names_that_look_alike_are_one_class_or_reported(root):
    (root / "train" / "cat").rename(root / "train" / "caf\u00e9")
    (root / "test" / "cat").rename(root / "test" / "cafe\u0301")
    for part in ("train", "test"):
        shutil.copytree(root / part / "dog", root / part / "Dog ")
    found = folder.list_images(root)
    assert found.classes == ("Dog ", "caf\u00e9", "dog")
    assert [len([file for file in found.files if file.label == label]) for label in range(3)] == [30, 30, 30]
    assert found.notes == ["Classes whose names differ only in case or spaces: Dog  and dog."]
    (root / "train" / "cafe\u0301").mkdir()
    with pytest.raises(UserError, match="has two folders whose names look the same"):
        folder.list_images(root)


def test_more_images_than_the_disk_holds_are_refused_before_any_is_opened(root, monkeypatch):
    usage = shutil.disk_usage(root)._replace(free=60 * 3 * 64**2)
    monkeypatch.setattr(shutil, "disk_usage", lambda _: usage)
    assert len(load(root, 64).train) == 40
    monkeypatch.setattr(folder, "_digest", None)
    with pytest.raises(
        UserError, match=r"60 images of .*pets need, at 65x65 pixels, 0\.0 GB on the disk of .*cache/\.dec"
    ):
        load(root, 65)


# Validation images


def test_a_folder_val_holds_the_validation_images(root):
    fill(root / "Valid" / "cat", 3, seed=50)
    fill(root / "Valid" / "dog", 4, seed=51)
    images = load(root)
    assert images.note is None
    assert (len(images.train), images.train.own_val, len(images.test)) == (47, 7, 20)
    train, val = data.train_val_split(images.train, 7, seed=3)
    assert (len(pixels(train)), val.labels.bincount().tolist()) == (40, [3, 4])
    assert pixels(val) == {decode(file, 32).numpy().tobytes() for file in (root / "Valid").rglob("*.png")}
    assert not pixels(val) & pixels(train)
    assert content(load(root)) == content(images)


def test_beside_train_and_val_the_test_split_is_a_fifth_of_train(root):
    (root / "test").rename(root / "val")
    images = load(root)
    assert images.train.own_val == 20
    assert images.test.labels.bincount().tolist() == [4, 4]
    assert "Without test images of their own, a fifth of the training images is the test split." in images.note
    assert {name.split("/")[0] for name in images.test_files} == {"train"}


def test_a_class_that_test_or_val_lacks_is_kept_and_named(root):
    shutil.rmtree(root / "test" / "cat")
    fill(root / "val" / "cat", 3, seed=50)
    images = load(root)
    assert images.classes == ("cat", "dog")
    assert images.test.labels.unique().tolist() == [1]
    for part, name in (("val", "dog"), ("test", "cat")):
        assert f"Classes without images in {part}, so they are not measured there: {name}." in images.note


# A table of labels


def write_table(root: Path, lines: list[str]) -> Path:
    table = root / "labels.csv"
    table.write_bytes(b"\xef\xbb\xbf" + "\r\n".join(lines).encode())
    return table


def rows(root: Path, split=False) -> list[str]:
    """The images of `root` with labels that are not their folders' names, and perhaps their splits."""
    files = sorted(file.relative_to(root) for file in root.rglob("*.png"))
    return [f'{file}, "a {file.parts[1]}, so"' + f",{file.parts[0]}" * split for file in files]


def test_a_table_gives_the_labels_and_perhaps_the_splits(root):
    expected = load(root)
    table = write_table(root, ["Path, LABEL,split", *rows(root, split=True)])
    images = folder.load(root, 32, root.parent / "cache", table)
    assert images.classes == ("a cat, so", "a dog, so")
    assert content(images)[1:] == content(expected)[1:]
    table = write_table(root, ["label,path", *(",".join(row.split(",", 1)[::-1]) for row in rows(root))])
    images = folder.load(root, 32, root.parent / "cache", table)
    assert images.train.labels.bincount().tolist() == images.test.labels.bincount().mul(4).tolist() == [24, 24]


def test_a_table_of_another_system_names_the_same_images(root, tmp_path):
    link, (first, *_) = tmp_path / "link", sorted((root / "train" / "cat").iterdir())
    link.symlink_to(root)
    first.rename(composed := first.with_name(unicodedata.normalize("NFC", "é.png")))
    lines = [f"{link}/train/cat/{unicodedata.normalize('NFD', composed.name)},é", "train\\dog\\0-000.png,dog"]
    lines += [f"{file.relative_to(root)},e\u0301" for file in (root / "train" / "cat").iterdir() if file != composed]
    lines += [f"{file.relative_to(root)},dog" for file in (root / "train" / "dog").iterdir() if "000" not in file.name]
    found = folder.list_images(root, write_table(root, ["path,label", *lines]))
    assert found.classes == ("dog", "é")
    assert {file.name for file in found.files} == {
        file.relative_to(root).as_posix() for file in (root / "train").rglob("*.png")
    }
    assert found.notes == []


TABLES = {
    "other columns": (lambda rows: ["file,class"], "must name the columns path and label, and .*: it has file, class$"),
    "empty": (lambda rows: [], "must name the columns path and label, .* it has none$"),
    "one label": (lambda rows: ["path,label", rows[0]], "needs at least two different labels: it has a cat, so$"),
    "quote": (lambda rows: ["path,label", 'a.png, "oak', "b.png,red"], "^a quote before line 3 of .* is not closed$"),
    "comma": (lambda rows: ["path,label", "a.png,oak,", "b.png,oak, red"], "^line 3 of .* has too many cells: quote"),
    "no label": (lambda rows: ["path,label", "a.png,"], "^line 2 of .*labels.csv has no path or no label$"),
    "two labels": (lambda rows: ["path,label", *rows, rows[0][:20] + "x"], "names .*png twice, with different labels"),
    "outside": (lambda rows: ["path,label", "../a.png,x"], r"line 2 of .* names \.\./a\.png, which is not in "),
    "missing": (
        lambda rows: ["path,label", *rows, "gone.png,x"],
        "^1 of 61 files that .* cannot be found in .*gone.png$",
    ),
    "another split": (lambda rows: ["path,label,split", "a.png,x,old"], "the split is train, val or test, not old$"),
    "some splits": (
        lambda rows: ["path,label,split", rows[0] + ",test", *rows[1:]],
        "must give a split to each image or to none: test$",
    ),
    "two columns": (lambda rows: ["path,label,Label", "a.png,x,y"], "names the column label twice$"),
    "a folder": (lambda rows: ["path,label", *rows, "train/cat,x"], "names train/cat, which is not a file$"),
    "latin 1": (lambda rows: ["path,label", *rows, "\udce9"], "is not a CSV file in UTF-8"),
    "no file": (None, r"^cannot read .*labels\.csv: No such file or directory$"),
}


@pytest.mark.parametrize("kind", TABLES)
def test_a_table_that_cannot_be_used_is_refused_in_one_sentence(root, kind):
    make, sentence = TABLES[kind]
    table = root / "labels.csv"
    if make:
        table.write_bytes("\n".join(make(rows(root))).encode(errors="surrogateescape"))
    with pytest.raises(UserError, match=sentence):
        folder.load(root, 32, root.parent / "cache", table)


def test_images_are_known_by_their_extensions_in_any_case(tmp_path):
    some = ("", ".png", ".JPG", ".jpeg", ".jpe", ".jfif", ".mpo", ".gif", ".webp", ".avif", ".bmp", ".tif", ".Tiff")
    for name in ("a", "b"):
        (tmp_path / name).mkdir()
        for extension in (*some, ".ppm", ".pgm", ".pbm", ".pnm", ".ico"):
            (tmp_path / name / f"image{extension}").touch()
    found = folder.list_images(tmp_path)
    assert (len(found.files), found.notes) == (36, [])


# What cannot be used


BROKEN = {
    "no classes": (
        lambda root: [shutil.rmtree(root), fill(root, 3, seed=1)],
        "pets has no folders: put the images of each class into a folder of its name",
    ),
    "one class": (
        lambda root: shutil.rmtree(root / "train" / "dog"),
        "train has only one class, cat: at least two are needed$",
    ),
    "splits without classes": (
        lambda root: [shutil.rmtree(root), fill(root / "train", 5, seed=1), fill(root / "test", 5, seed=2)],
        "test, train in .*pets have no folders of classes: put the images of each class into a folder of its name",
    ),
    "no folder of training images": (
        lambda root: shutil.rmtree(root / "train"),
        "pets has test, but needs exactly one train folder and .* alone, use .*pets/test: a fifth of it becomes",
    ),
    "two spellings": (
        lambda root: fill(root / "Training" / "cat", 3, seed=80),
        "pets has Training, train, test, but needs exactly one train folder",
    ),
    "splits with unknown names": (
        lambda root: [(root / part).rename(root / name) for part, name in (("train", "a"), ("test", "b"))],
        "a, b in .*pets all have the same folders, cat, dog: if they are splits, rename them to train and test",
    ),
    "photos of a phone, all but one": (
        lambda root: [file.rename(file.with_suffix(".heic")) for file in list((root / "train" / "cat").iterdir())[1:]],
        "images of cat: each class needs at least 2 training images, all different. Skipped: 19 .heic files: convert",
    ),
    "test images without classes": (
        lambda root: [shutil.rmtree(root / "test"), fill(root / "test", 3, seed=9)],
        "pets/test has no folders of classes, as train has: move its images into such folders or, if their classes are",
    ),
    "no test image that can be read": (
        lambda root: [
            shutil.rmtree(root / "test"),
            fill(root / "train" / "cat", 100, seed=9),
            (root / "test" / "cat").mkdir(parents=True),
            (root / "test" / "cat" / "1.png").write_text("no"),
        ],
        "pets has no test image that can be read: 1 of 141 files could not be read as images",
    ),
    "too few without a split": (
        lambda root: [shutil.rmtree(root), fill(root / "cat", 9, seed=1), fill(root / "bear", 2, seed=2)],
        "too few images of bear: each class needs at least 2",
    ),
    "a class only in test": (
        lambda root: fill(root / "test" / "eel", 2, seed=70),
        "pets/test has classes that .*pets/train lacks, so they cannot be learned: eel$",
    ),
    "too many other files": (
        lambda root: [(root / "train" / "cat" / f"{number}.gif").write_text("no") for number in range(4)],
        r"cannot read 4 of 64 files as images \(at most 1% may fail\): fix or delete train/cat/0\.gif \(the ",
    ),
    "a file too large for an image": (
        lambda root: os.truncate(root / "train" / "cat" / "1-000.png", 2**40),
        r"1-000\.png .the file has over 400 MB",
    ),
    "a name in Latin-1": (
        lambda root: (root / "train" / "dog").rename(root / "train" / os.fsdecode(b"chien\xe9")),
        r"the name 'chien\\udce9' is not valid UTF-8; rename it",
    ),
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


def test_more_classes_than_a_checkpoint_may_have_are_refused(root, monkeypatch):
    monkeypatch.setattr(folder, "MAX_CLASSES", 1)
    with pytest.raises(UserError, match=r"pets has 2 classes: at most 1 are possible$"):
        folder.list_images(root)


def test_300_classes_have_one_label_each_and_training_images_are_mixed(tmp_path):
    for number in range(300):
        fill(tmp_path / "many" / f"{number:03}", 3, seed=number)
    images = load(tmp_path / "many")
    assert images.train.labels.bincount().tolist() == [2] * 300
    assert images.test.labels.tolist() == list(range(300))
    assert len(images.train.labels[:100].unique()) > 60
