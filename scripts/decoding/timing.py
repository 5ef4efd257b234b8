"""Steps of an executor timed between measurements of the limit, so that what slows one slows the other."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from typing import Any

import jax
import numpy as np

from decoding.bounds import decode_bytes, dot_gflops, prefill_flops
from hmoe_jax.exec.open import open_executor
from hmoe_jax.exec.plan import EngineOptions
from hmoe_jax.exec.session import Session
from hmoe_jax.kernels.pool import ThreadPool

WARM_STEPS = 3
STEPS_PER_ROUND = 8
READ_MEGABYTES = 512
"""Of one measurement of the read bandwidth: larger than every cache, and a tenth of a second long."""


@dataclass(frozen=True)
class DecodeResult:
    """Medians over the rounds; `ratio` is that of step to bound in the same round. `num_bytes` is by stage, per step.

    `load` is tokens per expert `[m, e]` over the prompts.
    """

    num_layers: int
    batch: int
    context: int
    step_s: float
    read_gbps: float
    ratio: float
    num_bytes: Mapping[str, int]
    load: np.ndarray

    @property
    def step_bytes(self) -> int:
        return sum(self.num_bytes.values())

    @property
    def tok_per_s(self) -> float:
        return self.batch / self.step_s


@dataclass(frozen=True)
class PrefillResult:
    """Medians over the rounds."""

    num_tokens: int
    seconds: float
    flops: float
    dot_gflops: float

    @property
    def gflops(self) -> float:
        return self.flops / self.seconds / 1e9

    @property
    def tok_per_s(self) -> float:
        return self.num_tokens / self.seconds


def time_decode(
    model: str, options: Mapping[str, Any], text: Sequence[int], *, batch: int, context: int, num_rounds: int
) -> DecodeResult:
    """Steps of `batch` sequences, each with `context` tokens in the middle of the measurement."""
    num_steps = WARM_STEPS + num_rounds * STEPS_PER_ROUND
    prompt_len = context - num_steps // 2
    if prompt_len < 1:
        raise ValueError(f"--context={context} is too short for {num_steps} steps around it: lower --rounds")
    with _session(model, options, text, batch=batch, prompt_len=prompt_len, num_steps=num_steps) as (session, pool):
        routes = [_prefill(session, sequence) for sequence in session.sequences]
        for _ in range(WARM_STEPS):
            session.decode()
        rounds = [_decode_round(session, pool) for _ in range(num_rounds)]
        step_s, read_gbps, expert_bytes = zip(*rounds, strict=True)
        num_bytes = decode_bytes(session, expert_bytes=int(np.mean(expert_bytes)))
        fixed = sum(num_bytes.values()) - num_bytes["experts"]
        ratios = [s / ((fixed + e) / gbps / 1e9) for s, gbps, e in rounds]
        config = session.executor.config
        return DecodeResult(
            num_layers=config.num_layers,
            batch=batch,
            context=context,
            step_s=statistics.median(step_s),
            read_gbps=statistics.median(read_gbps),
            ratio=statistics.median(ratios),
            num_bytes=num_bytes,
            load=np.stack([np.bincount(ids[ids >= 0], minlength=config.num_experts) for ids in np.hstack(routes)]),
        )


def time_prefill(
    model: str, options: Mapping[str, Any], text: Sequence[int], *, lengths: Sequence[int], num_rounds: int
) -> list[PrefillResult]:
    """Whole prompts of each length, each in one piece."""
    results = []
    for length in lengths:
        wishes = {**options, "max_prefill_tokens": length}
        with _session(model, wishes, text, batch=1, prompt_len=length, num_steps=1) as (session, pool):
            _prefill(session, session.sequences[0])  # compiles
            rounds = [
                (_seconds(partial(session.prefill, session.sequences[0])), dot_gflops(pool)) for _ in range(num_rounds)
            ]
            flops = prefill_flops(session.executor.config, length)
        seconds, peaks = zip(*rounds, strict=True)
        results.append(PrefillResult(length, statistics.median(seconds), flops, statistics.median(peaks)))
    return results


@contextmanager
def _session(
    model: str, options: Mapping[str, Any], text: Sequence[int], *, batch: int, prompt_len: int, num_steps: int
) -> Iterator[tuple[Session, ThreadPool]]:
    """Sequences whose prompts are parts of the text, and a pool like the executor's, to measure the limits with."""
    wishes = {**options, "max_model_len": prompt_len + num_steps, "max_num_seqs": batch}
    executor, plan = open_executor(model, EngineOptions(**wishes))
    try:
        if executor.expert_stats is None:
            raise ValueError(f"executor {plan.executor!r} does not read experts from memory: use --executor=fused")
        session = Session(executor, prompt_len=prompt_len, num_steps=num_steps)
        for index, sequence in enumerate(session.sequences):
            begin = index * len(text) // batch
            sequence.prompt = np.resize(np.roll(text, -begin), prompt_len).tolist()
        with ThreadPool(plan.num_threads, isa=plan.isa) as pool:
            yield session, pool
    finally:
        executor.close()


def _prefill(session: Session, sequence: Any) -> np.ndarray:
    """Runs the prompt; returns the expert ids of its tokens `[m, t, k]`."""
    session.prefill(sequence)
    return np.hstack([jax.device_get(session.executor.step(piece).routes) for piece in session.pieces(sequence)])


def _decode_round(session: Session, pool: ThreadPool) -> tuple[float, float, int]:
    """(median seconds of a step, GB/s measured before and after, bytes of experts per step)"""
    stats = session.executor.expert_stats
    assert stats is not None
    before_gbps, before = pool.read_gbps(megabytes=READ_MEGABYTES), stats().expert_bytes
    seconds = statistics.median(_seconds(session.decode) for _ in range(STEPS_PER_ROUND))
    expert_bytes = (stats().expert_bytes - before) // STEPS_PER_ROUND
    return seconds, (before_gbps + pool.read_gbps(megabytes=READ_MEGABYTES)) / 2, expert_bytes


def _seconds(work: Callable[[], object]) -> float:
    begin = time.perf_counter()
    work()
    return time.perf_counter() - begin
