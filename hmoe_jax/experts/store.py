"""Host memory of the routed experts: one copy, in the checkpoint's own bytes."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Literal, NamedTuple

import jax
import numpy as np
from jaxtyping import Array, Int32, UInt8

from hmoe_jax.architectures.deepseek_v3_checkpoint import MATRICES, Matrix
from hmoe_jax.experts.pinned import PIN_BYTES, as_array, open_driver
from hmoe_jax.experts.records import Part, RecordLayout
from hmoe_jax.kernels import _native
from hmoe_jax.kernels.pool import ThreadPool
from hmoe_jax.quant.formats import find_format

Residency = Literal["mmap", "arena", "pinned"]
PlannedResidency = Literal["auto", "mmap", "arena", "pinned"]


class ExpertTensor(NamedTuple):
    """One matrix of one expert, `[out, in]`, as its format stores it (`quant.formats`); the arrays may map files.

    `layer` counts the layers that have routed experts. `scale` is the grid of scales, None where the format has none.
    Arrays are row-major, at any address.
    """

    layer: int
    expert: int
    matrix: Matrix
    weight: np.ndarray
    scale: np.ndarray | None = None


@dataclass(frozen=True)
class StoreShape:
    """How many layers with routed experts, experts in each, and the two widths of an expert."""

    num_layers: int
    num_experts: int
    hidden: int
    ffn: int

    def matrix(self, name: Matrix) -> tuple[int, int]:
        """(out, in) of one matrix."""
        return (self.hidden, self.ffn) if name == "down" else (self.ffn, self.hidden)


@dataclass(frozen=True)
class StoreStats:
    """Since the last reset. `expert_bytes` counts every expert once per call, however many tokens chose it."""

    calls: int
    expert_bytes: int
    seconds: float

    @property
    def gbps(self) -> float:
        return self.expert_bytes / self.seconds / 1e9 if self.seconds else 0.0


class ExpertStore:
    """All routed experts, read by `moe_experts` through `id`. A context manager; `close()` releases the arrays.

    `residency` says where the weights lie:

    - "mmap": where the arrays have them. Nothing is copied; the arrays, and the file mappings behind them, are kept
      alive until `close()`.
    - "arena": in memory of the store's own, in huge pages. Each array is copied by the pool's threads and let go
      before the next is asked for, so that one copy is all that is held. Node n of the pool's N NUMA nodes has the
      rows `[n * rows / N, (n + 1) * rows / N)` of every matrix, rounded to pages.
    - "auto": "mmap" for a pool on one NUMA node, "arena" on several.

    An arena becomes "pinned" by `pin`: GPUs then read it where it lies, at their own speed.

    Raises `ValueError` for a tensor of the wrong dtype, shape or layout, for one given twice, for a missing one, for
    sizes that the format cannot hold, and when the memory is not to be had.
    """

    def __init__(
        self,
        tensors: Iterable[ExpertTensor],
        *,
        shape: StoreShape,
        codec: str,
        pool: ThreadPool,
        residency: Literal["auto", "mmap", "arena"] = "auto",
    ):
        self.shape, self.codec, self._format = shape, codec, find_format(codec)
        for matrix in MATRICES:
            self._format.weight_shape(*shape.matrix(matrix))
        self.native = _native.ExpertStore(
            pool.native,
            codec,
            num_layers=shape.num_layers,
            num_experts=shape.num_experts,
            hidden=shape.hidden,
            ffn=shape.ffn,
            residency=residency,
        )
        self._parts: dict[Matrix, tuple[Part, Part | None]] = {}
        for tensor in tensors:
            self._add(tensor)
            del tensor  # else its arrays live while the next is read
        self.native.freeze()

    def _add(self, tensor: ExpertTensor) -> None:
        place = f"layer {tensor.layer}, expert {tensor.expert}, {tensor.matrix}"
        self._format.check(*self.shape.matrix(tensor.matrix), tensor.weight, tensor.scale, name=place)
        weight, scale = _bytes(place, tensor.weight), None
        options = {}
        if tensor.scale is not None:
            scale = _bytes(f"{place} scale", tensor.scale)
            if tensor.scale.dtype != np.float32:  # the default
                options["scale_dtype"] = tensor.scale.dtype.name
        self.native.add(tensor.layer, tensor.expert, tensor.matrix, weight, scale, **options)
        if tensor.matrix not in self._parts:
            scale_part = None if tensor.scale is None else Part(tensor.scale.shape, tensor.scale.dtype)
            self._parts[tensor.matrix] = (Part(tensor.weight.shape, tensor.weight.dtype), scale_part)

    @property
    def id(self) -> int:
        """What the FFI calls know this store by."""
        return self.native.id

    @property
    def residency(self) -> Residency:
        """Where the weights lie."""
        return self.native.residency

    @property
    def placement_refusal(self) -> str | None:
        """Why the kernel did not bind the arena's pages to NUMA nodes, as in many containers; None where it did.

        Then a page lies where the thread ran that first wrote to it, which is mostly the same node.
        """
        return self.native.placement_refusal

    @property
    def record_layout(self) -> RecordLayout:
        """How `copy_records` lays out an expert. Raises `ValueError` if the experts have different scales."""
        layout = RecordLayout(self.codec, self._parts)
        assert layout.num_bytes == self.native.record_bytes
        return layout

    @property
    def num_bytes(self) -> int:
        """Of all experts as records."""
        return self.shape.num_layers * self.shape.num_experts * self.native.record_bytes

    def copy_records(self, layer: int, experts: Int32[np.ndarray, " e"], out: UInt8[np.ndarray, "e n"]) -> None:
        """Copies experts of one layer as records (`record_layout`). Other Python threads run meanwhile.

        Raises `ValueError` for an id or a shape that is wrong, and when the store is closed.
        """
        self.native.copy_records(layer, experts, out)

    def pin(self, *, advance: Callable[[int], None] = lambda num_bytes: None) -> None:
        """Makes an arena "pinned": the GPU's driver locks it in memory, for all GPUs. `advance` is told bytes.

        Raises `ValueError` with the driver's reason, where there is no driver or the process may not lock so much; then
        nothing is locked and the store goes on as before.
        """
        driver = open_driver()
        while num_bytes := self.native.pin_next(driver, PIN_BYTES):
            advance(num_bytes)

    def record(self, layer: int, expert: int, device: jax.Device) -> UInt8[Array, "1 n"]:
        """A pinned store's own bytes of an expert (`record_layout`), which `device` may copy: the memory stays while
        the array lives, whenever the store is closed.

        Raises `ValueError` for a store that is not pinned or closed, and for an expert that there is not.
        """
        return as_array(self.native.record(layer, expert, device.local_hardware_id or 0), device)

    def stats(self) -> StoreStats:
        stats = self.native.stats()
        return StoreStats(stats["calls"], stats["bytes"], stats["seconds"])

    def reset_stats(self) -> None:
        self.native.reset_stats()

    def close(self) -> None:
        """Waits for the calls that read the store; later calls fail with "expert store N is closed"."""
        self.native.close()

    def __enter__(self) -> ExpertStore:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


def _bytes(name: str, array: np.ndarray) -> np.ndarray:
    """The array's memory, which NumPy cannot hand over as FP8 or BF16."""
    if not array.flags.c_contiguous:
        raise ValueError(f"{name}: expected a row-major array without gaps, got strides {array.strides}")
    return array.reshape(-1).view(np.uint8)
