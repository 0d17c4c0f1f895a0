"""The hardware: which device computes, in which number format, and how memory is reused."""

import contextlib
import ctypes
import sys
from types import ModuleType

import torch

from cifar.errors import UserError

# glibc's mallopt parameters, from malloc.h.
_M_TRIM_THRESHOLD, _M_TOP_PAD, _M_MMAP_MAX = -1, -2, -4


def choose(name: str) -> torch.device:
    """The device called `name`; `auto` is the fastest that is there: cuda, then mps, then cpu.

    Raises UserError for a device that this machine lacks.
    """
    there = {"cuda": torch.cuda.is_available(), "mps": torch.backends.mps.is_available(), "cpu": True}
    present = [device for device, is_there in there.items() if is_there]
    if name == "auto":
        return torch.device(present[0])
    if name not in present:
        raise UserError(f"this machine has no device '{name}': it has {', '.join(present)}")
    return torch.device(name)


def has_bfloat16(device: torch.device) -> bool:
    """Whether the device multiplies bfloat16 matrices in hardware; where it does not, float32 is faster."""
    if device.type == "cuda":
        return torch.cuda.is_bf16_supported(including_emulation=False)
    if device.type == "cpu":
        capabilities = torch.cpu.get_capabilities()
        return bool(capabilities.get("avx512_bf16") or capabilities.get("amx_bf16"))
    return False


def resolve_precision(name: str, device: torch.device) -> str:
    """`bfloat16` or `float32`; `auto` takes bfloat16 where the device has it natively."""
    if name != "auto":
        return name
    return "bfloat16" if has_bfloat16(device) else "float32"


def multiplies_tiles(device: torch.device) -> bool:
    """Whether products are computed in bfloat16 from here on, by a processor that multiplies them in tiles (AMX)."""
    in_bfloat16 = torch.is_autocast_enabled(device.type) and torch.get_autocast_dtype(device.type) == torch.bfloat16
    return device.type == "cpu" and in_bfloat16 and bool(torch.cpu.get_capabilities().get("amx_bf16"))


def autocast(device: torch.device, precision: str) -> contextlib.AbstractContextManager:
    """A context in which the network's products are computed in `precision`; weights stay float32."""
    return torch.autocast(device.type, torch.bfloat16, enabled=precision == "bfloat16")


def random_module(device: torch.device) -> ModuleType:
    """Where get_rng_state and set_rng_state of the device's global generator are."""
    return torch if device.type == "cpu" else torch.get_device_module(device)


def describe(device: torch.device) -> str:
    """The device's name as its maker prints it."""
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    return torch.cpu.get_capabilities().get("cpu_name", device.type) if device.type == "cpu" else device.type


def keep_freed_memory() -> bool:
    """Make glibc keep large blocks for reuse instead of returning them to the system at once.

    A training step frees and takes hundreds of megabytes; with glibc's defaults each comes back as
    fresh pages, and faulting them in took over a third of a step's time. Returns whether it was set:
    elsewhere than on glibc nothing happens. What lies free by then, of the stage or the run before, is
    returned. Call it before the first large tensor.
    """
    if not sys.platform.startswith("linux"):
        return False
    libc = ctypes.CDLL(None)
    if not hasattr(libc, "gnu_get_libc_version"):
        return False
    wanted = {_M_MMAP_MAX: 0, _M_TRIM_THRESHOLD: -1, _M_TOP_PAD: 64 * 2**20}
    libc.malloc_trim(0)
    return all(libc.mallopt(parameter, value) for parameter, value in wanted.items())
