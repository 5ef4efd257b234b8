"""The table of formats: shapes, bytes, and what is refused."""

from __future__ import annotations

import re

import ml_dtypes
import numpy as np
import pytest

from hmoe_jax.quant.formats import FORMATS, PER_CHANNEL, PER_TENSOR, ScaleBlock, find_format
from hmoe_jax.quant.quantize import quantize
from tests.quant.exact import CODECS, SCALED

ROWS, COLS = 130, 256


def stored(codec: str) -> tuple[np.ndarray, np.ndarray | None]:
    return quantize(codec, np.ones((ROWS, COLS), np.float32))


def test_published_shapes_of_an_expert_of_deepseek_v3() -> None:
    shapes = {
        codec: (layout.weight_shape(2048, 7168), *(block.grid(2048, 7168) for block in layout.scale_blocks))
        for codec, layout in FORMATS.items()
    }
    assert shapes == {
        "bf16": ((2048, 7168),),
        "fp8_block": ((2048, 7168), (16, 56), (2048, 56)),
        "fp8_channel": ((2048, 7168), (2048, 1), (1, 1)),
        "int8_channel": ((2048, 7168), (2048, 1), (1, 1)),
        "int4_group32": ((2048, 896), (2048, 224)),
        "int4_group64": ((2048, 896), (2048, 112)),
        "int4_group128": ((2048, 896), (2048, 56)),
        "mxfp4": ((2048, 3584), (2048, 224)),
    }


@pytest.mark.parametrize(
    ("codec", "bytes_per_weight"),
    [
        ("bf16", 2),
        ("fp8_block", 1 + 4 / 128**2),
        ("fp8_channel", 1 + 4 / 7168),
        ("int8_channel", 1 + 4 / 7168),
        ("int4_group32", 0.5 + 2 / 32),
        ("int4_group64", 0.5 + 2 / 64),
        ("int4_group128", 0.5 + 2 / 128),
        ("mxfp4", 0.5 + 1 / 32),
    ],
)
def test_bytes_per_weight(codec: str, bytes_per_weight: float) -> None:
    assert find_format(codec).num_bytes(2048, 7168) == round(2048 * 7168 * bytes_per_weight)


@pytest.mark.parametrize(("size", "blocks"), [(1, 1), (127, 1), (128, 1), (129, 2), (576, 5)])
def test_ragged_last_blocks_have_a_scale(size: int, blocks: int) -> None:
    assert ScaleBlock(128, 128).grid(size, 1) == (blocks, 1)
    assert ScaleBlock(1, 128).grid(3, size) == (3, blocks)


def test_scales_of_whole_rows_may_lack_axes_of_length_1() -> None:
    assert ScaleBlock(128, 128).stored_shapes(130, 256) == ((2, 2),)
    assert PER_CHANNEL.stored_shapes(130, 256) == ((130, 1), (130,))
    assert PER_TENSOR.stored_shapes(130, 256) == ((1, 1), (1,), ())


@pytest.mark.parametrize("codec", CODECS)
def test_what_quantisers_make_passes_and_has_the_bytes_it_should(codec: str) -> None:
    weight, scale = stored(codec)
    layout = find_format(codec)
    layout.check(ROWS, COLS, weight, scale)
    assert weight.nbytes + (0 if scale is None else scale.nbytes) == layout.num_bytes(ROWS, COLS)
    assert weight.shape == layout.weight_shape(ROWS, COLS)
    assert layout.num_cols(weight.shape[1]) == COLS


@pytest.mark.parametrize("codec", CODECS)
def test_wrong_arrays_are_refused_by_name(codec: str) -> None:
    weight, scale = stored(codec)
    layout = find_format(codec)
    with pytest.raises(ValueError, match=r"^w: expected shape \(130, \d+\), got \(129, \d+\)$"):
        layout.check(ROWS, COLS, weight[1:], scale, name="w")
    with pytest.raises(ValueError, match=f"^w: expected dtype {weight.dtype}, got float64$"):
        layout.check(ROWS, COLS, weight.astype(np.float64), scale, name="w")


@pytest.mark.parametrize("codec", SCALED)
def test_wrong_scales_are_refused_by_name(codec: str) -> None:
    weight, scale = stored(codec)
    layout = find_format(codec)
    choices = " or ".join(str(dtype) for dtype in layout.scale_dtypes)
    with pytest.raises(ValueError, match=f"^w scale: expected dtype {choices}, got float64$"):
        layout.check(ROWS, COLS, weight, scale.astype(np.float64), name="w")
    for wrong in (scale.reshape(-1), np.concatenate([scale, scale]), np.concatenate([scale, scale], axis=1), scale[:0]):
        with pytest.raises(ValueError, match=rf"^w scale: expected shape .*, got {re.escape(str(wrong.shape))}$"):
            layout.check(ROWS, COLS, weight, wrong, name="w")
    with pytest.raises(ValueError, match=f"^w: {codec} needs scales, got None$"):
        layout.check(ROWS, COLS, weight, None, name="w")


def test_scales_that_do_not_belong_are_refused() -> None:
    weight, _ = stored("bf16")
    with pytest.raises(ValueError, match=r"weight: bf16 has no scales, got some of shape \(1, 1\)"):
        find_format("bf16").check(ROWS, COLS, weight, np.ones((1, 1), np.float32))


@pytest.mark.parametrize("codec", ["int4_group32", "int4_group64", "int4_group128", "mxfp4"])
def test_columns_that_groups_do_not_divide_are_refused(codec: str) -> None:
    multiple = find_format(codec).cols_multiple
    with pytest.raises(ValueError, match=f"{codec} needs columns that {multiple} divides, got {multiple + 8}"):
        find_format(codec).weight_shape(3, multiple + 8)


@pytest.mark.parametrize("codec", SCALED)
def test_a_grid_that_no_block_makes_is_refused(codec: str) -> None:
    with pytest.raises(ValueError, match=rf"scales of a 130 x 256 matrix in {codec}: expected .*, got \(7, 3\)"):
        find_format(codec).scale_block((7, 3), ROWS, COLS)


def test_an_unknown_codec_is_named_beside_the_known_ones() -> None:
    with pytest.raises(ValueError, match="codec 'fp7' is unknown: expected one of bf16, fp8_block, fp8_channel"):
        find_format("fp7")


def test_scales_of_both_float_dtypes_are_taken_where_files_have_both() -> None:
    for codec in ("fp8_channel", "int8_channel"):
        weight, scale = stored(codec)
        find_format(codec).check(ROWS, COLS, weight, scale.astype(ml_dtypes.bfloat16))
