"""Every encoding of every codec, through the decode that the kernels use."""

import numpy as np
import pytest

from hmoe_jax.kernels import _native
from hmoe_jax.quant.formats import FORMATS
from tests.kernels.codecs import CODECS, has_codec
from tests.quant.exact import exact_values


def every_code_at_every_position(codec):
    """Stored bytes of whole blocks of 128 weights."""
    encoding = FORMATS[codec].encoding
    if encoding.bits == 16:
        return np.arange(65536, dtype=np.uint16).view(np.uint8)
    every_byte = np.arange(256, dtype=np.uint8)
    return np.concatenate([np.roll(every_byte, shift) for shift in range(128)])


@pytest.mark.parametrize("codec", CODECS)
def test_every_format_of_the_table_has_a_codec(codec):
    assert has_codec(codec)


def test_all_encodings_are_exact_at_every_position(isa, codec):
    stored = every_code_at_every_position(codec)
    with np.errstate(invalid="ignore"):  # signalling NaNs of BF16
        expected = exact_values(codec, stored.view(FORMATS[codec].encoding.dtype)[None])[0].astype(np.float32)
    decoded = np.asarray(_native.decode(codec, isa, stored), np.float32)
    np.testing.assert_array_equal(decoded, expected)  # equal NaNs included


def test_signs_of_zero_are_kept_where_an_encoding_has_them(isa):
    for codec in ("bf16", "fp8_block"):
        stored = every_code_at_every_position(codec)
        with np.errstate(invalid="ignore"):
            expected = exact_values(codec, stored.view(FORMATS[codec].encoding.dtype)[None])[0]
        decoded = np.asarray(_native.decode(codec, isa, stored), np.float32)
        finite = ~np.isnan(expected)
        np.testing.assert_array_equal(np.signbit(decoded[finite]), np.signbit(expected[finite]))


def test_decode_wants_whole_blocks(isa, codec):
    num_bytes = 128 * FORMATS[codec].encoding.bits // 8 - 1
    with pytest.raises(ValueError, match=f"bytes: expected a multiple of 128 weights, got {num_bytes} bytes"):
        _native.decode(codec, isa, np.zeros(num_bytes, np.uint8))


def test_decode_wants_known_names():
    with pytest.raises(ValueError, match="codec 'fp7' is unknown: expected one of bf16, fp8_block"):
        _native.decode("fp7", "scalar", np.zeros(128, np.uint8))
    with pytest.raises(ValueError, match=r"isa 'mmx' is unknown: expected auto, .*avx512, avx2, scalar"):
        _native.decode("fp8_block", "mmx", np.zeros(128, np.uint8))
