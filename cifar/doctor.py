"""Checks whether this machine can run the suite, and how to fix what is wrong; changes nothing itself.

torch and whatever needs it are imported inside the checks, because they may be what is broken.
"""

import importlib.metadata
import math
import os
import shutil
import socket
import tempfile
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from itertools import chain
from pathlib import Path

from cifar import console
from cifar.config import IS_CLONE, PROJECT, STAGES, Config, shared_data_dir
from cifar.errors import UserError, describe, plural
from cifar.runs import RESUMABLE, Run

# Packages that a run does without -> the task that needs them.
_OPTIONAL = {
    **dict.fromkeys(("gradio", "starlette", "uvicorn"), "demo"),
    **dict.fromkeys(("pytest", "pytest-xdist", "selenium"), "test"),
    **dict.fromkeys(("ruff", "mypy"), "lint"),
}
# Package -> the version that fixes known security holes, and these; only where our bounds allow earlier ones.
_SECURITY = {"pillow": ("12.3", "CVE-2026-59197 to 59200, memory safety of its decoders")}
# What device.cpu_features names -> the minutes that `fast` takes on two cores (docs/results.md).
_FAST_MINUTES = {"amx_bf16": "4", "avx512_bf16": "5 to 10", "avx2": "14 to 24"}
_STYLES = {"note": "cyan", "warning": "yellow", "failure": "bold red"}


@dataclass(frozen=True)
class Finding:
    """The result of one check. level: `ok`, `note`, `warning`, or `failure` if a run would fail."""

    subject: str
    level: str
    message: str
    fix: str = ""


def examine(config: Config, port: int) -> list[Finding]:
    """Check everything that a run with these settings needs; asks the network only for a dataset that is missing."""
    checks = {
        "packages": _packages(requirements()),
        "device": chain(_device(config.device), _memory()),  # both need torch
        "disk": _disk(config.output_dir),
        "dataset": _dataset(config),
        "port": _port(port),
    }
    return [finding for subject, check in checks.items() for finding in _guarded(subject, check)]


def examine_run(run: Run) -> list[Finding]:
    """Say how a run ended, what training and evaluation found in it, and what to try."""
    return list(_guarded("run", _run(run)))


def _guarded(subject: str, check: Iterable[Finding]) -> Iterator[Finding]:
    """Yield the findings of a check, and what it raises as a failure."""
    try:
        yield from check
    except UserError as error:
        yield Finding(subject, "failure", str(error))
    except Exception as error:  # a broken package raises anything
        fix = "if a package is broken: pip install --force-reinstall PACKAGE"
        yield Finding(subject, "failure", f"cannot be checked: {describe(error)}", fix)


def show_findings(findings: Sequence[Finding]) -> None:
    """Print a line for each finding, and its fix below."""
    for finding in findings:
        style = _STYLES.get(finding.level)
        console.say(f"{finding.level:<8} {finding.subject:<9} {finding.message}", style=style)
        if finding.fix:
            console.say(f"{'fix:':>18} {finding.fix}", style=style)


def requirements() -> list[str]:
    """List what the suite requires: a clone's requirements.txt, or what the installed package says, with the demo's."""
    if IS_CLONE:
        lines = (PROJECT / "requirements.txt").read_text(encoding="utf-8").splitlines()
        return [line for line in lines if line and not line.startswith("#")]
    required = importlib.metadata.requires("cifar-suite") or []
    return [line for line in required if "extra ==" not in line or 'extra == "demo"' in line]


def _packages(requirements: Iterable[str]) -> Iterator[Finding]:
    """Find packages that are missing, out of bounds or insecure. requirements: as in a requirements.txt."""
    from packaging.requirements import Requirement
    from packaging.version import Version

    fine = []
    for required in map(Requirement, requirements):
        name, fix = required.name, f"pip install '{required.name}{required.specifier}'"
        try:
            installed = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            level, user = ("warning", f"{STAGES} {_OPTIONAL[name]}") if name in _OPTIONAL else ("failure", "a run")
            yield Finding("packages", level, f"{name} is missing: {user} needs it", fix)
            continue
        safe, holes = _SECURITY.get(name, ("0", ""))
        if Version(installed) < Version(safe):
            problem = f"has a known security hole, fixed in {safe}: {holes}"
            yield Finding("packages", "warning", f"{name} {installed} {problem}", f"pip install '{name}>={safe}'")
        elif not required.specifier.contains(installed, prereleases=True):
            yield Finding("packages", "warning", f"{name} {installed} was not tested: use {required.specifier}", fix)
        elif name not in _OPTIONAL:
            fine.append(f"{name} {installed}")
    if fine:
        yield Finding("packages", "ok", ", ".join(fine))


def _device(name: str) -> Iterator[Finding]:
    """Check the device, whether it multiplies bfloat16, and how many threads the CPU uses."""
    import joblib
    import torch

    from cifar import device

    chosen = device.choose(name)
    if problem := device.unused_gpu():
        message = f"{chosen.type}: {problem}"
        hidden = "unset CUDA_VISIBLE_DEVICES" if "CUDA_VISIBLE_DEVICES" in os.environ else ""
        yield Finding("device", "warning", message, hidden or "update the driver, or PyTorch for its CUDA version")
    else:
        message = f"{chosen.type}: {device.describe(chosen)}"
        if chosen.type == "cuda":
            free, total = torch.cuda.mem_get_info(chosen)
            message += f", {free / 1e9:.1f} GB of memory free of {total / 1e9:.1f}"
        yield Finding("device", "ok", message)
    kind, duration = chosen.type, ""
    if chosen.type == "cpu":
        kind = next((kind for kind in _FAST_MINUTES if device.cpu_features().get(kind)), kind)
        duration = f"; fast takes about {_FAST_MINUTES[kind]} minutes on two cores" if kind in _FAST_MINUTES else ""
    if device.has_bfloat16(chosen):
        yield Finding("bfloat16", "ok", f"in hardware ({kind}): networks train in it{duration}")
    else:
        precision = device.resolve_precision("auto", chosen)
        yield Finding("bfloat16", "note", f"not in hardware: networks train in {precision}{duration}")
    yield _threads(torch.get_num_threads(), joblib.cpu_count())


def _threads(threads: int, cores: int) -> Finding:
    """Compare torch's threads with the cores that this process may use, and look for other programs on them."""
    from cifar import device

    message = f"{threads} on {plural(cores, 'core')}"
    if threads > cores:
        message += ": they would wait for each other"
        return Finding("threads", "warning", message, f"export OMP_NUM_THREADS={cores}")
    if hasattr(os, "getloadavg") and os.getloadavg()[0] > (os.cpu_count() or 1) / 2:
        message += "; the machine was busy in the last minute: other programs make training slower"
        return Finding("threads", "warning", message, device.advice_when_busy(threads, cores))
    if threads < cores and os.environ.get("OMP_NUM_THREADS") == str(threads):
        return Finding("threads", "note", message, "unset OMP_NUM_THREADS to use all cores")
    return Finding("threads", "ok", message)


def _memory() -> Iterator[Finding]:
    import torch

    from cifar import device

    total, free = device.memory()
    needed = 2 if device.has_bfloat16(torch.device("cpu")) else 3  # measured: 1.9 GB, in float32 2.7
    message = f"{free / 1e9:.1f} GB free of {total / 1e9:.1f}; the recipe fast takes up to {needed} GB with CIFAR-10"
    if free < needed * 1e9:
        fix = "close other programs, or choose a smaller --batch-size or --recipe convnet"
        yield Finding("memory", "warning", message, fix)
    elif math.isfinite(total):
        yield Finding("memory", "ok", message)


def _disk(output_dir: str) -> Iterator[Finding]:
    free = _require_room(output_dir, 50, "--output-dir")
    yield Finding("disk", "ok", f"{free / 1e9:.1f} GB free in {output_dir}; a run of fast takes 45 MB")


def _require_room(folder: str, megabytes: float, flag: str) -> float:
    """Return the free bytes of a folder, which need not exist. Raises UserError if so much cannot be written to it."""
    path = Path(folder).absolute()
    try:
        parents = (parent for parent in (path, *path.parents) if parent.exists())
        existing = next(parents, path)  # a drive of Windows may be missing
        tempfile.TemporaryFile(dir=existing).close()
        free = shutil.disk_usage(existing).free
    except OSError as error:
        raise UserError(f"cannot write to {folder}: {error.strerror}; set {flag} to another folder") from None
    if free < megabytes * 1e6:
        advice = f"make room, or set {flag} to another folder"
        raise UserError(f"{free / 1e6:.0f} MB free in {folder}, but {megabytes:.0f} MB needed; {advice}")
    return free


def _dataset(config: Config) -> Iterator[Finding]:
    from cifar import datasets, download

    path, description = Path(config.data_dir), datasets.describe(config.dataset, config.labels)
    archive = download.ARCHIVES.get("cifar10" if config.dataset == "auto" else config.dataset)
    if not archive:
        yield Finding("dataset", "ok", description)
    elif folder := download.find(archive, path):
        download.verify(archive, folder)
        yield Finding("dataset", "ok", f"in {folder}; each file has its published MD5")
    elif file := download.find_file(archive, path):
        yield Finding("dataset", "ok", f"{file} has the published SHA-256; the next run unpacks it")
    else:
        yield _missing(archive, config)


def _missing(archive, config: Config) -> Finding:
    from cifar import download

    _require_room(config.data_dir, 2.2 * archive.size / 1e6, "--data-dir")  # itself, and 1.1 times as much unpacked
    source = " (CIFAR_DATA_DIR)" if config.data_dir == shared_data_dir() else ""
    message = f"{archive.name} is not in {config.data_dir}{source}"
    if host := download.reachable_host(archive, config.mirror, seconds=1.5):
        return Finding("dataset", "note", f"{message}: the next run downloads {archive.size / 1e6:.0f} MB from {host}")
    message += ", and it cannot be downloaded"
    fix = f"put {archive.name} into {config.data_dir}, or name its folder with --data-dir, or an address with --mirror"
    if config.dataset == "auto":
        return Finding("dataset", "warning", f"{message}: a run would train on scikit-learn's digits instead", fix)
    return Finding("dataset", "failure", message, fix)


def _port(port: int) -> Iterator[Finding]:
    try:
        socket.create_server(("127.0.0.1", port)).close()
    except OSError as error:
        message = f"the demo cannot listen on port {port}: {os.strerror(error.errno or 0)}"
        yield Finding("port", "warning", message, f"{STAGES} demo --port with another number")
    else:
        yield Finding("port", "ok", f"{port} is free for the demo")


def _run(run: Run) -> Iterator[Finding]:
    from cifar import evaluate

    record, status = run.record, run.status()
    can_go_on = status in RESUMABLE and "not finite" not in (record.error or "")  # which would happen again
    fix = f"resume it with `{run.resume_command}`" if can_go_on else ""
    level = "ok" if status in ("completed", "running") else "warning"
    yield Finding("run", level, f"{run.path.name} is {status}" + (f": {record.error}" if record.error else ""), fix)
    if run.has_metrics:
        yield Finding("run", "ok", f"test accuracy {run.metrics.accuracy:.2%}, with TTA {run.metrics.accuracy_tta:.2%}")
    for sentence in filter(None, (record.note, *evaluate.learning_problems(run))):
        yield Finding("run", "warning", sentence)
