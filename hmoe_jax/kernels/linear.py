"""`linear`: activations times one dense matrix on the CPU, at the speed of memory."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, BFloat16, Float32, Shaped

from hmoe_jax.kernels import _native
from hmoe_jax.quant.formats import Format, find_format

jax.ffi.register_ffi_target("hmoe_linear", _native.linear(), platform="cpu")


def linear(
    x: BFloat16[Array, "t i"],
    weight: Shaped[Array, "o items"],
    scale: Shaped[Array, "row_blocks col_blocks"] | None = None,
    *,
    codec: str,
    pool: int,
) -> Float32[Array, "t o"]:
    """x @ weight.T with FP32 accumulation.

    `weight` is stored in the format `codec` (`quant.formats`), with its grid of scales unless that is `bf16`. `pool` is
    a `ThreadPool.id`. The bits of a row do not depend on the other rows or on the number of threads. Raises
    `ValueError` for arrays that are not of the format. CPU platform only. Not differentiable.
    """
    layout = find_format(codec)
    layout.check(weight.shape[0], x.shape[1], weight, scale)
    call = jax.ffi.ffi_call("hmoe_linear", jax.ShapeDtypeStruct((x.shape[0], weight.shape[0]), jnp.float32))
    return call(x, weight, _native_scale(layout, scale), pool=np.int64(pool), codec=codec)


def _native_scale(layout: Format, scale: Shaped[Array, "row_blocks col_blocks"] | None) -> Array:
    """What the handler takes for a grid of scales: an empty matrix for none, a vector where rows have one each."""
    if scale is None:
        return jnp.zeros((0, 0), jnp.float32)
    return scale.reshape(-1) if layout.has_whole_row_scales else scale
