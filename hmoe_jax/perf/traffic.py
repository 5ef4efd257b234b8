"""Bytes that a step has to read at least, stage by stage: each weight once, and the live part of the cache."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable
from dataclasses import dataclass

from hmoe_jax.perf.hlo import Instruction
from hmoe_jax.perf.programs import Program
from hmoe_jax.perf.scopes import scope_of_parameter


@dataclass(frozen=True)
class Load:
    """One execution of a step program: its new tokens, its sequences, and the cached tokens that they look at."""

    program: Program
    tokens: int
    sequences: int
    context_tokens: int


def stage_bytes(loads: Iterable[Load], *, expert_bytes: int | None) -> dict[str, int]:
    """By stage, from the arguments of the compiled programs: what a program does not use is not counted.

    `expert_bytes` are those that native kernels have read; None where experts are arguments of the programs, which
    read them all. Writes and intermediate values are not counted: a stage that moves more than this wastes time, and
    its per cent of the limit say so.
    """
    total: Counter[str] = Counter()
    for load in loads:
        for parameter in load.program.module.parameters:
            scope = scope_of_parameter(parameter.op_name)
            if scope is not None:
                total[scope.stage] += _bytes_read(parameter, load)
    if expert_bytes is not None:
        total["experts"] += expert_bytes
    return dict(total)


def _bytes_read(parameter: Instruction, load: Load) -> int:
    """The rows that a table is asked for, or the whole of a weight."""
    path, num_bytes = parameter.op_name, parameter.num_bytes
    if path == "weights.embed":
        return num_bytes // parameter.shape[0] * load.tokens
    if path.startswith("state.caches"):
        pages, slots = parameter.shape[:2]
        return num_bytes // (pages * slots) * load.context_tokens
    if path.startswith("state.sampler"):
        return num_bytes // parameter.shape[0] * load.sequences
    return num_bytes
