"""Formats mean what the implementations that publish them make of them."""

from __future__ import annotations

import jax.numpy as jnp
import numpy as np
import pytest

from hmoe_jax.quant.dequantize import dequantize
from hmoe_jax.quant.formats import find_format
from tests.quant.exact import exact
from tests.quant.golden import GOLDEN_CODECS, load_golden


@pytest.mark.parametrize("codec", GOLDEN_CODECS)
def test_stored_matrices_have_the_published_layout(codec: str) -> None:
    weight, scale, values = load_golden(codec)
    find_format(codec).check(*values.shape, weight, scale)


@pytest.mark.parametrize("codec", GOLDEN_CODECS)
def test_values_are_those_of_the_publishers(codec: str) -> None:
    weight, scale, values = load_golden(codec)
    np.testing.assert_array_equal(np.asarray(dequantize(codec, weight, scale, jnp.float32)), values)
    np.testing.assert_array_equal(exact(codec, weight, scale).astype(np.float32), values)


@pytest.mark.parametrize("codec", ["int4_group32", "int8_channel"])
def test_the_lowest_code_occurs(codec: str) -> None:
    weight, _, _ = load_golden(codec)
    lowest = {"int4_group32": -8, "int8_channel": -128}[codec]
    assert np.asarray(find_format(codec).encoding.values(weight)).min() == lowest


@pytest.mark.parametrize("codec", GOLDEN_CODECS)
def test_codes_of_the_values_are_the_publishers(codec: str) -> None:
    weight, _, _ = load_golden(codec)
    encoding = find_format(codec).encoding
    np.testing.assert_array_equal(encoding.codes(np.asarray(encoding.values(weight))), weight)
