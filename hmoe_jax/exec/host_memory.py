"""How much of the host's memory this process may use: the machine's, or what its container has."""

from __future__ import annotations

import os
from pathlib import Path

CGROUPS = (
    # version 2: limit ("max" for all), in use, and where the page cache is told
    (Path("/sys/fs/cgroup/memory.max"), Path("/sys/fs/cgroup/memory.current")),
    # version 1
    (
        Path("/sys/fs/cgroup/memory/memory.limit_in_bytes"),
        Path("/sys/fs/cgroup/memory/memory.usage_in_bytes"),
    ),
)
"""A container's limit, and what it uses. Beside each lies `memory.stat`."""

MEMINFO = Path("/proc/meminfo")


def usable_bytes() -> int:
    """All that there is, in use or not."""
    ram_bytes = os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    return min([ram_bytes, *(limit for limit, _ in _limits())])


def available_bytes() -> int:
    """What can still be had: pages of files count, as the system drops them when memory is wanted."""
    free = [
        int(line.split()[1]) * 1024 for line in MEMINFO.read_text().splitlines() if line.startswith("MemAvailable:")
    ]
    free += [limit - in_use for limit, in_use in _limits()]
    return max(0, min(free))


def _limits() -> list[tuple[int, int]]:
    """(limit, bytes in use that cannot be dropped) of this process's container, if it has one."""
    limits = []
    for limit, current in CGROUPS:
        if limit.is_file() and current.is_file() and limit.read_text().strip().isdecimal():
            stat = dict(line.split() for line in (limit.parent / "memory.stat").read_text().splitlines())
            cached = int(stat.get("total_inactive_file", stat.get("inactive_file", 0)))
            limits.append((int(limit.read_text()), int(current.read_text()) - cached))
    return limits
