"""Memory and caches as Linux tells them."""

from __future__ import annotations

from pathlib import Path

MEMORY = Path("/proc/meminfo")
CACHES = Path("/sys/devices/system/cpu/cpu0/cache")
UNITS = {"K": 1 << 10, "M": 1 << 20, "G": 1 << 30}


def available_bytes(memory: Path = MEMORY) -> int:
    """What a program can take without making others swap."""
    fields = dict(line.split(":", 1) for line in memory.read_text().splitlines() if ":" in line)
    return int(fields["MemAvailable"].split()[0]) * 1024


def last_level_cache_bytes(caches: Path = CACHES) -> int:
    """The largest cache of the first CPU; 0 if the system does not tell."""
    sizes = [path.read_text().strip() for path in caches.glob("index*/size")]
    return max((int(size[:-1]) * UNITS[size[-1]] for size in sizes), default=0)
