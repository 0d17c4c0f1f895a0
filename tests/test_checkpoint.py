import os
import pickle

import pytest
import torch

from cifar import checkpoint
from cifar.config import UserError

CONTENT = {"model": "convnet", "classes": ("a", "b"), "image_size": 32, "epoch": 3}


def save(path):
    checkpoint.save(path, **CONTENT, weights={"w": torch.arange(6.0).view(2, 3)})


def test_a_checkpoint_loads_as_it_was_saved(tmp_path):
    save(tmp_path / "best.pt")
    content = checkpoint.load(tmp_path / "best.pt")
    assert torch.equal(content["weights"]["w"], torch.arange(6.0).view(2, 3))
    assert (content["model"], content["classes"], content["epoch"]) == ("convnet", ["a", "b"], 3)
    assert os.listdir(tmp_path) == ["best.pt"]


def test_a_missing_checkpoint_is_told(tmp_path):
    with pytest.raises(UserError, match="there is no checkpoint"):
        checkpoint.load(tmp_path / "best.pt")


@pytest.mark.parametrize("damage", [b"", b"rubbish", "truncated", "folder", "flipped"])
def test_a_damaged_checkpoint_is_told_in_one_sentence(tmp_path, damage):
    path = tmp_path / "best.pt"
    if damage == "folder":
        path.mkdir()
    else:
        save(path)
        whole = path.read_bytes()
        flipped = bytes(byte ^ 255 if 200 < index < 400 else byte for index, byte in enumerate(whole))
        path.write_bytes({"truncated": whole[:-200], "flipped": flipped}.get(damage, damage))
    with pytest.raises(UserError, match=r"is damaged or not one of this program.s$"):
        checkpoint.load(path)


class _Command:
    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return os.mkdir, (str(self.path),)


@pytest.mark.parametrize("write", [torch.save, lambda content, path: path.write_bytes(pickle.dumps(content))])
def test_code_in_a_checkpoint_is_not_executed(tmp_path, write):
    write({"weights": _Command(tmp_path / "executed")}, tmp_path / "best.pt")
    with pytest.raises(UserError, match="is damaged or not"):
        checkpoint.load(tmp_path / "best.pt")
    assert not (tmp_path / "executed").exists()


def test_another_format_is_refused(tmp_path):
    save(tmp_path / "best.pt")
    torch.save({**checkpoint.load(tmp_path / "best.pt"), "format": 2}, tmp_path / "best.pt")
    with pytest.raises(UserError, match="is not of format 1"):
        checkpoint.load(tmp_path / "best.pt")
