"""Compiled HLO as text, parsed into records: just what a profile needs of it."""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from functools import cached_property
from math import prod

_MODULE = re.compile(r"HloModule ([\w.\-]+)")
_COMPUTATION = re.compile(r"(ENTRY )?%([\w.\-]+) \(.*\{$")
_INSTRUCTION = re.compile(r"\s+(?:ROOT )?%([\w.\-]+) = (\(.*?\)|\S+) ([\w\-]+)\((.*?)\)(.*)")
_NAME = re.compile(r"%([\w.\-]+)")
_CALLED = re.compile(r"(?:calls|to_apply|body|condition|\w+_computations?)=(%[\w.\-]+|\{[^}]*\})")
_OP_NAME = re.compile(r'op_name="([^"]*)"')
_TARGET = re.compile(r'custom_call_target="([^"]*)"')
_ARRAY = re.compile(r"([a-z]+)(\d*)\w*\[([\d,]*)\]")


@dataclass(frozen=True)
class Instruction:
    """One line of a computation. `op_name` is JAX's name-scope path, or an argument's path; both may be "".

    `calls` are the computations it runs; `target` is that of a custom call.
    """

    name: str
    opcode: str
    type: str
    operands: tuple[str, ...]
    calls: tuple[str, ...]
    op_name: str
    target: str

    @property
    def shape(self) -> tuple[int, ...]:
        """Of an array. Raises `ValueError` for a tuple."""
        arrays = _ARRAY.findall(self.type)
        if len(arrays) != 1:
            raise ValueError(f"{self.name}: expected one array, got {self.type}")
        return _dims(arrays[0][2])

    @property
    def num_bytes(self) -> int:
        """Of the array, or of all arrays of a tuple."""
        return sum(_num_bytes(*array) for array in _ARRAY.findall(self.type))


@dataclass(frozen=True)
class Module:
    """A program: computations by name, instructions in the order of the text (scheduled: operands before users)."""

    name: str
    entry: str
    computations: Mapping[str, tuple[Instruction, ...]]

    def __post_init__(self) -> None:
        if self.entry not in self.computations:
            raise ValueError(f"module {self.name!r}: no entry computation among {len(self.computations)}")

    def instructions(self) -> Iterator[Instruction]:
        for computation in self.computations.values():
            yield from computation

    @cached_property
    def by_name(self) -> dict[str, Instruction]:
        """Names are unique in a module."""
        return {instruction.name: instruction for instruction in self.instructions()}

    @property
    def parameters(self) -> list[Instruction]:
        """The arguments of the program that it uses; their `op_name` is the path in Python, "weights.embed"."""
        return [each for each in self.computations[self.entry] if each.opcode == "parameter"]

    @property
    def custom_calls(self) -> list[Instruction]:
        return [each for each in self.instructions() if each.opcode == "custom-call"]


def parse(text: str) -> Module:
    """What `compiled.as_text()` prints. Raises `ValueError` for text that has no module or no entry computation."""
    name, entry, current = "", "", ""
    computations: dict[str, list[Instruction]] = {}
    for line in text.splitlines():
        if match := _INSTRUCTION.match(line):
            computations.setdefault(current, []).append(_instruction(match))
        elif match := _COMPUTATION.match(line):
            current = match[2]
            entry = current if match[1] else entry
        elif match := _MODULE.match(line):
            name = match[1]
    if not name:
        raise ValueError("not HLO text: no line begins with 'HloModule'")
    return Module(name, entry, {key: tuple(lines) for key, lines in computations.items()})


def _instruction(match: re.Match[str]) -> Instruction:
    name, kind, opcode, operands, rest = match.groups()
    calls = [called for group in _CALLED.findall(rest) for called in _NAME.findall(group)]
    op_name, target = _OP_NAME.search(rest), _TARGET.search(rest)
    return Instruction(
        name=name,
        opcode=opcode,
        type=kind,
        operands=tuple(_NAME.findall(operands)),
        calls=tuple(calls),
        op_name=op_name[1] if op_name else "",
        target=target[1] if target else "",
    )


def _dims(text: str) -> tuple[int, ...]:
    return tuple(int(dim) for dim in text.split(",") if dim)


def _num_bytes(kind: str, bits: str, dims: str) -> int:
    """The first number in a dtype's name is its width ("f8e4m3fn", "bf16"); "pred" is a byte, a token nothing."""
    width = 8 if kind == "pred" else int(bits or 0)
    return -(-width * prod(_dims(dims)) // 8)
