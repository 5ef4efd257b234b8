"""Latent attention to keys and values that are expanded once and kept, for a prompt that is computed in many blocks.

`attend_decompressed` expands the whole context anew for every block, which is most of the work of a short one. Here a
layer's keys and values are an array to which each block adds its own: of DeepSeek-V3 64 KB for a token, beside the 1 KB
of its latent, so they are kept of one layer at a time.
"""

from __future__ import annotations

from typing import Any

import jax.numpy as jnp
from jax import lax
from jax.typing import DTypeLike
from jaxtyping import Array, Bool, Float, Int32, UInt16

from hmoe_jax.kernels.flash_attention import KEYS, Softmax, attend_run
from hmoe_jax.kernels.mla_expanded import expanded_shape, mla_attend_expanded, mla_expand
from hmoe_jax.nn.attention import (
    KeysValues,
    Pages,
    Queries,
    ScoresAndMix,
    UpProjections,
    expand_latents,
    is_native,
    online_softmax,
    scores_and_mix,
    uses_flash,
)

CHUNK_LEN = 256
"""Positions of the context that XLA's programs attend to together: 300 KB of latents, which stay in the L2 cache. There
is room for whole chunks of keys and values, which are whole steps of the kernel for GPUs."""
assert CHUNK_LEN % KEYS == 0

Expanded = KeysValues | UInt16[Array, "h c words"]
"""The second form is that of the native kernels (`kernels.mla_expanded`)."""


def allocate(up: UpProjections, *, rope_dim: int, num_positions: int, dtype: DTypeLike) -> Expanded:
    """For positions `0 .. num_positions - 1` of any layer with such up-projections. Nothing is expanded yet."""
    (heads, nope_dim, _), value_dim = up.key.shape, up.value.shape[1]
    if is_native(up, dtype):
        widths = {"heads": heads, "nope": nope_dim, "rope": rope_dim, "value": value_dim}
        return jnp.zeros(expanded_shape(**widths, positions=num_positions), jnp.uint16)
    held = -(-num_positions // CHUNK_LEN) * CHUNK_LEN
    return KeysValues(
        key=jnp.zeros((heads, held, nope_dim), dtype),
        rope=jnp.zeros((held, rope_dim), dtype),
        value=jnp.zeros((heads, held, value_dim), dtype),
    )


def expand(up: UpProjections, expanded: Expanded, pages: Pages, positions: Int32[Array, " t"]) -> Expanded:
    """`expanded` with keys and values of `positions`, which follow each other, the last one perhaps several times.

    Their latents, and those of all earlier positions, lie in the `pages` of one sequence. Donate `expanded`: it is
    written in place.
    """
    if not isinstance(expanded, KeysValues):
        assert up.pool is not None
        return mla_expand(expanded, up.key, up.value, pages.cache, pages.tables, positions, pool=up.pool)
    # In whole steps of the kernel for GPUs: of what it reads nothing is left from another prompt.
    held, dtype = len(expanded.rope), expanded.rope.dtype
    size = min((len(positions) + 2 * (KEYS - 1)) // KEYS * KEYS, held)
    begin = jnp.minimum(positions[0] // KEYS * KEYS, held - size)
    places = begin + jnp.arange(size)
    slots = pages.cache.shape[1]
    bits = pages.cache[pages.tables[places // slots], places % slots]
    latents = jnp.where((places <= positions.max())[:, None], lax.bitcast_convert_type(bits, dtype), 0)

    def put(array: Array, rows: Array, axis: int) -> Array:
        return lax.dynamic_update_slice_in_dim(array, rows, begin, axis=axis)

    new = expand_latents(up, latents)
    return KeysValues(
        key=put(expanded.key, new.key, 1),
        rope=put(expanded.rope, new.rope, 0),
        value=put(expanded.value, new.value, 1),
    )


def attend_expanded(
    queries: Queries, up: UpProjections, expanded: Expanded, positions: Int32[Array, " t"], *, scale: float
) -> Float[Array, "t h v"]:
    """As `attend_decompressed`, where all positions that the queries see were expanded before, their own included."""
    if not isinstance(expanded, KeysValues):
        assert up.pool is not None
        sizes: dict[str, Any] = {"value_dim": up.value.shape[1], "scale": scale, "pool": up.pool}
        return mla_attend_expanded(queries.nope, queries.rope, expanded, positions, **sizes)

    def flash(queries: Queries, expanded: KeysValues) -> Float[Array, "t h v"]:
        return attend_expanded_flash(queries, expanded, positions, scale=scale)

    def xla(queries: Queries, expanded: KeysValues) -> Float[Array, "t h v"]:
        return _attend_expanded_xla(queries, expanded, positions, scale=scale)

    if not uses_flash(queries, up):
        return xla(queries, expanded)
    return lax.platform_dependent(queries, expanded, cuda=flash, default=xla)


def attend_expanded_flash(
    queries: Queries, expanded: KeysValues, positions: Int32[Array, " t"], *, scale: float, interpret: bool = False
) -> Float[Array, "t h v"]:
    """As `attend_expanded`, by the kernel for GPUs."""
    nope, rope = (jnp.swapaxes(each, 0, 1) for each in (queries.nope, queries.rope))
    nothing = Softmax.empty(nope.shape[0], nope.shape[1], expanded.value.shape[-1])
    operands = (nope, rope, expanded.key, expanded.rope, expanded.value, positions, jnp.int32(0))
    return attend_run(nothing, *operands, scale=scale, interpret=interpret).result(queries.nope.dtype)


def _attend_expanded_xla(
    queries: Queries, expanded: KeysValues, positions: Int32[Array, " t"], *, scale: float
) -> Float[Array, "t h v"]:
    def meet(index: Int32[Array, ""], visible: Bool[Array, "t s"]) -> ScoresAndMix:
        def chunk(array: Array, axis: int) -> Array:
            return lax.dynamic_slice_in_dim(array, index * CHUNK_LEN, CHUNK_LEN, axis=axis)

        value = jnp.where(visible.any(axis=0)[:, None], chunk(expanded.value, 1), 0)
        return scores_and_mix(queries, KeysValues(chunk(expanded.key, 1), chunk(expanded.rope, 0), value))

    sizes: dict[str, Any] = {"chunk_len": CHUNK_LEN, "width": expanded.value.shape[-1]}
    num_chunks = positions.max() // CHUNK_LEN + 1
    return online_softmax(meet, queries, positions, num_chunks=num_chunks, **sizes, scale=scale)
