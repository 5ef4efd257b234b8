"""What follows the last layer of a streamed prompt: pure functions, one for each step function."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any

from jax import lax
from jaxtyping import Array

from hmoe_jax.architectures import deepseek_v3
from hmoe_jax.architectures.deepseek_v3 import Weights
from hmoe_jax.config import ModelConfig
from hmoe_jax.exec.batch import PrefillBatch
from hmoe_jax.exec.step import StepOutput, prefill, prefill_logits, prefill_scored, sample_row, score
from hmoe_jax.nn.norm import rms_norm
from hmoe_jax.sampling import SamplerState


def _sampled(
    config: ModelConfig, weights: Weights, sampler: SamplerState, batch: PrefillBatch, x: Array, routes: list[Array]
) -> tuple[StepOutput, SamplerState]:
    last = lax.dynamic_slice_in_dim(x, batch.length - 1, 1)
    sampled, sampler = sample_row(weights, sampler, batch, rms_norm(last, weights.norm, config.norm_eps))
    length = len(batch.tokens)
    chosen = deepseek_v3.stack_routes(config, [ids[:length] for ids in routes], num_tokens=length)
    return StepOutput(sampled, chosen), sampler


def _scored(
    config: ModelConfig, weights: Weights, sampler: SamplerState, batch: PrefillBatch, x: Array, routes: list[Array]
) -> tuple[StepOutput, SamplerState]:
    output, sampler = _sampled(config, weights, sampler, batch, x, routes)
    hidden = rms_norm(x[: len(batch.tokens)], weights.norm, config.norm_eps)
    return replace(output, prompt=score(weights, hidden, batch.targets)), sampler


def _logits(
    config: ModelConfig, weights: Weights, sampler: SamplerState, batch: PrefillBatch, x: Array, routes: list[Array]
) -> tuple[Array, SamplerState]:
    hidden = rms_norm(x[: len(batch.tokens)], weights.norm, config.norm_eps)
    return deepseek_v3.logits(weights, hidden), sampler


TAILS: dict[Any, Callable[..., Any]] = {prefill: _sampled, prefill_scored: _scored, prefill_logits: _logits}
"""What follows the last layer, by the step function that does the same in one program."""
