"""What routers did, and whether a difference between two of them is explained by a near tie."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np


@dataclass(frozen=True)
class Routing:
    """One pass: chosen experts `ids [m, t, k]`, and the scores `choice [m, t, e]` (sigmoid plus bias) to choose by."""

    num_groups: int
    ids: np.ndarray
    choice: np.ndarray

    @property
    def group_scores(self) -> np.ndarray:
        """`[m, t, g]`: the sum of each group's best two."""
        groups = self.choice.reshape(*self.choice.shape[:2], self.num_groups, -1)
        return np.sort(groups, axis=-1)[..., -2:].sum(axis=-1)


def same_experts(a: np.ndarray, b: np.ndarray) -> np.ndarray:
    """`[m, t]`: whether two `ids` name the same experts, in whatever order."""
    return (np.sort(a, axis=-1) == np.sort(b, axis=-1)).all(axis=-1)


def regret(oracle: Routing, ids: np.ndarray, *, top_groups: int) -> tuple[np.ndarray, np.ndarray]:
    """By how much `ids` miss the best choice, by the oracle's scores: of groups `[m, t]` and of experts `[m, t]`.

    0 where they are a best choice. Of groups: how far below the last eligible group the worst used one is. Of experts:
    how far the worst chosen one is below the best that was passed over in the same groups as chosen ones.
    """
    scores = oracle.group_scores
    per_group = oracle.choice.shape[-1] // oracle.num_groups
    used = _one_hot(ids // per_group, oracle.num_groups)
    last_eligible = np.sort(scores, axis=-1)[..., -top_groups]
    worst_used = np.where(used, scores, np.inf).min(axis=-1)
    chosen = _one_hot(ids, oracle.choice.shape[-1])
    passed_over = np.repeat(used, per_group, axis=-1) & ~chosen
    best_passed_over = np.where(passed_over, oracle.choice, -np.inf).max(axis=-1)
    worst_chosen = np.where(chosen, oracle.choice, np.inf).min(axis=-1)
    return np.maximum(last_eligible - worst_used, 0), np.maximum(best_passed_over - worst_chosen, 0)


def _one_hot(ids: np.ndarray, size: int) -> np.ndarray:
    return (ids[..., None] == np.arange(size)).any(axis=-2)
