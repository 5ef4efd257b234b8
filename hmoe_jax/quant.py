"""Block FP8: E4M3 weights with one FP32 scale per 128 x 128 block, ragged last blocks included.

Layout and meaning are those of DeepSeek-V3's `weight` / `weight_scale_inv` pairs: value = e4m3 * scale of its block.
"""

from __future__ import annotations

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
from jax.typing import DTypeLike
from jaxtyping import Array, Float, Float32

from hmoe_jax.config import FP8_BLOCK
from hmoe_jax.core import AnyArray

E4M3_MAX = 448.0


def num_blocks(size: int) -> int:
    """How many scales cover `size` rows or columns."""
    return -(-size // FP8_BLOCK)


def dequantize(
    data: Float[AnyArray, "*e rows cols"], scale: Float32[AnyArray, "*e row_blocks col_blocks"], dtype: DTypeLike
) -> Float[Array, "*e rows cols"]:
    """The weights as `dtype`: the product is formed in FP32, so the one rounding is that to `dtype`."""
    rows, cols = data.shape[-2:]
    scale = jnp.repeat(jnp.repeat(scale, FP8_BLOCK, axis=-2)[..., :rows, :], FP8_BLOCK, axis=-1)[..., :cols]
    return (data.astype(jnp.float32) * scale).astype(dtype)


def quantize(weight: Float32[np.ndarray, "rows cols"]) -> tuple[np.ndarray, np.ndarray]:
    """The nearest block-FP8 matrix: `(e4m3 [rows, cols], scale [ceil(rows/128), ceil(cols/128)] f32)`.

    Each block's largest magnitude becomes 448; a block of zeros gets scale 1. Raises `ValueError` for non-finite
    weights.
    """
    if not np.isfinite(weight).all():
        raise ValueError("cannot quantise non-finite weights")
    rows, cols = weight.shape
    padded = np.zeros((num_blocks(rows) * FP8_BLOCK, num_blocks(cols) * FP8_BLOCK), np.float32)
    padded[:rows, :cols] = weight
    blocks = padded.reshape(num_blocks(rows), FP8_BLOCK, num_blocks(cols), FP8_BLOCK)
    largest = np.abs(blocks).max(axis=(1, 3))
    scale = np.where(largest > 0, largest / np.float32(E4M3_MAX), np.float32(1))
    # Dividing by a rounded scale can land a hair above 448, which E4M3FN would turn into NaN.
    codes = np.clip(blocks / scale[:, None, :, None], -E4M3_MAX, E4M3_MAX).reshape(padded.shape)
    return codes[:rows, :cols].astype(ml_dtypes.float8_e4m3fn), scale.astype(np.float32)


def is_fp8(array: jax.Array | np.ndarray) -> bool:
    return array.dtype == jnp.float8_e4m3fn
