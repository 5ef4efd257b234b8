"""`in_order`: a value as it is, but not before another one is there."""

from __future__ import annotations

import jax
from jaxtyping import Array

from hmoe_jax.kernels import _native

jax.ffi.register_ffi_target("hmoe_in_order", _native.in_order(), platform="cpu")
jax.ffi.register_ffi_target("hmoe_in_order", _native.in_order(), platform="CUDA")


def in_order(value: Array, *, after: Array) -> Array:
    """What uses the result is computed after `after`. Nothing is copied where nobody else uses the value later.

    XLA:CPU drops `lax.optimization_barrier` before it decides what to copy and in which order to run: a cache that one
    part of a batch reads and the next one writes to would be copied as a whole, in every layer.
    """
    out = jax.ShapeDtypeStruct(value.shape, value.dtype)
    return jax.ffi.ffi_call("hmoe_in_order", out, input_output_aliases={0: 0})(value, after)
