"""Whether this machine is fit for a run, and what mends what is not: checks that change and print nothing.

torch is imported inside the checks that need it, for it may be what is broken.
"""

import contextlib
import importlib.metadata
import os
import re
import shutil
import socket
import tempfile
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

from cifar import archive, download, limits
from cifar.config import PROJECT, Config
from cifar.download import Archive
from cifar.errors import UserError, first_line, short

REQUIREMENTS = PROJECT / "requirements.txt"
_FOR_TESTS = ("pytest", "pytest-xdist", "selenium")
_NEEDED_BY = {"gradio": "invoke demo", "ruff": "invoke lint", **dict.fromkeys(_FOR_TESTS, "invoke test")}
_RUN_BYTES = 20e6  # that a run's directory takes; measured: 17 to 18 MB
_MEMORY = {"digits": 1.4e9}  # bytes, peak of `fast` on the CPU; measured: 1.29 GB
_CIFAR_MEMORY = 3.0e9  # likewise; measured: 2.7 GiB
_REACH_SECONDS = 1.5


@dataclass(frozen=True)
class Finding:
    """What a check found. level: `ok`, `note`, `warning`, or `failure` where a run would fail."""

    subject: str
    level: str
    says: str
    cure: str = ""


def examine(config: Config, port: int) -> list[Finding]:
    """All findings about a run with these settings. Only where the dataset is missing is the network asked, for it."""
    with ThreadPoolExecutor(1) as pool:
        reaching = _reaching(pool, config)
        return [
            *_packages(REQUIREMENTS),
            *_hardware(config),
            _disk(config.output_dir),
            _memory(config.dataset),
            _dataset(config, reaching),
            _port(port),
            *_browser(),
        ]


# Packages


def _packages(requirements: Path) -> list[Finding]:
    """What is missing, below a security fix or out of bounds: the file has the bounds, and fixes in its comments."""
    cure = f"pip install -r {short(requirements)}"
    try:
        from packaging.requirements import Requirement
    except ImportError:
        return [Finding("packages", "failure", "packaging is missing, so that no version can be compared", cure)]
    lines = [line.partition("#") for line in requirements.read_text(encoding="utf-8").splitlines()]
    wanted = [(Requirement(line), comment.strip()) for line, _, comment in lines if line.strip()]
    installed = {requirement.name: _version(requirement.name) for requirement, _ in wanted}
    findings = [_package(requirement, installed[requirement.name], comment, cure) for requirement, comment in wanted]
    findings.append(_pair(installed, cure))
    versions = ", ".join(f"{name} {installed[name]}" for name in installed if name not in _NEEDED_BY)
    return list(filter(None, findings)) or [Finding("packages", "ok", versions)]


def _version(name: str) -> str | None:
    try:
        return importlib.metadata.version(name)
    except importlib.metadata.PackageNotFoundError:
        return None


def _package(requirement, installed: str | None, comment: str, cure: str) -> Finding | None:
    """What is wrong with one package. comment: `below VERSION: the hole that it closes`, or nothing."""
    from packaging.version import Version

    name = requirement.name
    if installed is None:
        level = "warning" if name in _NEEDED_BY else "failure"
        return Finding("packages", level, f"{name} is missing: {_NEEDED_BY.get(name, 'a run')} needs it", cure)
    fix = re.match(r"below (\S+): (.+)", comment)
    if fix and Version(installed) < Version(fix[1]):
        says = f"{name} {installed} has a known security hole, closed in {fix[1]}: {fix[2]}"
    elif not requirement.specifier.contains(installed, prereleases=True):
        says = f"{name} {installed} is not what is tested: {requirement.specifier}"
    else:
        return None
    return Finding("packages", "warning", says, cure)


def _pair(installed: dict[str, str | None], cure: str) -> Finding | None:
    """torchvision's compiled part fails with another torch than the one it was built for, which it names."""
    from packaging.requirements import Requirement

    if not (installed.get("torch") and installed.get("torchvision")):
        return None
    built_for = map(Requirement, importlib.metadata.requires("torchvision") or ())
    specifier = next((needed.specifier for needed in built_for if needed.name == "torch"), None)
    if specifier is None or specifier.contains(installed["torch"], prereleases=True):
        return None
    says = f"torchvision {installed['torchvision']} is built for torch{specifier}, and torch is {installed['torch']}"
    return Finding("packages", "failure", says, cure)


# Hardware


def _hardware(config: Config) -> list[Finding]:
    try:
        import torch

        from cifar import device
    except Exception as error:
        reason = first_line(error) or type(error).__name__
        cure = f"pip install --force-reinstall -r {short(REQUIREMENTS)}, best in a fresh virtual environment"
        return [Finding("torch", "failure", f"it cannot be imported: {reason}", cure)]
    try:
        hardware = device.choose(config.device)
    except UserError as error:
        return [Finding("device", "failure", str(error), "leave out --device, or name one of those")]
    if hardware.type == "cpu" and shutil.which("nvidia-smi"):
        says = f"nvidia-smi is here, and torch {torch.__version__} finds no GPU: cpu computes"
        found = Finding(
            "device", "warning", says, "update the driver, or install the torch that pytorch.org has for it"
        )
    else:
        found = Finding("device", "ok", f"{hardware.type}: {device.describe(hardware)}")
    precise = device.has_bfloat16(hardware)
    says = "in hardware" if precise else "not in hardware: networks train in float32, which is slower"
    return [found, _threads(torch.get_num_threads()), Finding("bfloat16", "ok" if precise else "note", says)]


def _threads(threads: int) -> Finding:
    cores = limits.cores()
    if threads > cores:
        says = f"{threads} on the {cores} cores that this process may use: they wait for each other"
        return Finding("threads", "warning", says, f"export OMP_NUM_THREADS={cores}")
    if threads < cores and os.environ.get("OMP_NUM_THREADS"):
        says = f"{threads} on {cores} cores, as OMP_NUM_THREADS says"
        return Finding("threads", "note", says, "unset OMP_NUM_THREADS to use them all")
    return Finding("threads", "ok", f"{threads} on {cores} cores")


def _memory(dataset: str) -> Finding:
    needed = _MEMORY.get(dataset, _CIFAR_MEMORY)
    total, free = limits.memory()
    says = f"{free / 1e9:.1f} GB free of {total / 1e9:.1f}; the recipe fast takes up to {needed / 1e9:.1f}"
    if total < needed:
        return Finding("memory", "failure", says, "give it more memory, or take a smaller network: --recipe convnet")
    if free < needed:
        return Finding("memory", "warning", says, "end other programs first, or the system may end the run")
    return Finding("memory", "ok", says)


# Files


def _disk(output_dir: str) -> Finding:
    if trouble := _trouble(output_dir, _RUN_BYTES):
        return Finding("disk", "failure", trouble, "make room, or name another folder with --output-dir")
    free = shutil.disk_usage(_nearest(output_dir)).free
    return Finding("disk", "ok", f"{free / 1e9:.1f} GB free in {output_dir}; a run takes {_RUN_BYTES / 1e6:.0f} MB")


def _trouble(folder: str | Path, needed: float) -> str | None:
    """Why so many bytes cannot be written to the folder, which need not be there yet."""
    try:
        tempfile.TemporaryFile(dir=_nearest(folder)).close()
        free = shutil.disk_usage(_nearest(folder)).free
    except OSError as error:
        return f"cannot write to {folder}: {error.strerror}"
    return f"{free / 1e6:.0f} MB free in {folder}, and {needed / 1e6:.0f} needed" if free < needed else None


def _nearest(folder: str | Path) -> Path:
    """The folder, or what is there on the way to it."""
    path = Path(folder).absolute()
    return next(place for place in (path, *path.parents) if place.exists())


def _known(config: Config) -> Archive | None:
    """The archive that the dataset is in; None where it needs none."""
    return archive.ARCHIVES.get("cifar10" if config.dataset == "auto" else config.dataset)


def _file(known: Archive, config: Config) -> Path:
    """The archive, there or not."""
    path = Path(config.data_dir)
    return path if path.is_file() else path / known.name


def _reaching(pool: ThreadPoolExecutor, config: Config) -> Future | None:
    """Ask who would send the dataset, while other checks go on; None where it is on disk."""
    known = _known(config)
    with contextlib.suppress(OSError):  # of a folder that cannot be read, which _dataset tells
        if known and not archive.find(known, Path(config.data_dir)) and not _file(known, config).is_file():
            return pool.submit(download.reach, known, download.addresses(known, config.mirror), _REACH_SECONDS)
    return None


def _dataset(config: Config, reaching: Future | None) -> Finding:
    known = _known(config)
    if known is None:
        return Finding("dataset", "ok", f"{config.dataset} needs no download")
    if reaching:
        return _missing(known, config, *reaching.result())
    try:
        folder = archive.find(known, Path(config.data_dir))
        return _unpacked(known, folder) if folder else _packed(known, _file(known, config))
    except OSError as error:
        says = f"cannot read {config.data_dir}: {error.strerror}"
        return Finding("dataset", "failure", says, "name another place with --data-dir")


def _unpacked(known: Archive, folder: Path) -> Finding:
    if trouble := archive.trouble(known, folder):
        return Finding("dataset", "failure", *trouble)
    return Finding("dataset", "ok", f"in {folder}, each file with its published MD5; a run needs no network")


def _packed(known: Archive, file: Path) -> Finding:
    with file.open("rb") as opened:
        if not known.is_in(opened):
            says = f"{file} is damaged or another file: its SHA-256 is not that of {known.name}"
            return Finding(
                "dataset", "failure", says, "name another place with --data-dir, or delete it to fetch it anew"
            )
    if trouble := _trouble(file.parent, known.unpacked):
        says = f"{file} has the published SHA-256 and cannot be unpacked: {trouble}"
        return Finding("dataset", "failure", says, "copy it to another folder, and name that with --data-dir")
    return Finding("dataset", "ok", f"{file} has the published SHA-256; the next run unpacks it and needs no network")


def _missing(known: Archive, config: Config, host: str | None, reasons: str) -> Finding:
    """What to say of a dataset that is not there. host: that would send it. reasons: why others would not."""
    if trouble := _trouble(config.data_dir, known.size + known.unpacked):
        cure = "make room, or name another folder with --data-dir"
        return Finding("dataset", "failure", f"{known.name} is to be fetched: {trouble}", cure)
    if host:
        says = f"not in {config.data_dir}: the next run fetches its {known.size / 1e6:.0f} MB from {host}"
        return Finding("dataset", "note", says)
    says = f"not in {config.data_dir}, and cannot be fetched ({reasons})"
    cure = f"put {known.name} into {config.data_dir}, or name its place with --data-dir, or an address with --mirror"
    if config.dataset == "auto":
        return Finding("dataset", "warning", f"{says}: a run would train on scikit-learn's digits instead", cure)
    return Finding("dataset", "failure", says, cure)


# What a run does without


def _port(port: int) -> Finding:
    try:
        socket.create_server(("127.0.0.1", port)).close()
    except OSError as error:
        says = f"the demo cannot listen on port {port}: {os.strerror(error.errno)}"
        return Finding("port", "warning", says, "invoke demo --port with another number")
    return Finding("port", "ok", f"{port} is free for the demo")


def _browser() -> list[Finding]:
    if all(shutil.which(name) for name in ("chromium", "chromedriver")):
        return []
    return [Finding("browser", "note", "no chromium with its chromedriver: the demo's tests skip the browser")]
