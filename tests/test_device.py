import os
import platform
import sys

import pytest
import torch

from cifar import device
from cifar.errors import UserError
from commands import run


def test_auto_is_the_fastest_available_device(monkeypatch):
    for cuda, mps, expected in ((True, True, "cuda"), (False, True, "mps"), (False, False, "cpu")):
        monkeypatch.setattr(torch.cuda, "is_available", lambda there=cuda: there)
        monkeypatch.setattr(torch.backends.mps, "is_available", lambda there=mps: there)
        assert device.choose("auto").type == expected


@pytest.mark.parametrize(("flag", "precision"), [("avx512_bf16", "bfloat16"), ("avx2", "float32")])
def test_auto_precision_is_bfloat16_where_the_processor_has_it(monkeypatch, flag, precision):
    monkeypatch.setattr(device, "cpu_features", lambda: {flag: True})
    assert device.resolve_precision("auto", torch.device("cpu")) == precision
    assert device.resolve_precision("float32", torch.device("cpu")) == "float32"


def test_pytorch_limited_to_avx2_imitates_a_processor_without_bfloat16():
    code = "import torch; from cifar import device; print(device.resolve_precision('auto', torch.device('cpu')))"
    assert run("-c", code, env=os.environ | {"ATEN_CPU_CAPABILITY": "avx2"})[1] == "float32\n"


@pytest.mark.parametrize(("has_bfloat16", "precision"), [(True, "bfloat16"), (False, "float16")])
def test_a_gpu_without_bfloat16_trains_in_float16_and_no_other_device_does(monkeypatch, has_bfloat16, precision):
    monkeypatch.setattr(torch.cuda, "is_bf16_supported", lambda including_emulation: has_bfloat16)
    gpu, cpu = torch.device("cuda"), torch.device("cpu")
    assert device.resolve_precision("auto", gpu) == precision
    device.require_precision("float16", gpu)
    with pytest.raises(UserError, match="--precision float16 needs an NVIDIA GPU, and the device is cpu"):
        device.require_precision("float16", cpu)
    assert device.resolve_precision("float16", cpu) == device.resolve_precision("auto", cpu)  # to evaluate


@pytest.mark.parametrize(
    ("precision", "dtype"), [("float32", torch.float32), ("bfloat16", torch.bfloat16), ("float16", torch.float16)]
)
def test_products_are_computed_in_the_precision(precision, dtype):
    with device.autocast(torch.device("cpu"), precision):
        assert (torch.ones(2, 2) @ torch.ones(2, 2)).dtype == dtype


# The allocator takes a few uses to settle: small blocks that fall between the large ones part the freed memory
# at first, by chance in another way each time. Hence the median of twenty uses.
FAULTS = """
import resource, statistics, torch
from cifar import device
def faults_of_a_use():
    before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
    torch.ones(10_000_000).sum()
    return resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before
def median():
    return round(statistics.median(faults_of_a_use() for _ in range(20)))
print(median(), device.keep_freed_memory(), median())
"""


@pytest.mark.skipif(sys.platform != "linux", reason="counts page faults as Linux does")
def test_kept_memory_is_reused_without_page_faults():
    returned, is_kept, kept = run("-c", FAULTS)[1].split()
    if is_kept == "False":
        pytest.skip("not on glibc")
    assert int(kept) < 0.1 * int(returned)


# How many bytes stay after large blocks, with small ones between them that are kept, were freed twice; by default 8 to
# 44 MB.
STAYING = """
import os
from cifar import device
device.keep_freed_memory(), device.return_freed_memory()
def resident():
    with open("/proc/self/statm") as file:
        return int(file.read().split()[1]) * os.sysconf("SC_PAGE_SIZE")
before, kept = resident(), []
for _ in range(2):
    blocks = [(b"x" * 9_000_000, kept.append(b"x" * 50_000)) for _ in range(5)]
    blocks.clear()
print(resident() - before)
"""


@pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="other libraries need no help")
def test_returned_memory_does_not_stay_in_pieces():
    assert int(run("-c", STAYING)[1]) < 5e6


@pytest.mark.parametrize(("system", "library"), [("darwin", None), ("linux", object())])
def test_without_glibc_nothing_is_set(system, library, monkeypatch):
    monkeypatch.setattr(sys, "platform", system)
    monkeypatch.setattr(device.ctypes, "CDLL", lambda _: library)
    assert not device.keep_freed_memory()


def test_apples_gpu_computes_in_float32_and_is_described_by_its_type():
    mps = torch.device("mps")
    assert device.resolve_precision("auto", mps) == "float32"
    assert device.describe(mps) == "mps"


def test_memory_is_no_more_than_the_control_groups_limit(monkeypatch, tmp_path):
    (tmp_path / "unlimited").write_text("max\n")
    (tmp_path / "limited").write_text("1000\n")
    monkeypatch.setattr(device, "_CGROUP_LIMITS", (str(tmp_path / "unlimited"), str(tmp_path / "none")))
    total, free = device.memory()
    assert 1000 < free <= total
    monkeypatch.setattr(device, "_CGROUP_LIMITS", (str(tmp_path / "limited"),))
    assert device.memory() == (1000, 1000)
