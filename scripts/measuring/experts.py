"""Random experts in block FP8, and every way to multiply a group of them, in turn."""

from __future__ import annotations

import itertools
import sys
from collections.abc import Callable, Sequence
from functools import partial
from typing import Literal

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array
from jaxtyping import Float32

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

    A call unpacks the experts' records, which lie on the device. A variant that fails there is left out, and said.
    """
    variants = [each for each in variants_on(jax.local_devices()[0].platform) if _runs(store, each, rows[0])]
    cases = [(variant, count) for variant in variants for count in rows]
    calls = _calls(store, cases, group_size=group_size)
    flops_per_row = 2 * group_size * 3 * store.shape.hidden * store.shape.ffn
    rates: Variants = {variant: {} for variant in variants}
    for (variant, count), seconds in zip(cases, medians_in_turn(calls, effort), strict=True):
        rates[variant][count] = count * flops_per_row / seconds / 1e12
    return rates


def variant_errors(store: ExpertStore, *, group_size: int, rows: int) -> dict[str, float]:
    """Of each variant's outputs against those of `batched`, relative to the largest."""
    variants = variants_on(jax.local_devices()[0].platform)
    outputs = [np.asarray(call()) for call in _calls(store, [(each, rows) for each in variants], group_size=group_size)]
    expected = outputs[variants.index("batched")]
    errors = [float(np.abs(output - expected).max() / np.abs(expected).max()) for output in outputs]
    return dict(zip(variants, errors, strict=True))


def _runs(store: ExpertStore, variant: str, rows: int) -> bool:
    (call,) = _calls(store, [(variant, rows)], group_size=1)
    try:
        jax.block_until_ready(call())
    except jax.errors.JaxRuntimeError as error:
        print(f"{variant} does not run here: {error}", file=sys.stderr)
        return False
    return True


def _calls(
    store: ExpertStore, cases: Sequence[tuple[str, int]], *, group_size: int
) -> list[Callable[[], Float32[Array, "t d"]]]:
    """For each (variant, rows of each expert)."""
    layout = store.record_layout
    records = np.zeros((group_size, layout.num_bytes), np.uint8)
    store.copy_records(0, np.arange(group_size, dtype=np.int32), records)
    most = max(count for _, count in cases)
    hidden = jax.random.normal(jax.random.key(0), (most, store.shape.hidden), jnp.bfloat16)
    operands = jax.device_put((jnp.zeros(hidden.shape, jnp.float32), hidden, records))
    return [partial(_tile(variant, layout, num_rows=count), *operands) for variant, count in cases]


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
