"""`rms_norm`: a norm on the CPU whose bits do not depend on how many rows there are."""

from __future__ import annotations

import jax
import numpy as np
from jaxtyping import Array, BFloat16

from hmoe_jax.kernels import _native

jax.ffi.register_ffi_target("hmoe_rms_norm", _native.rms_norm(), platform="cpu")


def rms_norm(x: BFloat16[Array, "t d"], weight: BFloat16[Array, " d"], *, eps: float) -> BFloat16[Array, "t d"]:
    """x / rms(x) * weight for each row, computed in FP32. CPU platform only. Not differentiable.

    XLA:CPU adds up a row in an order that depends on the number of rows: that of 512 values among up to 7 rows may
    differ in its last bit from that among 8, which now and then turns a rounding to BF16.
    """
    call = jax.ffi.ffi_call("hmoe_rms_norm", jax.ShapeDtypeStruct(x.shape, x.dtype))
    return call(x, weight, eps=np.float32(eps))
