"""Decompressed latent attention in two steps: latents into keys and values, which are kept, and attention to these.

For a prompt in many blocks: `mla_prefill` would expand the whole context anew for each of them.
"""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, BFloat16, Int32, UInt16

from hmoe_jax.kernels import _native

jax.ffi.register_ffi_target("hmoe_mla_expand", _native.mla_expand(), platform="cpu")
jax.ffi.register_ffi_target("hmoe_mla_attend_expanded", _native.mla_attend_expanded(), platform="cpu")


def expanded_shape(*, heads: int, nope: int, rope: int, value: int, positions: int) -> tuple[int, int, int]:
    """(heads, chunks, words) of the array of `uint16` that holds a layer's keys and values of so many positions, in the
    layout of the kernels: 2 * (n + p + v) bytes for each head and position, `n` and `p` padded to 32 and `v` to 16, in
    chunks of 512.
    """
    return _native.mla_expanded_shape(heads, nope, rope, value, positions)


def mla_expand(
    expanded: UInt16[Array, "h c words"],
    key: BFloat16[Array, "h n r"],
    value: BFloat16[Array, "h v r"],
    cache: UInt16[Array, "pages slots w"],
    table: Int32[Array, " table"],
    positions: Int32[Array, " t"],
    *,
    pool: int,
) -> UInt16[Array, "h c words"]:
    """`expanded`, which is overwritten, with keys and values of the positions from the least to the last of
    `positions`.

    The other arguments are those of `mla_prefill`. Positions come in steps of 32: some before the first are expanded
    again, and some behind the last one become zeros; what lies beyond these is kept. A position's bits depend on its
    latent alone. CPU platform only. Not differentiable.
    """
    result = jax.ShapeDtypeStruct(expanded.shape, expanded.dtype)
    call = jax.ffi.ffi_call("hmoe_mla_expand", result, input_output_aliases={0: 0})
    return call(expanded, key, value, cache, table, positions, pool=np.int64(pool))


def mla_attend_expanded(
    nope: BFloat16[Array, "t h n"],
    rope: BFloat16[Array, "t h p"],
    expanded: UInt16[Array, "h c words"],
    positions: Int32[Array, " t"],
    *,
    value_dim: int,
    scale: float,
    pool: int,
) -> BFloat16[Array, "t h v"]:
    """The bits of `mla_prefill`, where all positions up to the last of `positions` were expanded before.

    A position that `expanded` has no place for fails the XLA call. CPU platform only. Not differentiable.
    """
    result = jax.ShapeDtypeStruct((*nope.shape[:2], value_dim), jnp.bfloat16)
    call = jax.ffi.ffi_call("hmoe_mla_attend_expanded", result)
    return call(nope, rope, expanded, positions, pool=np.int64(pool), scale=np.float32(scale))
