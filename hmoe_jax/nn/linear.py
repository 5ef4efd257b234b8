"""Dense projections, whatever their number format and whoever multiplies them."""

from __future__ import annotations

from dataclasses import dataclass
from functools import partial
from typing import Any, Literal

import jax
import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Float, Float32

from hmoe_jax.kernels.grouped.fp8_product import fits, multiply_fp8
from hmoe_jax.kernels.grouped.products import BATCHED, project_bf16
from hmoe_jax.kernels.linear import linear as native_linear
from hmoe_jax.kernels.moe_experts_reference import ExpertMatrices
from hmoe_jax.nn.einsum import einsum_f32
from hmoe_jax.quant.dequantize import dequantize

GpuProducts = Literal["xla", "kernel"]
"""Who multiplies block-scaled FP8 on a GPU: XLA, or a kernel of ours (`kernels.grouped.fp8_product`) where it fits."""


@partial(jax.tree_util.register_dataclass, data_fields=("weight", "scale"), meta_fields=("codec", "pool", "on_gpu"))
@dataclass(frozen=True)
class Projection:
    """A weight `[out, in]` as stored in the format `codec` (`quant.formats`), with its grid of scales if it has any.

    Weights of codec `bf16` may also be held in FP32, for computing in FP32. `pool` names the native
    thread pool that multiplies it on the CPU platform; None leaves it to XLA. `on_gpu` says who does on a GPU. In an
    abstract tree the leaves are `TensorSpec`s.
    """

    weight: Any
    scale: Any = None
    codec: str = "bf16"
    pool: int | None = None
    on_gpu: GpuProducts = "xla"


def linear(x: Float[Array, "t i"], projection: Projection) -> Float32[Array, "t o"]:
    """x @ weight.T with FP32 accumulation and an FP32 result."""
    if projection.pool is None:
        return _linear_xla(x, projection)
    return lax.platform_dependent(x, projection, cpu=_linear_native, default=_linear_xla)


def _linear_xla(x: Float[Array, "t i"], projection: Projection) -> Float32[Array, "t o"]:
    if projection.scale is None:
        return einsum_f32("ti,oi->to", x, projection.weight)
    return lax.platform_dependent(x, projection, cpu=_linear_f32, default=_linear_bf16)


def _linear_f32(x: Float[Array, "t i"], projection: Projection) -> Float32[Array, "t o"]:
    """Scaled in FP32: rounding code * scale to BF16 would lose bits that the checkpoint has."""
    weight = dequantize(projection.codec, projection.weight, projection.scale, jnp.float32)
    return einsum_f32("ti,oi->to", x.astype(jnp.float32), weight)


def _linear_bf16(x: Float[Array, "t i"], projection: Projection) -> Float32[Array, "t o"]:
    """The same bits of the weights on units that multiply BF16, as of a group of one expert."""
    matrix = ExpertMatrices(projection.weight[None], projection.scale[None], codec=projection.codec)
    by_xla = partial(project_bf16, product=BATCHED)
    if projection.on_gpu == "xla" or not fits(x[None], matrix):
        return by_xla(x[None], matrix)[0]
    return lax.platform_dependent(x[None], matrix, cuda=multiply_fp8, default=by_xla)[0]


def _linear_native(x: Float[Array, "t i"], projection: Projection) -> Float32[Array, "t o"]:
    assert projection.pool is not None
    return native_linear(x, projection.weight, projection.scale, codec=projection.codec, pool=projection.pool)
