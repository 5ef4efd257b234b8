"""Random experts in block FP8, and every way to multiply a group of them, in turn."""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from functools import partial
from typing import Literal

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array

from hmoe_jax.architectures.deepseek_v3_checkpoint import MATRICES
from hmoe_jax.experts.records import RecordLayout
from hmoe_jax.experts.store import ExpertStore, ExpertTensor, StoreShape
from hmoe_jax.kernels.grouped.experts import VARIANTS, variants_on
from hmoe_jax.kernels.grouped.routes import GroupRows
from hmoe_jax.kernels.pool import ThreadPool
from hmoe_jax.quant.formats import FORMATS
from measuring.timing import Effort, medians_in_turn

CODEC = "fp8_block"

Variants = dict[str, dict[int, float]]
"""TFLOP/s of each variant, by the rows of each expert."""


def random_matrix(rng: np.random.Generator, rows: int, cols: int) -> tuple[np.ndarray, np.ndarray]:
    """Codes and scales."""
    layout = FORMATS[CODEC]
    codes = rng.integers(0, 120, (rows, cols), dtype=np.uint8)  # finite, as E4M3
    return codes.view(layout.encoding.dtype), np.full(layout.scale_blocks[0].grid(rows, cols), 2.0**-9, np.float32)


def random_store(shape: StoreShape, pool: ThreadPool, *, residency: Literal["mmap", "arena"] = "mmap") -> ExpertStore:
    rng = np.random.default_rng(0)
    places = itertools.product(range(shape.num_layers), range(shape.num_experts), MATRICES)
    tensors = (ExpertTensor(*place, *random_matrix(rng, *shape.matrix(place[2]))) for place in places)
    return ExpertStore(tensors, shape=shape, codec=CODEC, pool=pool, residency=residency)


def measure_variants(store: ExpertStore, *, group_size: int, rows: Sequence[int], effort: Effort) -> Variants:
    """Tiles of the store's first experts on JAX's default device, as streaming has them; every row is some token's.

    A call unpacks the experts' records, which lie on the device.
    """
    shape, layout = store.shape, store.record_layout
    records = np.zeros((group_size, layout.num_bytes), np.uint8)
    store.copy_records(0, np.arange(group_size, dtype=np.int32), records)
    hidden = jax.random.normal(jax.random.key(0), (max(rows), shape.hidden), jnp.bfloat16)
    operands = jax.device_put((jnp.zeros(hidden.shape, jnp.float32), hidden, records))
    variants = variants_on(jax.local_devices()[0].platform)
    cases = [(variant, count) for variant in variants for count in rows]
    calls = [partial(_tile(variant, layout, num_rows=count), *operands) for variant, count in cases]
    flops_per_row = 2 * group_size * 3 * shape.hidden * shape.ffn
    rates: Variants = {variant: {} for variant in variants}
    for (variant, count), seconds in zip(cases, medians_in_turn(calls, effort), strict=True):
        rates[variant][count] = count * flops_per_row / seconds / 1e12
    return rates


def best_variant(rates: Variants) -> str:
    """The fastest with the most rows that were measured."""
    return max(rates, key=lambda variant: rates[variant][max(rates[variant])])


def variants_table(rates: Variants, *, peak_tflops: float) -> str:
    lines = [f"| rows of each expert | {' | '.join(rates)} |", f"|{'---:|' * (1 + len(rates))}"]
    for count in next(iter(rates.values())):
        cells = [f"{own[count]:.3g} ({own[count] / peak_tflops:.0%})" for own in rates.values()]
        lines.append(f"| {count} | {' | '.join(cells)} |")
    return "\n".join(lines)


def _tile(variant: str, layout: RecordLayout, *, num_rows: int) -> jax.stages.Wrapped:
    """(sums, hidden, records) -> sums: the first `num_rows` tokens through every expert."""

    def tile(routed: Array, hidden: Array, records: Array) -> Array:
        tokens = jnp.broadcast_to(jnp.arange(num_rows, dtype=jnp.int32), (len(records), num_rows))
        rows = GroupRows(tokens, jnp.ones(tokens.shape, jnp.float32))
        return VARIANTS[variant](routed, hidden, rows, layout.unpack(records))

    return jax.jit(tile)
