"""Root-mean-square norm against its formula."""

from __future__ import annotations

import jax.numpy as jnp
import numpy as np
import pytest

from hmoe_jax.nn.norm import rms_norm

RNG = np.random.default_rng(0)


def formula(x: np.ndarray, weight: np.ndarray, eps: float) -> np.ndarray:
    wide = x.astype(np.float64)
    return wide / np.sqrt((wide**2).mean(axis=-1, keepdims=True) + eps) * weight.astype(np.float64)


@pytest.mark.parametrize("shape", [(1, 7), (3, 7), (6, 72)])
def test_float32_is_the_formula_up_to_rounding(shape: tuple[int, ...]) -> None:
    x = RNG.standard_normal(shape).astype(np.float32) * 30
    weight = RNG.standard_normal(shape[-1]).astype(np.float32)
    got = np.asarray(rms_norm(jnp.asarray(x), jnp.asarray(weight), 1e-6))
    # A mean of d squares, its root, two products: (d / 2 + 4) roundings at worst.
    np.testing.assert_allclose(got, formula(x, weight, 1e-6), rtol=(shape[-1] / 2 + 4) * 2.0**-24)


def test_bfloat16_is_rounded_only_at_the_end() -> None:
    x = jnp.asarray(RNG.standard_normal((5, 72)), jnp.bfloat16)
    weight = jnp.asarray(RNG.standard_normal(72), jnp.bfloat16)
    got = rms_norm(x, weight, 1e-6)
    assert got.dtype == jnp.bfloat16
    wide = rms_norm(x.astype(jnp.float32), weight.astype(jnp.float32), 1e-6)
    np.testing.assert_array_equal(np.asarray(got), np.asarray(wide.astype(jnp.bfloat16)))


def test_eps_keeps_a_zero_vector_zero() -> None:
    assert not np.asarray(rms_norm(jnp.zeros((2, 8)), jnp.ones(8), 1e-6)).any()


def test_eps_is_added_to_the_mean_square() -> None:
    got = rms_norm(jnp.full((1, 4), 1e-3), jnp.ones(4), 3e-6)
    np.testing.assert_allclose(np.asarray(got), 0.5, rtol=8 * 2.0**-24)
