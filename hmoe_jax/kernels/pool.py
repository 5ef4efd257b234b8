"""The native thread pool: who computes on the CPU, and with which instruction set."""

from __future__ import annotations

from hmoe_jax.kernels import _native


class ThreadPool:
    """Owns the threads and the choice of ISA. A context manager; `close()` ends it.

    The threads live on until every `ExpertStore` made with the pool is closed too. `isa` is one of
    `available_isas()`, or "auto" for the best of them. `topology` is "auto" for the machine's own NUMA nodes and cores,
    or the CPUs of each node, like "0-15;16-31". Raises `ValueError` for what this machine does not offer, and when it
    does not start the threads.
    """

    def __init__(self, num_threads: int | str = "auto", *, isa: str = "auto", topology: str = "auto"):
        self.native = _native.ThreadPool(resolve_num_threads(num_threads, topology=topology), isa, topology)

    @property
    def id(self) -> int:
        """What the FFI calls know this pool by."""
        return self.native.id

    @property
    def num_threads(self) -> int:
        return self.native.num_threads

    @property
    def num_nodes(self) -> int:
        """NUMA nodes that have a thread of the pool."""
        return self.native.num_nodes

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


def resolve_num_threads(num_threads: int | str, *, topology: str = "auto") -> int:
    """ "auto" is one thread per physical core that this process may use, fewer under a cgroup quota.

    A number may go beyond the cores, up to all hardware threads. Raises `ValueError` for numbers below 1, or above
    the CPUs: threads that share a CPU wait for each other at every barrier.
    """
    if num_threads == "auto":
        return _native.resolve_num_threads(None, topology)
    if not isinstance(num_threads, int) or isinstance(num_threads, bool):
        raise ValueError(f"num_threads: expected 'auto' or a positive integer, got {num_threads!r}")
    return _native.resolve_num_threads(num_threads, topology)
