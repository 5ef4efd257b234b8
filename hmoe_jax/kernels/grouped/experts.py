"""A group of experts for the tokens that chose them, added to the sums of all groups before."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

import jax
import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Float, Float32, Int32

from hmoe_jax.kernels.grouped.fp8_product import fits, multiply_fp8
from hmoe_jax.kernels.grouped.products import BATCHED, project, ragged_product
from hmoe_jax.kernels.grouped.routes import GroupRows
from hmoe_jax.kernels.moe_experts_reference import ExpertArrays, ExpertMatrices

GroupedExperts = Callable[[Float32[Array, "t d"], Float[Array, "t d"], GroupRows, ExpertArrays], Float32[Array, "t d"]]
"""(sums so far, hidden, rows, experts) -> sums: routed experts' outputs times their weights, as the reference."""


def batched(
    routed: Float32[Array, "t d"], hidden: Float[Array, "t d"], rows: GroupRows, experts: ExpertArrays
) -> Float32[Array, "t d"]:
    """All experts of the group in one batched product for each matrix: they are dequantised together."""
    out = _mlp(_take(hidden, rows.tokens), experts, _project_batched)
    return _add_experts(routed, rows, lambda e: out[e])


def kernel(
    routed: Float32[Array, "t d"], hidden: Float[Array, "t d"], rows: GroupRows, experts: ExpertArrays
) -> Float32[Array, "t d"]:
    """As `batched`, on a GPU with a kernel of our own where it fits the format: experts are unpacked on the chip."""
    out = _mlp(_take(hidden, rows.tokens), experts, _project_by_kernel)
    return _add_experts(routed, rows, lambda e: out[e])


def looped(
    routed: Float32[Array, "t d"], hidden: Float[Array, "t d"], rows: GroupRows, experts: ExpertArrays
) -> Float32[Array, "t d"]:
    """One expert after the other: the least memory."""

    def compute(e: Int32[Array, ""]) -> Float32[Array, "c d"]:
        expert = jax.tree.map(lambda leaf: lax.dynamic_slice_in_dim(leaf, e, 1), experts)
        return _mlp(_take(hidden, rows.tokens[e])[None], expert, _project_batched)[0]

    return _add_experts(routed, rows, compute)


def ragged(
    routed: Float32[Array, "t d"], hidden: Float[Array, "t d"], rows: GroupRows, experts: ExpertArrays
) -> Float32[Array, "t d"]:
    """The used rows of all experts, one expert's after the other's, in one ragged product for each matrix.

    No padding is multiplied where XLA has a program for it. Where it has none, it makes a copy of the rows for every
    expert and multiplies them all: on the CPU platform 8.1 times the operations of a full tile of 8 experts.
    """
    num_places = rows.tokens.shape[1]
    is_used = rows.tokens < hidden.shape[0]
    order = jnp.argsort(~is_used.reshape(-1), stable=True).astype(jnp.int32)
    sizes = is_used.sum(axis=1, dtype=jnp.int32)
    project_ragged = partial(project, product=ragged_product(sizes, owners=order // num_places))
    out = _mlp(_take(hidden, rows.tokens.reshape(-1)[order]), experts, project_ragged)
    begins = jnp.cumsum(sizes) - sizes
    # Behind an expert's own rows come those of the next, in places of tokens past the end.
    return _add_experts(routed, rows, lambda e: lax.dynamic_slice_in_dim(out, begins[e], num_places))


VARIANTS: dict[str, GroupedExperts] = {"batched": batched, "looped": looped, "ragged": ragged, "kernel": kernel}


def variants_on(platform: str) -> list[str]:
    """Those that have a program of their own there."""
    return [name for name in VARIANTS if platform != "cpu" or name != "kernel"]


def _take(hidden: Float[Array, "t d"], tokens: Int32[Array, "*r"]) -> Float[Array, "*r d"]:
    """Zeros for tokens past the end."""
    return hidden.at[tokens].get(mode="fill", fill_value=0)


Project = Callable[[Float[Array, "*r i"], ExpertMatrices], Float32[Array, "*r o"]]

_project_batched: Project = partial(project, product=BATCHED)


def _project_by_kernel(x: Float[Array, "e c i"], matrix: ExpertMatrices) -> Float32[Array, "e c o"]:
    if not fits(x, matrix):
        return _project_batched(x, matrix)
    return lax.platform_dependent(x, matrix, cuda=multiply_fp8, default=_project_batched)


def _mlp(x: Float[Array, "*r d"], experts: ExpertArrays, project: Project) -> Float32[Array, "*r d"]:
    inner = jax.nn.silu(project(x, experts.gate)) * project(x, experts.up)
    return project(inner.astype(x.dtype), experts.down)


def _add_experts(
    routed: Float32[Array, "t d"], rows: GroupRows, compute: Callable[[Int32[Array, ""]], Float32[Array, "c d"]]
) -> Float32[Array, "t d"]:
    """The outputs `compute(e)` of expert after expert, times their weights: always in this order.

    A token occurs once among those of an expert, so that no two additions meet.
    """

    def add(e: Int32[Array, ""], sums: Float32[Array, "t d"]) -> Float32[Array, "t d"]:
        out = compute(e) * rows.weights[e][:, None]
        return sums.at[rows.tokens[e]].add(out, mode="drop", unique_indices=True)

    return lax.fori_loop(0, rows.tokens.shape[0], add, routed)
