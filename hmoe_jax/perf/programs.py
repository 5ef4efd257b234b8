"""What a compiled program is: its HLO, XLA's own estimates, and the custom calls in it."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property
from typing import Any

from hmoe_jax.perf.hlo import Module, parse
from hmoe_jax.perf.scopes import OTHER, Scope, scopes

_CONTROL = ("while", "conditional", "call")


@dataclass(frozen=True)
class Program:
    """`text` is the optimised HLO. `cost` and `memory` are what XLA says, {} where the platform says nothing.

    XLA's `flops` count a loop's body once and a custom call as nothing: they are a floor.
    """

    text: str
    cost: Mapping[str, float]
    memory: Mapping[str, int]

    @cached_property
    def module(self) -> Module:
        return parse(self.text)

    @cached_property
    def scopes(self) -> dict[str, Scope]:
        """The scope of every instruction, by name."""
        return scopes(self.module)

    def scope_of(self, name: str) -> Scope:
        """For an instruction that a trace names; what XLA's runtime adds of its own is `OTHER`."""
        return self.scopes.get(name, Scope("", OTHER))

    def label(self, name: str) -> str:
        """What an instruction does: the target of a custom call, else its name without the number."""
        instruction = self.module.by_name.get(name)
        return (instruction.target if instruction else "") or re.sub(r"[.\d]+$", "", name)

    def type_of(self, name: str) -> str:
        """Dtype and shape of an instruction's result, without the layout; "" for a tuple."""
        instruction = self.module.by_name.get(name)
        return "" if instruction is None or instruction.type.startswith("(") else instruction.type.partition("{")[0]

    def is_control(self, name: str) -> bool:
        """Whether it only runs others: a loop, a branch, a call."""
        instruction = self.module.by_name.get(name)
        return instruction is not None and instruction.opcode in _CONTROL

    @property
    def custom_calls(self) -> dict[str, dict[str, int]]:
        """How often the text has each target, and in which stages."""
        calls: dict[str, Counter[str]] = {}
        for call in self.module.custom_calls:
            calls.setdefault(call.target, Counter())[self.scope_of(call.name).stage] += 1
        return {target: dict(stages) for target, stages in calls.items()}

    def summary(self) -> dict[str, Any]:
        """All but the text, for JSON."""
        return {
            "module": self.module.name,
            "num_instructions": sum(1 for _ in self.module.instructions()),
            "custom_calls": self.custom_calls,
            "memory": dict(self.memory),
            "cost": dict(self.cost),
        }


def inspect(compiled: Any) -> Program:
    """A compiled executable of JAX's (`jax.stages.Compiled`)."""
    return Program(text=compiled.as_text(), cost=_cost(compiled), memory=_memory(compiled))


def table(programs: Mapping[str, Program]) -> str:
    """One line for each program."""
    header = f"{'program':<20}{'instructions':>14}{'MFLOP':>10}{'temp MB':>10}  custom calls"
    return "\n".join([header, *(_line(name, program) for name, program in programs.items())])


def _line(name: str, program: Program) -> str:
    calls = {target: sum(stages.values()) for target, stages in program.custom_calls.items()}
    flops, temp = program.cost.get("flops", 0) / 1e6, program.memory.get("temp_size_in_bytes", 0) / 1e6
    listed = ", ".join(f"{target} x{count}" for target, count in sorted(calls.items()))
    return f"{name:<20}{program.summary()['num_instructions']:>14}{flops:>10.1f}{temp:>10.2f}  {listed or 'none'}"


def _cost(compiled: Any) -> dict[str, float]:
    """XLA's estimates without the `utilization` and `accessed` of each operand, which are hundreds."""
    costs = compiled.cost_analysis() or {}
    return {key: float(value) for key, value in sorted(costs.items()) if "{" not in key and not key[-1].isdigit()}


def _memory(compiled: Any) -> dict[str, int]:
    stats = compiled.memory_analysis()
    names = [name for name in dir(stats) if name.endswith("_in_bytes")] if stats is not None else []
    return {name: getattr(stats, name) for name in names}
