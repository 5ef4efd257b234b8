"""Times an executor's steps and records them under the profiler."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass

from hmoe_jax.exec.programs import Executor
from hmoe_jax.exec.session import Session
from hmoe_jax.perf import trace
from hmoe_jax.perf.programs import Program
from hmoe_jax.perf.report import Profile
from hmoe_jax.perf.stages import mean_op_seconds, slowest, stage_seconds
from hmoe_jax.perf.traffic import Load, stage_bytes

WARM_STEPS = 3
PREFILLS = 3
"""How often the prompt is run to time it, and again to trace it."""


@dataclass(frozen=True)
class Measured:
    """A kind of step, timed without the profiler and recorded with it."""

    name: str
    tokens: int
    untraced_s: float
    recording: bytes
    steps: list[trace.Step]
    num_bytes: Mapping[str, int]


def measure(session: Session, compiled: Mapping[str, Program], *, num_steps: int) -> list[Measured]:
    """A prefill, and `num_steps` of decode: each once to warm up, then timed, then recorded."""
    for sequence in session.sequences:
        session.prefill(sequence)
    first = session.sequences[0]
    prefill = _time_and_record(
        session,
        ("prefill", lambda: session.prefill(first), PREFILLS),
        tokens=len(first.prompt),
        loads=lambda: _prefill_loads(session, compiled),
    )
    for _ in range(WARM_STEPS):
        session.decode()
    # The context grows by a token a step: its mean is that of the step in the middle.
    decode = _time_and_record(
        session,
        ("decode", session.decode, num_steps),
        tokens=len(session.sequences),
        loads=lambda: [_decode_load(session, compiled, ahead=num_steps // 2)],
    )
    return [prefill, decode]


def _time_and_record(
    session: Session, work: tuple[str, Callable[[], None], int], *, tokens: int, loads: Callable[[], list[Load]]
) -> Measured:
    """`work` is (name, call, how often). `loads` is asked just before the recorded calls."""
    name, call, count = work
    before, seconds = _expert_bytes(session.executor), []
    for _ in range(count):
        begin = time.perf_counter()
        call()
        seconds.append(time.perf_counter() - begin)
    after = _expert_bytes(session.executor)
    expert_bytes = (after - before) // count if before is not None and after is not None else None
    num_bytes = stage_bytes(loads(), expert_bytes=expert_bytes)
    recording = trace.record(name, call, num_steps=count)
    return Measured(name, tokens, statistics.median(seconds), recording, trace.read_steps(recording), num_bytes)


def profile(measured: Measured, modules: Mapping[str, Program], *, limit_gbps: float, num_slowest: int) -> Profile:
    """Where the time of the recorded steps went. `modules` are the compiled programs by their HLO module's name."""
    charged = mean_op_seconds(measured.steps, modules)
    return Profile(
        name=measured.name,
        tokens=measured.tokens,
        seconds=stage_seconds(charged, modules),
        num_bytes=measured.num_bytes,
        roofline_gbps=limit_gbps,
        untraced_s=measured.untraced_s,
        slowest=slowest(charged, modules, count=num_slowest),
    )


def _prefill_loads(session: Session, compiled: Mapping[str, Program]) -> list[Load]:
    """What one call of `prefill` asks of memory."""
    return [
        Load(compiled[f"prefill_{len(piece.tokens)}"], int(piece.length), 1, int(piece.start + piece.length))
        for piece in session.pieces(session.sequences[0])
    ]


def _decode_load(session: Session, compiled: Mapping[str, Program], *, ahead: int) -> Load:
    """What the call of `decode` after `ahead` more of them asks of memory."""
    count = len(session.sequences)
    program = compiled[f"decode_{session.executor.buckets.for_decode(count)}"]
    return Load(program, count, count, sum(each.position + 1 + ahead for each in session.sequences))


def _expert_bytes(executor: Executor) -> int | None:
    return executor.expert_stats().expert_bytes if executor.expert_stats else None
