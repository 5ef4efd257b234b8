"""Every encoding of every codec, through the decode that the kernels use."""

import ml_dtypes
import numpy as np
import pytest

from hmoe_jax.kernels import _native


def test_all_e4m3_encodings_are_exact_at_every_position(isa):
    codes = np.concatenate([np.roll(np.arange(256, dtype=np.uint8), shift) for shift in range(128)])
    expected = codes.view(ml_dtypes.float8_e4m3fn).astype(np.float32)
    decoded = np.asarray(_native.decode("fp8_block", isa, codes), np.float32)
    np.testing.assert_array_equal(decoded, expected)  # equal NaNs included
    finite = ~np.isnan(expected)
    np.testing.assert_array_equal(np.signbit(decoded[finite]), np.signbit(expected[finite]))


def test_all_bf16_encodings_are_exact(isa):
    codes = np.arange(65536, dtype=np.uint16)
    expected = codes.view(ml_dtypes.bfloat16).astype(np.float32)
    decoded = np.asarray(_native.decode("bf16", isa, codes.view(np.uint8)), np.float32)
    finite = ~np.isnan(expected)
    np.testing.assert_array_equal(decoded[finite].view(np.uint32), expected[finite].view(np.uint32))
    assert np.isnan(decoded[~finite]).all()


def test_decode_wants_whole_blocks_and_known_names(isa):
    with pytest.raises(ValueError, match="bytes: expected a multiple of 128 weights, got 127 bytes"):
        _native.decode("fp8_block", isa, np.zeros(127, np.uint8))
    with pytest.raises(ValueError, match="codec 'fp7' is unknown: expected one of bf16, fp8_block"):
        _native.decode("fp7", isa, np.zeros(128, np.uint8))
    with pytest.raises(ValueError, match="isa 'mmx' is unknown: expected auto, avx512_bf16, avx512, avx2, scalar"):
        _native.decode("fp8_block", "mmx", np.zeros(128, np.uint8))
