"""Routing against a brute force that follows the paper one token at a time."""

from __future__ import annotations

import itertools
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from hmoe_jax.config import ModelConfig
from hmoe_jax.nn.router import route
from tests.nn.configs import tiny

GROUPINGS = [(1, 1), (4, 2), (4, 1), (3, 2), (6, 5), (2, 2)]


def router_config(num_groups: int, top_groups: int, **changes: object) -> ModelConfig:
    return tiny(
        "plain",
        num_experts=12,
        top_k=2,
        num_groups=num_groups,
        top_groups=top_groups,
        hidden_size=17,
        **changes,
    )


def random_inputs(
    config: ModelConfig, *, seed: int = 0, num_tokens: int = 40
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    rng = np.random.default_rng(seed)
    hidden = rng.standard_normal((num_tokens, config.hidden_size)).astype(np.float32)
    weight = rng.standard_normal((config.num_experts, config.hidden_size)).astype(np.float32) / 4
    return hidden, weight, rng.standard_normal(config.num_experts).astype(np.float32) / 4


def brute_force(
    config: ModelConfig, hidden: np.ndarray, weight: np.ndarray, bias: np.ndarray
) -> tuple[tuple[int, ...], np.ndarray]:
    """One token: of all sets of groups the best, of all sets of eligible experts the best; (ids ascending, gates)."""
    scores = 1 / (1 + np.exp(-(weight.astype(np.float64) @ hidden.astype(np.float64))))
    choice, size = scores + bias, config.experts_per_group

    def group_score(group: int) -> float:
        members = choice[group * size : (group + 1) * size]
        return max(sum(pair) for pair in itertools.combinations(members, 2))

    groups = max(
        itertools.combinations(range(config.num_groups), config.top_groups),
        key=lambda groups: sum(group_score(g) for g in groups),
    )
    eligible = [e for e in range(config.num_experts) if e // size in groups]
    ids = max(itertools.combinations(eligible, config.top_k), key=lambda ids: choice[list(ids)].sum())
    gates = scores[list(ids)]
    return ids, config.routed_scale * (gates / gates.sum() if config.norm_top_k else gates)


def test_no_bit_depends_on_the_number_of_tokens() -> None:
    config = tiny("plain", num_experts=64, top_k=8, num_groups=1, top_groups=1, hidden_size=64)
    hidden, _, bias = random_inputs(config, num_tokens=1024)
    weight = np.eye(64, dtype=np.float32)  # no product is rounded: what follows them is tested
    jitted = jax.jit(partial(route, config))
    ids, gates = jitted(hidden, weight, bias)
    for count in (2, 7, 16, 100, 512):
        for few, all_of_them in zip(jitted(hidden[:count], weight, bias), (ids, gates), strict=True):
            np.testing.assert_array_equal(few, all_of_them[:count])


@pytest.mark.parametrize(("num_groups", "top_groups"), GROUPINGS)
@pytest.mark.parametrize("norm_top_k", [True, False])
def test_route_chooses_and_weighs_as_brute_force_does(num_groups: int, top_groups: int, norm_top_k: bool) -> None:
    config = router_config(num_groups, top_groups, norm_top_k=norm_top_k, routed_scale=2.5)
    inputs = random_inputs(config)
    ids, gates = (np.asarray(x) for x in route(config, *map(jnp.asarray, inputs)))
    for token, hidden in enumerate(inputs[0]):
        want_ids, want_gates = brute_force(config, hidden, *inputs[1:])
        order = ids[token].argsort()
        assert tuple(ids[token][order]) == want_ids
        # A sum of 17 products of size 1, a sigmoid, a sum of gates, a division: some tens of roundings.
        np.testing.assert_allclose(gates[token][order], want_gates, rtol=64 * 2.0**-24)


def test_ids_come_best_first() -> None:
    config = router_config(4, 2)
    hidden, weight, bias = random_inputs(config)
    ids, _ = route(config, *map(jnp.asarray, (hidden, weight, bias)))
    choice = 1 / (1 + np.exp(-(hidden @ weight.T))) + bias
    ordered = np.take_along_axis(choice, np.asarray(ids), axis=1)
    assert (np.diff(ordered, axis=1) <= 0).all()


def test_bias_changes_who_is_chosen_and_never_the_weights() -> None:
    config = router_config(1, 1, norm_top_k=False, routed_scale=1.0)
    hidden, weight, _ = random_inputs(config)
    scores = 1 / (1 + np.exp(-(hidden @ weight.T)))
    bias = np.zeros(config.num_experts, np.float32)
    bias[[3, 8]] = 5.0
    ids, gates = (np.asarray(x) for x in route(config, *map(jnp.asarray, (hidden, weight, bias))))
    assert (np.sort(ids, axis=1) == [3, 8]).all()
    np.testing.assert_allclose(gates, np.take_along_axis(scores, ids, axis=1), rtol=64 * 2.0**-24)


def test_a_negative_bias_on_every_expert_still_fills_the_places_with_eligible_ones() -> None:
    # A mask of zeros instead of minus infinity would prefer experts of masked groups here.
    config = router_config(4, 1)
    hidden, weight, _ = random_inputs(config)
    ids, _ = route(config, jnp.asarray(hidden), jnp.asarray(weight), jnp.full(config.num_experts, -3.0))
    groups = np.asarray(ids) // config.experts_per_group
    assert (groups == groups[:, :1]).all()


def test_normed_weights_sum_to_the_routed_scale() -> None:
    config = router_config(4, 2, norm_top_k=True, routed_scale=2.827)
    _, gates = route(config, *map(jnp.asarray, random_inputs(config)))
    np.testing.assert_allclose(np.asarray(gates).sum(axis=1), 2.827, rtol=8 * 2.0**-24)


def test_bfloat16_input_is_routed_in_float32() -> None:
    config = router_config(4, 2)
    hidden, weight, bias = (jnp.asarray(x) for x in random_inputs(config))
    narrow = hidden.astype(jnp.bfloat16)
    ids, gates = route(config, narrow, weight, bias)
    assert gates.dtype == jnp.float32
    wide_ids, wide_gates = route(config, narrow.astype(jnp.float32), weight, bias)
    np.testing.assert_array_equal(np.asarray(ids), np.asarray(wide_ids))
    np.testing.assert_array_equal(np.asarray(gates), np.asarray(wide_gates))
