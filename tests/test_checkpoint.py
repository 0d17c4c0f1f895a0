import functools
import io
import os
import zipfile
from pathlib import Path

import numpy as np
import pytest
import torch

from cifar import checkpoint, model
from cifar.config import PROJECT
from cifar.errors import UserError
from commands import start
from conftest import as_nobody
from handmade import Command

CONTENT = {"model": "convnet", "classes": ["a", "b"], "image_size": 32, "epoch": 3}


def network() -> torch.nn.Module:
    torch.manual_seed(0)
    return model.build("convnet", 2, 32)


def save(path: Path, **changes) -> None:
    checkpoint.save(path, {**CONTENT, "weights": network().state_dict(), **changes})


def rewrite(path: Path, **changes) -> None:
    """Save a checkpoint and replace entries of it, which `save` would not write."""
    save(path)
    torch.save({**torch.load(path, weights_only=True), **changes}, path)


def use(path: Path) -> torch.nn.Module:
    """Return a network with the weights of the checkpoint, loaded as its users do."""
    loaded = model.build("convnet", 2, 32)
    checkpoint.load_weights(path, checkpoint.load(path), loaded)
    return loaded


def test_a_checkpoint_loads_as_it_was_saved(tmp_path):
    save(tmp_path / "best.pt")
    content = checkpoint.load(tmp_path / "best.pt")
    assert (content["model"], content["classes"], content["epoch"]) == ("convnet", ["a", "b"], 3)
    for name, tensor in use(tmp_path / "best.pt").state_dict().items():
        assert torch.equal(tensor, network().state_dict()[name])
    assert os.listdir(tmp_path) == ["best.pt"]


def test_a_checkpoint_that_is_missing_or_cannot_be_read_is_named(tmp_path):
    with pytest.raises(UserError, match=r"there is no checkpoint .*best\.pt: "):
        checkpoint.load(tmp_path / "best.pt")
    save(tmp_path / "best.pt")
    (tmp_path / "best.pt").chmod(0)
    with as_nobody(), pytest.raises(UserError, match=r"cannot read the checkpoint .*best\.pt: Permission denied$"):
        checkpoint.load(tmp_path / "best.pt")


def test_a_pipe_in_place_of_a_checkpoint_is_not_waited_for(tmp_path):
    os.mkfifo(tmp_path / "best.pt")
    with pytest.raises(UserError, match=r"is damaged or not from this program$"):
        checkpoint.load(tmp_path / "best.pt")


@pytest.mark.parametrize(
    ("changes", "sentence"),
    [
        ({"format": 2}, "is not of format 1"),
        ({"color": 1}, "is not of format 1"),
        ({"model": 1}, "its network has no name"),
        ({"classes": []}, "its classes are not names"),
        ({"classes": ["a", 2]}, "its classes are not names"),
        ({"classes": ["a"] * 1_000_000}, "damaged"),
        ({"image_size": 10**9}, "its image size is not possible"),
        ({"image_size": "32"}, "its image size is not possible"),
        ({"epoch": -1}, "its epoch is not possible"),
        ({"weights": [1]}, "it has no weights"),
        ({"weights": {}}, "do not fit the network convnet"),
        # What becomes of a weight.
        (lambda weight: weight[:1], "do not fit the network"),
        (lambda weight: weight.double(), "do not fit the network"),
        (lambda weight: weight.to_sparse(), "is damaged"),
        (lambda weight: weight[:1, :1].clone().expand(2, 128), "do not fit the network"),
        (lambda weight: weight.to("meta"), "do not fit the network"),
        (lambda weight: weight.tolist(), "do not fit the network"),
        (lambda weight: weight * float("nan"), "are not finite"),
        (lambda weight: weight / 0, "are not finite"),
    ],
)
def test_what_is_not_possible_is_refused_in_a_sentence(tmp_path, changes, sentence):
    if callable(changes):
        weights = network().state_dict()
        changes = {"weights": {**weights, "head.weight": changes(weights["head.weight"])}}
    rewrite(tmp_path / "best.pt", **changes)
    with pytest.raises(UserError, match=sentence):
        use(tmp_path / "best.pt")


@functools.cache
def bomb() -> bytes:
    """Return a zip of 5 MB that unpacks to 1.2 GB."""
    file = io.BytesIO()
    with (
        zipfile.ZipFile(file, "w", zipfile.ZIP_DEFLATED, compresslevel=1) as archive,
        archive.open("archive/data.pkl", "w") as member,
    ):
        for _ in range(1200):
            member.write(bytes(10**6))
    return file.getvalue()


KINDS = (*["flipped"] * 12, *["cut"] * 6, "command", "shape", "type", "nan", "bomb", "claim", "empty", "folder")


def spoil(path: Path, rng: np.random.Generator) -> str:
    """Write a checkpoint with a random damage; returns its kind."""
    save(path)
    whole, weights = bytearray(path.read_bytes()), network().state_dict()
    name, kind = str(rng.choice(sorted(weights))), str(rng.choice(KINDS))
    match kind:
        case "flipped":
            for place in rng.integers(len(whole), size=rng.integers(1, 4)):
                whole[place] ^= 1 << int(rng.integers(8))
        case "cut":
            del whole[int(rng.integers(len(whole))) :]
        case "empty":
            whole = b""
        case "command":
            torch.save({**CONTENT, "format": 1, "weights": Command(path.parent / "executed")}, path)
            return kind
        case "shape" | "type" | "nan":
            odd = {"shape": torch.zeros(3), "type": weights[name].double(), "nan": weights[name] * float("nan")}[kind]
            rewrite(path, weights={**weights, name: odd})
            return kind
        case "bomb":
            whole = bomb()
        case "claim":  # 4 TB, of which one number is there
            rewrite(path, weights={**weights, name: torch.zeros(1).expand(10**6, 10**6)})
            return kind
    path.unlink()
    path.mkdir() if kind == "folder" else path.write_bytes(whole)
    return kind


LOAD = """
import resource, sys, time
from pathlib import Path
import torch
import test_checkpoint
from cifar.errors import UserError
saved = test_checkpoint.network().state_dict()
before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
for path in sorted(Path(sys.argv[1]).glob("*.pt")):
    started = time.process_time()
    try:
        loaded = test_checkpoint.use(path).state_dict()
        sentence = "loaded" if all(torch.equal(saved[name], loaded[name]) for name in saved) else "other weights"
    except UserError as error:
        sentence = str(error)
    print(path.name, "%.3f" % (time.process_time() - started), sentence.replace("\\n", " ... "))
print(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before)
"""


@pytest.mark.parametrize("damages", [75, pytest.param(4000, marks=pytest.mark.slow)])
def test_damaged_checkpoints_are_refused_in_five_seconds_and_a_gigabyte_and_execute_nothing(tmp_path, damages):
    rng = np.random.default_rng(1)
    kinds = {f"{number:04}.pt": spoil(tmp_path / f"{number:04}.pt", rng) for number in range(damages)}
    assert set(kinds.values()) == set(KINDS)
    paths = {"PYTHONPATH": os.pathsep.join((str(PROJECT), str(PROJECT / "tests")))}
    process = start("-c", LOAD, str(tmp_path), env=os.environ | paths)
    out, err = process.communicate()
    assert (process.returncode, err) == (0, "")
    *lines, kilobytes = out.splitlines()
    assert [line.split()[0] for line in lines] == sorted(kinds)
    for name, seconds, sentence in (line.split(maxsplit=2) for line in lines):
        assert float(seconds) < 5
        assert " ... " not in sentence
        assert sentence != "other weights"
        assert sentence != "loaded" or kinds[name] == "flipped", kinds[name]  # in the padding between the parts
    assert int(kilobytes) < 10**6
    assert not (tmp_path / "executed").exists()


def test_the_names_of_networks_in_older_checkpoints_are_still_understood(tmp_path):
    rewrite(tmp_path / "best.pt", model="whitened")
    assert checkpoint.load(tmp_path / "best.pt")["model"] == "airbench94"
