"""Rotary position embedding, plain and with YaRN."""

from __future__ import annotations

import math

import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Float32, Int

from hmoe_jax.config import ModelConfig, YarnConfig


def rotary_angles(
    config: ModelConfig, positions: Int[Array, " t"]
) -> tuple[Float32[Array, "t p"], Float32[Array, "t p"]]:
    """(cos, sin) of every position, one column per rotated pair (`p = rope_dim / 2`), with YaRN's scale applied."""
    angles = positions.astype(jnp.float32)[:, None] * inverse_frequencies(config)
    scale = config.yarn.rotary_scale if config.yarn else 1.0
    return jnp.cos(angles) * scale, jnp.sin(angles) * scale


def rotate(
    x: Float[Array, "t *h p2"], cos: Float32[Array, "t p"], sin: Float32[Array, "t p"], *, interleave: bool
) -> Float[Array, "t *h p2"]:
    """Rotates the pairs of the last axis: neighbours (0,1), (2,3)... if `interleave`, else (0,p), (1,p+1)...

    The result keeps the pair order of the input; scores do not depend on it, as queries and keys share it.
    """
    cos, sin = (part.reshape(part.shape[0], *(1,) * (x.ndim - 2), -1) for part in (cos, sin))
    pairs = x.astype(jnp.float32).reshape(*x.shape[:-1], *((-1, 2) if interleave else (2, -1)))
    axis = -1 if interleave else -2
    even, odd = jnp.take(pairs, 0, axis=axis), jnp.take(pairs, 1, axis=axis)
    rotated = jnp.stack([even * cos - odd * sin, odd * cos + even * sin], axis=axis)
    return rotated.reshape(x.shape).astype(x.dtype)


def inverse_frequencies(config: ModelConfig) -> Float32[np.ndarray, " p"]:
    """Radians per position of each pair. FP64 inside, since positions of 10^5 amplify its error."""
    wavelength = config.rope_theta ** (np.arange(0, config.rope_dim, 2, dtype=np.float64) / config.rope_dim)
    if config.yarn is None:
        return (1.0 / wavelength).astype(np.float32)
    keep = _extrapolated_share(config, config.yarn)
    return (keep / wavelength + (1.0 - keep) / (config.yarn.factor * wavelength)).astype(np.float32)


def _extrapolated_share(config: ModelConfig, yarn: YarnConfig) -> np.ndarray:
    """1 for pairs that turn often inside the original context (kept as they are), 0 for slow ones (stretched)."""

    def pair_turning(times: float) -> float:
        return (
            config.rope_dim
            * math.log(yarn.original_max_len / (times * 2 * math.pi))
            / (2 * math.log(config.rope_theta))
        )

    low, high = pair_turning(yarn.beta_fast), pair_turning(yarn.beta_slow)
    if yarn.truncate:
        low, high = math.floor(low), math.ceil(high)
    low, high = max(low, 0), min(high, config.rope_dim - 1)
    # Equal betas that rounding does not part make a step, not a division by zero.
    width = high - low if high != low else 0.001
    return 1.0 - np.clip((np.arange(config.rope_dim // 2) - low) / width, 0, 1)
