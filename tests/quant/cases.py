"""What the tests of formats share: matrices of uneven magnitude, and every layout of scales that a file may have."""

from __future__ import annotations

import numpy as np

from hmoe_jax.quant.formats import FORMATS

LAYOUTS = [
    (codec, block, scale_dtype)
    for codec, layout in FORMATS.items()
    for block in layout.scale_blocks or (None,)
    for scale_dtype in layout.scale_dtypes or (None,)
]
"""(codec, block, dtype of scales): all of the table."""


def random_matrix(rows: int, cols: int, *, seed: int = 0) -> np.ndarray:
    """Tiles of 32 x 32 of very different magnitude."""
    rng = np.random.default_rng(seed)
    tiles = np.exp2(rng.integers(-20, 20, (rows // 32 + 1, cols // 32 + 1)).astype(np.float32))
    size = tiles[np.arange(rows)[:, None] // 32, np.arange(cols) // 32]
    return rng.standard_normal((rows, cols), np.float32) * size
