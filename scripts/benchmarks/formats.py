"""Experts of random bytes that are valid in every weight format."""

from __future__ import annotations

from collections.abc import Iterator

import ml_dtypes
import numpy as np

from hmoe_jax.architectures.deepseek_v3_checkpoint import MATRICES
from hmoe_jax.experts.store import ExpertTensor, StoreShape
from hmoe_jax.kernels import _native
from hmoe_jax.quant.formats import FORMATS, Format

BF16, E4M3 = np.dtype(ml_dtypes.bfloat16), np.dtype(ml_dtypes.float8_e4m3fn)
TILE_BYTES = 64 << 20
HUGE_PAGE_BYTES = 2 << 20

SCALES = {
    "fp8_block": 2.0**-13,
    "fp8_channel": 2.0**-13,
    "int8_channel": 2.0**-13,
    "int4_group32": 2.0**-9,
    "int4_group64": 2.0**-9,
    "int4_group128": 2.0**-9,
    "mxfp4": 127 - 8,
}
"""What a format's scales are filled with, as stored, so that outputs have ordinary sizes."""


def native_formats() -> list[str]:
    """Those that this build has kernels for."""
    return [name for name in FORMATS if name in _native.codec_names()]


def expert_bytes(format_: Format, shape: StoreShape) -> int:
    """Weights and scales of one expert: what a call reads of it."""
    return sum(format_.num_bytes(*shape.matrix(matrix)) for matrix in MATRICES)


class ExpertMemory:
    """Weights and scales of one layer's experts in one format, each expert at addresses of its own.

    The weights are one random tile again and again, at other places of every expert: how fast they are read does not
    depend on what they are, and random numbers for gigabytes take minutes. With `overlap` the experts have the same
    values in little memory, where they overlap: for a reader that makes a copy of its own anyway.
    """

    def __init__(self, format_: Format, shape: StoreShape, *, overlap: bool = False):
        self.format, self.shape, self._overlap = format_, shape, overlap
        sizes = [shape.matrix(matrix) for matrix in MATRICES]
        self._weight_bytes = sum(_weight_bytes(format_, *size) for size in sizes)
        self._scale_bytes = expert_bytes(format_, shape) - self._weight_bytes
        count = 1 if overlap else shape.num_experts
        self._weights = _huge_pages(TILE_BYTES + self._weight_bytes if overlap else count * self._weight_bytes)
        self._scales = _huge_pages(count * self._scale_bytes)
        tile = random_tile()
        for begin in range(0, self._weights.size, TILE_BYTES):
            part = self._weights[begin : begin + TILE_BYTES]
            part[:] = tile[: part.size]
        if format_.has_scales:
            self._scales.view(format_.scale_dtypes[0])[:] = SCALES[format_.codec]

    def tensors(self) -> Iterator[ExpertTensor]:
        """Views of the memory, for an `ExpertStore`."""
        for expert in range(self.shape.num_experts):
            weight_at, scale_at = expert * self._weight_bytes, expert * self._scale_bytes
            if self._overlap:
                weight_at, scale_at = weight_at % TILE_BYTES, 0
            for matrix in MATRICES:
                size = self.shape.matrix(matrix)
                weight_end = weight_at + _weight_bytes(self.format, *size)
                scale_end = scale_at + self.format.num_bytes(*size) - (weight_end - weight_at)
                weight = self._weights[weight_at:weight_end].view(self.format.encoding.dtype)
                scale = None
                if self.format.has_scales:
                    stored = self._scales[scale_at:scale_end].view(self.format.scale_dtypes[0])
                    scale = stored.reshape(self.format.scale_blocks[0].grid(*size))
                yield ExpertTensor(0, expert, matrix, weight.reshape(self.format.weight_shape(*size)), scale)
                weight_at, scale_at = weight_end, scale_end


def _weight_bytes(format_: Format, rows: int, cols: int) -> int:
    return rows * cols * format_.encoding.bits // 8


def random_tile() -> np.ndarray:
    """TILE_BYTES bytes that are ordinary numbers in every format.

    The upper byte of a BF16 weight is 0x3b to 0x3d with either sign, so weights have magnitudes around 0.01 to 0.1;
    read as E4M3 that byte is about 1.5. The lower byte is the E4M3 code of a normal deviate times 100, as a quantiser
    would make it: no NaN, and subnormals as rare as in a checkpoint.
    """
    rng = np.random.default_rng(0)
    tile = np.empty((TILE_BYTES // 2, 2), np.uint8)
    deviates = rng.standard_normal(1 << 16, np.float32) * 100
    codes = np.clip(deviates, -448, 448).astype(E4M3).view(np.uint8)
    tile[:, 0] = codes[rng.integers(0, codes.size, len(tile), np.uint16)]
    upper = np.array([0x3B, 0x3C, 0x3C, 0x3D, 0xBB, 0xBC, 0xBC, 0xBD], np.uint8)
    tile[:, 1] = upper[rng.integers(0, upper.size, len(tile), np.uint8)]
    return tile.reshape(-1)


def _huge_pages(num_bytes: int) -> np.ndarray:
    """Uninitialised bytes from a multiple of a huge page on; NumPy asks the kernel for such pages itself."""
    memory = np.empty(num_bytes + HUGE_PAGE_BYTES, np.uint8)
    begin = -memory.ctypes.data % HUGE_PAGE_BYTES
    return memory[begin : begin + num_bytes]
