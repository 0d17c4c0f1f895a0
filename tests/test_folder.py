import os
import re
import shutil
import tempfile
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from cifar import folder
from cifar.errors import UserError
from cifar.picture import decode
from conftest import as_nobody

SIZE = 32


def fill(place: Path, count: int, seed: int, size: tuple[int, int] = (8, 8)) -> None:
    """Pictures of noise, no two alike."""
    place.mkdir(parents=True, exist_ok=True)
    rng = np.random.default_rng(seed)
    for number in range(count):
        Image.fromarray(rng.integers(0, 256, (*size, 3), dtype=np.uint8)).save(place / f"{seed}-{number:03}.png")


@pytest.fixture
def root(tmp_path) -> Path:
    """Two classes in train/ and test/: ten and four pictures of each, of another size than the network's."""
    for seed, (part, count) in enumerate((("train", 10), ("test", 4))):
        for number, name in enumerate(("dog", "cat")):
            fill(tmp_path / "pets" / part / name, count, seed=2 * seed + number, size=(20, 40))
    return tmp_path / "pets"


@pytest.fixture
def level(tmp_path) -> Path:
    """Two classes in one level: 20 and 10 pictures."""
    fill(tmp_path / "level" / "a", 20, seed=1)
    fill(tmp_path / "level" / "b", 10, seed=2)
    return tmp_path / "level"


def load(root: Path, size: int = SIZE) -> folder.Pictures:
    return folder.load(root, size, root.parent / "cache")


def everything(pictures: folder.Pictures) -> list[bytes]:
    return [
        part.numpy().tobytes() for split in (pictures.train, pictures.test) for part in (split.images, split.labels)
    ]


@pytest.mark.parametrize("size", [32, 50])
def test_each_picture_is_what_the_decoder_gives_under_the_number_of_its_class(root, size):
    (root / "train" / "cat" / "inner").mkdir()
    (root / "train" / "cat" / "1-000.png").rename(root / "train" / "cat" / "inner" / "1-000.png")
    (root / "train" / "cat" / ".hidden").write_bytes(b"not counted")
    pictures = load(root, size)
    assert (pictures.classes, pictures.note) == (("cat", "dog"), None)
    for split, part, count in ((pictures.train, "train", 10), (pictures.test, "test", 4)):
        assert split.images.shape == (2 * count, 3, size, size)
        for number, name in enumerate(pictures.classes):
            expected = {decode(file, size).numpy().tobytes() for file in (root / part / name).rglob("*.png")}
            assert {image.numpy().tobytes() for image in split.images[split.labels == number]} == expected


def test_training_pictures_are_mixed_so_that_the_first_ones_are_of_all_classes(tmp_path):
    for seed in range(2):
        fill(tmp_path / "many" / "train" / str(seed), 100, seed)
        fill(tmp_path / "many" / "test" / str(seed), 1, seed + 10)
    assert 20 < load(tmp_path / "many").train.labels[:100].sum() < 80


def test_one_level_gives_a_fifth_of_each_class_to_the_test_split_and_no_picture_to_both(level):
    pictures = load(level)
    assert pictures.train.labels.bincount().tolist() == [16, 8]
    assert pictures.test.labels.bincount().tolist() == [4, 2]
    images = [image.numpy().tobytes() for split in (pictures.train, pictures.test) for image in split.images]
    assert len(set(images)) == 30


def test_the_test_split_of_one_level_depends_on_the_pictures_and_not_on_their_names_or_their_folders_place(level):
    before = load(level)
    for file in level.rglob("*.png"):
        file.rename(file.with_name("renamed-" + file.name[::-1]))
    level.rename(level.parent / "moved")
    after = load(level.parent / "moved")
    images = lambda pictures: {image.numpy().tobytes() for image in pictures.test.images}  # noqa: E731
    assert images(before) == images(after)


def test_copies_of_a_picture_stay_on_one_side_of_one_level(level):
    for number in range(3):
        for file in sorted((level / "a").glob("1-*.png")):
            shutil.copy(file, level / "a" / f"copy-{number}-{file.name}")
    pictures = load(level)
    sides = [{image.numpy().tobytes() for image in split.images} for split in (pictures.train, pictures.test)]
    assert not sides[0] & sides[1]
    assert pictures.note is None


def test_a_second_start_decodes_nothing_and_gives_the_same(root, monkeypatch):
    first = load(root)
    monkeypatch.setattr(folder, "_read", None)
    again = load(root)
    assert (everything(again), again.classes, again.note) == (everything(first), first.classes, first.note)
    with pytest.raises(TypeError):  # another size has a cache of its own
        load(root, 40)


def touch(root: Path) -> None:
    os.utime(root / "train" / "cat" / "1-000.png", (1, 1))


def replace(root: Path) -> None:
    shutil.copy(root / "train" / "cat" / "1-001.png", root / "train" / "cat" / "1-000.png")


def add(root: Path) -> None:
    fill(root / "train" / "cat", 1, seed=99)


def remove(root: Path) -> None:
    (root / "test" / "dog" / "2-000.png").unlink()


def rename_a_class(root: Path) -> None:
    for part in ("train", "test"):
        (root / part / "dog").rename(root / part / "wolf")


@pytest.mark.parametrize("change", [touch, replace, add, remove, rename_a_class])
def test_a_changed_folder_is_decoded_anew(root, change, monkeypatch):
    load(root)
    change(root)
    changed = load(root)
    monkeypatch.setattr(folder, "_load", lambda *_: None)
    fresh = load(root)
    assert (everything(changed), changed.classes) == (everything(fresh), fresh.classes)
    monkeypatch.undo()
    monkeypatch.setattr(folder, "_read", None)
    assert everything(load(root)) == everything(fresh)


@pytest.mark.parametrize(
    "damage", [lambda whole: whole[: len(whole) // 2], lambda whole: b"", lambda whole: b"\x80\x04."]
)
def test_a_damaged_cache_is_made_anew(root, damage):
    first = load(root)
    (cache,) = (root.parent / "cache" / "decoded").iterdir()
    cache.write_bytes(damage(cache.read_bytes()))
    assert everything(load(root)) == everything(first)
    assert len(list(cache.parent.iterdir())) == 1


def test_a_flipped_pixel_in_the_cache_is_noticed(root):
    first = load(root)
    (cache,) = (root.parent / "cache" / "decoded").iterdir()
    content = bytearray(cache.read_bytes())
    content[len(content) // 2] ^= 1
    cache.write_bytes(content)
    assert everything(load(root)) == everything(first)


def test_where_no_cache_can_be_written_the_pictures_are_read_all_the_same(root, capsys):
    (root.parent / "cache").write_bytes(b"a file in its place")
    assert len(load(root).train) == 20
    assert "decoded anew at the next start: cannot write" in capsys.readouterr().out


def test_up_to_a_hundredth_of_other_files_is_named_and_left_out(tmp_path):
    for name, seed in (("a", 1), ("b", 2)):
        fill(tmp_path / "level" / name, 100, seed)
    (tmp_path / "level" / "a" / "notes.txt").write_text("no picture")
    (tmp_path / "level" / "b" / "empty.png").write_bytes(b"")
    pictures = load(tmp_path / "level")
    assert len(pictures.all) == 200
    expected = "2 of 202 files could not be read as pictures and were left out: a/notes.txt (the file is not a picture"
    assert pictures.note.startswith(expected)
    assert "b/empty.png (the file is empty)" in pictures.note
    assert everything(load(tmp_path / "level")) == everything(pictures)
    assert load(tmp_path / "level").note == pictures.note


def test_a_file_that_may_not_be_read_is_left_out_like_one_that_is_no_picture(tmp_path):
    with tempfile.TemporaryDirectory() as name:  # as pytest's own folders are closed to others
        level = Path(name) / "level"
        for seed, label in enumerate("ab"):
            fill(level / label, 50, seed)
        (level / "a" / "0-007.png").chmod(0)
        Path(name).chmod(0o777)
        with as_nobody():
            pictures = load(level)
    assert len(pictures.all) == 99
    assert pictures.note.startswith("1 of 100 files could not be read as pictures and were left out: a/0-007.png (")


def test_a_folder_that_may_not_be_read_is_told(root):
    root.chmod(0)
    with as_nobody(), pytest.raises(UserError, match=r"^cannot read .*pets.*: Permission denied$"):
        load(root)
    root.chmod(0o755)


def test_the_same_picture_in_train_and_test_is_reported_with_both_names(root):
    shutil.copy(root / "test" / "dog" / "2-001.png", root / "train" / "dog" / "copy.png")
    assert load(root).note == (
        "1 of 8 test pictures are training pictures too, which flatters the accuracy: "
        "test/dog/2-001.png is train/dog/copy.png."
    )


def test_a_folder_beside_train_and_test_is_said_not_to_be_read(root):
    fill(root / "val" / "cat", 3, seed=50)
    assert load(root).note == "val beside train and test: not read; validation is held out of train."


def no_folders(root):
    shutil.rmtree(root)
    root.mkdir()


def pictures_without_a_class(root):
    no_folders(root)
    fill(root, 3, seed=1)


def one_class(root):
    for part in ("train", "test"):
        shutil.rmtree(root / part / "dog")


def empty_folders(root):
    for file in root.rglob("*.png"):
        file.unlink()


def too_few(root):
    for file in sorted((root / "train" / "dog").iterdir())[1:]:
        file.unlink()


def too_few_to_test(root):
    shutil.rmtree(root / "test" / "cat")


def too_few_in_one_level(root):
    shutil.move(root / "train", root.parent / "train")
    no_folders(root)
    shutil.move(root.parent / "train" / "cat", root / "cat")
    fill(root / "bear", 2, seed=1)


def only_train(root):
    shutil.rmtree(root / "test")
    fill(root / "val" / "cat", 1, seed=1)


def a_new_class_to_test(root):
    fill(root / "test" / "eel", 2, seed=70)


def too_much_that_is_no_picture(root):
    for number in range(4):
        (root / "train" / "cat" / f"{number}.txt").write_text("no")


def a_name_in_latin_1(root):
    for part in ("train", "test"):
        (root / part / "dog").rename(root / part / os.fsdecode(b"chien\xe9"))


SENTENCES = {
    no_folders: r"pets has no folders: each class's pictures go into one that is called like it",
    pictures_without_a_class: r"pets has no folders",
    one_class: r"train has one class, cat: there is nothing to tell apart",
    empty_folders: r"pets is empty",
    too_few: r"too few pictures of dog: each class takes at least 2 in train/ and 1 in test/",
    too_few_to_test: r"too few pictures of cat: each",
    too_few_in_one_level: r"too few pictures of bear: each class takes at least 3 that differ",
    only_train: r"pets has train/ but no test/",
    a_new_class_to_test: r"test has classes that train/ has not: eel",
    a_name_in_latin_1: r"pets cannot be read: the name 'chien\\udce9' is not in UTF-8, rename it",
    too_much_that_is_no_picture: (
        r"4 of 32 files could not be read as pictures, and 1% is the most that is passed over: mend or delete "
        r"train/cat/0\.txt \(the file is not a picture.*and 1 more"
    ),
}


@pytest.mark.parametrize("break_it", SENTENCES, ids=lambda break_it: break_it.__name__)
def test_a_folder_that_cannot_serve_is_told_in_one_sentence(root, break_it):
    break_it(root)
    with pytest.raises(UserError) as caught:
        load(root)
    assert re.search(SENTENCES[break_it], str(caught.value))
    assert "\n" not in str(caught.value)


def test_a_thousand_classes_are_one_number_each(tmp_path):
    image = Image.fromarray(np.zeros((4, 4, 3), dtype=np.uint8))
    for number in range(1000):
        (tmp_path / "many" / f"{number:03}").mkdir(parents=True)
        for copy in range(3):
            image.putpixel((0, 0), (number % 256, number // 256, copy))
            image.save(tmp_path / "many" / f"{number:03}" / f"{copy}.bmp")
    pictures = load(tmp_path / "many")
    assert pictures.train.labels.bincount().tolist() == [2] * 1000
    assert torch.equal(pictures.test.labels, torch.arange(1000))
