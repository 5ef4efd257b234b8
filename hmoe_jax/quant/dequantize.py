"""Stored matrices as plain numbers, in JAX: what every kernel is tested against."""

from __future__ import annotations

import jax
import jax.numpy as jnp
from jax.typing import DTypeLike
from jaxtyping import Array, Float, Shaped

from hmoe_jax.core import AnyArray
from hmoe_jax.quant.encodings import scale_values
from hmoe_jax.quant.formats import find_format


def dequantize(
    codec: str,
    weight: Shaped[AnyArray, "*e rows items"],
    scale: Shaped[AnyArray, "*e row_blocks col_blocks"] | None,
    dtype: DTypeLike,
) -> Float[Array, "*e rows cols"]:
    """The weights of a stored matrix, or of a stack of them, as `dtype`.

    The product of code and scale is formed in FP32 (exactly, for BF16 scales and powers of two), so the one other
    rounding is that to `dtype`. On the CPU platform XLA takes subnormal factors and products for zero. Raises
    `ValueError` for a grid of scales that the format does not have.
    """
    layout = find_format(codec)
    if scale is None:
        return layout.encoding.values(weight).astype(dtype)
    values, scales = layout.encoding.values(weight), scale_values(scale)
    rows, cols = values.shape[-2:]
    block = layout.scale_block(scales.shape[-2:], rows, cols)
    return (values * _repeat(_repeat(scales, -2, block.rows, rows), -1, block.cols, cols)).astype(dtype)


def _repeat(scales: Array, axis: int, block: int | None, size: int) -> Array:
    """One scale for each of `size` rows or columns, or an axis of length 1 that broadcasts."""
    if block is None or block == 1:
        return scales
    return jax.lax.slice_in_dim(jnp.repeat(scales, block, axis=axis), 0, size, axis=axis)
