"""From a trace to seconds per stage that add up to the step."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from enum import IntEnum

from hmoe_jax.perf.programs import Program
from hmoe_jax.perf.scopes import OTHER, STAGES
from hmoe_jax.perf.trace import Op, Step

BETWEEN = "between ops"
"""A program is running, but none of its operations: the runtime picks the next one."""

HOST = "host"
"""No program is running: Python, dispatch, and the copies of results."""

ROWS = (*STAGES, OTHER, BETWEEN, HOST)

OpKey = tuple[str, str]
"""(program's module, instruction)"""


@dataclass(frozen=True)
class OpGroup:
    """Instructions of one stage that do the same: most often one in every layer, or a few.

    `label` is a custom call's target, or a name that XLA has made from what it fused. `type` is that of the result.
    """

    stage: str
    label: str
    type: str
    count: int
    seconds: float


class _Rank(IntEnum):
    """Who is charged for a moment in which several are active: the highest."""

    STEP = 0
    RUN = 1
    CONTROL = 2
    OP = 3


@dataclass(frozen=True)
class _Span:
    key: OpKey
    rank: _Rank
    thread: str
    start_s: float
    end_s: float


def op_seconds(step: Step, programs: Mapping[str, Program]) -> dict[OpKey, float]:
    """Every moment of a step charged once: the values add up to `step.duration_s`. `programs` are by module name.

    A moment belongs to the innermost operation of each thread, in equal parts if several threads work; a loop or a
    branch is charged only while nothing inside it runs. The keys ("", `BETWEEN`) and ("", `HOST`) take the rest, and
    what programs run that are not in `programs`.
    """
    ops = [op for op in step.ops if op.module in programs and op.end_s > op.start_s]
    spans = [_Span(("", HOST), _Rank.STEP, "", step.start_s, step.end_s), *_runs(ops, step)]
    spans += [_op_span(op, step, programs[op.module]) for op in ops]
    # At one moment ends come first, and of several beginnings the longest one: it contains the others.
    edges = sorted(
        [(span.end_s, 0, 0.0, index) for index, span in enumerate(spans)]
        + [(span.start_s, 1, -span.end_s, index) for index, span in enumerate(spans)]
    )
    charged: dict[OpKey, float] = defaultdict(float)
    active: dict[str, list[_Span]] = defaultdict(list)
    now = step.start_s
    for moment, is_start, _, index in edges:
        _charge(charged, active, moment - now)
        now = moment
        stack = active[spans[index].thread]
        if is_start:
            stack.append(spans[index])
        else:
            stack.remove(spans[index])
    return dict(charged)


def mean_op_seconds(steps: Sequence[Step], programs: Mapping[str, Program]) -> dict[OpKey, float]:
    """The mean over the middle half of the steps, by duration: as additive as a mean, nearly as robust as a median."""
    if not steps:
        raise ValueError("no steps were recorded")
    ordered = sorted(steps, key=lambda step: step.duration_s)
    quarter = len(ordered) // 4
    middle = ordered[quarter : len(ordered) - quarter]
    total: dict[OpKey, float] = defaultdict(float)
    for step in middle:
        for key, seconds in op_seconds(step, programs).items():
            total[key] += seconds / len(middle)
    return dict(total)


def stage_seconds(charged: Mapping[OpKey, float], programs: Mapping[str, Program]) -> dict[str, float]:
    """One value for each of `ROWS`; they add up to the same as `charged`."""
    seconds = dict.fromkeys(ROWS, 0.0)
    for (module, name), value in charged.items():
        seconds[name if not module else programs[module].scope_of(name).stage] += value
    return seconds


def slowest(charged: Mapping[OpKey, float], programs: Mapping[str, Program], *, count: int) -> list[OpGroup]:
    """The groups of instructions that take longest, longest first."""
    groups: dict[tuple[str, str, str], list[float]] = defaultdict(list)
    for (module, name), seconds in charged.items():
        if module:
            program = programs[module]
            groups[program.scope_of(name).stage, program.label(name), program.type_of(name)].append(seconds)
    ordered = sorted(groups.items(), key=lambda item: -sum(item[1]))
    return [OpGroup(*key, len(seconds), sum(seconds)) for key, seconds in ordered[:count]]


def _charge(charged: dict[OpKey, float], active: Mapping[str, list[_Span]], seconds: float) -> None:
    innermost = [stack[-1] for stack in active.values() if stack]
    if not innermost or seconds <= 0:
        return
    rank = max(span.rank for span in innermost)
    working = [span for span in innermost if span.rank == rank]
    for span in working:
        charged[span.key] += seconds / len(working)


def _runs(ops: Sequence[Op], step: Step) -> list[_Span]:
    """From the first to the last operation of each execution of a program."""
    runs: dict[tuple[str, int], list[Op]] = defaultdict(list)
    for op in ops:
        runs[op.module, op.run].append(op)
    return [
        _Span(
            ("", BETWEEN),
            _Rank.RUN,
            f"{module} {run}",
            min(op.start_s for op in members),
            min(step.end_s, max(op.end_s for op in members)),
        )
        for (module, run), members in runs.items()
    ]


def _op_span(op: Op, step: Step, program: Program) -> _Span:
    rank = _Rank.CONTROL if program.is_control(op.name) else _Rank.OP
    return _Span((op.module, op.name), rank, op.thread, op.start_s, min(op.end_s, step.end_s))
