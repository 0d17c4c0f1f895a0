"""Several processes on this machine, joined as torchrun joins them; most of them are forked, which takes no time."""

import functools
import os
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch

import commands
from cifar import console, data, device, evaluate, main, model, optim, trainer
from cifar.config import Config
from cifar.errors import UserError
from cifar.runs import Run
from processes import SERVER, Outputs, results, slow_steps, train_and_evaluate, wait_until

LIMIT = 30  # seconds in which all have to end when one dies


def join_and_act(rank: int, count: int, port: int, log: Path, action, arguments) -> None:
    """Call the action in a process of a group, with torchrun's environment, as main.py does."""
    sys.stdout = sys.stderr = log.open("a", buffering=1, encoding="utf-8")
    console.out.file = console.err.file = sys.stdout
    console.out.quiet = console.err.quiet = rank > 0
    numbers = {"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": count, "LOCAL_WORLD_SIZE": count, "MASTER_PORT": port}
    os.environ |= {name: str(number) for name, number in numbers.items()} | {"MASTER_ADDR": "127.0.0.1"}
    torch.set_num_threads(1)
    main.run_pipeline = lambda *_: action(*arguments)
    main._exit_now(console.exit_code(lambda: main._run_as_process({}, None)))


def start(count: int, log: Path, action, *arguments) -> list:
    """Start that many processes, which call the action together."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    processes = [
        SERVER.Process(target=join_and_act, args=(rank, count, port, log, action, arguments)) for rank in range(count)
    ]
    for process in processes:
        process.start()
    return processes


def exit_codes(processes: list, seconds: float = 60) -> list[int | None]:
    deadline = time.monotonic() + seconds
    for process in processes:
        process.join(max(0, deadline - time.monotonic()))
    return [process.exitcode for process in processes]


# What is computed


def one_step(file: Path) -> None:
    """Save the weights after a step of mlp without dropout, and what the step and validation return."""
    augmentation = {"crop_scale": 0.5, "auto_augment": "randaugment"}
    config = Config.create(
        {"recipe": "mlp", "batch_size": 20, "optimizer": "sgd", "lr": 1.0, "small_size": 24, **augmentation}
    )
    images = torch.randint(256, (20, 3, 32, 32), generator=torch.Generator().manual_seed(0), dtype=torch.uint8)
    split = data.Split(images, torch.arange(20) % 10)
    network = trainer.new_network(config, split, 10)
    for module in network.modules():
        if isinstance(module, torch.nn.Dropout):
            module.p = 0.0
    batches = data.Batches(split, config, torch.device("cpu"), 10)
    optimizer = optim.build(network, config, batches.steps_per_epoch)
    training = trainer.Training(network, optimizer, batches)
    (batch,) = batches.epoch(1)
    criterion = torch.nn.CrossEntropyLoss(label_smoothing=0.1)
    losses, correct = trainer.train_step(device.distribute(network), optimizer, batch, criterion, "float32")
    training.record_step(batch, losses, correct)
    values = {"losses": batches.image_losses, "loss": training.losses, "correct": training.correct}
    validation = {name: torch.tensor(value) for name, value in evaluate.validate(network, split, "float32").items()}
    if device.rank() == 0:
        torch.save({**network.state_dict(), **values, **validation}, file)


def test_a_step_of_two_processes_is_that_of_one_with_the_whole_batch(tmp_path):
    one_step(tmp_path / "one")
    assert exit_codes(start(2, tmp_path / "log", one_step, tmp_path / "two")) == [0, 0], (tmp_path / "log").read_text()
    one, two = (torch.load(tmp_path / name) for name in ("one", "two"))
    assert one.keys() == two.keys()
    for name, tensor in one.items():
        torch.testing.assert_close(two[name], tensor, rtol=1e-4, atol=1e-6)


def slices(values: torch.Tensor, file: Path) -> None:
    own = values[device.rank_slice(len(values))]
    gathered = device.gather_slices(own, len(values))
    assert torch.equal(gathered, values)
    assert device.all_reduce(own.sum()) == values.sum()
    assert device.maximum(7 * device.rank()) == 14
    assert device.broadcast_object(device.rank() + 5) == 5
    network = torch.nn.BatchNorm2d(3)
    network.running_mean += device.rank()
    device.broadcast_buffers(network)
    assert network.running_mean.sum() == 0
    (file.parent / str(device.rank())).touch()


def test_three_processes_share_seven_values_and_agree(tmp_path):
    processes = start(3, tmp_path / "log", slices, torch.arange(7.0), tmp_path / "file")
    assert exit_codes(processes) == [0, 0, 0], (tmp_path / "log").read_text()
    assert {path.name for path in tmp_path.iterdir()} >= {"0", "1", "2"}


# How it ends


train = functools.partial(train_and_evaluate, recipe="convnet", val_size=837)


class Together(Outputs):
    """A folder of one run that several processes work on together."""

    def start(self, hinder=None, name: str | None = None, count: int = 2) -> list:
        return start(count, self.log, train, self.folder, name, hinder)

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
    assert (record.status, record.processes) == ("completed", 2)
    assert [epoch.images for epoch in by_two.run.history()] == [600, 600]  # whatever the processes


def test_a_signal_to_one_process_stops_all_after_the_same_step_and_the_run_resumes(together, by_two):
    processes = together.start(functools.partial(slow_steps, 0.02))
    wait_until(lambda: together.said().count("a step") >= 25)
    os.kill(processes[1].pid, signal.SIGTERM)
    assert exit_codes(processes) == [143, 143]
    assert together.said().splitlines()[-1] == f"interrupted; resume with `{together.run.resume_command}`"
    assert together.run.record.status == "interrupted"
    together.finish()
    assert [epoch.images for epoch in together.run.history()] == [600, 600]


def test_a_process_that_is_killed_ends_the_other_and_one_alone_finishes_the_run(together, by_two):
    processes = together.start(functools.partial(slow_steps, 0.01))
    wait_until(together.has_an_epoch)
    processes[1].kill()
    assert exit_codes(processes, LIMIT) == [1, -signal.SIGKILL]
    sentence = "another of the 2 processes has stopped: see torchrun's output"
    assert together.said().splitlines()[-1] == f"error: {sentence}"
    assert (together.run.record.status, together.run.record.error) == ("failed", sentence)
    together.finish(count=1)
    assert "processes was 2 and is 1: the results can differ from an uninterrupted run's" in together.said()
    losses = [[epoch.train_loss for epoch in run.history()] for run in (together.run, by_two.run)]
    assert losses[0] == pytest.approx(losses[1], rel=0.1)


@pytest.mark.slow
def test_when_the_first_is_killed_the_other_ends_and_prints_nothing(together):
    processes = together.start(functools.partial(slow_steps, 0.01))
    wait_until(lambda: "epoch 1/2" in together.said())
    before = together.said()
    processes[0].kill()
    assert exit_codes(processes, LIMIT) == [-signal.SIGKILL, 1]
    assert together.said().removeprefix(before).replace("a step\n", "") == ""
    assert together.run.status() == "killed"


def fail_in_the_second() -> None:
    def build(*_):
        raise UserError("there is no such network here")

    if device.rank() == 1:
        model.build = build


def test_an_error_in_another_process_is_printed_with_its_number_and_ends_all(together):
    assert exit_codes(together.start(fail_in_the_second), LIMIT) == [1, 1]
    assert "error: process 1: there is no such network here" in together.said()
    assert "Traceback" not in together.said()
    assert together.run.record.status == "failed"


def torchrun(*arguments: str) -> subprocess.Popen:
    words = ("-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2", "main.py", *arguments)
    environment = {name: value for name, value in os.environ.items() if name != "OMP_NUM_THREADS"}
    return commands.start(*words, env=environment, stderr=subprocess.STDOUT)


def test_torchrun_makes_a_run_for_each_seed_with_everything(tmp_path):
    settings = ("--recipe=mlp", "--dataset=digits", "--epochs=1", "--seeds=2", "--device=cpu")
    command = torchrun(*settings, f"--output-dir={tmp_path / 'outputs'}")
    said, _ = command.communicate(timeout=200)
    assert command.returncode == 0, said
    (group,) = [path for path in (tmp_path / "outputs").iterdir() if not path.is_symlink()]
    runs = [Run(path) for path in group.iterdir() if path.is_dir()]
    assert [(run.record.status, run.record.processes) for run in runs] == [("completed", 2)] * 2
    assert {run.config.seed for run in runs} == {0, 1}
    assert all((run.path / name).exists() for run in runs for name in ("report.html", "metrics.json"))
    assert (group / "summary.json").exists()
    assert said.count("epoch 1/1") == said.count("run directory") == 2


@pytest.mark.slow
def test_torchrun_prints_a_mistake_and_the_help_once(tmp_path):
    for arguments, code, sentence in (
        (["--help"], 0, "usage: python main.py"),
        (["--no-such-flag"], 1, "python main.py has no flag --no-such-flag"),
        (["--epochs=many"], 1, "error: --epochs takes a whole number, not 'many'"),
    ):
        command = torchrun(*arguments, f"--output-dir={tmp_path}")
        said, _ = command.communicate(timeout=120)
        assert (command.returncode, said.count(sentence)) == (code, 1), said


@pytest.mark.slow
@pytest.mark.parametrize(("number", "epochs"), [(signal.SIGTERM, 0), (signal.SIGINT, 1)])
def test_a_signal_to_torchrun_interrupts_the_run(tmp_path, number, epochs):
    command = torchrun(
        "--recipe=convnet", "--dataset=digits", "--epochs=200", "--device=cpu", f"--output-dir={tmp_path}"
    )
    # The history is empty at first, when one process may defer signals and the other not yet.
    wait_until(lambda: any(len(file.read_text().splitlines()) >= epochs for file in tmp_path.glob("2*/history.jsonl")))
    command.send_signal(number)
    said, _ = command.communicate(timeout=LIMIT)
    (run,) = [Run(path) for path in tmp_path.iterdir() if not path.is_symlink()]
    assert run.record.status == "interrupted", said
    assert f"resume with `{run.resume_command}`" in said


def test_processes_that_cannot_meet_end_with_a_sentence(monkeypatch):
    for name, value in {"RANK": "0", "LOCAL_RANK": "0", "WORLD_SIZE": "2"}.items():
        monkeypatch.setenv(name, value)
    monkeypatch.delenv("MASTER_ADDR", raising=False)
    with pytest.raises(UserError, match="the processes cannot connect to each other: "), device.process_group():
        pass


def test_an_error_of_the_program_is_not_taken_for_a_lost_process(monkeypatch):
    monkeypatch.setattr(torch.distributed, "init_process_group", lambda **_: None)
    with pytest.raises(RuntimeError, match=r"^shapes differ$"), device.process_group():
        raise RuntimeError("shapes differ")
