"""What the system lets this process have: cores and memory."""

import contextlib
import math
import os
import re
from collections.abc import Iterator
from pathlib import Path


def cores() -> int:
    """The cores of this process's affinity, or fewer where its control group has a quota."""
    usable = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    quotas = [text.split() for text in _group_limits("", "cpu.max")]
    quotas += zip(_group_limits("cpu", "cpu.cfs_quota_us"), _group_limits("cpu", "cpu.cfs_period_us"))
    limits = [math.ceil(int(quota) / int(period)) for quota, period in quotas if quota not in ("max", "-1")]
    return max(1, min([usable, *limits]))


def memory() -> tuple[float, float]:
    """How much this process may have in all, and how much of that is free; infinity where the system does not say."""
    total = free = math.inf
    with contextlib.suppress(OSError, ValueError, AttributeError):
        total = free = os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    with contextlib.suppress(OSError, TypeError):
        free = int(re.search(r"MemAvailable:\s+(\d+) kB", Path("/proc/meminfo").read_text())[1]) * 1024
    texts = [*_group_limits("", "memory.max"), *_group_limits("memory", "memory.limit_in_bytes")]
    limits = [int(text) for text in texts if text != "max"]
    with contextlib.suppress(ImportError):
        import resource

        limits += [most for most in resource.getrlimit(resource.RLIMIT_AS)[:1] if most != resource.RLIM_INFINITY]
    total = min([total, *limits])
    return total, min(total, free)


def _group_limits(
    controller: str, name: str, root: Path = Path("/sys/fs/cgroup"), own: Path = Path("/proc/self/cgroup")
) -> Iterator[str]:
    """What the file `name` says in this process's control group and in those above it.

    controller: of version 1, each of which has a tree of its own; empty for version 2.
    """
    with contextlib.suppress(OSError):
        for line in own.read_text().splitlines():
            _, controllers, path = line.split(":", 2)
            if controller in controllers.split(","):
                group = root / controller / path.lstrip("/")
                for folder in (group, *group.parents):
                    if folder.is_relative_to(root) and (folder / name).is_file():
                        yield (folder / name).read_text().strip()
