"""From logits to the next token, on the device, inside the step program.

Every running sequence has a row in `SamplerState`. A row's draws depend on its own seed and on how many tokens it has
drawn, on nothing else: a seeded request draws the same numbers whatever it is batched with. Order of operations as in
vLLM.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, fields

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jaxtyping import Array, Bool, Float32, Int32, UInt32

from hmoe_jax.core import AnyArray, record
from hmoe_jax.sampling_params import MAX_LOGPROBS, SamplingParams

NUM_CANDIDATES = 1024
"""Tokens among which the cut is looked for first. Of a trained model's text the nucleus of 0.95 has tens."""


@record
@dataclass(frozen=True)
class SamplerState:
    """One row per sequence, and a last one for padding (or one row alone). Counts are of generated tokens."""

    temperature: Float32[AnyArray, " *s"]
    top_p: Float32[AnyArray, " *s"]
    min_p: Float32[AnyArray, " *s"]
    top_k: Int32[AnyArray, " *s"]
    presence: Float32[AnyArray, " *s"]
    frequency: Float32[AnyArray, " *s"]
    repetition: Float32[AnyArray, " *s"]
    min_tokens: Int32[AnyArray, " *s"]
    drawn: Int32[AnyArray, " *s"]
    wants_logprobs: Bool[AnyArray, " *s"]
    seed: UInt32[AnyArray, "*s 2"]
    counts: Int32[AnyArray, "*s v"]
    in_prompt: Bool[AnyArray, "*s v"]
    bias: Float32[AnyArray, "*s v"]
    is_stop: Bool[AnyArray, "*s v"]


@record
@dataclass(frozen=True)
class Sampled:
    """The drawn tokens, and the log-probabilities of the model itself (before penalties and temperature).

    `rank` 1 is the most probable token. `top_ids` and `top_logprobs` are best first. All but the tokens are zero if no
    row of the step wants log-probabilities.
    """

    tokens: Int32[AnyArray, " b"]
    logprob: Float32[AnyArray, " b"]
    rank: Int32[AnyArray, " b"]
    top_ids: Int32[AnyArray, "b n"]
    top_logprobs: Float32[AnyArray, "b n"]


def empty_state(num_rows: int, vocab_size: int) -> SamplerState:
    """`num_rows` greedy rows, and the one for padding."""
    return jax.tree.map(lambda value: jnp.broadcast_to(value, (num_rows + 1, *value.shape)), empty_row(vocab_size))


def empty_row(vocab_size: int) -> SamplerState:
    """The row (no leading axis, NumPy) of nobody."""
    return sampler_row(SamplingParams(temperature=0.0), vocab_size, prompt_ids=(), stop_ids=(), seed=0)


def sampler_row(
    params: SamplingParams,
    vocab_size: int,
    *,
    prompt_ids: tuple[int, ...],
    stop_ids: tuple[int, ...],
    seed: int,
    drawn_ids: Sequence[int] = (),
) -> SamplerState:
    """The row (no leading axis, NumPy) of a request that has drawn some tokens, or none yet. `stop_ids` may not be
    drawn before `min_tokens`."""

    def mask(ids: tuple[int, ...]) -> np.ndarray:
        row = np.zeros(vocab_size, np.bool_)
        row[list(ids)] = True
        return row

    bias = np.zeros(vocab_size, np.float32)
    for token, value in (params.logit_bias or {}).items():
        bias[token] = value
    return SamplerState(
        temperature=np.array(0.0 if params.is_greedy else params.temperature, np.float32),
        top_p=np.array(params.top_p, np.float32),
        min_p=np.array(params.min_p, np.float32),
        top_k=np.array(min(params.top_k or vocab_size, vocab_size), np.int32),
        presence=np.array(params.presence_penalty, np.float32),
        frequency=np.array(params.frequency_penalty, np.float32),
        repetition=np.array(params.repetition_penalty, np.float32),
        min_tokens=np.array(params.min_tokens, np.int32),
        drawn=np.array(len(drawn_ids), np.int32),
        wants_logprobs=np.array(params.logprobs is not None),
        seed=np.array([(seed >> 32) & 0xFFFFFFFF, seed & 0xFFFFFFFF], np.uint32),
        counts=np.bincount(np.asarray(drawn_ids, np.int64), minlength=vocab_size).astype(np.int32),
        in_prompt=mask(prompt_ids),
        bias=bias,
        is_stop=mask(stop_ids),
    )


def set_row(state: SamplerState, slot: Int32[Array, ""], row: SamplerState) -> SamplerState:
    return jax.tree.map(lambda rows, new: rows.at[slot].set(new), state, row)


def sample(
    state: SamplerState, slots: Int32[Array, " b"], logits: Float32[Array, "b v"], advance: Bool[Array, " b"]
) -> tuple[Sampled, SamplerState]:
    """Draws a token for each of the `slots`; rows that do not `advance` (padding, unfinished prompts) stay."""
    with jax.named_scope("sample"):
        rows = jax.tree.map(lambda value: value[slots], state)
        adjusted = lax.cond(_is_adjusted(rows), _adjust, lambda rows, logits: logits, rows, logits)
        tokens = lax.cond(jnp.any(rows.temperature > 0), _draw, _greedy, rows, adjusted)
        step = advance.astype(jnp.int32)
        counts, drawn = state.counts.at[slots, tokens].add(step), state.drawn.at[slots].add(step)
        # `rows` may not be used from here on: with donated buffers the update is in place.
        new_state = SamplerState(
            **{field.name: getattr(state, field.name) for field in fields(state)} | {"counts": counts, "drawn": drawn}
        )
        return lax.cond(jnp.any(rows.wants_logprobs), report, _report_nothing, logits, tokens), new_state


def report(logits: Float32[Array, "b v"], tokens: Int32[Array, " b"]) -> Sampled:
    """What the model thought of `tokens`, and its own favourites."""
    log_probs = jax.nn.log_softmax(logits, axis=-1)
    chosen = jnp.take_along_axis(log_probs, tokens[:, None], axis=1)
    top_logprobs, top_ids = lax.top_k(log_probs, min(MAX_LOGPROBS, logits.shape[-1]))
    rank = 1 + jnp.sum(log_probs > chosen, axis=-1, dtype=jnp.int32)
    return Sampled(tokens, chosen[:, 0], rank, top_ids, top_logprobs)


def _report_nothing(logits: Float32[Array, "b v"], tokens: Int32[Array, " b"]) -> Sampled:
    """What `report` returns, without looking at the logits: half of a greedy sampler's time is spent there."""
    (b,), n = tokens.shape, min(MAX_LOGPROBS, logits.shape[-1])
    no_ids, no_logprobs = jnp.zeros((b, n), jnp.int32), jnp.zeros((b, n), jnp.float32)
    return Sampled(tokens, jnp.zeros(b, jnp.float32), jnp.zeros(b, jnp.int32), no_ids, no_logprobs)


def _is_adjusted(rows: SamplerState) -> Bool[Array, ""]:
    per_row = (
        (rows.presence != 0)
        | (rows.frequency != 0)
        | (rows.repetition != 1)
        | (rows.drawn < rows.min_tokens)
        | jnp.any(rows.bias != 0, axis=-1)
    )
    return jnp.any(per_row)


def _adjust(rows: SamplerState, logits: Float32[Array, "b v"]) -> Float32[Array, "b v"]:
    too_early = (rows.drawn < rows.min_tokens)[:, None] & rows.is_stop
    logits = jnp.where(too_early, -jnp.inf, logits) + rows.bias
    seen = rows.in_prompt | (rows.counts > 0)
    repetition = jnp.where(seen, rows.repetition[:, None], 1.0)
    logits = jnp.where(logits > 0, logits / repetition, logits * repetition)
    logits = logits - rows.frequency[:, None] * rows.counts
    return logits - rows.presence[:, None] * (rows.counts > 0)


def _greedy(rows: SamplerState, logits: Float32[Array, "b v"]) -> Int32[Array, " b"]:
    return jnp.argmax(logits, axis=-1).astype(jnp.int32)


def _draw(rows: SamplerState, logits: Float32[Array, "b v"]) -> Int32[Array, " b"]:
    is_greedy = rows.temperature == 0
    scaled = logits / jnp.where(is_greedy, 1.0, rows.temperature)[:, None]
    is_cut = (rows.top_k < logits.shape[-1]) | (rows.top_p < 1) | (rows.min_p > 0)
    kept = lax.cond(jnp.any(is_cut & ~is_greedy), _cut, lambda rows, scaled: scaled, rows, scaled)
    # Without the barrier XLA:CPU makes the noise inside the loop of the argmax, one number at a time.
    noisy = lax.optimization_barrier(kept + _noise(rows, logits.shape[-1]))
    drawn = jnp.argmax(noisy, axis=-1).astype(jnp.int32)
    return jnp.where(is_greedy, _greedy(rows, logits), drawn)


def _noise(rows: SamplerState, vocab_size: int) -> Float32[Array, "b v"]:
    """Gumbel noise: the argmax of logits plus it is a draw from their softmax."""

    def row(seed: UInt32[Array, " 2"], drawn: Int32[Array, ""]) -> Float32[Array, " v"]:
        key = jax.random.fold_in(jax.random.wrap_key_data(seed, impl="threefry2x32"), drawn)
        return jax.random.gumbel(key, (vocab_size,), jnp.float32)

    return jax.vmap(row)(rows.seed, rows.drawn)


def _cut(rows: SamplerState, scaled: Float32[Array, "b v"]) -> Float32[Array, "b v"]:
    """-inf for all tokens outside min-p, top-k and (of what those leave) top-p. The best token always stays.

    A token is outside the nucleus if it and all less probable ones together hold at most 1 - top_p. Looked for among
    the best tokens first: sorting a vocabulary of 129,280 takes 50 ms, finding its best 1,024 one.
    """
    best = scaled.max(axis=-1, keepdims=True)
    kept = jnp.where(scaled < best + jnp.log(rows.min_p)[:, None], -jnp.inf, scaled)
    least, is_found = _least_of_best(rows, kept)
    needs_all = ~is_found & (rows.temperature > 0)
    # A row's result is the same whichever rows are beside it, as each takes its own of the two.
    least_of_all = lax.cond(jnp.any(needs_all), _least_of_all, lambda rows, kept: least, rows, kept)
    return jnp.where(kept < jnp.where(is_found, least, least_of_all)[:, None], -jnp.inf, kept)


def _least_of_best(rows: SamplerState, kept: Float32[Array, "b v"]) -> tuple[Float32[Array, " b"], Bool[Array, " b"]]:
    """The least logit that top-k and top-p keep, and whether it lies among the best tokens."""
    vocab_size = kept.shape[-1]
    count = min(NUM_CANDIDATES, vocab_size)
    # Without the barrier XLA:CPU sorts everything: it knows its fast top-k by the one slice that is taken of a sort.
    ordered = lax.optimization_barrier(lax.top_k(kept, count)[0])
    # Tokens as good as the last one may lie outside, unless nothing does.
    last = ordered[:, -1] if count < vocab_size else jnp.full(kept.shape[0], -jnp.inf)
    has_k = rows.top_k < vocab_size
    kth = jnp.take_along_axis(ordered, jnp.minimum(rows.top_k, count)[:, None] - 1, axis=1)[:, 0]
    kth = jnp.where(has_k, kth, -jnp.inf)
    is_kth_found = ~has_k | ((rows.top_k <= count) & ((kth > last) | (count == vocab_size)))
    mass = jnp.exp(ordered - ordered[:, :1]) * (ordered >= kth[:, None])
    total = jnp.where(has_k, mass.sum(axis=-1), jnp.exp(kept - ordered[:, :1]).sum(axis=-1))
    before = jnp.cumsum(mass, axis=-1) - mass
    num_inside = jnp.sum(before < (rows.top_p * total)[:, None], axis=-1)
    edge = jnp.take_along_axis(ordered, jnp.maximum(num_inside, 1)[:, None] - 1, axis=1)[:, 0]
    has_p = rows.top_p < 1
    is_edge_found = ~has_p | (edge > last) | (count == vocab_size)
    return jnp.maximum(kth, jnp.where(has_p, edge, -jnp.inf)), is_kth_found & is_edge_found


def _least_of_all(rows: SamplerState, kept: Float32[Array, "b v"]) -> Float32[Array, " b"]:
    """The least logit that top-k and top-p keep, from the whole vocabulary in order."""
    ascending = jnp.sort(kept, axis=-1)
    vocab_size = kept.shape[-1]
    kth = jnp.take_along_axis(ascending, (vocab_size - rows.top_k)[:, None], axis=1)
    ascending = jnp.where(ascending < kth, -jnp.inf, ascending)
    mass = jnp.cumsum(jax.nn.softmax(ascending, axis=-1), axis=-1)
    outside = mass <= (1.0 - rows.top_p)[:, None]
    outside = outside.at[:, -1].set(False)
    edge = jnp.take_along_axis(ascending, jnp.sum(outside, axis=-1, keepdims=True), axis=1)
    return jnp.maximum(kth, edge)[:, 0]
