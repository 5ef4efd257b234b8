"""The figures that two sets of logits are compared by, and assertions whose failure names the worst place."""

from __future__ import annotations

import numpy as np

from hmoe_jax.config import ModelConfig
from tests.oracle import bounds
from tests.oracle.routing import Routing, regret


def relative_errors(ours: np.ndarray, oracle: np.ndarray) -> np.ndarray:
    """`[...]`: ||ours - oracle|| / ||oracle|| over the last axis."""
    return np.linalg.norm(ours - oracle, axis=-1) / np.linalg.norm(oracle, axis=-1)


def kl_divergences(oracle: np.ndarray, ours: np.ndarray) -> np.ndarray:
    """`[...]` in nats: KL(oracle || ours) of the two next-token distributions."""
    p, q = _log_softmax(oracle.astype(np.float64)), _log_softmax(ours.astype(np.float64))
    return (np.exp(p) * (p - q)).sum(axis=-1)


def assert_logits_close(ours: np.ndarray, oracle: np.ndarray, *, bound: float) -> None:
    """Every token's relative error is within `bound`."""
    errors = relative_errors(ours, oracle)
    worst = int(errors.argmax())
    entry = int(np.abs(ours[worst] - oracle[worst]).argmax())
    assert np.isfinite(ours).all(), f"logits are not finite at {np.argwhere(~np.isfinite(ours))[0]}"
    assert errors[worst] <= bound, (
        f"token {worst}: relative error {errors[worst]:.3e} exceeds {bound:.3e}; worst logit [{worst}, {entry}] is "
        f"{ours[worst, entry]:.6g}, the oracle's {oracle[worst, entry]:.6g}"
    )


def assert_choices_explained(config: ModelConfig, oracle: Routing, ids: np.ndarray, *, bound: float) -> None:
    """Wherever `ids` are not the best choice by the oracle's scores, these were closer than the error can tell."""
    groups, experts = regret(oracle, ids, top_groups=config.top_groups)
    for kind, missed, limit in (
        ("group", groups, bounds.group_regret(bound)),
        ("expert", experts, bounds.expert_regret(bound)),
    ):
        layer, token = np.unravel_index(missed.argmax(), missed.shape)
        assert missed[layer, token] <= limit, (
            f"MoE layer {layer}, token {token}: experts {ids[layer, token]} miss the oracle's best {kind} score by "
            f"{missed[layer, token]:.3e}, explained up to {limit:.3e}; its scores: {oracle.choice[layer, token]}"
        )


def assert_greedy_explained(ours: np.ndarray, oracle: np.ndarray, gaps: np.ndarray, limits: np.ndarray) -> None:
    """Per prompt `[p, n]`: the same tokens, up to a step at which the oracle's two best were closer than `limits`.

    After such a step the two continue different texts, so there is nothing to compare.
    """
    for prompt, differs in enumerate(ours != oracle):
        if differs.any():
            step = int(differs.argmax())
            assert gaps[prompt, step] <= limits[prompt, step], (
                f"prompt {prompt}, step {step}: token {ours[prompt, step]}, the oracle's {oracle[prompt, step]}; "
                f"its two best are {gaps[prompt, step]:.3e} apart, explained up to {limits[prompt, step]:.3e}"
            )


def top_two_gaps(logits: np.ndarray) -> np.ndarray:
    """`[...]`: how far the best of `logits [..., v]` is above the second."""
    best = np.sort(logits, axis=-1)
    return best[..., -1] - best[..., -2]


def _log_softmax(logits: np.ndarray) -> np.ndarray:
    shifted = logits - logits.max(axis=-1, keepdims=True)
    return shifted - np.log(np.exp(shifted).sum(axis=-1, keepdims=True))
