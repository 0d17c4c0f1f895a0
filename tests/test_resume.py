"""Trainings in separate processes that are killed, interrupted and hindered, and then resumed."""

import functools
import math
import os
import random
import re
import resource
import shutil
import signal
import time
from pathlib import Path

import pytest
import torch

from cifar import checkpoint, console, data, evaluate, pipeline, runs, trainer
from cifar.data import Dataset
from cifar.errors import UserError, display_path
from cifar.runs import find
from processes import Outputs, after_each_step, assert_resumes, results, slow_steps, slowly, stop_after, wait_until


@pytest.fixture(scope="module")
def uninterrupted(tmp_path_factory) -> dict:
    return Outputs(tmp_path_factory.mktemp("uninterrupted")).finish()


@pytest.fixture(scope="module")
def duration(tmp_path_factory, uninterrupted) -> float:
    """Seconds that a training takes; the first has waited for the server to start."""
    started = time.monotonic()
    Outputs(tmp_path_factory.mktemp("duration")).finish()
    return time.monotonic() - started


@pytest.fixture
def outputs(tmp_path) -> Outputs:
    return Outputs(tmp_path)


@pytest.mark.parametrize("seed", [0, 1, *slowly(range(2, 27))])
def test_a_run_that_is_killed_at_any_instants_ends_as_an_uninterrupted_one(outputs, uninterrupted, duration, seed):
    chance = random.Random(seed)
    for _ in range(chance.choice((1, 2, 3))):  # the second kill is one during the resume
        process = outputs.start_or_resume()
        process.join(chance.uniform(0, duration))
        process.kill()
        process.join()
        if process.exitcode == 0:
            break
    assert outputs.finish() == uninterrupted


def kill_at(count: int, marker: Path) -> None:
    """Have this process kill itself at the `count`th write, sync or rename, a write when it is half done.

    The marker is there afterwards if it came so far.
    """
    done = 0

    def passing(action, half):
        def act(*arguments, **options):
            nonlocal done
            done += 1
            if done == count:
                marker.touch()
                half(*arguments)
                os.kill(os.getpid(), signal.SIGKILL)
            return action(*arguments, **options)

        return act

    for write in (Path.write_bytes, Path.write_text):
        halfway = functools.partial(lambda write, path, content, *_: write(path, content[: len(content) // 2]), write)
        setattr(Path, write.__name__, passing(write, halfway))
    for name in ("fsync", "replace", "truncate"):
        setattr(os, name, passing(getattr(os, name), lambda *_: None))


POINTS = 60  # more than there are


@pytest.mark.parametrize("point", [24, *slowly(range(1, POINTS))])
def test_a_run_that_is_killed_at_a_write_sync_or_rename_ends_as_an_uninterrupted_one(
    outputs, uninterrupted, tmp_path, point
):
    process = outputs.start(functools.partial(kill_at, point, tmp_path / "came so far"))
    process.join(600)
    if not (tmp_path / "came so far").exists():
        assert (process.exitcode, point > 24) == (0, True)
        return
    assert point < POINTS - 1, "there are more writes than points"
    assert process.exitcode == -signal.SIGKILL
    assert outputs.finish() == uninterrupted


@pytest.mark.parametrize(("number", "code"), [(signal.SIGINT, 130), (signal.SIGTERM, 143)])
def test_a_signal_ends_the_step_saves_and_prints_the_command_that_resumes(outputs, uninterrupted, number, code):
    process = outputs.start(functools.partial(slow_steps, 0.02))
    wait_until(lambda: outputs.said().count("a step") >= 25)
    os.kill(process.pid, number)
    process.join(60)
    assert process.exitcode == code
    command = f"python main.py --resume {display_path(outputs.run.path)}"
    assert outputs.said().splitlines()[-1] == f"interrupted; resume with `{command}`"
    record = outputs.run.record
    assert (record.status, record.error) == ("interrupted", None)
    assert record.end >= record.start
    saved = checkpoint.load(outputs.run.checkpoints / "last.pt")["training"]["state"]
    assert saved["optimizer"]["steps"] > 20
    assert outputs.finish() == uninterrupted
    resumed = outputs.run.record.resumed
    assert [(again.epoch, again.step) for again in resumed] == [(saved["epoch"], saved["step"])]


def test_a_second_ctrl_c_leaves_at_once(outputs, uninterrupted):
    process = outputs.start(functools.partial(slow_steps, 50))
    wait_until(lambda: "a step" in outputs.said())
    os.kill(process.pid, signal.SIGINT)
    process.join(0.3)
    assert process.exitcode is None
    os.kill(process.pid, signal.SIGINT)
    process.join(20)
    assert process.exitcode == 130
    assert outputs.run.record.status == "interrupted"
    assert outputs.finish() == uninterrupted


def save_every_step() -> None:
    checkpoint._SAVE_SECONDS = 0.0


def test_saving_within_an_epoch_changes_nothing_and_a_killed_run_resumes_from_it(outputs, uninterrupted):
    process = outputs.start(save_every_step)
    wait_until(outputs.has_an_epoch)
    process.kill()
    process.join()
    saved = checkpoint.load(outputs.run.checkpoints / "last.pt")["training"]["state"]
    before = checkpoint.load(outputs.run.checkpoints / "previous.pt")["training"]["state"]
    assert saved["optimizer"]["steps"] - before["optimizer"]["steps"] in (0, 1)
    assert outputs.exit_code(save_every_step, "") == 0
    assert results(outputs.run) == uninterrupted


def late_saves(instant: int, saved: bool) -> None:
    """Have this process save no epoch, only, if asked to, after 25 steps, and kill itself after some."""
    checkpoint.EPOCH_SECONDS = math.inf

    def act(checkpointer):
        steps = checkpointer.training.optimizer.steps
        if saved and steps == 25:
            checkpointer.saved_at = -math.inf
        if steps == instant:
            os.kill(os.getpid(), signal.SIGKILL)

    after_each_step(act)


@pytest.mark.parametrize(("instant", "saved"), [(24, False), (30, True)])
def test_an_epoch_that_was_not_saved_is_trained_again(outputs, uninterrupted, instant, saved):
    assert outputs.exit_code(functools.partial(late_saves, instant, saved)) == -signal.SIGKILL
    assert len(outputs.run.history()) == 1
    present = {path.stem: checkpoint.load(path)["epoch"] for path in outputs.run.checkpoints.iterdir()}
    assert present == ({"best": 1, "last": 1} if saved else {})
    assert outputs.finish() == uninterrupted


def interrupt_validation() -> None:
    """Have this process receive Ctrl-C at the end of the first epoch, which is not saved otherwise."""
    checkpoint.EPOCH_SECONDS, validate = math.inf, evaluate.validate

    def validate_and_interrupt(*arguments):
        os.kill(os.getpid(), signal.SIGINT)
        return validate(*arguments)

    evaluate.validate = validate_and_interrupt


def test_a_signal_at_the_end_of_an_epoch_saves_it(outputs, uninterrupted):
    assert outputs.exit_code(interrupt_validation) == 130
    assert {path.stem for path in outputs.run.checkpoints.iterdir()} == {"best", "last"}
    assert outputs.finish() == uninterrupted
    assert [(again.epoch, again.step) for again in outputs.run.record.resumed] == [(2, 0)]


def small_files(bytes: int, from_save: int = 1) -> None:
    """Have this process write no larger files, as on a disk that is full, from so many checkpoints on."""
    save, saves = checkpoint.save, 0

    def save_on_a_full_disk(*arguments, **options):
        nonlocal saves
        saves += 1
        if saves == from_save:
            resource.setrlimit(resource.RLIMIT_FSIZE, (bytes, bytes))
        save(*arguments, **options)

    checkpoint.save = save_on_a_full_disk


@pytest.mark.parametrize("from_save", [3, *slowly([1, 2])])
def test_on_a_full_disk_the_run_fails_with_a_sentence_and_resumes_later(outputs, uninterrupted, from_save):
    code = outputs.exit_code(functools.partial(small_files, 10**6, from_save))
    name = "best.pt" if from_save == 1 else "last.pt"
    sentence = f"cannot write {display_path(outputs.run.checkpoints / name)}: File too large"
    assert (code, outputs.said().splitlines()[-1]) == (1, f"error: {sentence}")
    assert (outputs.run.record.status, outputs.run.record.error) == ("failed", sentence)
    assert not list(outputs.run.path.rglob("*.partial"))
    assert outputs.finish() == uninterrupted


def test_a_folder_that_is_removed_during_the_training_ends_it_with_a_sentence(outputs):
    process = outputs.start(functools.partial(slow_steps, 0.02))
    wait_until(outputs.has_an_epoch)
    while outputs.folder.exists():  # the process may write into a directory that is being emptied
        shutil.rmtree(outputs.folder, ignore_errors=True)
    process.join(60)
    assert process.exitcode == 1
    *_, last = outputs.said().splitlines()
    assert last.startswith("error: cannot ")
    assert last.endswith(": No such file or directory")
    assert "Traceback" not in outputs.said()


def lose_rights(folder: Path, steps: int) -> None:
    """Have this process lose the right to write into the folder after so many steps."""

    def lose(checkpointer):
        if checkpointer.training.optimizer.steps == steps and os.geteuid():
            for path in folder.rglob("*"):
                path.chmod(0o555)
        elif checkpointer.training.optimizer.steps == steps:
            os.seteuid(65534)  # root may write everywhere

    after_each_step(lose)


def test_a_folder_that_becomes_read_only_ends_the_training_with_a_sentence(outputs, uninterrupted):
    assert outputs.exit_code(functools.partial(lose_rights, outputs.folder, 30)) == 1
    sentence = f"error: cannot write {display_path(outputs.run.path / 'history.jsonl')}: Permission denied"
    assert outputs.said().splitlines()[-1] == sentence
    for path in outputs.folder.rglob("*"):
        path.chmod(0o755)
    assert outputs.run.status() == "killed"  # as how it failed could not be written
    assert outputs.finish() == uninterrupted


def test_a_second_trainer_on_a_run_is_refused_and_the_first_is_not_disturbed(outputs, uninterrupted):
    first = outputs.start()
    wait_until(lambda: any(outputs.folder.glob("*/log.txt")))  # which a run has once it is claimed
    os.kill(first.pid, signal.SIGSTOP)
    assert outputs.exit_code(name=outputs.run.path.name) == 1
    sentence = f"{outputs.run.path.name} is in use by another process: wait until it ends"
    assert outputs.said().splitlines()[-1] == f"error: {sentence}"
    assert outputs.run.status() == "running"
    os.kill(first.pid, signal.SIGCONT)
    first.join(60)
    assert first.exitcode == 0
    assert results(outputs.run) == uninterrupted


def test_two_trainers_in_one_outputs_folder_both_finish(outputs, uninterrupted):
    for process in [outputs.start(), outputs.start()]:
        process.join(60)
    made = [runs.Run(path) for path in outputs.folder.iterdir() if not path.is_symlink()]
    assert [results(run) == uninterrupted for run in made] == [True, True]
    assert find(str(outputs.folder)).path in [run.path for run in made]


@pytest.fixture(scope="module")
def once_interrupted(tmp_path_factory) -> Outputs:
    """A run whose last.pt is from the middle of its second epoch; copy it before you change it."""
    outputs = Outputs(tmp_path_factory.mktemp("interrupted"))
    outputs.exit_code(functools.partial(stop_after, 30))
    return outputs


@pytest.fixture
def interrupted(outputs, once_interrupted) -> Outputs:
    shutil.copytree(once_interrupted.folder, outputs.folder, symlinks=True)
    return outputs


def truncate(*paths: Path) -> None:
    for path in paths:
        path.write_bytes(path.read_bytes()[:-1000])


def test_a_damaged_last_checkpoint_falls_back_to_the_one_before_and_says_so(interrupted, uninterrupted):
    truncate(interrupted.run.checkpoints / "last.pt")
    assert interrupted.finish() == uninterrupted
    said = " ".join(interrupted.said().replace("│", " ").split())
    assert "last.pt is damaged or not from this program: resuming from previous.pt." in said
    assert interrupted.run.record.resumed[0].step == 0
    checkpoint.load(interrupted.run.checkpoints / "previous.pt")  # not replaced by the damaged one


@pytest.mark.slow
def test_what_was_measured_before_it_resumes_is_not_taken_for_the_result(interrupted, digits):
    run = interrupted.run
    evaluate.evaluate(run, digits, "cpu")
    (run.figures / "calibration.png").touch()
    with run.lifetime():
        trainer.fit(run, digits)
    assert not list(run.figures.iterdir())
    assert (run.status(), run.has_metrics, run.is_complete()) == ("completed", False, False)
    evaluate.evaluate(run, digits, "cpu")
    with run.lifetime():
        trainer.fit(run, digits)  # nothing is left to be trained
    assert run.is_complete()


@pytest.mark.parametrize("missing", ["last.pt", *slowly(["*.pt"])])
def test_without_its_last_or_any_checkpoint_a_run_goes_on_from_another_or_the_start(
    interrupted, uninterrupted, missing
):
    for path in interrupted.run.checkpoints.glob(missing):
        path.unlink()
    assert interrupted.finish() == uninterrupted


def resume(outputs: Outputs, dataset: Dataset) -> None:
    """Resume the run in this process."""
    threads = torch.get_num_threads()
    try:
        run, _ = pipeline.resume(outputs.run.path.name, {"output_dir": str(outputs.folder)})
        with run.lifetime():
            trainer.fit(run, dataset)
    finally:
        torch.set_num_threads(threads)


def change_checkpoints(run: runs.Run, change, name: str = "[lp]*") -> None:
    for path in run.checkpoints.glob(f"{name}.pt"):
        content = torch.load(path, weights_only=True)
        change(content)
        torch.save(content, path)


def set_entry(*keys, to):
    """Return a damage of a training's state: the entry at the keys becomes `to`, or `to` of the entry."""

    def damage(content: dict) -> None:
        part = content["training"]["state"]
        for key in keys[:-1]:
            part = part[key]
        part[keys[-1]] = to(part[keys[-1]]) if callable(to) else to

    return damage


STATE_DAMAGES = [
    lambda content: content["training"]["state"].pop("batches"),
    set_entry("epoch", to="1"),
    set_entry("epoch", to=0),
    set_entry("epoch", to=3),
    set_entry("step", to=-1),
    set_entry("losses", to=lambda losses: losses[:-1]),
    set_entry("losses", to=[1.0]),
    set_entry("best_score", to=0.75),
    set_entry("losses", to=lambda losses: losses / 0),
    set_entry("batches", "rng_state", to=lambda state: state[:-1]),
    set_entry("batches", "image_losses", to=lambda losses: losses[:1]),
    set_entry("optimizer", "optimizers", to={}),
    set_entry("optimizer", "optimizers", to=lambda states: states * 2),
    set_entry("optimizer", "optimizers", 0, to=[]),
    set_entry("optimizer", "optimizers", 0, 0, "exp_avg", to=lambda average: average / 0),
]
AGAIN = "; to start over, run `python main.py --config .*config.json`$"


@pytest.mark.parametrize(
    ("change", "sentence"),
    [
        (lambda run: truncate(*run.checkpoints.glob("[lp]*.pt")), "last.pt is damaged"),
        (lambda run: truncate(run.checkpoints / "best.pt"), "best.pt is damaged"),
        (lambda run: run.write_history([]), "history.jsonl is damaged: it has fewer than 1 epoch"),
        (
            lambda run: change_checkpoints(run, lambda content: content.pop("training")),
            "last.pt has no training that this version can resume",
        ),
        (
            lambda run: change_checkpoints(run, lambda content: content.update(epoch=0), "best"),
            r"best.pt is older than epoch \d+, which .*last.pt requires",
        ),
        *(
            (functools.partial(change_checkpoints, change=damage), "the checkpoint .*last.pt is damaged: ")
            for damage in STATE_DAMAGES
        ),
    ],
)
def test_files_that_cannot_be_resumed_are_refused_with_the_command_to_start_over(interrupted, digits, change, sentence):
    change(interrupted.run)
    with pytest.raises(UserError, match=f"{sentence}.*{AGAIN}"):
        resume(interrupted, digits)


def test_a_damaged_run_of_several_seeds_is_started_over_by_the_command_of_all(interrupted, digits):
    interrupted.run.update(command=["main.py", "--seeds", "2"])
    (interrupted.run.path.parent / "summary.json").touch()
    truncate(interrupted.run.checkpoints / "best.pt")
    group = re.escape(display_path(interrupted.run.path.parent.parent))
    hint = f"start over, remove .*{interrupted.run.path.name} and run `python main.py --seeds 2 --output-dir {group}`$"
    with pytest.raises(UserError, match=hint):
        resume(interrupted, digits)


def test_a_run_whose_settings_or_images_have_changed_is_refused(interrupted, digits, monkeypatch):
    interrupted.run.write("config.json", {**interrupted.run.config.model_dump(), "epochs": 9})
    change_checkpoints(interrupted.run, lambda content: content["training"]["requirements"].update(seed=5))
    monkeypatch.setattr(data.Split, "sha256", lambda split: "0" * 64)
    changes = r"epochs was 2 and is 9, seed was 5 and is 0, training images \(SHA-256\) was [0-9a-f]{64} and is 0{64}"
    with pytest.raises(UserError, match=f"cannot resume from .*last.pt: these settings have changed: {changes}{AGAIN}"):
        resume(interrupted, digits)


def test_another_machine_or_commit_is_mentioned_and_does_not_prevent_resuming(interrupted, digits, capsys):
    then = {"hardware": "an abacus", "processes": 2, "commit": "0" * 40}
    interrupted.run.update(**then, threads=99)
    resume(interrupted, digits)
    shown = capsys.readouterr().out
    assert "number of threads" not in shown  # with other processes, it means nothing
    for name, value in then.items():
        assert f"{name} was {value} and is " in shown
    assert "processes was 2 and is 1: the results can differ from an uninterrupted run's" in shown
    assert "computes other values" not in shown
    assert interrupted.run.record.status == "completed"


@pytest.mark.parametrize(
    ("variables", "is_kept"),
    [
        ({}, True),
        ({"OMP_NUM_THREADS": "1"}, False),
        ({"OMP_NUM_THREADS": "1", "TORCHELASTIC_RUN_ID": "torchrun's own default"}, True),
    ],
)
def test_a_run_resumes_with_its_number_of_threads_or_the_one_that_the_user_sets(
    interrupted, capsys, monkeypatch, variables, is_kept
):
    monkeypatch.delenv("OMP_NUM_THREADS", raising=False)
    for name, value in variables.items():
        monkeypatch.setenv(name, value)
    threads = torch.get_num_threads()
    interrupted.run.update(threads=threads + 1)
    try:
        pipeline.resume(interrupted.run.path.name, {"output_dir": str(interrupted.folder)})
        assert torch.get_num_threads() == (threads + 1 if is_kept else threads)
    finally:
        torch.set_num_threads(threads)
    change = f"number of threads was {threads + 1} and is {threads}: the results can differ"
    assert (change in capsys.readouterr().out) == (not is_kept)


@pytest.mark.parametrize(
    ("place", "error", "start"),
    [
        (
            (trainer.Training, "load_state_dict"),
            torch.OutOfMemoryError("CUDA out of memory.\nSee"),
            "the GPU is out of",
        ),
        ((torch, "load"), RuntimeError("[enforce fail] DefaultCPUAllocator: can't allocate memory"), "out of"),
    ],
)
def test_too_little_memory_is_one_sentence_with_the_cure_and_not_taken_for_a_damaged_file(
    interrupted, digits, monkeypatch, capsys, place, error, start
):
    def fill_memory(*_, **__):
        raise error

    monkeypatch.setattr(*place, fill_memory)
    assert console.exit_code(lambda: resume(interrupted, digits)) == 1
    assert re.fullmatch(rf"error: {start} memory: [^\n]* a smaller --batch-size [^\n]*\n", capsys.readouterr().err)


def test_a_network_whose_code_has_changed_is_mentioned(interrupted, digits, monkeypatch, capsys):
    monkeypatch.setattr(torch.nn.ReLU, "forward", lambda self, features: features.tanh())
    resume(interrupted, digits)
    assert "The network computes other values than when last.pt was saved" in " ".join(capsys.readouterr().out.split())


@pytest.mark.parametrize(
    "settings",
    [
        {"optimizer": "adamw", "weight_decay": 0.1},
        {"warmup_epochs": 1, "schedule": "exponential"},
        {"schedule": "step", "decay_epochs": 0.7},
        {"clip_grad": 0.5, "early_stopping": "loss"},
        {"ema": 0.9},
        {"auto_augment": "randaugment", "balance": "sampling"},
        {"auto_augment": "trivialaugment", "balance": "loss"},
        {"mixup": 0.2, "cutmix": 1.0},
    ],
    ids=lambda settings: "-".join(settings),
)
def test_each_setting_resumes_bit_for_bit(make_run, digits, settings):
    settings |= {"epochs": 2, "val_size": 1117}  # 16 steps in each epoch
    assert_resumes(lambda: make_run(**settings), digits, 25)
