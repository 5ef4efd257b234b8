"""The copy side of stream-loading prefill: experts on their way from host memory to the devices that compute them."""

from __future__ import annotations

import logging
import time
from collections import deque
from collections.abc import Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor, wait
from contextlib import ExitStack
from dataclasses import dataclass
from functools import cache, partial
from typing import Any, Protocol, runtime_checkable

import jax
import numpy as np
from jax.sharding import Mesh, NamedSharding, PartitionSpec
from jaxtyping import Array, Int32, UInt8

from hmoe_jax.exec.durations import MAX_COPYING
from hmoe_jax.exec.passes import StreamPlan
from hmoe_jax.experts.pinned import StagingBuffer, in_device_memory
from hmoe_jax.experts.records import ALIGN
from hmoe_jax.experts.store import ExpertStore
from hmoe_jax.perf.lanes import Recorder, Span

logger = logging.getLogger(__name__)

AXIS = "ep"
"""The mesh axis over which experts are divided."""

NOBODY = -1
"""In place of an expert, where a device has fewer left than a group holds."""

STAGING_BUFFERS = 3
"""One is filled while another is sent; the third bridges what differs in their speed."""


@dataclass(frozen=True)
class Group:
    """Experts that are copied and computed together: row i is of device i, `NOBODY` where it has none left."""

    layer: int
    experts: Int32[np.ndarray, "n g"]


Records = tuple[UInt8[Array, "rows bytes"], ...]
"""Of a group on one device, or on all: records one after the other, in arrays of as many rows each."""


@runtime_checkable
class RecordSource(Protocol):
    """Brings the records of some experts to one device. Nobody may read what was brought `depth` times before."""

    part_rows: int
    """How many records an array has."""
    concurrency: int
    """How many groups may be brought at once."""

    def bring(self, layer: int, experts: Int32[np.ndarray, " e"]) -> Records:
        """A whole group, when it has come: rows past those of `experts` hold anything."""


class HostRecords:
    """For the CPU platform, where a buffer is the device's memory itself: `depth` of them, filled in turn."""

    concurrency = 1

    def __init__(self, store: ExpertStore, device: jax.Device, plan: StreamPlan):
        self.part_rows = plan.group_size
        self._store, self._device = store, device
        shape = (plan.group_size, store.record_layout.num_bytes)
        self._buffers = deque(aligned(shape) for _ in range(plan.depth))

    def bring(self, layer: int, experts: Int32[np.ndarray, " e"]) -> Records:
        self._buffers.rotate(-1)
        buffer = self._buffers[0]
        self._store.copy_records(layer, experts, buffer[: len(experts)])
        return (jax.device_put(buffer, self._device, may_alias=True).block_until_ready(),)


class PinnedRecords:
    """From a pinned store, by the device's own copy engine.

    Two groups at a time: a GPU's copy waits for what the device was told to compute before it, and meanwhile the other
    one keeps the link busy.
    """

    part_rows = 1
    concurrency = MAX_COPYING

    def __init__(self, store: ExpertStore, device: jax.Device, plan: StreamPlan):
        self._record = cache(partial(store.record, device=device))  # to JAX an array is work, however little it holds
        self._group_size, self._sharding = plan.group_size, in_device_memory(device)

    def bring(self, layer: int, experts: Int32[np.ndarray, " e"]) -> Records:
        held = [self._record(layer, int(expert)) for expert in _at_least_one(experts)]
        return jax.block_until_ready(_padded(jax.device_put(held, self._sharding), self._group_size))


class StagedRecords:
    """From a store that is not pinned to a GPU, through a few pinned buffers: host memory is read and written once
    more, and a copy may wait for what is computed."""

    part_rows = 1
    concurrency = 1

    def __init__(self, store: ExpertStore, device: jax.Device, plan: StreamPlan):
        self._store, self._group_size = store, plan.group_size
        self._ring = deque(StagingBuffer(store.record_layout.num_bytes, device) for _ in range(STAGING_BUFFERS))

    def bring(self, layer: int, experts: Int32[np.ndarray, " e"]) -> Records:
        sent = [self._send(layer, expert) for expert in _at_least_one(experts)[:, None]]
        return jax.block_until_ready(_padded(sent, self._group_size))

    def _send(self, layer: int, expert: Int32[np.ndarray, " 1"]) -> UInt8[Array, "1 n"]:
        self._ring.rotate(-1)
        buffer = self._ring[0]
        buffer.wait()
        self._store.copy_records(layer, expert, buffer.memory)
        return buffer.send()


def record_source(store: ExpertStore, device: jax.Device, plan: StreamPlan) -> RecordSource:
    """The fastest that the store and the device allow."""
    if store.residency == "pinned":
        return PinnedRecords(store, device, plan)
    if device.platform == "cpu":
        return HostRecords(store, device, plan)
    logger.warning("experts are %s, not pinned: copies to %s go through host memory once more", store.residency, device)
    return StagedRecords(store, device, plan)


class CopyLane:
    """Copies records to one device, in the order asked, on threads of its own, which `close` ends.

    A copy may be asked for when nobody reads the one `depth` before it any more. `link_gbps` makes the lane as slow as
    a link of that bandwidth would be.
    """

    def __init__(self, store: ExpertStore, device: jax.Device, plan: StreamPlan):
        self.source = record_source(store, device, plan)
        self._record_bytes, self._link_gbps = store.record_layout.num_bytes, plan.link_gbps
        self._ended = 0.0
        self.num_bytes = 0
        """That were copied so far."""
        self._threads = ThreadPoolExecutor(self.source.concurrency, thread_name_prefix="hmoe-copy")

    def submit(self, layer: int, experts: Int32[np.ndarray, " g"]) -> Future[tuple[Records, Span]]:
        """The records of these experts on the device; rows of `NOBODY`, which come last, hold anything."""
        chosen, begin = experts[experts != NOBODY], time.perf_counter()
        return self._threads.submit(self._timed, layer, chosen, begin)

    def close(self) -> None:
        self._threads.shutdown(cancel_futures=True)
        del self.source  # and its buffers

    def _timed(self, layer: int, experts: Int32[np.ndarray, " e"], asked: float) -> tuple[Records, Span]:
        records, num_bytes = self.source.bring(layer, experts), len(experts) * self._record_bytes
        begin = max(asked, self._ended)
        if self._link_gbps is not None:
            time.sleep(max(0.0, begin + num_bytes / self._link_gbps / 1e9 - time.perf_counter()))
        self._ended = time.perf_counter()
        self.num_bytes += num_bytes
        return records, Span(f"layer {layer}", begin, self._ended, num_bytes)


class ExpertStream:
    """Groups through the lanes of all devices, for one prefill: asked for ahead, taken in the same order.

    Never more than `depth` groups are on the devices: asking for one more waits for the computation of the oldest.
    """

    def __init__(self, lanes: Mapping[int, CopyLane], mesh: Mesh, *, depth: int, recorder: Recorder):
        """`lanes` are those of this process's devices, by their places in the mesh."""
        self._lanes, self._depth, self._recorder = lanes, depth, recorder
        self._sharding = NamedSharding(mesh, PartitionSpec(AXIS))
        self._asked: deque[tuple[Group, list[Future[tuple[Records, Span]]]]] = deque()
        self._computing: deque[Any] = deque()

    @property
    def ahead(self) -> list[Group]:
        """What was asked for and not yet taken."""
        return [group for group, _ in self._asked]

    def ask(self, group: Group) -> None:
        if len(self._asked) + len(self._computing) >= self._depth:
            jax.block_until_ready(self._computing.popleft())
        copies = [lane.submit(group.layer, group.experts[place]) for place, lane in self._lanes.items()]
        self._asked.append((group, copies))

    def has_come(self, timeout_s: float) -> bool:
        """Whether the oldest group that was asked for is there, within so long."""
        copies = self._asked[0][1]
        return all(copy.done() for copy in copies) or not wait(copies, timeout=timeout_s).not_done

    def take(self) -> tuple[Group, Records]:
        """The oldest group that was asked for, when it has come: the devices' records, along the axis of experts."""
        group, copies = self._asked.popleft()
        arrived = [copy.result() for copy in copies]
        for _, span in arrived:
            self._recorder.copied(span)
        return group, tuple(self._join(shards) for shards in zip(*(records for records, _ in arrived), strict=True))

    def _join(self, shards: Sequence[UInt8[Array, "e bytes"]]) -> UInt8[Array, "ne bytes"]:
        rows, num_bytes = shards[0].shape
        shape = (rows * self._sharding.num_devices, num_bytes)
        return jax.make_array_from_single_device_arrays(shape, self._sharding, list(shards))

    def computing(self, output: Any) -> None:
        """`output` becomes ready when the group that was taken last is not read any more."""
        self._computing.append(output)

    def close(self) -> None:
        """Drops what has not begun and waits for what is under way, so that the buffers are free.

        Raises what failed, when all has ended.
        """
        copies = [copy for _, copies in self._asked for copy in copies]
        outputs = list(self._computing)
        self._asked.clear()
        self._computing.clear()
        with ExitStack() as waits:
            for output in outputs:
                waits.callback(jax.block_until_ready, output)
            for copy in copies:
                if not copy.cancel():
                    copy.exception()


def _at_least_one(experts: Int32[np.ndarray, " e"]) -> Int32[np.ndarray, " a"]:
    """A device that has none left is sent one in vain: programs have fixed shapes."""
    return experts if len(experts) else np.zeros(1, np.int32)


def _padded(rows: list[UInt8[Array, "1 n"]], count: int) -> Records:
    return tuple(rows + rows[-1:] * (count - len(rows)))


def aligned(shape: tuple[int, int]) -> UInt8[np.ndarray, "g n"]:
    """Memory that the CPU platform takes as it is. Pages are taken from the system when they are written."""
    size = int(np.prod(shape))
    memory = np.empty(size + ALIGN, np.uint8)
    skipped = -memory.ctypes.data % ALIGN
    return memory[skipped : skipped + size].reshape(shape)
