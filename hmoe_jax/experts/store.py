"""Host memory of the routed experts: one copy, in the checkpoint's own bytes."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Literal, NamedTuple

import ml_dtypes
import numpy as np

from hmoe_jax.architectures.deepseek_v3_checkpoint import Matrix
from hmoe_jax.kernels import _native
from hmoe_jax.kernels.pool import ThreadPool
from hmoe_jax.quant import num_blocks

Codec = Literal["bf16", "fp8_block"]
Residency = Literal["auto", "mmap", "arena"]
WEIGHT_DTYPE = {"bf16": np.dtype(ml_dtypes.bfloat16), "fp8_block": np.dtype(ml_dtypes.float8_e4m3fn)}


class ExpertTensor(NamedTuple):
    """One matrix of one expert. `weight` is `[out, in]`, row-major, at any address; the arrays may map files.

    `layer` counts the layers that have routed experts. `scale` is `[ceil(out/128), ceil(in/128)]` FP32 for codec
    `fp8_block`, None for `bf16`.
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

    Raises `ValueError` for a tensor of the wrong dtype, shape or layout, for one given twice, for a missing one, and
    when the memory is not to be had.
    """

    def __init__(
        self,
        tensors: Iterable[ExpertTensor],
        *,
        shape: StoreShape,
        codec: Codec,
        pool: ThreadPool,
        residency: Residency = "auto",
    ):
        self.shape, self.codec = shape, codec
        self.native = _native.ExpertStore(
            pool.native,
            codec,
            num_layers=shape.num_layers,
            num_experts=shape.num_experts,
            hidden=shape.hidden,
            ffn=shape.ffn,
            residency=residency,
        )
        for tensor in tensors:
            self._add(tensor)
            del tensor  # else its arrays live while the next is read
        self.native.freeze()

    def _add(self, tensor: ExpertTensor) -> None:
        place = f"layer {tensor.layer}, expert {tensor.expert}, {tensor.matrix}"
        _check(place, tensor.weight, WEIGHT_DTYPE[self.codec], self.shape.matrix(tensor.matrix))
        scales = None
        if tensor.scale is not None:
            rows, cols = self.shape.matrix(tensor.matrix)
            _check(f"{place} scale", tensor.scale, np.dtype(np.float32), (num_blocks(rows), num_blocks(cols)))
            scales = _bytes(tensor.scale)
        self.native.add(tensor.layer, tensor.expert, tensor.matrix, _bytes(tensor.weight), scales)

    @property
    def id(self) -> int:
        """What the FFI calls know this store by."""
        return self.native.id

    @property
    def residency(self) -> Residency:
        """ "mmap" or "arena"."""
        return self.native.residency

    @property
    def placement_refusal(self) -> str | None:
        """Why the kernel did not bind the arena's pages to NUMA nodes, as in many containers; None where it did.

        Then a page lies where the thread ran that first wrote to it, which is mostly the same node.
        """
        return self.native.placement_refusal

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


def _check(name: str, array: np.ndarray, dtype: np.dtype, shape: tuple[int, int]) -> None:
    if array.dtype != dtype:
        raise ValueError(f"{name}: expected dtype {dtype}, got {array.dtype}")
    if array.shape != shape:
        raise ValueError(f"{name}: expected shape {shape}, got {array.shape}")
    if not array.flags.c_contiguous:
        raise ValueError(f"{name}: expected a row-major array without gaps, got strides {array.strides}")


def _bytes(array: np.ndarray) -> np.ndarray:
    """The array's memory, which NumPy cannot hand over as FP8 or BF16."""
    return array.reshape(-1).view(np.uint8)
