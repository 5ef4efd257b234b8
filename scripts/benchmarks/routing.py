"""Which experts the tokens of a benchmark choose, and how a call finds none of them in a cache."""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np
from jaxtyping import Int32

SKEW = 0.5
"""Zipf's exponent: the r-th busiest expert is chosen in proportion to r**-SKEW. Of 64 experts the busiest then has four
times the mean, as one text loads a router that is balanced over all texts."""

KINDS = ("skewed", "uniform", "same", "distinct")
DRAWS = 101


def choose(kind: str, *, tokens: int, top_k: int, num_experts: int, seed: int = 0) -> Int32[np.ndarray, "t k"]:
    """Expert ids, `top_k` different ones per token.

    `same`: every token chooses the same. `distinct`: as many experts as there can be, evenly. `skewed`, `uniform`: of
    many draws the one with the median number of experts, so that no lucky draw is timed.
    """
    if not 1 <= top_k <= num_experts:
        raise ValueError(f"top-k: expected 1 <= top-k <= {num_experts}, the number of experts, got {top_k}")
    if kind == "same":
        return np.tile(np.arange(top_k, dtype=np.int32), (tokens, 1))
    if kind == "distinct":
        return (np.arange(tokens * top_k, dtype=np.int32) % num_experts).reshape(tokens, top_k)
    if kind not in KINDS:
        raise ValueError(f"routing: expected one of {', '.join(KINDS)}, got {kind!r}")
    rng = np.random.default_rng(seed)
    skew = SKEW if kind == "skewed" else 0.0
    draws = [_draw(rng, tokens=tokens, top_k=top_k, num_experts=num_experts, skew=skew) for _ in range(DRAWS)]
    return sorted(draws, key=lambda ids: len(np.unique(ids)))[DRAWS // 2]


def _draw(
    rng: np.random.Generator, *, tokens: int, top_k: int, num_experts: int, skew: float
) -> Int32[np.ndarray, "t k"]:
    """Without replacement within a token: the largest of log-probabilities with Gumbel noise."""
    log_load = -skew * np.log(np.arange(1, num_experts + 1))
    noisy = log_load + rng.gumbel(size=(tokens, num_experts))
    return np.argsort(-noisy, axis=1)[:, :top_k].astype(np.int32)


def rotate(ids: Int32[np.ndarray, "t k"], num_experts: int) -> list[Int32[np.ndarray, "t k"]]:
    """The same pattern on other experts: calls that follow each other walk round all of them.

    A call of one token reads 8 experts, 352 MB in FP8, and the third-level cache of a server holds 300 MB and more:
    with the same experts every time, or with popular ones, a benchmark measures that cache. Here an expert is used
    again only after the others have been (see `least_reuse`), which is what a model with many layers does.
    """
    labels = np.unique(ids)
    rank = np.searchsorted(labels, ids)
    period = num_experts // math.gcd(len(labels), num_experts)
    return [((rank + step * len(labels)) % num_experts).astype(np.int32) for step in range(period)]


def least_reuse(rotation: Sequence[Int32[np.ndarray, "t k"]]) -> int:
    """How many other experts are read at least between two reads of one, when a call reads its experts in order."""
    last: dict[int, int] = {}
    order = [expert for _ in range(2) for ids in rotation for expert in np.unique(ids).tolist()]
    least = len(order)
    for time, expert in enumerate(order):
        if expert in last:
            least = min(least, len(set(order[last[expert] + 1 : time])))
        last[expert] = time
    return least
