"""Each check, with its problem made real: old packages, a broken torch, full disks, damaged files, taken ports."""

import contextlib
import dataclasses
import importlib.metadata
import os
import re
import socket
from pathlib import Path

import pytest
import torch

from cifar import datasets, device, doctor, evaluate
from cifar.config import Config
from cifar.download import ARCHIVES
from cifar.errors import UserError
from commands import run
from conftest import as_nobody
from handmade import make_run
from server import CONTENT, archive_of, fail, send


def only(subject: str, check) -> doctor.Finding:
    """Return the one finding of a check."""
    (found,) = doctor._guarded(subject, check)
    return found


def test_a_good_machine_has_no_failures_and_stays_unchanged(small_cifar10, tmp_path, capsys):
    config = Config.create({"data_dir": str(tmp_path), "output_dir": str(tmp_path / "new")})
    findings = doctor.examine(config, 7860)
    assert [finding for finding in findings if finding.level == "failure"] == []
    assert [path.name for path in tmp_path.iterdir()] == [small_cifar10.name]
    doctor.show_findings(findings)
    shown = capsys.readouterr().out
    assert f"ok       dataset   in {small_cifar10}; each file has its published MD5\n" in shown
    assert f"torch {torch.__version__.split('+')[0]}" in shown


# Packages


def test_packages_that_are_old_new_missing_or_insecure_are_named_with_their_cure(tmp_path, monkeypatch, capsys):
    monkeypatch.setitem(doctor._OPTIONAL, "no-such-thing-either", "dance")
    monkeypatch.setitem(doctor._SECURITY, "rich", ("999", "CVE-1, x"))
    lines = ["numpy>=99,<100", "pillow<1", "no-such-thing>=1", "no-such-thing-either", "rich>=1"]
    old, new, missing, optional, insecure = doctor._packages(lines)
    version = importlib.metadata.version("numpy")
    assert old.message == f"numpy {version} was not tested: use <100,>=99"
    assert new.message.startswith("pillow ")
    assert (missing.level, missing.message) == ("failure", "no-such-thing is missing: a run needs it")
    assert (optional.level, optional.message) == ("warning", "no-such-thing-either is missing: invoke dance needs it")
    assert insecure.message.endswith("has a known security hole, fixed in 999: CVE-1, x")
    assert {finding.level for finding in (old, new, insecure)} == {"warning"}
    doctor.show_findings([missing])
    assert capsys.readouterr().out.splitlines()[1].strip() == f"fix: {missing.fix}"
    assert missing.fix == "pip install 'no-such-thing>=1'"
    assert insecure.fix == "pip install 'rich>=999'"


EXAMINE = """
from cifar import doctor
from cifar.config import Config
doctor.show_findings(doctor.examine(Config.create({"dataset": "digits"}), 7860))
"""


def test_a_broken_torch_is_one_failure_with_its_cure(tmp_path):
    (tmp_path / "torch").mkdir()
    (tmp_path / "torch" / "__init__.py").write_text("raise OSError('libtorch_cpu.so: not found\\nx')")
    code, out, err = run("-c", EXAMINE, env=os.environ | {"PYTHONPATH": str(tmp_path)})
    assert (code, err) == (0, "")
    failure = "failure  device    cannot be checked: OSError: libtorch_cpu.so: not found"
    assert f"{failure}\n              fix: if a package is broken: pip install --force" in out
    assert out.count("cannot be checked") == 2  # the datasets need torch too


# Hardware


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU here")
def test_a_gpu_that_cannot_be_used_is_reported(tmp_path, monkeypatch):
    found = only("device", doctor._device("cuda"))
    assert (found.level, found.message) == ("failure", "PyTorch finds no device 'cuda' here: it finds cpu")
    (tmp_path / "nvidia-smi").write_text("#!/bin/sh\n")
    (tmp_path / "nvidia-smi").chmod(0o755)
    monkeypatch.setenv("PATH", str(tmp_path))
    found = next(doctor._device("auto"))
    assert found.level == "warning"
    assert "finds no GPU" in found.message
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "")
    assert next(doctor._device("auto")).fix == "unset CUDA_VISIBLE_DEVICES"


def test_a_gpus_memory_and_precision_are_named(monkeypatch):
    for name, value in {"choose": torch.device("cuda"), "describe": "Tesla T4", "has_bfloat16": False}.items():
        monkeypatch.setattr(device, name, lambda _, value=value: value)
    monkeypatch.setattr(device, "unused_gpu", lambda: None)
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda _: (3_000_000_000, 15_800_000_000))
    found, precision, _ = doctor._device("auto")
    assert (found.level, found.message) == ("ok", "cuda: Tesla T4, 3.0 GB of memory free of 15.8")
    assert precision.message == "not in hardware: networks train in float16"


@pytest.mark.parametrize("kind", ["amx_bf16", "avx512_bf16", "avx2"])
def test_the_kind_of_processor_is_named(monkeypatch, kind):
    monkeypatch.setattr(device, "cpu_features", lambda: {kind: True})
    _, found, _ = doctor._device("cpu")
    is_fast = ("ok", f"in hardware ({kind}): networks train in it")
    is_slow = ("note", "not in hardware: networks train in float32")
    kind_named, _, duration = found.message.partition("; ")
    assert (found.level, kind_named) == (is_slow if kind == "avx2" else is_fast)
    assert re.fullmatch(r"fast takes about \d+( to \d+)? minutes on two cores", duration)


@pytest.mark.parametrize(
    ("threads", "load", "variable", "level", "fix"),
    [
        (4, 0.0, "", "ok", ""),
        (5, 0.0, "", "warning", "export OMP_NUM_THREADS=4"),
        (4, 1e9, "", "warning", "close other programs, or as long as they run: export OMP_NUM_THREADS=2"),
        (2, 1e9, "2", "warning", "close other programs"),  # the advice has been taken
        (1, 0.0, "1", "note", "unset OMP_NUM_THREADS to use all cores"),
        (2, 0.0, "9", "ok", ""),  # torch does not count hyperthreads
    ],
)
def test_threads_that_do_not_fit_the_cores_are_reported(monkeypatch, threads, load, variable, level, fix):
    monkeypatch.setattr(os, "getloadavg", lambda: (load, 0.0, 0.0), raising=False)
    monkeypatch.setenv("OMP_NUM_THREADS", variable)
    found = doctor._threads(threads, cores=4)
    assert (found.level, found.fix) == (level, fix)


@pytest.mark.parametrize(
    ("free", "bfloat16", "level"),
    [(2.5e9, True, "ok"), (1.5e9, True, "warning"), (4e9, False, "ok"), (2.5e9, False, "warning")],
)
def test_memory_is_compared_with_what_fast_needs(monkeypatch, free, bfloat16, level):
    monkeypatch.setattr(device, "memory", lambda: (8e9, free))
    monkeypatch.setattr(device, "has_bfloat16", lambda _: bfloat16)
    assert only("memory", doctor._memory()).level == level


# Disk and dataset


def test_a_disk_that_is_full_or_cannot_be_written_is_a_failure(tmp_path, monkeypatch):
    (tmp_path / "file").write_text("")
    (tmp_path / "closed").mkdir(mode=0)
    for folder, user in (("file", contextlib.nullcontext()), ("closed", as_nobody())):
        with user:
            found = only("disk", doctor._disk(str(tmp_path / folder / "outputs")))
        assert (found.level, "cannot write to" in found.message) == ("failure", True)
    monkeypatch.setattr(doctor.shutil, "disk_usage", lambda _: doctor.shutil._ntuple_diskusage(2e9, 2e9 - 3e6, 3e6))
    found = only("disk", doctor._disk(str(tmp_path / "outputs")))
    advice = "make room, or set --output-dir to another folder"
    assert found.message == f"3 MB free in {tmp_path / 'outputs'}, but 50 MB needed; {advice}"
    assert found.level == "failure"


def dataset(name: str, data_dir: Path = Path("nowhere")) -> doctor.Finding:
    return only("dataset", doctor._dataset(Config.create({"dataset": name, "data_dir": str(data_dir)})))


def test_a_damaged_file_of_the_dataset_is_named(small_cifar10):
    (small_cifar10 / "test_batch").write_bytes(b"x")
    found = dataset("cifar10", small_cifar10)
    assert found.level == "failure"
    assert found.message.startswith(f"{small_cifar10 / 'test_batch'} is damaged: ")


@pytest.fixture
def known(monkeypatch, server):
    """A small archive in the place of CIFAR-10's, and the server that has it."""
    known = archive_of(CONTENT, urls=(server.play("a", send()),))
    monkeypatch.setitem(ARCHIVES, "cifar10", known)
    return known


def test_an_archive_is_verified_without_a_connection(known, server, tmp_path):
    (tmp_path / "data.tar.gz").write_bytes(CONTENT)
    assert "the next run unpacks it" in dataset("cifar10", tmp_path).message
    (tmp_path / "data.tar.gz").write_bytes(CONTENT[:-1])
    for place in (tmp_path, tmp_path / "data.tar.gz"):
        assert (dataset("cifar10", place).level, "is damaged" in dataset("auto", place).message) == ("failure", True)
    assert dataset("cifar10", tmp_path / "other.tar.gz").message == f"there is no archive {tmp_path / 'other.tar.gz'}"
    assert server.requests == []


def test_a_missing_dataset_is_looked_for_but_not_downloaded(known, server, tmp_path, monkeypatch):
    found = dataset("cifar10", tmp_path)
    host = server.url.removeprefix("http://")
    assert found.level == "note"
    assert found.message == f"data.tar.gz is not in {tmp_path}: the next run downloads 1 MB from {host}"
    server.play("a", fail(503))
    assert (dataset("cifar10", tmp_path).level, dataset("auto", tmp_path).level) == ("failure", "warning")
    assert "would train on scikit-learn's digits" in dataset("auto", tmp_path).message
    assert list(tmp_path.iterdir()) == []
    monkeypatch.setenv("CIFAR_DATA_DIR", str(tmp_path))
    assert f"is not in {tmp_path} (CIFAR_DATA_DIR), and" in dataset("cifar10", tmp_path).message
    monkeypatch.setitem(ARCHIVES, "cifar10", dataclasses.replace(known, size=2**60))
    assert "set --data-dir to another folder" in dataset("cifar10", tmp_path).message


def test_a_dataset_that_cannot_be_used_is_a_failure(tmp_path):
    assert dataset("digits").level == "ok"
    for name in ("cifr10", "~nobody-of-that-name/x", str(tmp_path)):  # which is empty
        with pytest.raises(UserError) as refused:
            datasets.describe(name)
        assert dataset(name) == doctor.Finding("dataset", "failure", str(refused.value))
    labels = Config.create({"dataset": "cifar10", "labels": str(tmp_path / "labels.csv")})
    assert only("dataset", doctor._dataset(labels)).message.startswith("--labels is for a folder of images")


def test_a_taken_port_is_a_warning():
    with socket.create_server(("127.0.0.1", 0)) as listener:
        port = listener.getsockname()[1]
        found = only("port", doctor._port(port))
    assert (found.level, found.fix) == ("warning", "invoke demo --port with another number")
    assert found.message == f"the demo cannot listen on port {port}: Address already in use"
    assert only("port", doctor._port(port)).level == "ok"


# A run


def findings_of(run) -> list[tuple[str, str, bool]]:
    return [(found.level, found.message, bool(found.fix)) for found in doctor.examine_run(run)]


def test_a_run_is_described(tmp_path):
    run = make_run(tmp_path / "run")
    sound = [("ok", "run is completed", False), ("ok", "test accuracy 75.00%, with TTA 83.33%", False)]
    assert findings_of(run) == sound
    run.update(status="interrupted")
    assert findings_of(run) == [("warning", "run is interrupted", True), sound[1]]
    run.update(status="failed", error="no room")
    assert findings_of(run)[0] == ("warning", "run is failed: no room", True)
    run.update(error="the loss is not finite at epoch 1, step 2: try --lr 0.1")  # again, as its settings stay
    assert findings_of(run)[0][2] is False
    run.write("run.json", {})
    assert [level for level, *_ in findings_of(run)] == ["failure"]


def test_a_run_that_has_learned_nothing_is_a_warning(tmp_path):
    run = make_run(tmp_path / "run", predicted=(0,) * 12)
    *_, (level, message, _) = findings_of(run)
    assert (level, message) == ("warning", evaluate.learning_problems(run)[-1])
