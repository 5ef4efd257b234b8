"""The native thread pool: who computes on the CPU, and with which instruction set."""

from __future__ import annotations

import os
from pathlib import Path

from hmoe_jax.kernels import _native

CPU_MAX = Path("/sys/fs/cgroup/cpu.max")


class ThreadPool:
    """Owns the threads and the choice of ISA. A context manager; `close()` ends it.

    The threads live on until every `ExpertStore` made with the pool is closed too. `isa` is one of
    `available_isas()`, or "auto" for the best of them. Raises `ValueError` for what this machine does not offer, and
    when it does not start the threads.
    """

    def __init__(self, num_threads: int | str = "auto", *, isa: str = "auto"):
        self.native = _native.ThreadPool(resolve_num_threads(num_threads), isa)

    @property
    def id(self) -> int:
        """What the FFI calls know this pool by."""
        return self.native.id

    @property
    def num_threads(self) -> int:
        return self.native.num_threads

    @property
    def isa(self) -> str:
        return self.native.isa

    def read_gbps(self, *, megabytes: int = 1024) -> float:
        """The memory bandwidth that loads reach with as many threads: the limit of what streams weights.

        The machine's widest loads, whatever `isa` is, plain and prefetched: the faster of the two.
        """
        return _native.read_bandwidth(self.native, megabytes)

    def dot_gmacs(self) -> float:
        """1e9 multiply-adds per second of the ISA's dot instruction from registers: the limit of what computes."""
        return _native.dot_peak(self.native) / 1e9

    def close(self) -> None:
        self.native.close()

    def __enter__(self) -> ThreadPool:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


def available_isas() -> list[str]:
    """The instruction sets that this machine and this build offer, best first."""
    return _native.isa_names()


def cpu_name() -> str:
    return _native.cpu_name()


def resolve_num_threads(num_threads: int | str) -> int:
    """ "auto" is one thread per CPU that this process may use, fewer under a cgroup quota.

    Raises `ValueError` for numbers below 1, or above the CPUs: threads that share a CPU wait for each other at
    every barrier.
    """
    allowed = len(os.sched_getaffinity(0))
    if num_threads == "auto":
        return max(1, min(allowed, _cgroup_cpus(CPU_MAX)))
    if not isinstance(num_threads, int) or isinstance(num_threads, bool):
        raise ValueError(f"num_threads: expected 'auto' or a positive integer, got {num_threads!r}")
    if not 1 <= num_threads <= allowed:
        raise ValueError(
            f"num_threads: expected 1 <= num_threads <= {allowed}, the CPUs of this process, got {num_threads}"
        )
    return num_threads


def _cgroup_cpus(cpu_max: Path) -> int:
    """Whole CPUs that the quota pays for; effectively unlimited where there is none."""
    unlimited = 1 << 30
    try:
        quota, period = cpu_max.read_text().split()
    except (OSError, ValueError):
        return unlimited
    return unlimited if quota == "max" else int(quota) // int(period)
