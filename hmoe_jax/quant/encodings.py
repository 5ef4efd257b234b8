"""What stored items mean: the values of weights and scales, and the codes nearest to given values."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
from jaxtyping import Array, Float32, Shaped

from hmoe_jax.core import AnyArray

E8M0 = np.dtype(np.uint8)
"""Scales stored as the exponent of a power of two: 2^(e - 127), and 255 is NaN (OCP Microscaling 1.0, 5.4.1)."""

_E8M0_BIAS = 127
_E8M0_NAN = 255


@dataclass(frozen=True)
class Encoding:
    """How weights become stored items; an item holds one weight or several neighbours of a row.

    `largest` is the magnitude that quantisers give the largest weight of a block. `values` (JAX) is exact: FP32 holds
    every value of every encoding. `codes` (NumPy) rounds to nearest, ties to even, and wants magnitudes up to
    `largest`.
    """

    dtype: np.dtype
    weights_per_item: int
    largest: float
    values: Callable[[AnyArray], Float32[Array, "*e rows cols"]]
    codes: Callable[[Float32[np.ndarray, "rows cols"]], Shaped[np.ndarray, "rows items"]]

    @property
    def bits(self) -> int:
        """Of one weight."""
        return self.dtype.itemsize * 8 // self.weights_per_item


def scale_values(scale: Shaped[AnyArray, "*shape"]) -> Float32[Array, "*shape"]:
    """Stored scales in FP32: floats as they are, integers as E8M0 exponents."""
    if scale.dtype != E8M0:
        return jnp.asarray(scale).astype(jnp.float32)
    exponent = jnp.asarray(scale).astype(jnp.int32)
    # As bits, since 2^-127 is subnormal: XLA:CPU would flush it if it were computed.
    bits = jnp.where(exponent == 0, 1 << 22, exponent << 23)
    power = jax.lax.bitcast_convert_type(bits, jnp.float32)
    return jnp.where(exponent == _E8M0_NAN, jnp.nan, power)


def scale_codes(scale: Float32[np.ndarray, "*shape"], dtype: np.dtype) -> Shaped[np.ndarray, "*shape"]:
    """Scales as `dtype`: floats rounded to nearest, E8M0 rounded up (a smaller scale would not reach the largest)."""
    if dtype != E8M0:
        return scale.astype(dtype)
    significand, exponent = np.frexp(scale)
    exponent = np.where(significand == 0.5, exponent - 1, exponent)  # exactly 2^(exponent - 1)
    return np.clip(exponent + _E8M0_BIAS, 0, _E8M0_NAN - 1).astype(np.uint8)


def _as_floats(items: AnyArray) -> jax.Array:
    return jnp.asarray(items).astype(jnp.float32)


def _int4_values(words: AnyArray) -> jax.Array:
    return _nibbles(words).astype(jnp.float32) - 8


def _e2m1_values(pairs: AnyArray) -> jax.Array:
    return jnp.asarray(_E2M1_VALUES)[_nibbles(pairs)]


def _nibbles(items: AnyArray) -> jax.Array:
    """The 4-bit codes of each row in order: an item's lowest bits are its first weight."""
    items = jnp.asarray(items)
    shifts = jnp.arange(0, items.dtype.itemsize * 8, 4, dtype=items.dtype)
    codes = (items[..., None] >> shifts) & 15
    return codes.reshape(*items.shape[:-1], items.shape[-1] * len(shifts)).astype(jnp.int32)


def _pack_nibbles(codes: np.ndarray, dtype: np.dtype) -> np.ndarray:
    rows, cols = codes.shape
    pairs = codes.astype(np.uint8).reshape(rows, cols // 2, 2)
    little_endian = np.ascontiguousarray(pairs[..., 0] | pairs[..., 1] << 4)
    return little_endian.view(dtype.newbyteorder("<")).astype(dtype)


def _bf16_codes(values: np.ndarray) -> np.ndarray:
    return values.astype(ml_dtypes.bfloat16)


def _e4m3_codes(values: np.ndarray) -> np.ndarray:
    return values.astype(ml_dtypes.float8_e4m3fn)


def _int8_codes(values: np.ndarray) -> np.ndarray:
    return np.rint(values).astype(np.int8)


def _int4_codes(values: np.ndarray) -> np.ndarray:
    return _pack_nibbles(np.rint(values) + 8, np.dtype(np.int32))


def _e2m1_codes(values: np.ndarray) -> np.ndarray:
    return _pack_nibbles(values.astype(ml_dtypes.float4_e2m1fn).view(np.uint8), np.dtype(np.uint8))


_E2M1_MAGNITUDES = (0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0)
_E2M1_VALUES = np.array([*_E2M1_MAGNITUDES, *(-value for value in _E2M1_MAGNITUDES)], np.float32)

_BF16_MAX = float(ml_dtypes.finfo(ml_dtypes.bfloat16).max)

BF16 = Encoding(np.dtype(ml_dtypes.bfloat16), 1, _BF16_MAX, _as_floats, _bf16_codes)

E4M3 = Encoding(np.dtype(ml_dtypes.float8_e4m3fn), 1, 448.0, _as_floats, _e4m3_codes)
"""FP8 without infinity; 0x7f and 0xff are NaN."""

INT8 = Encoding(np.dtype(np.int8), 1, 127.0, _as_floats, _int8_codes)

INT4 = Encoding(np.dtype(np.int32), 8, 7.0, _int4_values, _int4_codes)
"""Eight weights in an int32, weight i in bits 4i to 4i + 3, stored as its value + 8 (compressed-tensors)."""

E2M1 = Encoding(np.dtype(np.uint8), 2, 6.0, _e2m1_values, _e2m1_codes)
"""Two FP4 weights in a byte, the first in the low bits (OCP Microscaling 1.0, 5.3.3; packed as gpt-oss is)."""
