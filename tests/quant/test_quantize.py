"""What quantisers make is nearest to what went in."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from hmoe_jax.quant.formats import FORMATS, PER_CHANNEL, ScaleBlock
from hmoe_jax.quant.quantize import quantize
from tests.quant.cases import LAYOUTS, random_matrix
from tests.quant.exact import SCALED, exact, exact_values, spread

# Of a value: half a step relative to it, and half a step near zero in units of the scale. E4M3 has 3 bits of fraction
# and steps of 2^-9 below its smallest normal; E2M1 has 1 bit, and steps of 1/2 up to 2.
STEPS = {"fp8": (2.0**-4, 2.0**-10), "int": (0.0, 0.5), "mxf": (2.0**-2, 0.25)}


@pytest.mark.parametrize(("codec", "block", "scale_dtype"), [layout for layout in LAYOUTS if layout[0] != "bf16"])
@given(seed=st.integers(0, 2**32 - 1))
def test_errors_are_at_most_half_a_step(codec: str, block: ScaleBlock, scale_dtype: np.dtype, seed: int) -> None:
    weight = random_matrix(130, 128, seed=seed)
    stored = quantize(codec, weight, block=block, scale_dtype=scale_dtype)
    per_weight = spread(codec, stored[1], *weight.shape)
    error = np.abs(exact(codec, *stored) - weight)
    relative, near_zero = STEPS[codec[:3]]
    # The quotient by the scale is rounded, which can decide a tie the other way: 2^-23 of it. A scale that BF16
    # rounds down leaves the block's largest weight beyond the largest code, by 2^-9.
    beyond = 2.0**-8 * np.abs(weight) if scale_dtype.itemsize == 2 else 0
    assert (
        error
        <= np.maximum(np.abs(weight) * relative, per_weight * near_zero) * (1 + 2.0**-21)
        + np.abs(weight) * 2.0**-22
        + beyond
    ).all()


@pytest.mark.parametrize("codec", SCALED)
def test_the_largest_magnitude_of_a_block_becomes_the_largest_code(codec: str) -> None:
    weight, scale = quantize(codec, random_matrix(130, 256))
    values = np.abs(exact_values(codec, weight))
    per_weight = spread(codec, np.arange(scale.size, dtype=np.float32).reshape(scale.shape), *values.shape)
    largest = [values[per_weight == block].max() for block in range(scale.size)]
    if codec == "mxfp4":
        # A power of two that is just large enough.
        assert set(largest) <= {3.0, 4.0, 6.0}
    else:
        assert set(largest) == {FORMATS[codec].encoding.largest}


@pytest.mark.parametrize("codec", SCALED)
def test_values_of_codes_survive(codec: str) -> None:
    weight, scale = quantize(codec, random_matrix(130, 128))
    values = exact(codec, weight, scale).astype(np.float32)
    again, same_scale = quantize(codec, values)
    np.testing.assert_array_equal(exact(codec, again, same_scale).astype(np.float32), values)


@pytest.mark.parametrize("codec", SCALED)
def test_a_block_of_zeros_has_scale_one(codec: str) -> None:
    weight = random_matrix(256, 128)
    weight[128:] = 0
    stored = quantize(codec, weight)
    per_weight = spread(codec, stored[1], *weight.shape)
    assert (per_weight[128:] == 1).all()
    assert not exact(codec, *stored)[128:].any()


@pytest.mark.parametrize("bad", [np.nan, np.inf, -np.inf])
@pytest.mark.parametrize("codec", ["bf16", "fp8_block", "mxfp4"])
def test_weights_that_are_not_finite_are_refused(codec: str, bad: float) -> None:
    weight = random_matrix(3, 32)
    weight[1, 2] = bad
    with pytest.raises(ValueError, match="non-finite"):
        quantize(codec, weight)


def test_a_choice_that_the_format_does_not_have_is_refused() -> None:
    with pytest.raises(ValueError, match="fp8_block has no scales of dtype float32 for ScaleBlock"):
        quantize("fp8_block", random_matrix(3, 5), block=PER_CHANNEL)
    with pytest.raises(ValueError, match="int4_group32 has no scales of dtype float32"):
        quantize("int4_group32", random_matrix(3, 32), scale_dtype=np.dtype(np.float32))
    with pytest.raises(ValueError, match="int4_group32 needs columns that 32 divides, got 33"):
        quantize("int4_group32", random_matrix(3, 33))
