"""The native norm against its formula, and one row's bits among others'."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from hmoe_jax.kernels.rms_norm import rms_norm

ROWS = 40


def case(width: int) -> tuple[jax.Array, jax.Array]:
    rng = np.random.default_rng(width)
    x = rng.standard_normal((ROWS, width)) * np.exp(rng.standard_normal((ROWS, 1)) * 5)
    return jnp.asarray(x, jnp.bfloat16), jnp.asarray(rng.standard_normal(width), jnp.bfloat16)


@pytest.mark.parametrize("width", [1, 31, 32, 33, 192, 512, 7168])
def test_equals_the_formula_and_a_row_gets_the_same_bits_among_any_others(width: int) -> None:
    x, weight = case(width)
    together = np.asarray(rms_norm(x, weight, eps=1e-6))
    wide, scale = np.asarray(x, np.float64), np.asarray(weight, np.float64)
    expected = wide / np.sqrt((wide**2).mean(axis=1, keepdims=True) + 1e-6) * scale
    np.testing.assert_allclose(together.astype(np.float64), expected, rtol=2.0**-8)  # half an ulp of BF16 and FP32's
    for rows in (1, 2, 3, 7, 8, 33):
        np.testing.assert_array_equal(np.asarray(rms_norm(x[-rows:], weight, eps=1e-6)), together[-rows:])


def test_what_is_not_finite_stays_in_its_row() -> None:
    x, weight = case(64)
    expected = np.asarray(rms_norm(x, weight, eps=1e-6))
    poisoned = np.asarray(rms_norm(x.at[3, 5].set(jnp.nan).at[4, 5].set(jnp.inf), weight, eps=1e-6))
    assert np.isnan(poisoned[3].astype(np.float32)).all()
    assert np.isnan(poisoned[4, 5].astype(np.float32))
    others = np.arange(ROWS) // 3 != 1
    np.testing.assert_array_equal(poisoned[others], expected[others])


def test_an_empty_batch_has_an_empty_result() -> None:
    x, weight = case(64)
    assert rms_norm(x[:0], weight, eps=1e-6).shape == (0, 64)


def test_arrays_of_other_shapes_and_types_are_refused() -> None:
    x, weight = case(64)
    call = jax.ffi.ffi_call("hmoe_rms_norm", jax.ShapeDtypeStruct(x.shape, x.dtype))
    with pytest.raises(jax.errors.JaxRuntimeError, match=r"weight: expected .*64.*63"):
        call(x, weight[:63], eps=np.float32(1e-6))
    with pytest.raises(jax.errors.JaxRuntimeError, match="x: expected"):
        call(x.astype(jnp.float32), weight, eps=np.float32(1e-6))
