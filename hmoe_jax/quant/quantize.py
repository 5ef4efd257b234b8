"""Plain numbers as stored matrices, in NumPy: for tests, exports and synthetic checkpoints.

The nearest codes for scales that map each block's largest magnitude to the largest code: no calibration, no search.
"""

from __future__ import annotations

import numpy as np
from jaxtyping import Float32, Shaped

from hmoe_jax.quant.encodings import scale_codes, scale_values
from hmoe_jax.quant.formats import ScaleBlock, find_format


def quantize(
    codec: str,
    weight: Float32[np.ndarray, "rows cols"],
    *,
    block: ScaleBlock | None = None,
    scale_dtype: np.dtype | None = None,
) -> tuple[Shaped[np.ndarray, "rows items"], Shaped[np.ndarray, "row_blocks col_blocks"] | None]:
    """`(weight, scale)` as the format stores them; `scale` is None for `bf16`.

    A block of zeros gets scale 1. `block` and `scale_dtype` choose where the format allows several. Raises
    `ValueError` for non-finite weights, columns that the format cannot group, and a choice that it does not have.
    """
    layout = find_format(codec)
    rows, cols = weight.shape
    layout.weight_shape(rows, cols)
    if not np.isfinite(weight).all():
        raise ValueError("cannot quantise non-finite weights")
    if not layout.has_scales:
        return layout.encoding.codes(weight), None
    block, scale_dtype = block or layout.scale_blocks[0], scale_dtype or layout.scale_dtypes[0]
    if block not in layout.scale_blocks or scale_dtype not in layout.scale_dtypes:
        raise ValueError(f"{codec} has no scales of dtype {scale_dtype} for {block}")
    largest = _largest(np.abs(weight), block)
    wanted = np.where(largest > 0, largest / np.float32(layout.encoding.largest), np.float32(1))
    scale = scale_codes(wanted, scale_dtype)
    per_weight = _expand(np.asarray(scale_values(scale)), block, rows, cols)
    # Dividing by a rounded scale can land a hair above the largest code, which E4M3 would turn into NaN.
    limit = layout.encoding.largest
    return layout.encoding.codes(np.clip(weight / per_weight, -limit, limit)), scale


def _largest(magnitude: np.ndarray, block: ScaleBlock) -> np.ndarray:
    """Of each block, `[row_blocks, col_blocks]`."""
    rows, cols = magnitude.shape
    by_rows = np.maximum.reduceat(magnitude, np.arange(0, rows, block.rows or rows), axis=0)
    return np.maximum.reduceat(by_rows, np.arange(0, cols, block.cols or cols), axis=1)


def _expand(scale: np.ndarray, block: ScaleBlock, rows: int, cols: int) -> np.ndarray:
    return scale[np.arange(rows)[:, None] // (block.rows or rows), np.arange(cols) // (block.cols or cols)]
