"""Which rows of a step's activations belong to which expert, for programs whose shapes do not depend on it."""

from __future__ import annotations

from dataclasses import dataclass

import jax.numpy as jnp
from jaxtyping import Array, Float32, Int32

from hmoe_jax.core import record


@record
@dataclass(frozen=True)
class SortedRoutes:
    """The slots of all tokens by expert: those of expert e are `offsets[e] .. offsets[e + 1] - 1`, tokens ascending.

    `tokens` and `weights` are of each slot. Unused slots come last.
    """

    tokens: Int32[Array, " s"]
    weights: Float32[Array, " s"]
    offsets: Int32[Array, " e1"]


@record
@dataclass(frozen=True)
class GroupRows:
    """Up to c tokens of each of g experts, then unused places: weight 0 and a token past the end, each another one."""

    tokens: Int32[Array, "g c"]
    weights: Float32[Array, "g c"]


def sort_routes(ids: Int32[Array, "t k"], weights: Float32[Array, "t k"], *, num_experts: int) -> SortedRoutes:
    """Sorts by expert id; -1 is an unused slot."""
    keys = jnp.where(ids < 0, num_experts, ids).reshape(-1)
    order = jnp.argsort(keys, stable=True).astype(jnp.int32)
    offsets = jnp.searchsorted(keys[order], jnp.arange(num_experts + 1, dtype=jnp.int32)).astype(jnp.int32)
    return SortedRoutes(tokens=order // ids.shape[1], weights=weights.reshape(-1)[order], offsets=offsets)


def group_rows(
    routes: SortedRoutes, experts: Int32[Array, " g"], first: Int32[Array, " g"], *, capacity: int, num_tokens: int
) -> GroupRows:
    """The tokens `first .. first + capacity - 1` of each of these experts; expert -1 has none."""
    places = jnp.arange(capacity, dtype=jnp.int32)
    begin, end = routes.offsets[experts] + first, routes.offsets[experts + 1]
    slots = begin[:, None] + places
    is_used = (slots < end[:, None]) & (experts >= 0)[:, None]
    nobody = num_tokens + jnp.arange(slots.size, dtype=jnp.int32).reshape(slots.shape)
    slots = jnp.where(is_used, slots, 0)
    return GroupRows(
        tokens=jnp.where(is_used, routes.tokens[slots], nobody),
        weights=jnp.where(is_used, routes.weights[slots], 0),
    )
