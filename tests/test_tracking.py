"""The trackers: what they record is read back from their own files."""

import importlib.util
import sqlite3
import sys

import pytest

from cifar import pipeline, report, tracking, visualize
from cifar.errors import UserError
from cifar.runs import Run
from commands import QUICK, main
from conftest import quick_config


@pytest.fixture
def track(tmp_path, monkeypatch):
    """A function that trains two epochs with a tracker, of which nothing is printed; returns the run."""
    for module, name in ((visualize, "visualize"), (report, "write")):
        monkeypatch.setattr(module, name, lambda *_: None)

    def train_with(tracker: str, **environment: str) -> Run:
        for name, value in environment.items():
            monkeypatch.setenv(name, value)
        code, out, err = main(*QUICK, "--epochs", "2", "--track", tracker, "--output-dir", str(tmp_path))
        assert (code, err) == (0, "")
        assert not [line for line in out.splitlines() if line.startswith(("*", "wandb", "\x1b"))]
        return Run(next(tmp_path.glob("2*_mlp_digits")))

    return train_with


def test_tensorboard_gets_settings_history_and_final_metrics(track):
    pytest.importorskip("tensorboard")
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    made = track("tensorboard")
    events = EventAccumulator(str(made.path / "tensorboard"))
    events.Reload()
    for key in ("train_loss", "val_accuracy", "lr", "images_per_second"):
        logged = [(event.step, event.value) for event in events.Scalars(key)]
        assert logged == [(line.epoch, pytest.approx(getattr(line, key), rel=1e-6)) for line in made.history()]
    (final,) = events.Scalars("test_accuracy_tta")
    assert final.value == pytest.approx(made.metrics.accuracy_tta)
    text, *_ = events.Tensors("config/text_summary")
    assert '"recipe": "mlp"' in text.tensor_proto.string_val[0].decode()


def test_wandb_gets_them_offline(track, tmp_path):
    pytest.importorskip("wandb")
    folders = {f"WANDB_{name}_DIR": str(tmp_path / "wandb-own") for name in ("CACHE", "CONFIG", "DATA")}
    name = track("wandb", WANDB_MODE="offline", **folders).path.name
    (training, evaluation) = sorted(tmp_path.glob(f"wandb/offline-run-*-{name}/*.wandb"))
    assert all(key in training.read_bytes() for key in (b"val_accuracy", b"label_smoothing", name.encode()))
    assert b"test_accuracy_tta" in evaluation.read_bytes()


def test_trackio_gets_them_in_its_database(track, tmp_path):
    if not importlib.util.find_spec("trackio"):  # which reads its folder's name when it is imported
        pytest.skip("trackio is not installed")
    name = track("trackio", TRACKIO_DIR=str(tmp_path / "trackio")).path.name
    with sqlite3.connect(tmp_path / "trackio" / "cifar.db") as database:
        rows = database.execute("select run_name, step, cast(metrics as text) from metrics order by step").fetchall()
    assert [row[0] for row in rows] == [name] * 3
    assert ["val_accuracy" in rows[0][2], "test_accuracy_tta" in rows[2][2]] == [True, True]


def test_a_folder_of_a_trackers_name_is_not_its_package(tmp_path, monkeypatch):
    (tmp_path / "trackio").mkdir()
    monkeypatch.setattr(sys, "path", [str(tmp_path)])
    monkeypatch.delitem(sys.modules, "trackio", raising=False)
    with pytest.raises(UserError, match=r"^--track trackio needs a package"):
        tracking.require("trackio")


def test_a_tracker_that_is_not_installed_or_cannot_start_is_one_sentence(tmp_path, monkeypatch, make_run):
    monkeypatch.setitem(sys.modules, "wandb", None)
    with pytest.raises(UserError, match=r"^--track wandb needs a package .* `pip install wandb`$"):
        pipeline.create(quick_config(tmp_path, track="wandb"))
    assert not list(tmp_path.iterdir())
    if importlib.util.find_spec("tensorboard"):
        monkeypatch.setitem(tracking._TRACKERS, "tensorboard", lambda run: 1 / 0)
        with pytest.raises(UserError, match=r"^tensorboard cannot start: ZeroDivisionError"):
            make_run(track="tensorboard")
