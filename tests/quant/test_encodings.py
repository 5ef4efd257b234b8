"""Every code of every encoding, and every scale."""

from __future__ import annotations

import ml_dtypes
import numpy as np
import pytest

from hmoe_jax.quant.encodings import BF16, E2M1, E4M3, E8M0, INT4, INT8, Encoding, scale_codes, scale_values
from tests.quant.exact import exact_values


def every_item(encoding: Encoding) -> np.ndarray:
    """Items in which every code occurs at every place, one row."""
    if encoding.weights_per_item == 1:
        unsigned = np.arange(2 ** (8 * encoding.dtype.itemsize), dtype=f"u{encoding.dtype.itemsize}")
        return unsigned.view(encoding.dtype)[None]
    codes = np.arange(16, dtype=np.uint8)
    others = np.random.default_rng(0).permuted(np.tile(codes, (16 * encoding.dtype.itemsize, 1)), axis=1)
    every_byte = np.arange(256, dtype=np.uint8)
    stored = np.concatenate([np.roll(every_byte, shift) for shift in range(encoding.dtype.itemsize)])
    return np.concatenate([stored, others.reshape(-1)]).view(encoding.dtype)[None]


@pytest.mark.parametrize(
    ("encoding", "codec"),
    [(BF16, "bf16"), (E4M3, "fp8_block"), (INT8, "int8_channel"), (INT4, "int4_group32"), (E2M1, "mxfp4")],
)
def test_every_code_has_its_value(encoding: Encoding, codec: str) -> None:
    items = every_item(encoding)
    with np.errstate(invalid="ignore"):
        want = exact_values(codec, items).astype(np.float32)
    got = np.asarray(encoding.values(items))
    # XLA:CPU reads a subnormal BF16 as zero, and says so nowhere: the kernels' tests allow for it as well.
    subnormal = (np.abs(want) < np.finfo(np.float32).tiny) & (want != 0)
    np.testing.assert_array_equal(got[~subnormal], want[~subnormal])
    numbers = ~np.isnan(want)
    np.testing.assert_array_equal(np.signbit(got[numbers]), np.signbit(want[numbers]))


@pytest.mark.parametrize("encoding", [BF16, E4M3, INT8, INT4, E2M1])
def test_values_of_codes_are_nearest_to_themselves(encoding: Encoding) -> None:
    items = every_item(encoding)
    if encoding is INT4:
        # Quantisers use -7 to 7; the sixteenth code, -8, is for those who can.
        assert not (np.asarray(INT4.values(items)) > INT4.largest).any()
    values = np.asarray(encoding.values(items))
    with np.errstate(invalid="ignore"):  # signalling NaNs
        again = encoding.codes(values)
    assert again.dtype == encoding.dtype
    np.testing.assert_array_equal(np.asarray(encoding.values(again)), values)


def test_first_weights_lie_in_low_bits() -> None:
    np.testing.assert_array_equal(INT4.values(np.array([[0x7654_3210]], np.int32))[0], np.arange(8) - 8)
    np.testing.assert_array_equal(INT4.codes(np.arange(8, dtype=np.float32)[None] - 8), [[0x7654_3210]])
    np.testing.assert_array_equal(E2M1.values(np.array([[0x72]], np.uint8)), [[1.0, 6.0]])
    np.testing.assert_array_equal(E2M1.codes(np.array([[-1.5, 4.0]], np.float32)), [[0x6B]])


def test_ties_are_rounded_to_even() -> None:
    halves = np.array([[0.25, 0.75, 1.25, 2.5, 3.5, 5.0, -0.25, -1.75]], np.float32)
    np.testing.assert_array_equal(E2M1.values(E2M1.codes(halves)), [[0, 1, 1, 2, 4, 4, -0.0, -2]])
    np.testing.assert_array_equal(INT8.codes(np.array([[0.5, 1.5, -0.5, 126.5]], np.float32)), [[0, 2, 0, 126]])


def test_all_e8m0_scales_are_powers_of_two_and_255_is_nan() -> None:
    codes = np.arange(256, dtype=np.uint8)
    got = np.asarray(scale_values(codes))
    want = np.float32(2.0) ** (np.arange(255, dtype=np.float64) - 127)
    # Compared as bits: a comparison may flush 2^-127, which is subnormal, to zero.
    np.testing.assert_array_equal(got[:255].view(np.uint32), want.astype(np.float32).view(np.uint32))
    assert np.isnan(got[255])
    np.testing.assert_array_equal(scale_codes(want.astype(np.float32), E8M0), codes[:255])


def test_e8m0_scales_are_rounded_up() -> None:
    assert scale_codes(np.array([1.0, 1.0001, 1.9999, 2.0], np.float32), E8M0).tolist() == [127, 128, 128, 128]
    assert scale_codes(np.array([3e38], np.float32), E8M0).tolist() == [254]


@pytest.mark.parametrize("dtype", [np.float32, ml_dtypes.bfloat16])
def test_float_scales_are_themselves(dtype: type) -> None:
    scale = np.array([1e-30, 0.3, 7e20], np.float32)
    np.testing.assert_array_equal(
        scale_values(scale_codes(scale, np.dtype(dtype))), scale.astype(dtype).astype(np.float32)
    )
