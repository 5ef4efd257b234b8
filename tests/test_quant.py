"""Block FP8: what is stored, what comes back, and how far it may be from what went in."""

from __future__ import annotations

import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from hmoe_jax.quant import E4M3_MAX, dequantize, is_fp8, num_blocks, quantize

FINITE_CODES = np.array(
    [code for code in range(256) if code & 0x7F != 0x7F], np.uint8
)  # E4M3FN has one NaN per sign and no infinity


def random_matrix(rows: int, columns: int, *, seed: int = 0) -> np.ndarray:
    """Blocks of very different magnitude."""
    rng = np.random.default_rng(seed)
    block = np.exp2(rng.integers(-20, 20, (num_blocks(rows), num_blocks(columns))).astype(np.float32))
    return rng.standard_normal((rows, columns), np.float32) * expand(block, rows, columns)


def expand(scale: np.ndarray, rows: int, columns: int) -> np.ndarray:
    """The scale of every element: that at (row // 128, column // 128)."""
    return scale[np.arange(rows)[:, None] // 128, np.arange(columns) // 128]


@pytest.mark.parametrize(("size", "blocks"), [(1, 1), (127, 1), (128, 1), (129, 2), (576, 5)])
def test_ragged_last_blocks_are_counted(size: int, blocks: int) -> None:
    assert num_blocks(size) == blocks


@pytest.mark.parametrize("shape", [(1, 1), (128, 128), (129, 127), (136, 264)])
def test_dequantize_multiplies_each_code_by_the_scale_of_its_block(shape: tuple[int, int]) -> None:
    codes, scale = quantize(random_matrix(*shape))
    got = np.asarray(dequantize(jnp.asarray(codes), jnp.asarray(scale), jnp.float32))
    np.testing.assert_array_equal(got, codes.astype(np.float32) * expand(scale, *shape))


@given(st.integers(0, 2**32 - 1))
def test_quantize_is_off_by_at_most_one_sixteenth_or_half_a_subnormal_step(seed: int) -> None:
    weight = random_matrix(130, 70, seed=seed)
    codes, scale = quantize(weight)
    step = expand(scale, *weight.shape)
    error = np.abs(codes.astype(np.float32) * step - weight)
    # 3 stored bits of significand: half a step is 2^-4 of the value; subnormals are 2^-9 apart. The quotient's own
    # rounding can decide a tie the other way: 2^-23.
    assert (error <= np.maximum(np.abs(weight) * 2.0**-4, step * 2.0**-10) * (1 + 2.0**-22)).all()


def test_the_largest_magnitude_of_a_block_becomes_448() -> None:
    codes, _ = quantize(random_matrix(136, 264))
    for rows in (slice(0, 128), slice(128, None)):
        for columns in (slice(0, 128), slice(128, 256), slice(256, None)):
            assert np.abs(codes[rows, columns].astype(np.float32)).max() == E4M3_MAX


def test_every_finite_code_survives_dequantize_then_quantize() -> None:
    codes = np.resize(FINITE_CODES, (128, 128)).view(ml_dtypes.float8_e4m3fn)
    scale = np.full((1, 1), 2.0**-7, np.float32)
    values = np.asarray(dequantize(jnp.asarray(codes), jnp.asarray(scale), jnp.float32))
    again, same_scale = quantize(values)
    np.testing.assert_array_equal(again.view(np.uint8), codes.view(np.uint8))
    np.testing.assert_array_equal(same_scale, scale)


def test_dequantize_to_bfloat16_rounds_once() -> None:
    codes, scale = quantize(random_matrix(130, 140))
    exact = dequantize(jnp.asarray(codes), jnp.asarray(scale), jnp.float32)
    rounded = dequantize(jnp.asarray(codes), jnp.asarray(scale), jnp.bfloat16)
    np.testing.assert_array_equal(np.asarray(rounded), np.asarray(exact).astype(ml_dtypes.bfloat16))


def test_stacked_experts_are_dequantised_one_by_one() -> None:
    pairs = [quantize(random_matrix(140, 72, seed=seed)) for seed in range(3)]
    codes, scales = (np.stack(parts) for parts in zip(*pairs, strict=True))
    together = dequantize(jnp.asarray(codes), jnp.asarray(scales), jnp.float32)
    for expert, (code, scale) in enumerate(pairs):
        alone = dequantize(jnp.asarray(code), jnp.asarray(scale), jnp.float32)
        np.testing.assert_array_equal(np.asarray(together[expert]), np.asarray(alone))


def test_a_block_of_zeros_has_scale_one() -> None:
    weight = random_matrix(130, 128)
    weight[128:] = 0
    codes, scale = quantize(weight)
    assert scale[1, 0] == 1
    assert not codes[128:].astype(np.float32).any()


@pytest.mark.parametrize("bad", [np.nan, np.inf, -np.inf])
def test_weights_that_are_not_finite_are_refused(bad: float) -> None:
    weight = random_matrix(3, 5)
    weight[1, 2] = bad
    with pytest.raises(ValueError, match="non-finite"):
        quantize(weight)


def test_is_fp8_tells_the_one_format() -> None:
    assert is_fp8(np.zeros(1, ml_dtypes.float8_e4m3fn))
    assert not is_fp8(np.zeros(1, ml_dtypes.float8_e5m2))
    assert not is_fp8(jnp.zeros(1, jnp.bfloat16))
