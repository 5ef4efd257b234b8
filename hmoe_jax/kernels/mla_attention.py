"""`mla_attention`: absorbed latent attention of a decode step, over the pages of the cache as they lie in memory."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, BFloat16, Int32, UInt16

from hmoe_jax.kernels import _native

jax.ffi.register_ffi_target("hmoe_mla_attention", _native.mla_attention(), platform="cpu")


def mla_attention(
    nope: BFloat16[Array, "t h n"],
    rope: BFloat16[Array, "t h p"],
    key: BFloat16[Array, "h n r"],
    value: BFloat16[Array, "h v r"],
    cache: UInt16[Array, "pages slots w"],
    tables: Int32[Array, "t table"],
    positions: Int32[Array, " t"],
    *,
    scale: float,
    pool: int,
) -> BFloat16[Array, "t h v"]:
    """softmax(scale * [nope key, rope] . latents) latents, expanded by `value`: one new token for each sequence.

    `cache` holds the latents' bits, `w = r + p`; slot j of page `tables[t, i]` is position `i * slots + j` of sequence
    t, which is seen if it is not behind `positions[t]`. `pool` is a `ThreadPool.id`. FP32 sums; the absorbed query, the
    weights of the mixture and the mixture are rounded to BF16, as `nn.attention.attend_absorbed` does, which is the
    oracle. The bits of a token's row depend neither on the other tokens nor on the number of threads. A position or a
    page out of range fails the XLA call with a sentence that says so. CPU platform only. Not differentiable.
    """
    result = jax.ShapeDtypeStruct((*nope.shape[:2], value.shape[1]), jnp.bfloat16)
    call = jax.ffi.ffi_call("hmoe_mla_attention", result)
    return call(nope, rope, key, value, cache, tables, positions, pool=np.int64(pool), scale=np.float32(scale))
