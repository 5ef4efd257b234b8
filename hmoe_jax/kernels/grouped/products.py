"""rows @ weight.T for a stack of stored matrices, at full precision on units that multiply BF16."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial

import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Float, Float32, Int32

from hmoe_jax.kernels.moe_experts_reference import ExpertMatrices
from hmoe_jax.quant.dequantize import dequantize
from hmoe_jax.quant.encodings import E8M0, scale_values
from hmoe_jax.quant.formats import find_format


@dataclass(frozen=True)
class Product:
    """How rows `[*r, i]` meet the matrices `[e, o, i]` of their experts, whichever rows those are.

    `multiply(rows, weights)` gives FP32 sums `[*r, o]`; `spread` brings numbers `[e, o]` to the experts' rows.
    """

    multiply: Callable[[Array, Array], Array]
    spread: Callable[[Array], Array]


def _multiply_batched(x: Float[Array, "e c i"], weight: Float[Array, "e o i"]) -> Float32[Array, "e c o"]:
    return jnp.einsum("eci,eoi->eco", x, weight, precision=_precision(x), preferred_element_type=jnp.float32)


BATCHED = Product(_multiply_batched, spread=lambda values: values[:, None])
"""Of rows `[e, c, i]`: as many for every expert."""


def ragged_product(sizes: Int32[Array, " e"], owners: Int32[Array, " r"]) -> Product:
    """Of rows `[r, i]`, expert after expert: `sizes[e]` of each, and `owners` is the expert of every row.

    Rows past the last expert's may have any owner, and hold anything afterwards.
    """

    def spread(values: Array) -> Array:
        return values[owners]

    def multiply(x: Float[Array, "r i"], weight: Float[Array, "e o i"]) -> Float32[Array, "r o"]:
        # Where XLA multiplies every row with every expert, and with zeros for all but its own, a NaN would reach all.
        is_finite = jnp.isfinite(weight)
        sums = lax.ragged_dot_general(
            x,
            jnp.where(is_finite, weight, 0),
            sizes,
            _ROWS_BY_EXPERT,
            precision=_precision(x),
            preferred_element_type=jnp.float32,
        )
        return jnp.where(spread(is_finite.all(axis=-1)), sums, jnp.nan)

    return Product(multiply, spread)


_ROWS_BY_EXPERT = lax.RaggedDotDimensionNumbers(
    dot_dimension_numbers=(((1,), (2,)), ((), ())), lhs_ragged_dimensions=[0], rhs_group_dimensions=[0]
)


def project(x: Float[Array, "*r i"], matrix: ExpertMatrices, product: Product) -> Float32[Array, "*r o"]:
    """FP32 sums of products that are exact or nearly so: with FP32 weights on the CPU platform, else `project_bf16`."""
    return lax.platform_dependent(
        x, matrix, cpu=partial(_project_f32, product=product), default=partial(project_bf16, product=product)
    )


def _project_f32(x: Float[Array, "*r i"], matrix: ExpertMatrices, product: Product) -> Float32[Array, "*r o"]:
    weight = dequantize(matrix.codec, matrix.weight, matrix.scale, jnp.float32)
    return product.multiply(x.astype(jnp.float32), weight)


def project_bf16(x: Float[Array, "*r i"], matrix: ExpertMatrices, product: Product) -> Float32[Array, "*r o"]:
    """By products of BF16 numbers, losing at most 2^-17 of a weight.

    Codes are exact in BF16, and so are codes times powers of two. A scale per row is multiplied afterwards. With other
    scales a weight is the sum of two BF16 numbers (17 bits), which costs a second product.
    """
    layout = find_format(matrix.codec)
    if x.dtype != jnp.bfloat16 or matrix.weight.dtype == jnp.float32:
        return _project_f32(x, matrix, product)
    if layout.has_whole_row_scales:
        codes = layout.encoding.values(matrix.weight).astype(jnp.bfloat16)
        return product.multiply(x, codes) * product.spread(scale_values(matrix.scale)[..., 0])
    if matrix.scale is None or matrix.scale.dtype == E8M0:
        return product.multiply(x, dequantize(matrix.codec, matrix.weight, matrix.scale, jnp.bfloat16))
    weight = dequantize(matrix.codec, matrix.weight, matrix.scale, jnp.float32)
    # Not a cast there and back, which XLA may take for nothing.
    high = lax.reduce_precision(weight, exponent_bits=8, mantissa_bits=7)
    low = (weight - high).astype(jnp.bfloat16)
    return product.multiply(x, high.astype(jnp.bfloat16)) + product.multiply(x, low)


def _precision(x: Array) -> lax.Precision | None:
    return lax.Precision.HIGHEST if x.dtype == jnp.float32 else None
