"""The hardware: which device computes, in which precision, how memory is reused, and several processes as one job.

Other modules call a torch.device `hardware`, because `device` is this module.
"""

import contextlib
import ctypes
import datetime
import functools
import math
import os
import re
import shutil
import sys
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType
from typing import Any, cast

import torch
import torch.distributed as dist
from torch import Tensor, nn

from cifar.errors import UserError, first_line

_CGROUP_LIMITS = ("/sys/fs/cgroup/memory.max", "/sys/fs/cgroup/memory/memory.limit_in_bytes")  # of versions 2 and 1
DTYPES = {"bfloat16": torch.bfloat16, "float16": torch.float16, "float32": torch.float32}  # by precision
# glibc's mallopt parameters, from malloc.h.
_M_TRIM_THRESHOLD, _M_TOP_PAD, _M_MMAP_THRESHOLD, _M_MMAP_MAX = -1, -2, -3, -4


def choose(name: str) -> torch.device:
    """Return the device called `name`; `auto` is the fastest one available: cuda, then mps, then cpu.

    Raises UserError for a device that this machine lacks.
    """
    available = {"cuda": torch.cuda.is_available(), "mps": torch.backends.mps.is_available(), "cpu": True}
    present = [device for device, is_available in available.items() if is_available]
    if name not in ("auto", *present):
        raise UserError(f"PyTorch finds no device '{name}' here: it finds {', '.join(present)}")
    return torch.device(present[0] if name == "auto" else name)


def unused_gpu() -> str | None:
    """Return a sentence if there is the driver of a GPU that PyTorch cannot use, most often because it is too old."""
    if torch.cuda.is_available() or not shutil.which("nvidia-smi"):
        return None
    return f"nvidia-smi is installed, but torch {torch.__version__} finds no GPU"


@functools.cache
def cpu_features() -> dict[str, Any]:
    """Return the processor's features, such as `avx512_bf16`, and its `cpu_name`.

    Those beyond AVX2 are left out where ATEN_CPU_CAPABILITY limits PyTorch to it, to imitate an older processor.
    """
    features = torch.cpu.get_capabilities()
    hidden = ("avx512", "amx") if torch.backends.cpu.get_cpu_capability() == "AVX2" else ()
    return {name: value for name, value in features.items() if not name.startswith(hidden)}


def has_bfloat16(device: torch.device) -> bool:
    """Say whether the device multiplies bfloat16 matrices in hardware; where it does not, float32 is faster."""
    if device.type == "cuda":
        return torch.cuda.is_bf16_supported(including_emulation=False)
    if device.type == "cpu":
        return bool(cpu_features().get("avx512_bf16") or cpu_features().get("amx_bf16"))
    return False


def resolve_precision(name: str, device: torch.device) -> str:
    """Return `bfloat16`, `float16` or `float32`; `auto` is the fastest that the device has in hardware.

    float16 is for GPUs of NVIDIA: elsewhere, a run that was trained in it is evaluated as with `auto`.
    """
    if name != "auto" and (name, device.type == "cuda") != ("float16", False):
        return name
    if has_bfloat16(device):
        return "bfloat16"
    return "float16" if device.type == "cuda" else "float32"


def require_precision(name: str, device: torch.device) -> None:
    """Raise UserError if a network cannot be trained on the device in this precision."""
    if name == "float16" and device.type != "cuda":
        raise UserError(f"--precision float16 needs an NVIDIA GPU, and the device is {device.type}: leave it out")


def autocast(device: torch.device, precision: str) -> contextlib.AbstractContextManager:
    """Return a context in which the network's products are computed in `precision`; weights stay float32."""
    return torch.autocast(device.type, DTYPES[precision], enabled=precision != "float32")


def compiled(network: nn.Module, mode: str) -> nn.Module:
    """Return the network with its calls compiled by torch.compile in a mode of its own, or as it is for `off`."""
    if mode == "off":
        return network
    return cast(nn.Module, torch.compile(network, mode=mode, dynamic=False))


@contextlib.contextmanager
def training_kernels(deterministic: bool) -> Iterator[None]:
    """Have cuDNN measure which of its algorithms are fastest, or take those that repeat bit for bit.

    Not for evaluation, where batches have many sizes, and each would be measured.
    Raises UserError for what torch.compile raises.
    """
    try:
        with torch.backends.cudnn.flags(enabled=True, benchmark=not deterministic, deterministic=deterministic):
            yield
    except RuntimeError as error:
        if type(error).__module__.startswith(("torch._dynamo", "torch._inductor")):
            raise UserError(f"torch.compile fails here, leave out --compile: {first_line(error)}") from None
        raise


def random_module(device: torch.device) -> ModuleType:
    """Return the module with get_rng_state and set_rng_state of the device's global generator."""
    return torch if device.type == "cpu" else torch.get_device_module(device)


def describe(device: torch.device) -> str:
    """Return the device's name as its maker prints it."""
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    return cpu_features().get("cpu_name", device.type) if device.type == "cpu" else device.type


def keep_freed_memory() -> bool:
    """Make glibc keep large blocks for reuse instead of returning them to the system at once.

    A training step frees and takes hundreds of megabytes; with glibc's defaults each comes back as fresh pages, and
    faulting them in took over a third of a step's time. Returns whether it was set: elsewhere than on glibc nothing
    happens. Memory that is free at the call is returned to the system. Call it before the first large tensor.
    """
    return _tune_glibc({_M_MMAP_MAX: 0, _M_TRIM_THRESHOLD: -1, _M_TOP_PAD: 64 * 2**20})


def return_freed_memory() -> bool:
    """Make glibc return each large block to the system when it is freed, for a program that runs for long.

    By default it does so only until the first one is freed, and then keeps those of that size, in pieces between
    smaller blocks: six hostile visitors raised the demo's memory by 81 MB for good, and by 5 MB with this.
    Returns whether it was set.
    """
    return _tune_glibc({_M_MMAP_MAX: 2**16, _M_MMAP_THRESHOLD: 2**17, _M_TRIM_THRESHOLD: 2**17, _M_TOP_PAD: 2**17})


def _tune_glibc(settings: dict[int, int]) -> bool:
    if not sys.platform.startswith("linux"):
        return False
    libc = ctypes.CDLL(None)
    if not hasattr(libc, "gnu_get_libc_version"):
        return False
    libc.malloc_trim(0)
    return all(libc.mallopt(parameter, value) for parameter, value in settings.items())


def user_sets_threads() -> bool:
    """Say whether the user chooses the number of threads; torchrun's default is one, which would leave cores idle."""
    return "OMP_NUM_THREADS" in os.environ and not (
        dist.is_torchelastic_launched() and os.environ["OMP_NUM_THREADS"] == "1"
    )


def advice_when_busy(threads: int, cores: int) -> str:
    """Say what makes training faster while other programs keep cores busy, for which its threads would wait."""
    fewer = max(1, cores // 2)
    advice = f", or as long as they run: export OMP_NUM_THREADS={fewer}" if threads > fewer else ""
    return f"close other programs{advice}"


def memory() -> tuple[float, float]:
    """Return how many bytes the machine and its container let this process take, and how many are free.

    All of them count as free where the system does not say how many are; both are infinite where neither is known.
    """
    total = free = math.inf
    with contextlib.suppress(OSError, ValueError, AttributeError):
        total = os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    with contextlib.suppress(OSError):
        if available := re.search(r"MemAvailable:\s+(\d+) kB", Path("/proc/meminfo").read_text()):
            free = int(available[1]) * 1024
    for file in _CGROUP_LIMITS:
        with contextlib.suppress(OSError, ValueError):  # no such file, or "max"
            total = min(total, int(Path(file).read_text()))
    return total, min(total, free)


def free_memory(device: torch.device) -> float:
    """Return how many bytes of the device's memory are free."""
    return torch.cuda.mem_get_info(device)[0] if device.type == "cuda" else memory()[1]


# Several processes, started by torchrun. Each runs the same program on its slice of every batch; rank 0 alone writes
# and prints. With one process the functions below change nothing.

_LONGEST_WAIT = datetime.timedelta(hours=6)  # for rank 0, which downloads, evaluates and draws on its own
# What gloo says when a process has ended; NCCL raises DistBackendError.
_BROKEN = re.compile("connection|peer|broken pipe|timed out", re.IGNORECASE)


def rank() -> int:
    """Return the number of this process; 0 is the one that writes and prints."""
    return dist.get_rank() if dist.is_initialized() else 0


def world_size() -> int:
    """Return the number of processes in this job."""
    return dist.get_world_size() if dist.is_initialized() else 1


@contextlib.contextmanager
def process_group() -> Iterator[None]:
    """Join the processes that torchrun has started, each with its GPU or its share of the cores.

    Raises UserError if they do not find each other, or if another process ends while this one needs it.
    """
    from joblib import cpu_count

    local, local_size = int(os.environ.get("LOCAL_RANK", 0)), int(os.environ.get("LOCAL_WORLD_SIZE", 1))
    if local < torch.cuda.device_count():  # more processes than GPUs can train on the CPU
        torch.cuda.set_device(local)
    if local_size > 1 and not user_sets_threads():
        torch.set_num_threads(max(1, cpu_count() // local_size))
    try:
        dist.init_process_group(timeout=_LONGEST_WAIT)
    except (RuntimeError, ValueError) as error:
        raise UserError(f"the processes cannot connect to each other: {first_line(error)}") from None
    with lost_process_errors():
        yield


@contextlib.contextmanager
def lost_process_errors() -> Iterator[None]:
    """Turn what PyTorch raises when another process has ended into UserError."""
    try:
        yield
    except RuntimeError as error:
        is_lost = isinstance(error, dist.DistBackendError) or _BROKEN.search(str(error))
        if world_size() == 1 or not is_lost:
            raise
        raise UserError(f"another of the {world_size()} processes has stopped: see torchrun's output") from None


def distribute(network: nn.Module) -> nn.Module:
    """Wrap a network so that its gradients are averaged over all processes.

    On GPUs, BatchNorm takes its statistics over the whole batch; on CPUs, where PyTorch has no such layer, over each
    process's slice, and rank 0's running statistics are the ones that count.
    """
    if world_size() == 1:
        return network
    from torch.nn.parallel import DistributedDataParallel

    if next(network.parameters()).device.type == "cuda":
        network = nn.SyncBatchNorm.convert_sync_batchnorm(network)
    return DistributedDataParallel(network, find_unused_parameters=True)  # layers whose learning rate has ended


def broadcast_buffers(network: nn.Module) -> None:
    """Give all processes rank 0's buffers, such as BatchNorm's running statistics."""
    if world_size() > 1:
        for buffer in network.buffers():
            dist.broadcast(buffer, src=0)


def rank_slice(total: int) -> slice:
    """Return the slice of `total` items that is this process's; sizes differ by one at most."""
    return slice(total * rank() // world_size(), total * (rank() + 1) // world_size())


def gather_slices(values: Tensor, total: int) -> Tensor:
    """Join the slices of all processes, (..., slice), to (..., total)."""
    if world_size() == 1:
        return values
    joined = values.new_zeros(*values.shape[:-1], total)
    joined[..., rank_slice(total)] = values
    dist.all_reduce(joined)
    return joined


def all_reduce(values: Tensor, operation: Any = dist.ReduceOp.SUM) -> Tensor:
    """Combine a tensor over all processes, by default by its sum."""
    if world_size() > 1:
        values = values.to("cuda" if dist.get_backend() == "nccl" else "cpu")  # what the processes exchange
        dist.all_reduce(values, operation)
    return values


def maximum(value: int) -> int:
    """Return the maximum over all processes; every process must call it."""
    return int(all_reduce(torch.tensor(value), dist.ReduceOp.MAX))


def broadcast_object(value: Any) -> Any:
    """Broadcast rank 0's value to all processes."""
    values = [value]
    if world_size() > 1:
        dist.broadcast_object_list(values, src=0)
    return values[0]
