"""`mla_prefill`: decompressed latent attention of one sequence's new tokens, over the pages of its cache."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, BFloat16, Int32, UInt16

from hmoe_jax.kernels import _native

jax.ffi.register_ffi_target("hmoe_mla_prefill", _native.mla_prefill(), platform="cpu")


def mla_prefill(
    nope: BFloat16[Array, "t h n"],
    rope: BFloat16[Array, "t h p"],
    key: BFloat16[Array, "h n r"],
    value: BFloat16[Array, "h v r"],
    cache: UInt16[Array, "pages slots w"],
    table: Int32[Array, " table"],
    positions: Int32[Array, " t"],
    *,
    scale: float,
    pool: int,
) -> BFloat16[Array, "t h v"]:
    """softmax(scale * (nope . key latents + rope . rotated parts)) value latents, of all tokens of one sequence.

    As `mla_attention`, with one `table` for all tokens, and expanded keys and values, which are rounded to BF16, as
    `nn.attention.attend_decompressed` does: the oracle. The bits of a token's row depend on its context alone, so not
    on the pieces that a prompt is cut into. Scratch memory grows with the context, by 2.2 KB a position for
    DeepSeek-V3. CPU platform only. Not differentiable.
    """
    result = jax.ShapeDtypeStruct((*nope.shape[:2], value.shape[1]), jnp.bfloat16)
    call = jax.ffi.ffi_call("hmoe_mla_prefill", result)
    return call(nope, rope, key, value, cache, table, positions, pool=np.int64(pool), scale=np.float32(scale))
