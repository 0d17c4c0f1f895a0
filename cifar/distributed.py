"""Several processes as one: torchrun starts them, the first runs the program, and the others help where it asks.

What they tell each other goes through torch.distributed: by gloo for tensors on the CPU, by NCCL for those on GPUs.
"""

import contextlib
import datetime
import hashlib
import os
import re
import sys
from collections.abc import Callable, Iterator
from typing import Any, NoReturn

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.utils._pytree import tree_map_only

from cifar import console, limits, signals
from cifar.errors import UserError, first_line

# Between two messages: a download, figures, a report. A process that dies ends the others at once.
_MOST_BETWEEN = datetime.timedelta(hours=6)
# What gloo says of a process that is gone; NCCL raises DistBackendError.
_BROKEN = re.compile("connection|peer|broken pipe|timed out", re.IGNORECASE)

_together = False  # whether this process is at work with the others


class LostError(UserError):
    """Another process has ended while this one needed it."""


def count() -> int:
    """The processes of this job, this one among them."""
    return dist.get_world_size() if dist.is_initialized() else 1


def size() -> int:
    """The processes that work together at this moment: outside of `helped` each is on its own."""
    return dist.get_world_size() if _together else 1


def lead(action: Callable[[], None]) -> None:
    """Join the processes that torchrun has started; call the action in the first, and help it in the others.

    Raises UserError if they do not find each other, and LostError if another one ends, of which the first tells.
    """
    local = int(os.environ.get("LOCAL_RANK", 0))
    os.environ["CUDA_VISIBLE_DEVICES"] = own_gpu(os.environ.get("CUDA_VISIBLE_DEVICES"), local)
    if os.environ.get("OMP_NUM_THREADS") == "1":  # torchrun's default, which would leave cores idle
        torch.set_num_threads(max(1, limits.cores() // int(os.environ.get("LOCAL_WORLD_SIZE", 1))))
    try:
        dist.init_process_group(timeout=_MOST_BETWEEN)
    except (RuntimeError, ValueError) as error:
        raise UserError(f"the processes have not found each other: {first_line(error)}") from None
    if dist.get_rank() == 0:
        action()
        _tell(None)
    else:
        console.out.quiet = True
        _follow()
    dist.destroy_process_group()


def leave(code: int) -> NoReturn:
    """End this process without the rest of Python's own end.

    A thread of gloo that lets go of a tensor in it aborts the process: 2 of 14 runs, pytorch/pytorch#179291.
    """
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(code)


def own_gpu(visible: str | None, local: int) -> str:
    """CUDA_VISIBLE_DEVICES for the process `local` of this machine, where it was `visible` for all; "" if too few."""
    gpus = map(str, range(local + 1)) if visible is None else visible.split(",")
    return dict(enumerate(gpus)).get(local, "")


def _follow() -> None:
    """Do what the first process asks for until it has nothing more. A signal to stop is for that one to act on."""
    with signals.held_back():
        try:
            while (call := _tell()) is not None:
                function, arguments = call
                with _working_together():
                    function(*arguments)
        except (LostError, signals.Interrupted):
            leave(1)
        except UserError as error:
            raise UserError(f"process {dist.get_rank()}: {error}") from None


@contextlib.contextmanager
def _working_together() -> Iterator[None]:
    global _together
    _together = True
    try:
        yield
    finally:
        _together = False


@contextlib.contextmanager
def helped(function: Callable[..., None], *arguments: Any) -> Iterator[None]:
    """While it lasts the others run function(*arguments), and `add_up`, `gather` and so on join them with this process.

    Each has to call these in the same order. Tensors among the arguments arrive on the CPU.
    """
    if count() == 1:
        yield
        return
    _tell((function, tree_map_only(Tensor, Tensor.cpu, arguments)))
    with _working_together():
        yield


def share(total: int) -> slice:
    """Which of `total` things are this process's: as many as any other's, or one more or less."""
    rank = dist.get_rank() if size() > 1 else 0
    return slice(total * rank // size(), total * (rank + 1) // size())


def add_up(tensor: Tensor) -> Tensor:
    """The tensor, with the sum over all processes in it, whose bits are the same in each."""
    if size() > 1:
        with _losing():
            dist.all_reduce(tensor)
    return tensor


def add_up_gradients(network: nn.Module, *numbers: Tensor) -> list[Tensor]:
    """Add up the gradients of the network; returns the numbers, of any shape, added up with them in one message."""
    if size() == 1:
        return list(numbers)
    gradients = [parameter.grad for parameter in network.parameters() if parameter.grad is not None]
    parts = [*gradients, *numbers]
    whole = add_up(torch.cat([part.flatten().to(gradients[0]) for part in parts]))
    sums = whole.split([part.numel() for part in parts])
    for gradient, added in zip(gradients, sums):
        gradient.copy_(added.view_as(gradient))
    return [added.view_as(number).type_as(number) for added, number in zip(sums[len(gradients) :], numbers)]


def spread(own: Tensor, total: int) -> Tensor:
    """This process's share of `total` numbers, (B,), at its place among zeros, (total,), to add up with the others'."""
    if size() == 1:
        return own
    whole = own.new_zeros(total)
    whole[share(total)] = own
    return whole


def gather(things: list[Any]) -> list[Any]:
    """The things of all processes, one process after the other; tensors are on the CPU."""
    if size() == 1:
        return things
    lists: list[list[Any]] = [[]] * size()
    with _losing():
        dist.all_gather_object(lists, things)
    return [thing for own in lists for thing in own]


def agreed(signal_number: Callable[[], int | None]) -> Callable[[], int | None]:
    """The number of a signal that has come to any process, which all learn after the same step."""

    def ask() -> int | None:
        number = torch.tensor(signal_number() or 0)
        with _losing():
            dist.all_reduce(number, dist.ReduceOp.MAX)
        return number.item() or None

    return ask if size() > 1 else signal_number


def check_same(network: nn.Module) -> None:
    """Raise UserError unless the network's weights have the same bits in all processes."""
    if size() == 1:
        return
    digest = hashlib.sha256()
    for tensor in network.state_dict().values():
        digest.update(tensor.cpu().flatten().view(torch.uint8).numpy())
    own = int.from_bytes(digest.digest()[:7])
    bounds = torch.tensor([own, -own])
    with _losing():
        dist.all_reduce(bounds, dist.ReduceOp.MAX)
    if bounds.sum():
        raise UserError("the processes have come to different weights: their machines do not compute alike")


def _tell(content: Any = None) -> Any:
    """What the first process says to all; what others give is not heard."""
    box = [content]
    with _losing():
        dist.broadcast_object_list(box, src=0, device=torch.device("cpu"))
    return box[0]


@contextlib.contextmanager
def _losing() -> Iterator[None]:
    """Turn what torch raises when a connection breaks into LostError."""
    try:
        yield
    except RuntimeError as error:
        if not isinstance(error, dist.DistBackendError) and not _BROKEN.search(str(error)):
            raise
        raise LostError(f"another of the {count()} processes has ended: torchrun says which and how") from None
