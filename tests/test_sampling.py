"""The sampler against NumPy: which tokens may be drawn, how often, and what the penalties make of logits.

Every test uses batches of one size, so that each function is compiled once.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable
from dataclasses import replace
from functools import cache
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from hmoe_jax import sampling
from hmoe_jax.sampling import Sampled, SamplerState, sampler_row
from hmoe_jax.sampling_params import MAX_LOGPROBS, SamplingParams
from tests.serving import log_softmax

ROWS, VOCAB = 128, 37


@cache
def compiled(name: str) -> Callable[..., Any]:
    return jax.jit(getattr(sampling, name))


def row(
    params: SamplingParams, *, prompt: tuple[int, ...] = (), stop: tuple[int, ...] = (), seed: int = 0
) -> SamplerState:
    return sampler_row(params, VOCAB, prompt_ids=prompt, stop_ids=stop, seed=seed)


def stack(rows: list[SamplerState]) -> SamplerState:
    """A state of `ROWS` sequences, the given ones again and again, and the row for padding."""
    padding = row(SamplingParams(temperature=0.0))
    rows = [rows[i % len(rows)] for i in range(ROWS)] + [padding]
    return jax.tree.map(lambda *values: np.stack(values), *rows)


def sample(
    state: SamplerState, logits: np.ndarray, *, advance: np.ndarray | None = None
) -> tuple[Sampled, SamplerState]:
    everyone = np.ones(ROWS, np.bool_) if advance is None else advance
    return compiled("sample")(state, np.arange(ROWS, dtype=np.int32), logits, everyone)


def random_logits(seed: int = 0, *, scale: float = 2.0) -> np.ndarray:
    return (np.random.default_rng(seed).standard_normal((ROWS, VOCAB)) * scale).astype(np.float32)


def random_row_seeds(params: SamplingParams, seed: int = 0) -> SamplerState:
    seeds = np.random.default_rng(seed).integers(0, 2**64, ROWS, dtype=np.uint64)
    return stack([row(params, seed=int(each)) for each in seeds])


# --- which tokens are kept ---


def kept_by_reference(logits: np.ndarray, params: SamplingParams) -> list[set[int]]:
    """vLLM's sets, one row at a time: min-p, then top-k, then top-p of what is left; equals of a kept one are kept."""
    return [_kept_of_row(row.astype(np.float64), params) for row in logits]


def _kept_of_row(logits: np.ndarray, params: SamplingParams) -> set[int]:
    p = np.exp(logits - logits.max())
    kept = p >= params.min_p
    if params.top_k:
        kept &= logits >= np.sort(np.where(kept, logits, -np.inf))[::-1][min(params.top_k, VOCAB) - 1]
    p = np.where(kept, p, 0) / p[kept].sum()
    order = np.argsort(-p, kind="stable")
    before = np.concatenate([[0.0], np.cumsum(p[order])[:-1]])
    nucleus = order[(before < params.top_p)]
    kept &= logits >= logits[nucleus].min()
    return set(np.flatnonzero(kept).tolist())


def kept(logits: np.ndarray, params: SamplingParams) -> list[set[int]]:
    rows = jax.tree.map(lambda value: value[:ROWS], stack([row(params)]))
    left = np.asarray(compiled("_cut")(rows, logits))
    assert (left[np.isfinite(left)] == logits[np.isfinite(left)]).all()
    return [set(np.flatnonzero(np.isfinite(row)).tolist()) for row in left]


CUTS = [
    {"top_k": 1},
    {"top_k": 5},
    {"top_k": VOCAB},
    {"top_k": VOCAB + 1, "top_p": 0.7},
    {"top_k": 2**31 - 1, "top_p": 0.7},
    {"top_p": 0.5},
    {"top_p": 0.999},
    {"top_p": 1e-12},
    {"min_p": 0.1},
    {"min_p": 1.0},
    {"min_p": 0.05, "top_k": 6, "top_p": 0.8},
    {"min_p": 0.3, "top_k": 20},
    {"top_k": 3, "top_p": 0.4},
]


@pytest.mark.parametrize("cut", CUTS, ids=str)
def test_the_kept_tokens_are_those_of_the_reference(cut: dict[str, Any]) -> None:
    logits, params = random_logits(3), SamplingParams(**cut)
    assert kept(logits, params) == kept_by_reference(logits, params)


@pytest.mark.parametrize("cut", CUTS, ids=str)
@pytest.mark.parametrize("num_candidates", [1, 4, VOCAB - 1])
def test_a_cut_among_the_best_tokens_is_that_of_the_whole_vocabulary(
    monkeypatch: pytest.MonkeyPatch, cut: dict[str, Any], num_candidates: int
) -> None:
    monkeypatch.setattr(sampling, "NUM_CANDIDATES", num_candidates)
    rows = jax.tree.map(lambda value: value[:ROWS], stack([row(SamplingParams(**cut))]))
    logits = random_logits(3)
    logits[:, 7] = logits[:, 8] = logits.max(axis=1)  # equal ones on the edge of the candidates
    left = np.asarray(sampling._cut(rows, jnp.asarray(logits)))
    sets = [set(np.flatnonzero(np.isfinite(each)).tolist()) for each in left]
    assert sets == kept_by_reference(logits, SamplingParams(**cut))


def test_without_a_cut_everything_is_kept() -> None:
    assert kept(random_logits(4), SamplingParams()) == [set(range(VOCAB))] * ROWS


@pytest.mark.parametrize("cut", [{"top_k": 1}, {"top_p": 1e-9}, {"min_p": 1.0}], ids=str)
def test_the_tightest_cuts_keep_the_best_token_alone(cut: dict[str, Any]) -> None:
    logits = random_logits(5)
    assert kept(logits, SamplingParams(**cut)) == [{int(best)} for best in logits.argmax(axis=1)]


@pytest.mark.parametrize("cut", [{"top_k": 2}, {"top_p": 0.5}, {"min_p": 0.9}], ids=str)
def test_equal_tokens_stand_or_fall_together(cut: dict[str, Any]) -> None:
    logits = np.full((ROWS, VOCAB), -3.0, np.float32)
    logits[:, [4, 9, 30]] = 2.0
    assert kept(logits, SamplingParams(**cut)) == [{4, 9, 30}] * ROWS
    flat = np.zeros((ROWS, VOCAB), np.float32)
    assert kept(flat, SamplingParams(**cut)) == [set(range(VOCAB))] * ROWS


def test_forbidden_tokens_stay_forbidden_under_every_cut() -> None:
    logits = random_logits(6)
    logits[:, 10:] = -np.inf
    for cut in CUTS:
        assert all(tokens <= set(range(10)) for tokens in kept(logits, SamplingParams(**cut)))


@pytest.mark.parametrize("cut", CUTS, ids=str)
def test_only_kept_tokens_are_drawn_and_with_enough_draws_all(cut: dict[str, Any]) -> None:
    params = SamplingParams(**cut, temperature=3.0)
    logits = np.repeat(random_logits(7)[:1], ROWS, axis=0)
    allowed = kept_by_reference(logits[:1] / np.float32(3.0), params)[0]
    state, seen = random_row_seeds(params), set()
    for _ in range(8):
        sampled, state = sample(state, logits)
        seen |= set(np.asarray(sampled.tokens).tolist())
    # The rarest of 37 tokens has e^(-4/3) to e^(-8/3) of the best one's share: 1024 draws do not miss one worth 2 %.
    probabilities = np.exp(logits[0].astype(np.float64) / 3)
    probabilities /= probabilities[list(allowed)].sum()
    assert seen <= allowed
    assert seen >= {token for token in allowed if probabilities[token] > 0.02}


# --- how often they are drawn ---


@pytest.mark.parametrize(
    "params", [{}, {"temperature": 0.5}, {"temperature": 4.0}, {"top_p": 0.8}, {"top_k": 7, "min_p": 0.01}], ids=str
)
def test_frequencies_follow_the_softmax_of_what_is_kept(params: dict[str, Any]) -> None:
    wish = SamplingParams(**params)
    logits = np.repeat(random_logits(8, scale=1.0)[:1], ROWS, axis=0)
    state, counts, rounds = random_row_seeds(wish, seed=1), np.zeros(VOCAB), 60
    for _ in range(rounds):
        sampled, state = sample(state, logits)
        counts += np.bincount(np.asarray(sampled.tokens), minlength=VOCAB)
    scaled = logits[0].astype(np.float64) / wish.temperature
    allowed = list(kept_by_reference(scaled[None], wish)[0])
    probabilities = np.zeros(VOCAB)
    probabilities[allowed] = np.exp(scaled[allowed]) / np.exp(scaled[allowed]).sum()
    assert counts.sum() == ROWS * rounds
    assert not counts[probabilities == 0].any()
    assert _chi_square_deviation(counts, probabilities * ROWS * rounds) < 5


def _chi_square_deviation(counts: np.ndarray, expected: np.ndarray) -> float:
    """How many standard deviations chi-square is above its mean. Tokens expected fewer than 5 times are one class."""
    rare = expected < 5
    counts = np.append(counts[~rare], counts[rare].sum())
    expected = np.append(expected[~rare], expected[rare].sum())
    counts, expected = counts[expected > 0], expected[expected > 0]
    freedom = len(counts) - 1
    statistic = ((counts - expected) ** 2 / expected).sum()
    return float((statistic - freedom) / math.sqrt(2 * freedom))


def test_successive_draws_of_a_row_are_not_correlated() -> None:
    flat = np.zeros((ROWS, VOCAB), np.float32)
    state, draws = random_row_seeds(SamplingParams(), seed=2), []
    for _ in range(20):
        sampled, state = sample(state, flat)
        draws.append(np.asarray(sampled.tokens))
    same = np.mean([(a == b).mean() for a, b in itertools.pairwise(draws)])
    num_pairs = ROWS * 19
    assert abs(same - 1 / VOCAB) < 5 * math.sqrt(1 / VOCAB / num_pairs)


def test_a_draw_depends_on_the_rows_seed_and_count_alone() -> None:
    logits = np.repeat(random_logits(9)[:1], ROWS, axis=0)
    wish = SamplingParams(temperature=2.0)
    neighbours = [
        row(SamplingParams(top_k=3), seed=1),
        row(SamplingParams(repetition_penalty=3.0), prompt=(2,), seed=2),
    ]
    alone = stack([row(wish, seed=77)])
    mixed = stack([neighbours[0], row(wish, seed=77), neighbours[1], row(SamplingParams(temperature=0.0))])
    for _ in range(4):
        one, alone = sample(alone, logits)
        other, mixed = sample(mixed, logits)
        tokens = np.asarray(one.tokens)
        assert (tokens == tokens[0]).all()
        assert (np.asarray(other.tokens)[1::4] == tokens[0]).all()


def test_greedy_rows_take_the_best_token_beside_rows_that_draw() -> None:
    logits = random_logits(10)
    state = stack([row(SamplingParams(temperature=0.0, top_k=2)), row(SamplingParams(temperature=50.0), seed=5)])
    sampled, _ = sample(state, logits)
    best = logits.argmax(axis=1)
    assert (np.asarray(sampled.tokens)[::2] == best[::2]).all()
    assert (np.asarray(sampled.tokens)[1::2] != best[1::2]).any()


def test_a_temperature_near_zero_is_nearly_greedy() -> None:
    logits = random_logits(11)
    sampled, _ = sample(random_row_seeds(SamplingParams(temperature=2e-5)), logits)
    assert (np.asarray(sampled.tokens) == logits.argmax(axis=1)).all()


# --- penalties, bias, minimum length ---


def adjusted_by_reference(
    logits: np.ndarray, params: SamplingParams, *, prompt: list[int], generated: list[int]
) -> np.ndarray:
    """vLLM's order: stop tokens barred, bias, repetition, frequency, presence. One logit at a time, in FP64."""
    adjusted = logits.astype(np.float64)
    for token in range(VOCAB):
        value, count = adjusted[token], generated.count(token)
        if len(generated) < params.min_tokens and token in (params.stop_token_ids or ()):
            value = -math.inf
        value += (params.logit_bias or {}).get(token, 0.0)
        if token in prompt or count:
            value = value / params.repetition_penalty if value > 0 else value * params.repetition_penalty
        adjusted[token] = value - params.frequency_penalty * count - params.presence_penalty * (count > 0)
    return adjusted


@pytest.mark.parametrize(
    "wish",
    [
        {"repetition_penalty": 1.7},
        {"repetition_penalty": 0.4},
        {"frequency_penalty": 0.9},
        {"frequency_penalty": -1.1, "presence_penalty": 0.3},
        {"presence_penalty": 1.3},
        {"logit_bias": {3: 2.5, 8: -100.0}},
        {"min_tokens": 5, "stop_token_ids": [0, 6]},
        {
            "repetition_penalty": 1.2,
            "frequency_penalty": 0.7,
            "presence_penalty": -0.4,
            "logit_bias": {1: 3.0, 6: 100.0},
            "min_tokens": 4,
            "stop_token_ids": [6],
        },
    ],
    ids=str,
)
def test_logits_are_adjusted_as_in_the_reference(wish: dict[str, Any]) -> None:
    prompt, generated = [1, 2, 3, 2], [3, 4, 4, 9]
    logits, params = random_logits(12), SamplingParams(**wish)
    counts = np.bincount(generated, minlength=VOCAB).astype(np.int32)
    state = row(params, prompt=tuple(prompt), stop=params.stop_token_ids)
    for past in ([], generated[:3], generated):
        counts = np.bincount(past, minlength=VOCAB).astype(np.int32)
        state = replace(state, counts=counts, drawn=np.array(len(past), np.int32))
        rows = jax.tree.map(lambda value: value[:ROWS], stack([state]))
        ours = np.asarray(compiled("_adjust")(rows, logits))
        theirs = np.stack([adjusted_by_reference(r, params, prompt=prompt, generated=past) for r in logits])
        assert (np.isneginf(ours) == np.isneginf(theirs)).all()
        # Four FP32 operations, each off by at most 2^-24 of the largest value on the way.
        bound = 4 * 2.0**-24 * 200
        np.testing.assert_allclose(ours, theirs, rtol=0, atol=bound)


def test_counts_grow_with_the_tokens_that_are_drawn() -> None:
    state, history = random_row_seeds(SamplingParams(frequency_penalty=0.5)), []
    for step in range(5):
        sampled, state = sample(state, random_logits(step))
        history.append(np.asarray(sampled.tokens))
    want = np.stack([np.bincount(tokens, minlength=VOCAB) for tokens in np.stack(history, axis=1)])
    assert (np.asarray(state.counts)[:ROWS] == want).all()
    assert (np.asarray(state.drawn)[:ROWS] == 5).all()


def test_rows_that_do_not_advance_stay_as_they_are() -> None:
    before = random_row_seeds(SamplingParams())
    advance = np.arange(ROWS) % 3 == 0
    _, after = sample(before, random_logits(13), advance=advance)
    assert (np.asarray(after.drawn)[:ROWS] == advance).all()
    assert (np.asarray(after.counts)[:ROWS].sum(axis=1) == advance).all()
    for name in ("seed", "bias", "temperature", "in_prompt", "is_stop"):
        np.testing.assert_array_equal(getattr(after, name), getattr(before, name))


def test_min_tokens_hold_until_that_many_are_drawn() -> None:
    logits = np.zeros((ROWS, VOCAB), np.float32)
    logits[:, 6] = 50.0
    state = stack(
        [row(SamplingParams(temperature=0.0, min_tokens=3), stop=(6,)), row(SamplingParams(min_tokens=3), stop=(6,))]
    )
    for step in range(4):
        sampled, state = sample(state, logits)
        assert ((np.asarray(sampled.tokens) == 6) == (step == 3)).all()


# --- what is reported ---


def test_reports_are_of_the_models_own_logits() -> None:
    logits = random_logits(14)
    wish = SamplingParams(temperature=7.0, top_k=9, presence_penalty=2.0, logit_bias={5: 6.0}, logprobs=0)
    sampled, _ = sample(random_row_seeds(wish), logits)
    log_probs, tokens = log_softmax(logits), np.asarray(sampled.tokens)
    chosen = log_probs[np.arange(ROWS), tokens]
    # A sum of 37 exponentials and its logarithm, of values up to 10, in FP32.
    bound = 40 * 2.0**-24 * 10
    np.testing.assert_allclose(sampled.logprob, chosen, rtol=0, atol=bound)
    assert (np.asarray(sampled.rank) == 1 + (log_probs > chosen[:, None]).sum(axis=1)).all()
    best = np.argsort(-log_probs, axis=1, kind="stable")[:, :MAX_LOGPROBS]
    np.testing.assert_array_equal(sampled.top_ids, best)
    np.testing.assert_allclose(sampled.top_logprobs, np.take_along_axis(log_probs, best, axis=1), rtol=0, atol=bound)


def test_nothing_is_reported_unless_one_row_of_the_step_wants_it() -> None:
    logits = random_logits(15)
    silent, _ = sample(stack([row(SamplingParams())]), logits)
    mixed, _ = sample(stack([row(SamplingParams())] * 9 + [row(SamplingParams(logprobs=3))]), logits)
    assert (silent.tokens == mixed.tokens).all()
    assert not np.any([silent.logprob.any(), silent.rank.any(), silent.top_ids.any(), silent.top_logprobs.any()])
    assert (np.asarray(mixed.rank) >= 1).all()


def test_equal_tokens_share_a_rank() -> None:
    reported = jax.jit(sampling.report)(jnp.array([[1.0, 3.0, 3.0, 0.0]]), jnp.array([2]))
    assert int(reported.rank[0]) == 1
    assert reported.top_ids.tolist() == [[1, 2, 0, 3]]


# --- rows ---


def test_a_row_holds_what_the_request_asks() -> None:
    params = SamplingParams(temperature=0.5, top_k=-1, logit_bias={3: -2.0}, min_tokens=2, seed=1)
    made = row(params, prompt=(4, 4, 7), stop=(1,), seed=(5 << 32) | 6)
    assert made.temperature == np.float32(0.5)
    assert made.top_k == VOCAB
    assert made.seed.tolist() == [5, 6]
    assert np.flatnonzero(made.in_prompt).tolist() == [4, 7]
    assert np.flatnonzero(made.is_stop).tolist() == [1]
    assert (made.bias[3], np.count_nonzero(made.bias)) == (-2.0, 1)
    assert (made.drawn, made.counts.sum()) == (0, 0)


def test_a_row_is_put_into_its_slot_only() -> None:
    state = sampling.empty_state(3, VOCAB)
    assert state.temperature.shape == (4,)
    changed = jax.jit(sampling.set_row)(state, np.array(2, np.int32), row(SamplingParams(), prompt=(8,), seed=9))
    assert changed.temperature.tolist() == [0.0, 0.0, 1.0, 0.0]
    assert changed.in_prompt[:, 8].tolist() == [False, False, True, False]
