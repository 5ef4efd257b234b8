"""Sequences that decode, and a long prompt: one after the other, and beside each other, in turn on one engine."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field

import numpy as np

from hmoe_jax.engine import Engine
from hmoe_jax.sampling_params import SamplingParams

SETTLING_STEPS = 3
"""After sequences have joined, before steps are timed."""


@dataclass(frozen=True)
class Load:
    """`batch` sequences that look back at `context` tokens and more, beside prompts of `prompt_len` tokens."""

    batch: int
    context: int
    prompt_len: int

    def max_len(self, *, num_rounds: int, num_steps: int) -> int:
        """The longest sequence of a measurement: beside a prompt there may be many times as many steps as alone."""
        return max(self.context + 64 * num_rounds * num_steps, self.prompt_len + 1)


@dataclass(frozen=True)
class Traffic:
    """What host memory and the link have moved between two looks, `seconds` after the beginning."""

    seconds: float
    expert_gbps: float
    copied_gbps: float


@dataclass
class Round:
    """Seconds of each decode step alone and beside the prompt; of the prompt alone, and beside decoding. Of all the
    steps alone: `experts_s` in which the CPU computed routed experts, `waited_s` in which the device awaited them."""

    alone_s: list[float]
    experts_s: float
    waited_s: float
    beside_s: list[float]
    prompt_alone_s: float
    prompt_beside_s: float
    traffic: list[Traffic] = field(default_factory=list)


@dataclass(frozen=True)
class Measured:
    """Of all rounds together: medians."""

    load: Load
    rounds: list[Round]

    @property
    def alone_s(self) -> float:
        return statistics.median(s for each in self.rounds for s in each.alone_s)

    @property
    def beside_s(self) -> float:
        return statistics.median(s for each in self.rounds for s in each.beside_s)

    @property
    def mean_slowdown(self) -> float:
        """Of the time between tokens on the average, which `max_decode_slowdown` steers."""
        return statistics.median(
            statistics.mean(each.beside_s) / statistics.mean(each.alone_s) - 1 for each in self.rounds
        )

    @property
    def slowdown(self) -> float:
        """Of the median time between tokens."""
        return statistics.median(
            statistics.median(each.beside_s) / statistics.median(each.alone_s) - 1 for each in self.rounds
        )

    @property
    def prompt_alone_s(self) -> float:
        return statistics.median(each.prompt_alone_s for each in self.rounds)

    @property
    def prompt_beside_s(self) -> float:
        return statistics.median(each.prompt_beside_s for each in self.rounds)

    @property
    def experts_share(self) -> float:
        """Of a decode step alone."""
        return statistics.median(each.experts_s / sum(each.alone_s) for each in self.rounds)

    @property
    def ideal_gain(self) -> float:
        """If the prompt were computed whenever the device would wait, as fast as alone, and nobody were late."""
        return statistics.median(each.waited_s / sum(each.alone_s) for each in self.rounds)

    @property
    def gain(self) -> float:
        """In throughput: how much longer the same steps and the same prompt take one after the other."""
        return statistics.median(in_turns_s(each) / each.prompt_beside_s - 1 for each in self.rounds)


def in_turns_s(one: Round) -> float:
    """The steps that there were beside the prompt, each as long as alone, and then the prompt."""
    return len(one.beside_s) * statistics.mean(one.alone_s) + one.prompt_alone_s


def measure(engine: Engine, load: Load, *, num_rounds: int, num_steps: int) -> Measured:
    """Rounds of `num_steps` steps alone, a prompt beside decoding, as many steps again, and the prompt alone."""
    draw = np.random.default_rng(0)
    prompts = (draw.integers(2, engine.config.vocab_size, load.prompt_len).tolist() for _ in iter(int, 1))
    contexts = [draw.integers(2, engine.config.vocab_size, load.context).tolist() for _ in range(load.batch)]
    for context in contexts:  # the prefix cache has them from now on
        _run_prompt(engine, context)
    with _decoding(engine, contexts):
        _run_prompt(engine, next(prompts))
    rounds = [_round(engine, contexts, prompts, num_steps=num_steps) for _ in range(num_rounds)]
    return Measured(load, rounds)


def _round(engine: Engine, contexts: list[list[int]], prompts: Iterator[list[int]], *, num_steps: int) -> Round:
    with _decoding(engine, contexts):
        alone_s, experts_s, waited_s = _steps(engine, num_steps)
        traffic: list[Traffic] = []
        beside_s, prompt_beside_s = _run_prompt(engine, next(prompts), traffic)
        after_s, experts_after_s, waited_after_s = _steps(engine, num_steps)
    _, prompt_alone_s = _run_prompt(engine, next(prompts))
    return Round(
        alone_s=[*alone_s, *after_s],
        experts_s=experts_s + experts_after_s,
        waited_s=waited_s + waited_after_s,
        beside_s=beside_s,
        prompt_alone_s=prompt_alone_s,
        prompt_beside_s=prompt_beside_s,
        traffic=traffic,
    )


def _steps(engine: Engine, count: int) -> tuple[list[float], float, float]:
    """Seconds of each; those of all in which experts were computed, and in which they were awaited."""
    before = engine.metrics()
    steps_s = [_timed(engine.step) for _ in range(count)]
    after = engine.metrics()
    return steps_s, after.experts_busy_s - before.experts_busy_s, after.experts_waited_s - before.experts_waited_s


@contextmanager
def _decoding(engine: Engine, contexts: list[list[int]]) -> Iterator[None]:
    """While sequences with these prompts decode."""
    forever = SamplingParams(max_tokens=None, temperature=0.0, ignore_eos=True)
    names = {f"context {index}" for index in range(len(contexts))}
    for name, ids in zip(sorted(names), contexts, strict=True):
        engine.add_request(name, {"prompt_token_ids": ids}, forever)
    silent = set(names)
    while silent:
        silent -= {output.request_id for output in engine.step()}
    for _ in range(SETTLING_STEPS):
        engine.step()
    yield
    engine.abort(names)
    engine.step()


def _run_prompt(engine: Engine, prompt: list[int], traffic: list[Traffic] | None = None) -> tuple[list[float], float]:
    """Seconds of each step until the prompt has its first token, and of all."""
    engine.add_request("prompt", {"prompt_token_ids": prompt}, SamplingParams(max_tokens=1, temperature=0.0))
    steps_s, begin, is_done = [], time.perf_counter(), False
    look = _Look(engine, begin)
    while not is_done:
        step_begin = time.perf_counter()
        is_done = any(output.request_id == "prompt" and output.finished for output in engine.step())
        steps_s.append(time.perf_counter() - step_begin)
        if traffic is not None:
            traffic.append(look())
    return steps_s, time.perf_counter() - begin


class _Look:
    def __init__(self, engine: Engine, begin: float):
        self._engine, self._begin = engine, begin
        self._before = self._now()

    def _now(self) -> tuple[float, int, int]:
        metrics = self._engine.metrics()
        return time.perf_counter(), metrics.expert_bytes, metrics.copied_bytes

    def __call__(self) -> Traffic:
        (before_s, read, copied), self._before = self._before, self._now()
        now_s, now_read, now_copied = self._before
        seconds = now_s - before_s
        return Traffic(now_s - self._begin, (now_read - read) / seconds / 1e9, (now_copied - copied) / seconds / 1e9)


def _timed(act: Callable[[], object]) -> float:
    begin = time.perf_counter()
    act()
    return time.perf_counter() - begin
