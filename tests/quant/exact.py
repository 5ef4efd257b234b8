"""What stored matrices mean, in FP64 and along another path than the engine's: `ml_dtypes` and single bytes."""

from __future__ import annotations

import ml_dtypes
import numpy as np

from hmoe_jax.quant.formats import FORMATS

CODECS = tuple(FORMATS)
SCALED = tuple(codec for codec in CODECS if codec != "bf16")

_COLS_PER_SCALE = {"fp8_block": 128, "int4_group32": 32, "int4_group64": 64, "int4_group128": 128, "mxfp4": 32}


def exact(codec: str, weight: np.ndarray, scale: np.ndarray | None) -> np.ndarray:
    """The weights `[rows, cols]`; FP64 holds every product of a code and a scale."""
    values = exact_values(codec, weight)
    return values if scale is None else values * spread(codec, scale, *values.shape)


def exact_values(codec: str, weight: np.ndarray) -> np.ndarray:
    """The values of the codes, without scales."""
    if codec == "mxfp4":
        return _nibbles(weight).view(ml_dtypes.float4_e2m1fn).astype(np.float64)
    if codec.startswith("int4"):
        return _nibbles(weight).astype(np.float64) - 8
    with np.errstate(invalid="ignore"):  # signalling NaNs among all codes of BF16
        return weight.astype(np.float64)


def spread(codec: str, scale: np.ndarray, rows: int, cols: int) -> np.ndarray:
    """The scale of every weight, from its grid."""
    if scale.dtype == np.uint8:
        scale = scale.view(ml_dtypes.float8_e8m0fnu)
    rows_per_scale = 128 if codec == "fp8_block" and len(scale) != rows else 1
    row = np.minimum(np.arange(rows) // rows_per_scale, len(scale) - 1)
    col = np.arange(cols) // _COLS_PER_SCALE.get(codec, cols)
    return scale.astype(np.float64)[row[:, None], col]


def _nibbles(weight: np.ndarray) -> np.ndarray:
    stored = np.ascontiguousarray(weight).view(np.uint8)
    return np.stack([stored & 15, stored >> 4], axis=-1).reshape(len(stored), -1)
