"""The formats in which weight matrices are stored: the one table that loader, store, kernels and oracle read.

Every format keeps a matrix `[rows, cols]` (out, in) row by row, as published. `docs/formats.md` says who publishes it.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from types import MappingProxyType
from typing import Any

import ml_dtypes
import numpy as np

from hmoe_jax.quant.encodings import BF16, E2M1, E4M3, E8M0, INT4, INT8, Encoding

FP8_BLOCK = 128
"""Columns, and in DeepSeek's files rows, that share one scale in block FP8."""

MXFP4_GROUP = 32

_FLOAT32 = np.dtype(np.float32)
_BFLOAT16 = np.dtype(ml_dtypes.bfloat16)


@dataclass(frozen=True)
class ScaleBlock:
    """Neighbouring weights that share one scale; None is all rows, or all columns."""

    rows: int | None
    cols: int | None

    def grid(self, rows: int, cols: int) -> tuple[int, int]:
        """How many scales a matrix has in each direction; last blocks may be ragged."""
        return _num_blocks(rows, self.rows), _num_blocks(cols, self.cols)

    def stored_shapes(self, rows: int, cols: int) -> tuple[tuple[int, ...], ...]:
        """In which files keep the scales: the grid, or what is left of it without axes that are always 1."""
        grid = self.grid(rows, cols)
        if self.cols is not None:
            return (grid,)
        return (grid, grid[:1]) if self.rows is not None else (grid, grid[:1], ())


PER_CHANNEL = ScaleBlock(1, None)
PER_TENSOR = ScaleBlock(None, None)


@dataclass(frozen=True)
class Format:
    """A weight is the value of its code times the scale of its block, formed in FP32.

    `scale_blocks` and `scale_dtypes` are what a file may choose from, quantisers take the first; both are empty where
    weights are stored without scales. Scales that files have in one of `widened_scale_dtypes` become the first of
    `scale_dtypes`, exactly, when they are loaded. `cols_multiple` must divide the columns of every matrix.
    """

    codec: str
    encoding: Encoding
    scale_blocks: tuple[ScaleBlock, ...] = ()
    scale_dtypes: tuple[np.dtype, ...] = ()
    widened_scale_dtypes: tuple[np.dtype, ...] = ()
    cols_multiple: int = 1

    @property
    def has_scales(self) -> bool:
        return bool(self.scale_blocks)

    @property
    def has_whole_row_scales(self) -> bool:
        """Whether all columns of a row share a scale, so that a grid has one column."""
        return self.has_scales and all(block.cols is None for block in self.scale_blocks)

    def weight_shape(self, rows: int, cols: int) -> tuple[int, int]:
        """Of the stored array. Raises `ValueError` if this format cannot hold so many columns."""
        if cols % self.cols_multiple:
            raise ValueError(f"{self.codec} needs columns that {self.cols_multiple} divides, got {cols}")
        return rows, cols // self.encoding.weights_per_item

    def num_cols(self, items: int) -> int:
        """Of a matrix whose stored rows have so many items."""
        return items * self.encoding.weights_per_item

    def scale_block(self, grid: tuple[int, ...], rows: int, cols: int) -> ScaleBlock:
        """The block of a matrix that has this `grid` of scales. Raises `ValueError` if there is none."""
        for block in self.scale_blocks:
            if block.grid(rows, cols) == grid:
                return block
        choices = " or ".join(str(block.grid(rows, cols)) for block in self.scale_blocks)
        raise ValueError(f"scales of a {rows} x {cols} matrix in {self.codec}: expected {choices}, got {grid}")

    def num_bytes(self, rows: int, cols: int) -> int:
        """Of a stored matrix, with the scales that quantisers make."""
        weights = rows * cols * self.encoding.bits // 8
        if not self.has_scales:
            return weights
        scale_rows, scale_cols = self.scale_blocks[0].grid(rows, cols)
        return weights + scale_rows * scale_cols * self.scale_dtypes[0].itemsize

    def check(self, rows: int, cols: int, weight: Any, scale: Any, *, name: str = "weight") -> None:
        """Raises `ValueError` unless the arrays (NumPy, JAX or traced) are a stored `rows` x `cols` matrix.

        Scales must be a grid of two axes. `name` begins the message.
        """
        _check_array(name, weight, (self.encoding.dtype,), (self.weight_shape(rows, cols),))
        if not self.has_scales:
            if scale is not None:
                raise ValueError(f"{name}: {self.codec} has no scales, got some of shape {scale.shape}")
            return
        if scale is None:
            raise ValueError(f"{name}: {self.codec} needs scales, got None")
        grids = tuple(block.grid(rows, cols) for block in self.scale_blocks)
        _check_array(f"{name} scale", scale, self.scale_dtypes, grids)


def find_format(codec: str) -> Format:
    """The format of that name. Raises `ValueError` for an unknown one."""
    if codec not in FORMATS:
        raise ValueError(f"codec {codec!r} is unknown: expected one of {', '.join(FORMATS)}")
    return FORMATS[codec]


def _num_blocks(size: int, block: int | None) -> int:
    return 1 if block is None else -(-size // block)


def _check_array(name: str, array: Any, dtypes: tuple[np.dtype, ...], shapes: tuple[tuple[int, ...], ...]) -> None:
    if array.dtype not in dtypes:
        raise ValueError(f"{name}: expected dtype {' or '.join(map(str, dtypes))}, got {array.dtype}")
    if array.shape not in shapes:
        raise ValueError(f"{name}: expected shape {' or '.join(map(str, shapes))}, got {array.shape}")


def _int4_group(size: int) -> Format:
    return Format(f"int4_group{size}", INT4, (ScaleBlock(1, size),), (_BFLOAT16,), cols_multiple=size)


_CHANNEL_BLOCKS = (PER_CHANNEL, PER_TENSOR)
_TABLE = (
    Format("bf16", BF16),
    Format("fp8_block", E4M3, (ScaleBlock(FP8_BLOCK, FP8_BLOCK), ScaleBlock(1, FP8_BLOCK)), (_FLOAT32,), (_BFLOAT16,)),
    Format("fp8_channel", E4M3, _CHANNEL_BLOCKS, (_FLOAT32, _BFLOAT16)),
    Format("int8_channel", INT8, _CHANNEL_BLOCKS, (_FLOAT32, _BFLOAT16)),
    _int4_group(32),
    _int4_group(64),
    _int4_group(128),
    Format("mxfp4", E2M1, (ScaleBlock(1, MXFP4_GROUP),), (E8M0,), cols_multiple=MXFP4_GROUP),
)

FORMATS: Mapping[str, Format] = MappingProxyType({entry.codec: entry for entry in _TABLE})
"""By the name that kernels know them by: their codec."""
