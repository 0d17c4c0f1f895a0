"""Several processes on this machine, joined as torchrun joins them: most of them are forked, which takes no time."""

import functools
import os
import shutil
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path
from unittest import mock

import pytest
import torch
from torch import nn

from cifar import checkpoint, console, data, datasets, distributed, evaluate, model, train, whole_batch
from cifar.config import PROJECT, Config
from cifar.console import TrainingDisplay
from cifar.data import shrink
from cifar.errors import UserError
from cifar.runs import Run
from conftest import quick_config
from processes import SERVER, Outputs, results, slow_steps, slowly, wait_until

BATCH = 20  # images, which three processes cannot share evenly
RECIPES = ("fast", "simple", "convnet")  # BatchNorm of both kinds, both dropouts, jitter, label smoothing
LIMIT = 30  # seconds in which all have to end when one dies


def join_and_act(rank: int, count: int, port: int, threads: int, log: Path, action, arguments) -> None:
    """A process, with what torchrun puts into its environment; the first calls the action."""
    sys.stdout = sys.stderr = log.open("a", buffering=1, encoding="utf-8")
    console.out.file = console.err.file = sys.stdout
    numbers = {"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": count, "LOCAL_WORLD_SIZE": count, "MASTER_PORT": port}
    os.environ |= {name: str(number) for name, number in numbers.items()} | {"MASTER_ADDR": "127.0.0.1"}
    torch.set_num_threads(threads)
    sys.exit(console.exit_code(lambda: distributed.lead(lambda: action(*arguments))))


def start(count: int, log: Path, action, *arguments) -> list:
    """That many processes, which call the action together."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    numbers = (count, port, torch.get_num_threads(), log, action, arguments)
    processes = [SERVER.Process(target=join_and_act, args=(rank, *numbers)) for rank in range(count)]
    for process in processes:
        process.start()
    return processes


def exit_codes(processes: list, seconds: float = 60) -> list[int | None]:
    deadline = time.monotonic() + seconds
    for process in processes:
        process.join(max(0, deadline - time.monotonic()))
    return [process.exitcode for process in processes]


def in_all(function, *arguments) -> None:
    """Call the function in all processes."""
    with distributed.helped(function, *arguments):
        function(*arguments)


# What is computed


def coloured() -> data.Split:
    """Images of every colour: of gray ones, whitening leaves channels so near to constant that rounding shows."""
    generator = torch.Generator().manual_seed(0)
    return data.Split(
        torch.randint(256, (BATCH, 3, 32, 32), generator=generator, dtype=torch.uint8), torch.arange(BATCH) % 10
    )


def first_steps(folder: Path) -> None:
    """Keep the gradients of the first step of trainings, their loss, and what BatchNorm has seen, in float64.

    There it shows whether they are equal but for rounding: in float32 a tie in a max-pool shows as well.
    """
    for recipe in RECIPES:
        config = Config.create({"recipe": recipe, "batch_size": BATCH, "seed": 5})
        network = train.fresh_network(config, coloured(), 10).to(memory_format=torch.channels_last)
        network.double().register_forward_pre_hook(lambda _, images: (images[0].double(),))
        state = train.fresh_state(config, network, coloured())
        state.updates.step = lambda: None
        state.image_losses = state.image_losses.double()
        side = 24 if recipe == "fast" else 32
        of_loss = mock.patch.object(torch.Tensor, "float", torch.Tensor.double)
        of_shrinking = mock.patch.object(data, "shrink", lambda images, side: shrink(images.double(), side))
        with of_loss, of_shrinking:
            train.train_epoch(state, side, config.label_smoothing, "float32", TrainingDisplay([1], [1]))
        gradients = {name: weight.grad for name, weight in network.named_parameters() if weight.grad is not None}
        numbers = {"loss": state.losses, "correct": state.correct}
        if os.environ.get("RANK", "0") == "0":
            torch.save({**gradients, **dict(network.named_buffers()), **numbers}, folder / f"{recipe}.pt")


@pytest.fixture(scope="module")
def steps_of_one(tmp_path_factory) -> dict[str, dict[str, torch.Tensor]]:
    folder = tmp_path_factory.mktemp("one")
    first_steps(folder)
    return {recipe: torch.load(folder / f"{recipe}.pt") for recipe in RECIPES}


@pytest.mark.parametrize("count", [3, *slowly([2])])
def test_the_gradients_of_a_step_are_those_of_one_process(count, steps_of_one, tmp_path):
    processes = start(count, tmp_path / "log", in_all, first_steps, tmp_path)
    assert exit_codes(processes) == [0] * count
    for recipe, expected in steps_of_one.items():
        got = torch.load(tmp_path / f"{recipe}.pt")
        assert got.keys() == expected.keys()
        for name, tensor in expected.items():
            torch.testing.assert_close(got[name], tensor, rtol=0, atol=1e-12 * tensor.abs().max().item())


def noisy() -> nn.Sequential:
    """All that draws noise for what it is given, and a BatchNorm that the recipes do not have."""
    from torchvision.ops import StochasticDepth

    norm = nn.BatchNorm2d(3, affine=False, momentum=None)
    return nn.Sequential(nn.Dropout(0.3), nn.Dropout2d(0.3), StochasticDepth(0.3, "row"), norm)


def through(network: nn.Module, images: torch.Tensor) -> list[torch.Tensor]:
    """What the network makes of the images, and how the images change the sum of its cubes."""
    torch.manual_seed(1)
    own = images[distributed.share(len(images))].requires_grad_()
    features = network(own)
    features.pow(3).sum().backward()
    return [features.detach(), own.grad]


def through_whole(images: torch.Tensor, file: Path) -> None:
    network = noisy()
    whole_batch.convert(network, len(images))
    parts = distributed.gather([through(network, images)])
    if os.environ["RANK"] == "0":
        torch.save([torch.cat(tensors) for tensors in zip(*parts)], file)


@pytest.mark.slow
def test_layers_compute_for_an_image_what_torch_does_for_the_whole_batch(tmp_path):
    images = torch.rand(7, 3, 4, 4)
    assert exit_codes(start(2, tmp_path / "log", in_all, through_whole, images, tmp_path / "two")) == [0, 0]
    torch.testing.assert_close(torch.load(tmp_path / "two"), through(noisy(), images), rtol=1e-5, atol=1e-4)


def in_batches_of_50() -> None:
    evaluate._BATCH_PIXELS = 50 * 32**2


def evaluate_in_batches(run: Run) -> None:
    in_all(in_batches_of_50)
    evaluate.evaluate(run, datasets.of_run(run, None), "cpu")


def test_an_evaluation_by_three_processes_writes_the_bytes_of_one(evaluated_run, digits, tmp_path, monkeypatch):
    monkeypatch.setattr(evaluate, "_BATCH_PIXELS", 50 * 32**2)  # so that 360 images are 8 batches
    one, three = (Run(shutil.copytree(evaluated_run.path, tmp_path / name)) for name in ("one", "three"))
    evaluate.evaluate(one, digits, "cpu")
    (three.path / "metrics.json").unlink()
    assert exit_codes(start(3, tmp_path / "log", evaluate_in_batches, three)) == [0, 0, 0]
    for name in ("metrics.json", "predictions.csv", "analysis.json"):
        assert (three.path / name).read_bytes() == (one.path / name).read_bytes()


@pytest.mark.parametrize(
    ("visible", "own"),
    [
        (None, ["0", "1", "2"]),
        ("", ["", "", ""]),
        ("5,3", ["5", "3", ""]),
        ("GPU-8f,GPU-2a,2", ["GPU-8f", "GPU-2a", "2"]),
    ],
)
def test_each_process_of_a_machine_sees_a_gpu_of_its_own(visible, own):
    assert [distributed.own_gpu(visible, local) for local in range(3)] == own


# How it ends


def fit_and_evaluate(folder: Path, name: str | None, hinder) -> None:
    """A run, or with a name what is left of it; `hinder` is called in all processes first."""
    if hinder:
        in_all(hinder)
    settings = quick_config(folder, epochs=2, val_size=837)
    run, dataset = train.begin(settings) if name is None else train.take_up(name, {"output_dir": str(folder)})
    with run.lifetime():
        train.fit(run, dataset)
        evaluate.evaluate(run, dataset, "cpu")


class Together(Outputs):
    """A folder of one run that several processes work on together."""

    def start(self, hinder=None, name: str | None = None, count: int = 2) -> list:
        return start(count, self.log, fit_and_evaluate, self.folder, name, hinder)

    def finish(self, count: int = 2) -> dict:
        processes = self.start(name="" if self.folder.exists() else None, count=count)
        assert exit_codes(processes) == [0] * count, self.said()
        return results(self.run)


@pytest.fixture(scope="module")
def by_two(tmp_path_factory) -> Together:
    """A run from beginning to end by two processes."""
    together = Together(tmp_path_factory.mktemp("two"))
    together.finish()
    return together


@pytest.fixture
def together(tmp_path) -> Together:
    return Together(tmp_path)


def test_two_processes_write_one_run_and_one_history(by_two):
    assert by_two.said().count("epoch 1/2") == by_two.said().count("epoch 2/2") == 1
    record = by_two.run.record
    assert (record["status"], record["processes"]) == ("completed", 2)
    speeds = [line["images_per_second"] * line["seconds"] for line in by_two.run.history()]
    assert speeds == pytest.approx([600, 600], rel=0.05)  # 20 batches of 30 an epoch, whatever the processes


@pytest.mark.slow
def test_a_signal_to_one_process_stops_all_after_a_step_and_the_run_goes_on_to_the_same_bits(together, by_two):
    processes = together.start(functools.partial(slow_steps, 0.02))
    wait_until(lambda: together.said().count("a step") >= 25)
    os.kill(processes[1].pid, signal.SIGTERM)
    assert exit_codes(processes) == [143, 1]
    assert together.said().splitlines()[-1].endswith("goes on with it")
    assert together.run.record["status"] == "interrupted"
    saved = checkpoint.load(together.run.checkpoints / "last.pt")["training"]["state"]
    assert saved["updates"] > 20
    assert together.finish() == results(by_two.run)


def test_a_process_that_is_killed_ends_the_others_and_one_alone_finishes_the_run(together, by_two):
    processes = together.start(functools.partial(slow_steps, 0.01))
    wait_until(together.has_an_epoch)
    processes[1].kill()
    assert exit_codes(processes, LIMIT) == [1, -signal.SIGKILL]
    sentence = "another of the 2 processes has ended: torchrun says which and how"
    assert together.said().splitlines()[-1] == f"error: {sentence}"
    assert (together.run.record["status"], together.run.record["error"]) == ("failed", sentence)
    together.finish(count=1)
    assert "begun with 2 processes: with 1 the last digits come out differently" in together.said()
    assert together.run.record["processes"] == 1
    losses = [[line["train_loss"] for line in run.history()] for run in (together.run, by_two.run)]
    assert losses[0] == pytest.approx(losses[1], rel=0.02)
    accuracies = [[line["val_accuracy"] for line in run.history()] for run in (together.run, by_two.run)]
    assert accuracies[0] == pytest.approx(accuracies[1], abs=0.02)


@pytest.mark.slow
def test_when_the_first_is_killed_the_others_end_without_a_word(together):
    processes = together.start(functools.partial(slow_steps, 0.01))
    wait_until(lambda: "epoch 1/2" in together.said())  # which comes after the epoch's line of the history
    before = together.said()
    processes[0].kill()
    assert exit_codes(processes, LIMIT) == [-signal.SIGKILL, 1]
    assert together.said().removeprefix(before).replace("a step\n", "") == ""
    assert together.run.status() == "killed"


def fail_in_the_second() -> None:
    def build(*_):
        raise UserError("there is no such network here")

    if os.environ["RANK"] == "1":
        model.build = build


def test_a_mistake_in_another_process_is_told_with_its_number_and_ends_all(together):
    assert exit_codes(together.start(fail_in_the_second), LIMIT) == [1, 1]
    assert "error: process 1: there is no such network here" in together.said()
    assert "Traceback" not in together.said()
    assert together.run.record["status"] == "failed"


def drift_in_the_second() -> None:
    go = distributed.check_same

    def check_same(network: nn.Module) -> None:
        if os.environ["RANK"] == "1":
            next(network.parameters()).data[0, 0, 0, 0] += 1e-7
        go(network)

    distributed.check_same = check_same


@pytest.mark.slow
def test_weights_that_drift_apart_end_the_run_with_one_sentence(together):
    assert exit_codes(together.start(drift_in_the_second), LIMIT) == [1, 1]
    assert together.said().splitlines() == [
        "error: the processes have come to different weights: their machines do not compute alike"
    ]


def test_a_batch_too_small_to_share_is_refused(make_run, monkeypatch):
    monkeypatch.setattr(distributed, "count", lambda: 65)
    with pytest.raises(UserError, match="--batch-size 64 is too small for 65 processes"):
        make_run()


def torchrun(*arguments: str, **options) -> subprocess.Popen:
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2", "main.py"]
    environment = {name: value for name, value in os.environ.items() if name != "OMP_NUM_THREADS"}
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.STDOUT, "text": True}
    return subprocess.Popen([*command, *arguments], cwd=PROJECT, env=environment, **pipes, **options)


def test_torchrun_makes_one_run_with_everything(tmp_path):
    command = torchrun("--recipe=mlp", "--dataset=digits", "--epochs=1", f"--output-dir={tmp_path / 'outputs'}")
    said, _ = command.communicate(timeout=120)
    assert command.returncode == 0, said
    (run,) = [Run(path) for path in (tmp_path / "outputs").iterdir() if not path.is_symlink()]
    assert (run.record["status"], run.record["processes"]) == ("completed", 2)
    assert {"report.html", "metrics.json", "predictions.csv", "config.json"} <= {
        path.name for path in run.path.iterdir()
    }
    assert len(list(run.figures.iterdir())) > 5
    assert said.count("epoch 1/1") == said.count("run directory") == 1


@pytest.mark.slow
def test_torchrun_tells_of_a_mistake_and_of_help_once(tmp_path):
    for arguments, code, sentence in (
        (["--help"], 0, "usage: main.py"),
        (["--no-such-flag"], 1, "unrecognized arguments: --no-such-flag"),
        (["--epochs=many"], 1, "error: --epochs takes a whole number, not 'many'"),
        (["--dataset=digits", "--lr=1e30", "--recipe=mlp", "--optimizer=sgd"], 1, "error: the loss is not finite"),
    ):
        command = torchrun(*arguments, f"--output-dir={tmp_path}")
        said, _ = command.communicate(timeout=120)
        assert (command.returncode, said.count(sentence)) == (code, 1), said


@pytest.mark.slow
@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_signal_to_torchrun_interrupts_the_run(tmp_path, number):
    command = torchrun("--recipe=convnet", "--dataset=digits", "--epochs=200", f"--output-dir={tmp_path}")
    wait_until(lambda: any(tmp_path.glob("2*/history.jsonl")))
    command.send_signal(number)
    said, _ = command.communicate(timeout=LIMIT)
    (run,) = [Run(path) for path in tmp_path.iterdir() if not path.is_symlink()]
    assert run.record["status"] == "interrupted"
    assert f"`{run.resume_command}` goes on with it" in said


def test_processes_that_are_not_told_where_to_meet_end_with_a_sentence(monkeypatch):
    for name, value in {"RANK": "0", "LOCAL_RANK": "0", "WORLD_SIZE": "2", "CUDA_VISIBLE_DEVICES": ""}.items():
        monkeypatch.setenv(name, value)
    monkeypatch.delenv("MASTER_ADDR", raising=False)
    with pytest.raises(UserError, match="the processes have not found each other: "):
        distributed.lead(lambda: None)


def test_a_mistake_of_the_program_is_not_taken_for_a_lost_process():
    with pytest.raises(RuntimeError, match=r"^shapes differ$") as error, distributed._losing():
        raise RuntimeError("shapes differ")
    assert not isinstance(error.value, distributed.LostError)
