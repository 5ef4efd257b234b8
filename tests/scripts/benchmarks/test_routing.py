from __future__ import annotations

import numpy as np
import pytest
from benchmarks.routing import KINDS, SKEW, choose, least_reuse, rotate


@pytest.mark.parametrize("kind", KINDS)
def test_a_token_never_chooses_an_expert_twice(kind: str) -> None:
    ids = choose(kind, tokens=37, top_k=5, num_experts=11)
    assert ids.shape == (37, 5)
    assert ids.dtype == np.int32
    assert ids.min() >= 0
    assert ids.max() < 11
    assert all(len(set(row)) == 5 for row in ids.tolist())


def test_same_routing_uses_as_few_experts_as_can_be_and_distinct_as_many() -> None:
    assert len(np.unique(choose("same", tokens=9, top_k=4, num_experts=64))) == 4
    assert len(np.unique(choose("distinct", tokens=9, top_k=4, num_experts=64))) == 36
    counts = np.bincount(choose("distinct", tokens=9, top_k=4, num_experts=10).ravel())
    assert counts.max() - counts.min() <= 1


def test_skewed_routing_loads_experts_by_zipfs_law() -> None:
    """With one expert per token the law holds as it stands: nothing is lost to choosing without replacement."""
    tokens, num_experts = 200_000, 8
    ids = choose("skewed", tokens=tokens, top_k=1, num_experts=num_experts)
    law = np.arange(1, num_experts + 1) ** -SKEW
    expected = tokens * law / law.sum()
    # Five standard deviations of a binomial count.
    assert (np.abs(np.bincount(ids.ravel()) - expected) < 5 * np.sqrt(expected)).all()


def test_the_draw_is_the_one_with_the_median_number_of_experts() -> None:
    numbers = [len(np.unique(choose("skewed", tokens=4, top_k=8, num_experts=64, seed=seed))) for seed in range(20)]
    assert max(numbers) - min(numbers) <= 1


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("tokens", [1, 2, 8, 128])
def test_a_rotation_keeps_the_pattern_and_walks_round_all_experts(kind: str, tokens: int) -> None:
    ids = choose(kind, tokens=tokens, top_k=8, num_experts=64)
    rotation = rotate(ids, 64)
    loads = [sorted(np.bincount(each.ravel(), minlength=64)) for each in rotation]
    assert all(load == loads[0] == sorted(np.bincount(ids.ravel(), minlength=64)) for load in loads)
    visits = np.bincount(np.concatenate([np.unique(each) for each in rotation]), minlength=64)
    assert visits.min() == visits.max() > 0


@pytest.mark.parametrize("tokens", [1, 2, 4, 8, 32, 128, 512])
def test_an_expert_returns_only_after_half_of_the_others(tokens: int) -> None:
    rotation = rotate(choose("skewed", tokens=tokens, top_k=8, num_experts=64), 64)
    assert least_reuse(rotation) >= 31


def test_the_least_reuse_is_counted_in_other_experts() -> None:
    def ids(*experts: int) -> np.ndarray:
        return np.array([experts], np.int32)

    assert least_reuse([ids(0, 1), ids(2, 3)]) == 3
    assert least_reuse([ids(0, 1), ids(1, 2)]) == 0
    assert least_reuse([ids(0, 1, 2)]) == 2


def test_what_cannot_be_chosen_is_refused() -> None:
    with pytest.raises(ValueError, match="top-k: expected 1 <= top-k <= 4, the number of experts, got 5"):
        choose("same", tokens=1, top_k=5, num_experts=4)
    with pytest.raises(ValueError, match="routing: expected one of skewed, uniform, same, distinct, got 'odd'"):
        choose("odd", tokens=1, top_k=1, num_experts=4)
