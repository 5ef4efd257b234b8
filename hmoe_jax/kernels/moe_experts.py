"""`moe_experts`: the routed experts of one layer, read from host memory where the checkpoint's bytes lie."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, BFloat16, Float32, Int32

from hmoe_jax.kernels import _native

jax.ffi.register_ffi_target("hmoe_moe_experts", _native.moe_experts(), platform="cpu")
jax.ffi.register_ffi_target("hmoe_moe_experts", _native.moe_experts_gpu(), platform="CUDA")


def moe_experts(
    hidden: BFloat16[Array, "t d"],
    ids: Int32[Array, "t k"],
    weights: Float32[Array, "t k"],
    *,
    layer: int | Int32[Array, ""],
    store: int,
) -> Float32[Array, "t d"]:
    """sum over k of weights[t, k] * down(silu(gate x) * up x), each expert's weights read once per call.

    `store` is an `ExpertStore.id`; `layer` counts the layers that have routed experts, and is an operand so that one
    compiled program serves all of them. An id of -1 is an unused slot: it reads nothing and adds nothing. FP32
    accumulation; the intermediate is rounded to BF16. The bits of a token's row do not depend on the other tokens or
    on the number of threads. An id or a layer out of range, or a closed store, fails the XLA call with a sentence that
    says so. In a program for a GPU the operands are brought to the host and the CPU computes, while the GPU's stream
    waits. Not differentiable.
    """
    call = jax.ffi.ffi_call("hmoe_moe_experts", jax.ShapeDtypeStruct(hidden.shape, jnp.float32))
    return call(hidden, ids, weights, jnp.asarray(layer, jnp.int32), store=np.int64(store))
