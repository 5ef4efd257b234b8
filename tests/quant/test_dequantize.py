"""Stored matrices become the numbers that they mean, rounded once."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest

from hmoe_jax.quant.dequantize import dequantize
from hmoe_jax.quant.formats import FORMATS, ScaleBlock
from hmoe_jax.quant.quantize import quantize
from tests.quant.cases import LAYOUTS, random_matrix
from tests.quant.exact import CODECS, exact


@pytest.mark.parametrize(("codec", "block", "scale_dtype"), LAYOUTS)
@pytest.mark.parametrize("rows", [1, 128, 130])
@pytest.mark.parametrize("cols", [128, 384])
def test_every_weight_is_its_code_times_the_scale_of_its_block(
    codec: str, block: ScaleBlock | None, scale_dtype: np.dtype | None, rows: int, cols: int
) -> None:
    stored = quantize(codec, random_matrix(rows, cols), block=block, scale_dtype=scale_dtype)
    got = np.asarray(dequantize(codec, *stored, jnp.float32))
    np.testing.assert_array_equal(got, exact(codec, *stored).astype(np.float32))


@pytest.mark.parametrize("codec", [codec for codec, layout in FORMATS.items() if layout.cols_multiple == 1])
@pytest.mark.parametrize("shape", [(1, 1), (129, 127), (136, 264)])
def test_ragged_matrices(codec: str, shape: tuple[int, int]) -> None:
    stored = quantize(codec, random_matrix(*shape))
    got = np.asarray(dequantize(codec, *stored, jnp.float32))
    np.testing.assert_array_equal(got, exact(codec, *stored).astype(np.float32))


@pytest.mark.parametrize("codec", CODECS)
def test_bfloat16_is_rounded_once(codec: str) -> None:
    stored = quantize(codec, random_matrix(130, 128))
    wide = dequantize(codec, *stored, jnp.float32)
    rounded = dequantize(codec, *stored, jnp.bfloat16)
    np.testing.assert_array_equal(np.asarray(rounded), np.asarray(wide).astype(ml_dtypes.bfloat16))


@pytest.mark.parametrize("codec", CODECS)
def test_stacked_experts_are_dequantised_one_by_one(codec: str) -> None:
    pairs = [quantize(codec, random_matrix(140, 128, seed=seed)) for seed in range(3)]
    stacks = jax.tree.map(lambda *parts: np.stack(parts), *pairs)
    together = jax.jit(lambda stacks: dequantize(codec, *stacks, jnp.float32))(stacks)
    for expert, pair in enumerate(pairs):
        np.testing.assert_array_equal(together[expert], dequantize(codec, *pair, jnp.float32))


def test_a_grid_that_the_format_does_not_have_is_refused() -> None:
    weight, scale = quantize("fp8_block", random_matrix(300, 256))
    with pytest.raises(ValueError, match=r"expected \(3, 2\) or \(300, 2\), got \(2, 2\)"):
        dequantize("fp8_block", weight, scale[:2], jnp.float32)


@pytest.mark.parametrize("exponent", [0, 1, 127, 254])
def test_extreme_e8m0_exponents_scale_exactly_or_leave_the_range_of_fp32(exponent: int) -> None:
    weight = np.arange(256, dtype=np.uint8).reshape(1, 256)[:, :16]
    scale = np.full((1, 1), exponent, np.uint8)
    got = np.asarray(dequantize("mxfp4", weight, scale, jnp.float32))
    want = exact("mxfp4", weight, scale)
    # Beyond FP32: infinity, and zero instead of subnormals, of which the scale 2^-127 is one itself.
    want[np.abs(want) < np.finfo(np.float32).tiny] = 0
    if exponent == 0:
        want[:] = 0
    with np.errstate(over="ignore"):
        np.testing.assert_array_equal(got, want.astype(np.float32))


def test_nan_scales_make_a_group_nan_and_no_other() -> None:
    weight, scale = quantize("mxfp4", random_matrix(2, 96))
    scale[1, 1] = 255
    got = np.isnan(np.asarray(dequantize("mxfp4", weight, scale, jnp.float32)))
    assert got[1, 32:64].all()
    assert got.sum() == 32
