"""x @ weight.T for a stack of stored matrices, at full precision on units that multiply BF16."""

from __future__ import annotations

import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Float, Float32

from hmoe_jax.kernels.moe_experts_reference import ExpertMatrices
from hmoe_jax.quant.dequantize import dequantize
from hmoe_jax.quant.encodings import E8M0, scale_values
from hmoe_jax.quant.formats import find_format


def project(x: Float[Array, "e c i"], matrix: ExpertMatrices) -> Float32[Array, "e c o"]:
    """FP32 sums of products that are exact or nearly so: with FP32 weights on the CPU platform, else `project_bf16`."""
    return lax.platform_dependent(x, matrix, cpu=_project_f32, default=project_bf16)


def _project_f32(x: Float[Array, "e c i"], matrix: ExpertMatrices) -> Float32[Array, "e c o"]:
    weight = dequantize(matrix.codec, matrix.weight, matrix.scale, jnp.float32)
    return _multiply(x.astype(jnp.float32), weight)


def project_bf16(x: Float[Array, "e c i"], matrix: ExpertMatrices) -> Float32[Array, "e c o"]:
    """By products of BF16 numbers, losing at most 2^-17 of a weight.

    Codes are exact in BF16, and so are codes times powers of two. A scale per row is multiplied afterwards. With other
    scales a weight is the sum of two BF16 numbers (17 bits), which costs a second product.
    """
    layout = find_format(matrix.codec)
    if x.dtype != jnp.bfloat16 or matrix.weight.dtype == jnp.float32:
        return _project_f32(x, matrix)
    if layout.has_whole_row_scales:
        codes = layout.encoding.values(matrix.weight).astype(jnp.bfloat16)
        return _multiply(x, codes) * jnp.swapaxes(scale_values(matrix.scale), -1, -2)
    if matrix.scale is None or matrix.scale.dtype == E8M0:
        return _multiply(x, dequantize(matrix.codec, matrix.weight, matrix.scale, jnp.bfloat16))
    weight = dequantize(matrix.codec, matrix.weight, matrix.scale, jnp.float32)
    # Not a cast there and back, which XLA may take for nothing.
    high = lax.reduce_precision(weight, exponent_bits=8, mantissa_bits=7)
    low = (weight - high).astype(jnp.bfloat16)
    return _multiply(x, high.astype(jnp.bfloat16)) + _multiply(x, low)


def _multiply(x: Float[Array, "e c i"], weight: Float[Array, "e o i"]) -> Float32[Array, "e c o"]:
    precision = lax.Precision.HIGHEST if x.dtype == jnp.float32 else None
    return jnp.einsum("eci,eoi->eco", x, weight, precision=precision, preferred_element_type=jnp.float32)
