"""Who computes: our kernels as the engine calls them, and the naive loop."""

from __future__ import annotations

from collections.abc import Callable
from typing import Protocol

import jax
import jax.numpy as jnp
import numpy as np

from benchmarks.cases import NAIVE, Batch
from benchmarks.formats import BF16
from benchmarks.timing import Timer
from hmoe_jax.experts.store import ExpertStore
from hmoe_jax.kernels import _native
from hmoe_jax.kernels.moe_experts import moe_experts


class Side(Protocol):
    """One contestant with one format and number of threads. It has its experts in memory until `close`."""

    by: str

    def visit(self, batch: Batch, *, seconds: float) -> list[float]:
        """Seconds of each of some calls; see `Timer.visit`."""

    def output(self, batch: Batch) -> np.ndarray:
        """`[t, d]` FP32 of the rotation's first call."""

    def close(self) -> None: ...


class Ours:
    """`moe_experts` under `jit`, operands on the device, as in a step program."""

    def __init__(self, store: ExpertStore, *, isa: str):
        self.by = isa
        self._store = store
        self._call = jax.jit(lambda hidden, ids, weights: moe_experts(hidden, ids, weights, layer=0, store=store.id))
        self._timers: dict[int, Timer] = {}

    def visit(self, batch: Batch, *, seconds: float) -> list[float]:
        if batch.tokens not in self._timers:
            call = self._prepare(batch)
            self._timers[batch.tokens] = Timer(lambda index: call(index).block_until_ready())
        return self._timers[batch.tokens].visit(seconds=seconds)

    def output(self, batch: Batch) -> np.ndarray:
        return np.asarray(self._prepare(batch)(0))

    def _prepare(self, batch: Batch) -> Callable[[int], jax.Array]:
        hidden, weights = map(jnp.asarray, activations(batch))
        hidden = hidden.astype(jnp.bfloat16)
        ids = [jnp.asarray(each) for each in batch.rotation]
        return lambda index: self._call(hidden, ids[index % len(ids)], weights)

    def close(self) -> None:
        self._store.close()


class Naive:
    """Dequantise to FP32, then multiply; format `fp8_block`."""

    by = NAIVE

    def __init__(self, store: ExpertStore):
        self._store = store
        self._timers: dict[int, Timer] = {}

    def visit(self, batch: Batch, *, seconds: float) -> list[float]:
        if batch.tokens not in self._timers:
            self._timers[batch.tokens] = Timer(self._prepare(batch))
        return self._timers[batch.tokens].visit(seconds=seconds)

    def output(self, batch: Batch) -> np.ndarray:
        return self._prepare(batch)(0)

    def _prepare(self, batch: Batch) -> Callable[[int], np.ndarray]:
        hidden, weights = activations(batch)
        out = np.empty_like(hidden)

        def call(index: int) -> np.ndarray:
            ids = batch.rotation[index % len(batch.rotation)]
            _native.naive_experts(self._store.native, hidden, ids, weights, out)
            return out

        return call

    def close(self) -> None:
        self._store.close()


def activations(batch: Batch) -> tuple[np.ndarray, np.ndarray]:
    """(hidden `[t, d]`, expert weights `[t, k]`): FP32 of BF16 values, and FP32 that add up to one for a token."""
    rng = np.random.default_rng(1)
    hidden = rng.standard_normal((batch.tokens, batch.layer.shape.hidden), np.float32)
    hidden = hidden.astype(BF16).astype(np.float32)
    weights = rng.random((batch.tokens, batch.layer.top_k), np.float32)
    return hidden, weights / weights.sum(axis=1, keepdims=True)
