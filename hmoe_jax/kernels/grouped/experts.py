"""A group of experts for the tokens that chose them, added to the sums of all groups before."""

from __future__ import annotations

from collections.abc import Callable

import jax
from jax import lax
from jaxtyping import Array, Float, Float32, Int32

from hmoe_jax.kernels.grouped.products import project
from hmoe_jax.kernels.grouped.routes import GroupRows
from hmoe_jax.kernels.moe_experts_reference import ExpertArrays

GroupedExperts = Callable[[Float32[Array, "t d"], Float[Array, "t d"], GroupRows, ExpertArrays], Float32[Array, "t d"]]
"""(sums so far, hidden, rows, experts) -> sums: routed experts' outputs times their weights, as the reference."""


def batched(
    routed: Float32[Array, "t d"], hidden: Float[Array, "t d"], rows: GroupRows, experts: ExpertArrays
) -> Float32[Array, "t d"]:
    """All experts of the group in one batched product for each matrix: they are dequantised together."""
    x = hidden.at[rows.tokens].get(mode="fill", fill_value=0)
    out = _mlp(x, experts) * rows.weights[..., None]
    return lax.fori_loop(0, out.shape[0], lambda e, sums: _add_rows(sums, rows.tokens[e], out[e]), routed)


def looped(
    routed: Float32[Array, "t d"], hidden: Float[Array, "t d"], rows: GroupRows, experts: ExpertArrays
) -> Float32[Array, "t d"]:
    """One expert after the other: the least memory."""

    def add_expert(e: Int32[Array, ""], sums: Float32[Array, "t d"]) -> Float32[Array, "t d"]:
        expert = jax.tree.map(lambda leaf: lax.dynamic_slice_in_dim(leaf, e, 1), experts)
        x = hidden.at[rows.tokens[e]].get(mode="fill", fill_value=0)
        return _add_rows(sums, rows.tokens[e], _mlp(x[None], expert)[0] * rows.weights[e][:, None])

    return lax.fori_loop(0, rows.tokens.shape[0], add_expert, routed)


VARIANTS: dict[str, GroupedExperts] = {"batched": batched, "looped": looped}


def _mlp(x: Float[Array, "e c d"], experts: ExpertArrays) -> Float32[Array, "e c d"]:
    inner = jax.nn.silu(project(x, experts.gate)) * project(x, experts.up)
    return project(inner.astype(x.dtype), experts.down)


def _add_rows(
    sums: Float32[Array, "t d"], tokens: Int32[Array, " c"], out: Float32[Array, "c d"]
) -> Float32[Array, "t d"]:
    """In a fixed order: a token occurs once among those of an expert, so that no two additions meet."""
    return sums.at[tokens].add(out, mode="drop", unique_indices=True)
