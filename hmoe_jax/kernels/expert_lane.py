"""`experts_submit` and `experts_wait`: `moe_experts` in two halves, between which a program computes other things."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, BFloat16, Float32, Int32

from hmoe_jax.kernels import _native

jax.ffi.register_ffi_target("hmoe_experts_submit", _native.experts_submit(), platform="cpu")
jax.ffi.register_ffi_target("hmoe_experts_wait", _native.experts_wait(), platform="cpu")
jax.ffi.register_ffi_target("hmoe_experts_submit", _native.experts_submit_gpu(), platform="CUDA")
jax.ffi.register_ffi_target("hmoe_experts_wait", _native.experts_wait_gpu(), platform="CUDA")

Ticket = Int32[Array, ""]


def experts_submit(
    hidden: BFloat16[Array, "t d"],
    ids: Int32[Array, "t k"],
    weights: Float32[Array, "t k"],
    *,
    layer: int | Int32[Array, ""],
    after: Ticket,
    lane: int,
    slot: int,
) -> Ticket:
    """Hands the operands of `moe_experts` to the thread of an `ExpertLane` and returns at once.

    They are copied. In a program for a GPU copies and the job are put on its stream, in the same order. Jobs are
    computed in the order in which they are submitted, each in a `slot`, which it has until the next one is submitted
    there. Calls of a program happen in the order that their data demands: this one after `after`.
    """
    call = jax.ffi.ffi_call("hmoe_experts_submit", jax.ShapeDtypeStruct((), jnp.int32))
    numbers = {"lane": np.int64(lane), "slot": np.int64(slot)}
    return call(hidden, ids, weights, jnp.asarray(layer, jnp.int32), after, **numbers)


def experts_wait(
    ticket: Ticket, *, shape: tuple[int, int], after: Ticket, lane: int, slot: int
) -> Float32[Array, "t d"]:
    """The result of a submitted job, `shape` `[t, d]`, as soon as it is there, and not before `after` is.

    A job that failed, or that is not done within the lane's patience, fails the XLA call with a sentence that says so;
    on a GPU, whose stream waits, it fails the lane's next call or `ExpertLane.check`.
    """
    call = jax.ffi.ffi_call("hmoe_experts_wait", jax.ShapeDtypeStruct(shape, jnp.float32))
    return call(ticket, after, lane=np.int64(lane), slot=np.int64(slot))
