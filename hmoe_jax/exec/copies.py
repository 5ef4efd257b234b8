"""The copy side of stream-loading prefill: experts on their way from host memory to the devices that compute them."""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any

import jax
import numpy as np
from jax.sharding import Mesh, NamedSharding, PartitionSpec
from jaxtyping import Array, Int32, UInt8

from hmoe_jax.exec.passes import StreamPlan
from hmoe_jax.experts.records import ALIGN
from hmoe_jax.experts.store import ExpertStore
from hmoe_jax.perf.lanes import Recorder, Span

AXIS = "ep"
"""The mesh axis over which experts are divided."""

NOBODY = -1
"""In place of an expert, where a device has fewer left than a group holds."""


@dataclass(frozen=True)
class Group:
    """Experts that are copied and computed together: row i is of device i, `NOBODY` where it has none left."""

    layer: int
    experts: Int32[np.ndarray, "n g"]


class CopyLane:
    """Copies records to one device, in the order asked, on a thread of its own, which `close` ends.

    The lane owns `plan.depth` buffers, which it fills in turn: a copy may be asked for when nobody reads the one
    `depth` before it any more. On the CPU platform a buffer is the device's memory itself. `plan.link_gbps` makes the
    lane as slow as a link of that bandwidth would be.
    """

    def __init__(self, store: ExpertStore, device: jax.Device, plan: StreamPlan):
        self._store, self._device, self._link_gbps = store, device, plan.link_gbps
        shape = (plan.group_size, store.record_layout.num_bytes)
        self._buffers = deque(aligned(shape) for _ in range(plan.depth))
        self._thread = ThreadPoolExecutor(1, thread_name_prefix="hmoe-copy")

    def submit(self, layer: int, experts: Int32[np.ndarray, " g"]) -> Future[tuple[jax.Array, Span]]:
        """The records of these experts on the device; rows of `NOBODY`, which come last, hold anything."""
        self._buffers.rotate(-1)
        return self._thread.submit(self._copy, layer, experts[experts != NOBODY], self._buffers[0])

    def close(self) -> None:
        self._thread.shutdown(cancel_futures=True)

    def _copy(
        self, layer: int, experts: Int32[np.ndarray, " e"], buffer: UInt8[np.ndarray, "g n"]
    ) -> tuple[jax.Array, Span]:
        begin = time.perf_counter()
        self._store.copy_records(layer, experts, buffer[: len(experts)])
        records = jax.device_put(buffer, self._device, may_alias=True).block_until_ready()
        num_bytes = len(experts) * buffer.shape[1]
        if self._link_gbps is not None:
            time.sleep(max(0.0, begin + num_bytes / self._link_gbps / 1e9 - time.perf_counter()))
        return records, Span(f"layer {layer}", begin, time.perf_counter(), num_bytes)


class ExpertStream:
    """Groups through the lanes of all devices, for one prefill: asked for ahead, taken in the same order.

    Never more than `depth` groups are on the devices: asking for one more waits for the computation of the oldest.
    """

    def __init__(self, lanes: Mapping[int, CopyLane], mesh: Mesh, *, depth: int, recorder: Recorder):
        """`lanes` are those of this process's devices, by their places in the mesh."""
        self._lanes, self._depth, self._recorder = lanes, depth, recorder
        self._sharding = NamedSharding(mesh, PartitionSpec(AXIS))
        self._asked: deque[tuple[Group, list[Future[tuple[jax.Array, Span]]]]] = deque()
        self._computing: deque[Any] = deque()

    @property
    def ahead(self) -> list[Group]:
        """What was asked for and not yet taken."""
        return [group for group, _ in self._asked]

    def ask(self, group: Group) -> None:
        if len(self._asked) + len(self._computing) >= self._depth:
            self._computing.popleft().block_until_ready()
        copies = [lane.submit(group.layer, group.experts[place]) for place, lane in self._lanes.items()]
        self._asked.append((group, copies))

    def take(self) -> tuple[Group, UInt8[Array, "e n"]]:
        """The oldest group that was asked for, when it has come: the devices' records, along the axis of experts."""
        group, copies = self._asked.popleft()
        arrived = [copy.result() for copy in copies]
        for _, span in arrived:
            self._recorder.copied(span)
        shards = [records for records, _ in arrived]
        shape = (group.experts.size, shards[0].shape[1])
        return group, jax.make_array_from_single_device_arrays(shape, self._sharding, shards)

    def computing(self, output: Any) -> None:
        """`output` becomes ready when the group that was taken last is not read any more."""
        self._computing.append(output)

    def close(self) -> None:
        """Drops what has not begun and waits for what is under way, so that the buffers are free."""
        for copy in [copy for _, copies in self._asked for copy in copies]:
            if not copy.cancel():
                copy.exception()
        for output in self._computing:
            output.block_until_ready()
        self._asked.clear()
        self._computing.clear()


def aligned(shape: tuple[int, int]) -> UInt8[np.ndarray, "g n"]:
    """Memory that the CPU platform takes as it is. Pages are taken from the system when they are written."""
    size = int(np.prod(shape))
    memory = np.empty(size + ALIGN, np.uint8)
    skipped = -memory.ctypes.data % ALIGN
    return memory[skipped : skipped + size].reshape(shape)
