"""Rounds over all cases of a format and a number of threads, the hardware's limits measured anew in each."""

from __future__ import annotations

import statistics
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import numpy as np

from benchmarks.cases import Batch, Case, Limits, Result, Sample
from benchmarks.sides import Side
from hmoe_jax.kernels.pool import ThreadPool
from hmoe_jax.quant.formats import Format

AGREEMENT = 0.02
"""Of the largest output. Sides differ in what they round to BF16 (2**-9 each time), and not in much else."""


@dataclass(frozen=True)
class Effort:
    """How long to measure: rounds, seconds of a case's visit in each, and the longest call that is tried again.

    Where a call took longer than `max_call_s`, the same side is not asked for more tokens.
    """

    rounds: int
    visit_s: float
    max_call_s: float
    read_megabytes: int


@dataclass(frozen=True)
class Group:
    """What is compared with each other. `pools` are by ISA, those of our sides; all have `threads` threads."""

    format: Format
    threads: int
    pools: Mapping[str, ThreadPool]
    sides: Sequence[Side]
    batches: Sequence[Batch]


def measure(group: Group, effort: Effort, *, tick: Callable[[str], None]) -> list[Result]:
    """A B A B: every side in turn at each number of tokens, round after round. `tick` is told of every visit."""
    check_agreement(group)
    samples: dict[Case, list[Sample]] = {}
    slow: dict[str, int] = {}
    for _ in range(effort.rounds):
        limits = _limits(group, effort)
        for batch in group.batches:
            for side in group.sides:
                case = Case(group.format.codec, group.threads, batch.tokens, side.by)
                tick(f"{case.format} {case.by} {case.threads}x{case.tokens}")
                if batch.tokens > slow.get(side.by, batch.tokens):
                    continue
                times = side.visit(batch, seconds=effort.visit_s)
                sample = Sample(statistics.median(times), min(times), len(times), limits[side.by])
                samples.setdefault(case, []).append(sample)
                if sample.seconds > effort.max_call_s:
                    slow[side.by] = min(batch.tokens, slow.get(side.by, batch.tokens))
    batches = {batch.tokens: batch for batch in group.batches}
    return [_result(case, batches[case.tokens], group.format, each) for case, each in samples.items()]


def check_agreement(group: Group) -> None:
    """Raises `ValueError` where a side computes something else than the first: then there is nothing to compare."""
    batch = group.batches[0]
    first, *others = group.sides
    expected = first.output(batch)
    for side in others:
        error = float(np.abs(side.output(batch) - expected).max() / np.abs(expected).max())
        if not error < AGREEMENT:
            raise ValueError(
                f"{group.format.codec}: {side.by} and {first.by} disagree by {error:.2%} of the largest output, "
                f"expected less than {AGREEMENT:.0%}"
            )


def _limits(group: Group, effort: Effort) -> dict[str, Limits]:
    """By side. One measurement of reads is for all: it does not depend on the ISA."""
    read = next(iter(group.pools.values())).read_gbps(megabytes=effort.read_megabytes)
    dots = {isa: pool.dot_gmacs() for isa, pool in group.pools.items()}
    return {side.by: Limits(read, dots.get(side.by)) for side in group.sides}


def _result(case: Case, batch: Batch, format_: Format, samples: Sequence[Sample]) -> Result:
    return Result(case, batch.distinct_bytes(format_), batch.multiply_adds, batch.reuse_bytes(format_), samples)
