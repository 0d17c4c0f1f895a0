"""Several processes as one, on this machine and by gloo, as torchrun starts them."""

import multiprocessing
import os
import socket
import sys
from pathlib import Path

import pytest
import torch
from conftest import quick_config

from cifar import datasets, distributed, train
from cifar.config import Config

SERVER = multiprocessing.get_context("forkserver")
RECIPES = ("fast", "simple", "convnet")  # with BatchNorm of either kind, both dropouts, jitter, small images
BATCH = 50  # which three processes cannot share evenly


def free_port() -> int:
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        return listener.getsockname()[1]


def process(rank: int, count: int, port: int, action, arguments) -> None:
    """What torchrun gives a process; the first calls the action."""
    numbers = {"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": count, "LOCAL_WORLD_SIZE": count, "MASTER_PORT": port}
    os.environ |= {name: str(number) for name, number in numbers.items()} | {"MASTER_ADDR": "127.0.0.1"}
    torch.set_num_threads(1)
    distributed.lead(lambda: action(*arguments))


def in_processes(count: int, action, *arguments) -> list[int]:
    """Call the action in the first of so many processes; returns the exit codes of all."""
    port = free_port()
    all = [SERVER.Process(target=process, args=(rank, count, port, action, arguments)) for rank in range(count)]
    for one in all:
        one.start()
    for one in all:
        one.join(60)
    return [one.exitcode for one in all]


def first_step(recipe: str, folder: Path, split) -> None:
    """Save the gradients of a training's first step, and what BatchNorm remembers of it."""
    config = Config.create({"recipe": recipe, "batch_size": BATCH, "seed": 5})
    network = train.fresh_network(config, split, 10).to(memory_format=torch.channels_last)
    state = train.fresh_state(config, network, split)
    state.updates.step = lambda: None
    train.train_epoch(state, 24 if recipe == "fast" else 32, config.label_smoothing, "float32", train._display(config, state))
    tensors = {name: parameter.grad for name, parameter in network.named_parameters() if parameter.grad is not None}
    tensors |= {**dict(network.named_buffers()), "loss": state.losses, "correct": state.correct}
    if torch.distributed.get_rank() == 0:
        torch.save(tensors, folder / f"{recipe}.pt")
