"""All ways to multiply a group of experts, against the reference, in every format."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from hmoe_jax.experts.store import StoreShape
from hmoe_jax.kernels.grouped.experts import VARIANTS
from hmoe_jax.kernels.grouped.products import BATCHED, project_bf16, ragged_product
from hmoe_jax.kernels.grouped.routes import group_rows, sort_routes
from hmoe_jax.kernels.moe_experts_reference import ExpertArrays, moe_experts_reference
from hmoe_jax.quant.dequantize import dequantize
from tests.kernels.expert_case import Batch, Experts, shape_for
from tests.quant.exact import CODECS

SHAPE = StoreShape(num_layers=1, num_experts=5, hidden=136, ffn=72)
NUM_TOKENS = 37


def run(variant: str, experts: ExpertArrays, batch: Batch, groups: list[list[int]], tiles: list[int]) -> np.ndarray:
    """All groups one after the other, each in tiles of rows."""

    @jax.jit
    def add_all(hidden: jax.Array, ids: jax.Array, weights: jax.Array, experts: ExpertArrays) -> jax.Array:
        routes = sort_routes(ids, weights, num_experts=SHAPE.num_experts)
        routed = jnp.zeros(hidden.shape, jnp.float32)
        for group in groups:
            chosen, first = jnp.array(group, jnp.int32), 0
            stack = jax.tree.map(lambda leaf, chosen=chosen: leaf[chosen], experts)
            for rows in tiles:
                places = group_rows(
                    routes, chosen, jnp.full(len(chosen), first, jnp.int32), capacity=rows, num_tokens=len(hidden)
                )
                routed = VARIANTS[variant](routed, hidden, places, stack)
                first += rows
        return routed

    return np.asarray(add_all(*batch.operands, experts))


@pytest.mark.parametrize("variant", VARIANTS)
@pytest.mark.parametrize("codec", CODECS)
def test_groups_add_up_to_the_reference(codec: str, variant: str) -> None:
    shape = shape_for(codec, SHAPE)
    experts, batch = Experts.random(shape, codec).arrays(0), Batch.random(shape, NUM_TOKENS, slots=3)
    expected = np.asarray(moe_experts_reference(*batch.operands, experts))
    actual = run(variant, experts, batch, [[3, 1, 0], [4, -1, 2]], [24, 16])
    # The sums differ in their order, and the inner activation may be rounded the other way.
    np.testing.assert_allclose(actual, expected, atol=2.0**-8 * np.abs(expected).max())
    assert np.linalg.norm(actual - expected) <= 2.0**-10 * np.linalg.norm(expected)


def test_a_token_without_experts_gets_nothing() -> None:
    experts, batch = Experts.random(SHAPE, "bf16").arrays(0), Batch.random(SHAPE, 6, slots=2)
    hidden, _, weights = batch.operands
    nothing = Batch(hidden, jnp.full((6, 2), -1, jnp.int32), weights)
    assert not run("batched", experts, nothing, [[0, 1, 2, 3, 4]], [8]).any()


def test_nan_in_an_expert_reaches_only_those_who_chose_it() -> None:
    experts, batch = Experts.random(SHAPE, "bf16").arrays(0), Batch.random(SHAPE, 20, slots=2)
    poisoned = jax.tree.map(lambda leaf: leaf.at[1].set(jnp.nan), experts)
    chosen = (np.asarray(batch.ids) == 1).any(axis=1)
    assert 0 < chosen.sum() < 20
    for variant in VARIANTS:
        actual = run(variant, poisoned, batch, [[0, 1, 2], [3, 4]], [8, 16])
        np.testing.assert_array_equal(np.isnan(actual).any(axis=1), chosen)


@pytest.mark.parametrize("codec", CODECS)
def test_products_of_bf16_lose_nothing(codec: str) -> None:
    """Against FP32 weights: where those are no sum of two BF16 numbers, 2^-17 of each product is lost at most."""
    shape = shape_for(codec, SHAPE)
    gate = Experts.random(shape, codec).arrays(0).gate
    x = jax.random.normal(jax.random.key(0), (shape.num_experts, 9, shape.hidden), jnp.bfloat16)
    weight = np.asarray(dequantize(codec, gate.weight, gate.scale, jnp.float32), np.float64)
    exact = np.einsum("eci,eoi->eco", np.asarray(x, np.float64), weight)
    magnitude = np.einsum("eci,eoi->eco", np.abs(np.asarray(x, np.float64)), np.abs(weight))
    sums = shape.hidden * 2.0**-24
    sizes = np.array([4, 0, 9, 1, 7], np.int32)
    used = np.arange(9) < sizes[:, None]
    unpadded = ragged_product(jnp.asarray(sizes), owners=jnp.asarray(np.nonzero(used)[0], jnp.int32))
    for product, rows in ((BATCHED, np.s_[:]), (unpadded, used)):
        error = np.abs(np.asarray(project_bf16(x[rows], gate, product)) - exact[rows])
        assert (error <= magnitude[rows] * (2.0**-16 + sums)).all()
    rounded = np.einsum("eci,eoi->eco", np.asarray(x, np.float64), weight.astype(jnp.bfloat16).astype(np.float64))
    if codec in ("fp8_block", "int4_group32"):  # the bound would notice one BF16 number in place of two
        assert (np.abs(rounded - exact) > magnitude * (2.0**-16 + sums)).any()


def test_compiled_operations_are_those_of_the_rows() -> None:
    """No expansion to all experts for all tokens: 1.3 times the multiply-adds of the rows, at most."""
    shape = StoreShape(num_layers=1, num_experts=8, hidden=256, ffn=128)
    experts = Experts.random(shape, "fp8_block").arrays(0)
    hidden = jnp.zeros((512, shape.hidden), jnp.bfloat16)
    places = group_rows(
        sort_routes(jnp.zeros((512, 2), jnp.int32), jnp.zeros((512, 2), jnp.float32), num_experts=8),
        jnp.arange(8, dtype=jnp.int32),
        jnp.zeros(8, jnp.int32),
        capacity=128,
        num_tokens=512,
    )
    compiled = jax.jit(VARIANTS["batched"]).lower(hidden.astype(jnp.float32), hidden, places, experts).compile()
    ideal = 2 * 3 * shape.hidden * shape.ffn * 8 * 128
    assert ideal <= compiled.cost_analysis()["flops"] <= 1.3 * ideal
