"""x @ weight.T for a stack of block-scaled FP8 matrices on a GPU, unpacked on the chip, in Pallas (compiled by Triton).

Codes are exact in BF16. The products of a block of columns are summed in FP32 and then scaled: one product for each
weight, and no weight is ever written to memory, where `products.project_bf16` needs two of both.
"""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import triton
from jaxtyping import Array, BFloat16, Float32

from hmoe_jax.kernels.moe_experts_reference import ExpertMatrices

BLOCK = 128
"""Rows and columns of a weight with one scale."""

MIN_ROWS, MAX_ROWS = 16, 128
"""Of a tile of activations."""


def fits(x: Array, matrix: ExpertMatrices) -> bool:
    """Whether the kernel takes these: BF16 rows in tiles, FP8 in whole blocks of 128 x 128 with a scale each."""
    if matrix.codec != "fp8_block" or x.dtype != jnp.bfloat16 or x.shape[-2] % MIN_ROWS:
        return False
    outputs, inputs = matrix.weight.shape[-2:]
    is_whole = outputs % BLOCK == 0 and inputs % BLOCK == 0
    return is_whole and matrix.scale.shape[-2:] == (outputs // BLOCK, inputs // BLOCK)


def multiply_fp8(
    x: BFloat16[Array, "e c i"], matrix: ExpertMatrices, *, interpret: bool = False
) -> Float32[Array, "e c o"]:
    """Of what `fits`. `interpret` runs the same code on any device, slowly."""
    (num_experts, num_rows, inputs), outputs = x.shape, matrix.weight.shape[1]
    rows = next(size for size in (MAX_ROWS, 64, 32, MIN_ROWS) if num_rows % size == 0)
    call = pl.pallas_call(
        _kernel,
        # Neighbours share a weight's tile, which is then in the cache: row tiles are innermost.
        grid=(num_experts, outputs // BLOCK, num_rows // rows),
        in_specs=(
            pl.BlockSpec((1, rows, inputs), lambda e, o, c: (e, c, 0)),
            pl.BlockSpec((1, BLOCK, inputs), lambda e, o, c: (e, o, 0)),
            pl.BlockSpec((1, 1, inputs // BLOCK), lambda e, o, c: (e, o, 0)),
        ),
        out_specs=pl.BlockSpec((1, rows, BLOCK), lambda e, o, c: (e, c, o)),
        out_shape=jax.ShapeDtypeStruct((num_experts, num_rows, outputs), jnp.float32),
        compiler_params=triton.CompilerParams(num_warps=8 if rows == MAX_ROWS else 4, num_stages=3),
        interpret=interpret,
        name="fp8_product",
    )
    return call(x, matrix.weight, matrix.scale)


def _kernel(x: Any, weight: Any, scale: Any, out: Any) -> None:
    def add(block: Array, sums: Array) -> Array:
        columns = pl.ds(block * BLOCK, BLOCK)
        codes = weight[0, :, columns].astype(jnp.bfloat16)
        products = jnp.dot(x[0, :, columns], codes.T, preferred_element_type=jnp.float32)
        return sums + products * scale[0, 0, block]

    out[0] = lax.fori_loop(0, x.shape[2] // BLOCK, add, jnp.zeros(out.shape[1:], jnp.float32))
