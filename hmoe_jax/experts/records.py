"""An expert as one run of bytes: what is copied to a device, and how a program finds the matrices in it."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import NamedTuple

import jax
import numpy as np
from jaxtyping import Array, Shaped, UInt8

from hmoe_jax.architectures.deepseek_v3_checkpoint import MATRICES, Matrix
from hmoe_jax.kernels.moe_experts_reference import ExpertArrays, ExpertMatrices

ALIGN = 64
"""Every part of a record begins at a multiple of this (the native store's `kRecordAlign`)."""


class Part(NamedTuple):
    """The shape and type of one array in a record."""

    shape: tuple[int, ...]
    dtype: np.dtype

    @property
    def num_bytes(self) -> int:
        return int(np.prod(self.shape)) * self.dtype.itemsize


@dataclass(frozen=True)
class RecordLayout:
    """gate, up, down; of each the weights as stored, then the grid of scales if the format has any."""

    codec: str
    parts: Mapping[Matrix, tuple[Part, Part | None]]

    @property
    def num_bytes(self) -> int:
        return sum(_rounded(part) for pair in self.parts.values() for part in pair)

    def unpack(self, records: UInt8[Array, "e n"]) -> ExpertArrays:
        """The matrices of a stack of records, inside a traced program: slices of the same bytes."""
        offset, matrices = 0, {}
        for matrix in MATRICES:
            weight, scale = self.parts[matrix]
            scales_at = offset + _rounded(weight)
            matrices[matrix] = ExpertMatrices(
                weight=_slice(records, offset, weight),
                scale=None if scale is None else _slice(records, scales_at, scale),
                codec=self.codec,
            )
            offset = scales_at + _rounded(scale)
        return ExpertArrays(**matrices)


def _rounded(part: Part | None) -> int:
    return -(-part.num_bytes // ALIGN) * ALIGN if part is not None else 0


def _slice(records: UInt8[Array, "e n"], offset: int, part: Part) -> Shaped[Array, "e ..."]:
    run = jax.lax.slice_in_dim(records, offset, offset + part.num_bytes, axis=1)
    if part.dtype.itemsize == 1:
        return jax.lax.bitcast_convert_type(run.reshape(-1, *part.shape), part.dtype)
    return jax.lax.bitcast_convert_type(run.reshape(-1, *part.shape, part.dtype.itemsize), part.dtype)
