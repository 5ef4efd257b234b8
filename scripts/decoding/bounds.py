"""What the hardware allows: bytes over read bandwidth for a decode, multiply-adds over the dot peak for a prefill."""

from __future__ import annotations

from collections.abc import Mapping

from hmoe_jax.config import ModelConfig
from hmoe_jax.exec.session import Session
from hmoe_jax.kernels.pool import ThreadPool
from hmoe_jax.perf import programs
from hmoe_jax.perf.sizes import count_parameters
from hmoe_jax.perf.traffic import Load, stage_bytes


def decode_bytes(session: Session, *, expert_bytes: int) -> Mapping[str, int]:
    """By stage, what the next decode step reads at least: each weight once, and the cache of its sequences."""
    count = len(session.sequences)
    compiled = session.executor.programs["decode", session.executor.buckets.for_decode(count)]
    context = sum(each.position + 1 for each in session.sequences)
    return stage_bytes([Load(programs.inspect(compiled), count, count, context)], expert_bytes=expert_bytes)


def prefill_flops(config: ModelConfig, num_tokens: int) -> float:
    """Two per multiply-add of a prompt: every token's matrices, one token's head, and causal attention."""
    count = count_parameters(config)
    head = config.vocab_size * config.hidden_size
    pairs = num_tokens * (num_tokens + 1) / 2
    attention = config.num_layers * config.num_heads * (config.qk_dim + config.v_dim) * pairs
    return 2.0 * ((count.active - head) * num_tokens + head + attention)


def dot_gflops(pool: ThreadPool) -> float:
    """The multiply-add peak of the pool's instruction set: two operations each."""
    return 2 * pool.dot_gmacs()
