"""Which part of the model each compiled operation belongs to, in the words of the source's `jax.named_scope`s.

XLA keeps JAX's scopes as an instruction's `op_name`, but its passes drop some: on the CPU most of all where BF16 is
widened, which is where the time goes. What has lost its scope is given that of what it works for.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

from hmoe_jax.perf.hlo import Instruction, Module

STAGES = ("embed", "attention", "router", "experts", "shared", "mlp", "head", "sample")
"""The named scopes of a step, in the order in which it meets them."""

OTHER = "other"
"""What lies in no stage: the norms and additions between them."""

_PARAMETER_STAGES = (
    (r"weights\.embed\b", "embed"),
    (r"weights\.layers\[\d+\]\.attention", "attention"),
    (r"weights\.layers\[\d+\]\.mlp\.router", "router"),
    (r"weights\.layers\[\d+\]\.mlp\.shared\b", "shared"),
    (r"weights\.layers\[\d+\]\.mlp\.(gate|up|down)\b", "mlp"),
    (r"weights\.head\b", "head"),
    (r"operand\b", "experts"),
    (r"state\.caches\b", "attention"),
    (r"state\.sampler\b", "sample"),
)
_LAYER = re.compile(r"layer\d+")
_INDEX = re.compile(r"(?:layers|caches)\[(\d+)\]")


@dataclass(frozen=True)
class Scope:
    """`layer` is "layer3", or "" outside all layers."""

    layer: str
    stage: str

    def __str__(self) -> str:
        return f"{self.layer}/{self.stage}" if self.layer else self.stage


def scope_of_path(op_name: str) -> Scope:
    """From a path such as "jit(decode_1)/layer2/attention/while/body/dot_general"."""
    parts = op_name.split("/")
    layer = next((part for part in parts if _LAYER.fullmatch(part)), "")
    return Scope(layer, next((part for part in parts if part in STAGES), OTHER))


def scope_of_parameter(path: str) -> Scope | None:
    """Who reads an argument of a step program, from its path; None for those that many read (the batch)."""
    stage = next((stage for pattern, stage in _PARAMETER_STAGES if re.match(pattern, path)), None)
    if stage is None:
        return Scope("", OTHER) if path.startswith("weights.") else None
    index = _INDEX.search(path)
    return Scope(f"layer{index[1]}" if index else "", stage)


def scopes(module: Module) -> dict[str, Scope]:
    """The scope of every instruction, by name."""
    known = {each.name: scope for each in module.instructions() if (scope := _own_scope(each))}
    # Parameters only tell their readers' scopes where they are arguments of the program.
    known |= {each.name: scope for each in module.parameters if (scope := scope_of_parameter(each.op_name))}
    for computation in module.computations.values():
        _inherit(computation, known)
    _inherit_from_callers(module, known)
    return {each.name: known.get(each.name, Scope("", OTHER)) for each in module.instructions()}


def _own_scope(instruction: Instruction) -> Scope | None:
    # A fusion may carry an argument's path ("batch.positions"): no scope of the source.
    return scope_of_path(instruction.op_name) if "/" in instruction.op_name else None


def _inherit(computation: Sequence[Instruction], known: dict[str, Scope]) -> None:
    """From the weights or the cache that it reads, else from its first user, else from its first operand."""
    parameters = {each.name for each in computation if each.opcode == "parameter"}
    for each in computation:
        _adopt(each, [name for name in each.operands if name in parameters], known)
    users: dict[str, list[str]] = {}
    for each in computation:
        for operand in each.operands:
            users.setdefault(operand, []).append(each.name)
    for each in reversed(computation):
        _adopt(each, users.get(each.name, ()), known)
    for each in computation:
        _adopt(each, each.operands, known)


def _adopt(instruction: Instruction, candidates: Iterable[str], known: dict[str, Scope]) -> None:
    if instruction.name not in known and instruction.opcode != "parameter":
        found = next((known[name] for name in candidates if name in known), None)
        if found is not None:
            known[instruction.name] = found


def _inherit_from_callers(module: Module, known: dict[str, Scope]) -> None:
    """What is still unknown: from most of what it calls, else from what calls it."""
    callers = {callee: each.name for each in module.instructions() for callee in each.calls}
    for computation, instructions in module.computations.items():
        for each in instructions:
            called = [inner.name for callee in each.calls for inner in module.computations.get(callee, ())]
            inner = Counter(known[name] for name in called if name in known)
            if each.name not in known and inner:
                known[each.name] = inner.most_common(1)[0][0]
            elif each.name not in known and callers.get(computation) in known:
                known[each.name] = known[callers[computation]]
