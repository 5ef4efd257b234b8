"""A trace with the source's words in it, for a trace viewer (ui.perfetto.dev, chrome://tracing).

The profiler's own file shows `ffi_call.44`; this one shows layer2 > experts > hmoe_moe_experts, one below the other.
Format: Trace Event Format, complete events, times in microseconds.
"""

from __future__ import annotations

import gzip
import json
from collections.abc import Callable, Iterable, Mapping, Sequence
from itertools import groupby
from typing import Any

from hmoe_jax.perf.programs import Program
from hmoe_jax.perf.trace import Op, Step


def to_json_gz(steps: Sequence[Step], programs: Mapping[str, Program]) -> bytes:
    """The whole file. `programs` are by module name."""
    events = [event for step in steps for event in _step_events(step, programs)]
    names = sorted({event["tid"] for event in events})
    numbers = {name: number for number, name in enumerate(names)}
    threads = [
        {"ph": "M", "name": "thread_name", "pid": 0, "tid": number, "args": {"name": name}}
        for name, number in numbers.items()
    ]
    for event in events:
        event["tid"] = numbers[event["tid"]]
    # No time of writing in the header: the same steps give the same file.
    return gzip.compress(json.dumps({"traceEvents": [*threads, *events]}).encode(), mtime=0)


def _step_events(step: Step, programs: Mapping[str, Program]) -> list[dict[str, Any]]:
    ops = sorted((op for op in step.ops if op.module in programs), key=lambda op: (op.thread, op.start_s, -op.end_s))
    events = [_event(step.name, "steps", step.start_s, step.end_s)]
    for thread, members in groupby(ops, key=lambda op: op.thread):
        of_thread = list(members)
        events += _merged(of_thread, thread, lambda op: (programs[op.module].scope_of(op.name).layer,))
        events += _merged(of_thread, thread, lambda op: _scope(programs, op))
        events += [_op_event(op, programs[op.module]) for op in of_thread]
    return events


def _scope(programs: Mapping[str, Program], op: Op) -> tuple[str, str]:
    scope = programs[op.module].scope_of(op.name)
    return scope.layer, scope.stage


def _merged(ops: Iterable[Op], thread: str, key: Callable[[Op], tuple[str, ...]]) -> list[dict[str, Any]]:
    """One slice for each run of neighbours with the same key, named by the key's last word; none for ""."""
    slices = []
    for words, members in groupby(ops, key=key):
        group = list(members)
        if words[-1]:
            slices.append(_event(words[-1], thread, group[0].start_s, max(op.end_s for op in group)))
    return slices


def _op_event(op: Op, program: Program) -> dict[str, Any]:
    instruction = program.module.by_name.get(op.name)
    args = {"hlo": op.name, "type": program.type_of(op.name), "op_name": instruction.op_name if instruction else ""}
    return _event(program.label(op.name), op.thread, op.start_s, op.end_s) | {"args": args}


def _event(name: str, thread: str, start_s: float, end_s: float) -> dict[str, Any]:
    return {"ph": "X", "name": name, "pid": 0, "tid": thread, "ts": start_s * 1e6, "dur": (end_s - start_s) * 1e6}
