from __future__ import annotations

from itertools import pairwise

from tests.perf.conftest import NUM_STEPS, Recorded


def test_steps_are_in_order_and_hold_operations_of_the_program(recorded: Recorded) -> None:
    steps = recorded.steps
    assert [step.name for step in steps] == ["decode"] * NUM_STEPS
    assert all(before.end_s <= after.start_s for before, after in pairwise(steps))
    assert all({op.module for op in step.ops} == {"jit_decode_1"} for step in steps)


def test_every_recorded_operation_is_an_instruction_of_the_hlo(recorded: Recorded) -> None:
    names = {op.name for step in recorded.steps for op in step.ops}
    assert names <= recorded.program.module.by_name.keys()


def test_every_custom_call_is_recorded_in_every_step(recorded: Recorded) -> None:
    calls = {call.name for call in recorded.program.module.custom_calls if call.target.startswith("hmoe_")}
    assert all(calls <= {op.name for op in step.ops} for step in recorded.steps)
