"""Routed experts beside a compiled step: the calls of an expert lane, in an order that the compiler cannot change."""

from __future__ import annotations

import jax.numpy as jnp
from jaxtyping import Array, Float, Float32

from hmoe_jax.architectures.deepseek_v3 import Seam
from hmoe_jax.kernels.expert_lane import Ticket, experts_submit, experts_wait
from hmoe_jax.kernels.in_order import in_order

_Started = tuple[Ticket, tuple[int, ...]]
"""A job, and the shape of its result."""


class LaneExperts:
    """Fills the seam of one traced program, with a slot of the lane for each part (see `ExpertsBeside`).

    What is traced after `finish` depends on the job that was started last, and not only on its own: so the program does
    not wait for a part's experts before it has given the lane those of the other part.
    """

    def __init__(self, lane: int):
        self._lane = lane
        self._last: Ticket = jnp.zeros((), jnp.int32)

    def start(self, part: int, layer: int, seam: Seam) -> tuple[_Started, Float[Array, "t d"]]:
        operands = (seam.hidden, seam.ids, seam.weights)
        ticket = experts_submit(*operands, layer=layer, after=self._last, lane=self._lane, slot=part)
        self._last = ticket
        return (ticket, seam.hidden.shape), self.in_order(seam.hidden, ticket)

    def finish(self, part: int, started: _Started) -> Float32[Array, "t d"]:
        ticket, (num_tokens, width) = started
        return experts_wait(ticket, shape=(num_tokens, width), after=self._last, lane=self._lane, slot=part)

    def in_order(self, value: Array, after: Array) -> Array:
        return in_order(value, after=after)
