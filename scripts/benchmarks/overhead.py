"""What a call costs when there is nothing to do: every slot -1, the pool warm."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass

import jax
import jax.numpy as jnp

from benchmarks.cases import Layer
from hmoe_jax.experts.store import ExpertStore
from hmoe_jax.kernels.moe_experts import moe_experts

CHAINED = 64
REPEATS = 300


@dataclass(frozen=True)
class Overhead:
    """`dispatch_us`: a program of one call, Python and dispatch included. `call_us`: one call more in a program."""

    threads: int
    isa: str
    dispatch_us: float
    call_us: float


def measure_overhead(store: ExpertStore, layer: Layer, *, threads: int, isa: str) -> Overhead:
    """One token that uses no expert, through one FFI call and through a chain of them in one program."""
    one, many = (_time(_chain(store, layer, count)) for count in (1, 1 + CHAINED))
    return Overhead(threads, isa, one * 1e6, (many - one) / CHAINED * 1e6)


def _chain(store: ExpertStore, layer: Layer, count: int) -> Callable[[], jax.Array]:
    hidden = jnp.ones((1, layer.shape.hidden), jnp.bfloat16)
    ids = jnp.full((1, layer.top_k), -1, jnp.int32)

    @jax.jit
    def program(weights: jax.Array) -> jax.Array:
        for _ in range(count):
            # Each call needs the one before: XLA would run equal calls once, and independent ones at the same time.
            out = moe_experts(hidden, ids, weights, layer=0, store=store.id)
            weights = weights + out[:, : layer.top_k]
        return weights

    weights = jnp.ones((1, layer.top_k), jnp.float32)
    return lambda: program(weights).block_until_ready()


def _time(call: Callable[[], jax.Array]) -> float:
    times = []
    for _ in range(REPEATS):
        begin = time.perf_counter()
        call()
        times.append(time.perf_counter() - begin)
    return statistics.median(times[REPEATS // 10 :])
