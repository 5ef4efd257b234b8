"""`linear`: activations times one dense matrix on the CPU, at the speed of memory."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, BFloat16, Float32, Shaped

from hmoe_jax.kernels import _native

jax.ffi.register_ffi_target("hmoe_linear", _native.linear(), platform="cpu")


def linear(
    x: BFloat16[Array, "t i"],
    weight: Shaped[Array, "o i"],
    scale: Float32[Array, "row_blocks col_blocks"] | None = None,
    *,
    pool: int,
) -> Float32[Array, "t o"]:
    """x @ weight.T with FP32 accumulation.

    `weight` is BF16 without `scale`, or E4M3 with one scale per block of 128 x 128: `[ceil(o/128), ceil(i/128)]`.
    `pool` is a `ThreadPool.id`. The bits of a row do not depend on the other rows or on the number of threads. CPU
    platform only. Not differentiable.
    """
    if weight.dtype != (jnp.bfloat16 if scale is None else jnp.float8_e4m3fn):
        expected = "bfloat16 without a scale, or float8_e4m3fn with one"
        raise ValueError(
            f"weight: expected {expected}, got {weight.dtype} {'without' if scale is None else 'with'} one"
        )
    call = jax.ffi.ffi_call("hmoe_linear", jax.ShapeDtypeStruct((x.shape[0], weight.shape[0]), jnp.float32))
    if scale is None:
        return call(x, weight, jnp.zeros((0, 0), jnp.float32), pool=np.int64(pool), codec="bf16")
    return call(x, weight, scale, pool=np.int64(pool), codec="fp8_block")
