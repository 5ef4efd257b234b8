from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from hmoe_jax.perf.programs import Program
from hmoe_jax.perf.stages import BETWEEN, HOST, ROWS, mean_op_seconds, op_seconds, slowest, stage_seconds
from hmoe_jax.perf.trace import Op, Step
from tests.perf.conftest import Recorded

PROGRAM = Program(
    text="""HloModule jit_step

ENTRY %main (p: f32[8]) -> f32[8] {
  %p = f32[8]{0} parameter(0)
  %a.1 = f32[8]{0} negate(%p), metadata={op_name="jit(step)/layer0/router/neg"}
  %a.2 = f32[8]{0} negate(%a.1), metadata={op_name="jit(step)/layer1/router/neg"}
  %loop = f32[8]{0} while(%a.2), condition=%c, body=%b, metadata={op_name="jit(step)/layer1/attention/while"}
  ROOT %call = f32[8]{0} custom-call(%loop), custom_call_target="mine", metadata={op_name="jit(step)/head/ffi_call"}
}
""",
    cost={},
    memory={},
)
MODULES = {"jit_step": PROGRAM}


def _op(name: str, start: float, end: float, thread: str = "one", module: str = "jit_step") -> Op:
    return Op(module, name, 1, thread, float(start), float(end))


def _seconds(*ops: Op, end: float = 10.0) -> dict[str, float]:
    charged = op_seconds(Step("step", 0.0, end, ops), MODULES)
    return {name: seconds for (_, name), seconds in charged.items()}


def test_gaps_inside_a_program_and_outside_are_told_apart() -> None:
    assert _seconds(_op("a.1", 2, 3), _op("call", 5, 9)) == {HOST: 3, "a.1": 1, BETWEEN: 2, "call": 4}


def test_threads_that_work_at_once_share_the_time() -> None:
    assert _seconds(_op("a.1", 0, 10), _op("a.2", 4, 10, "two"))["a.1"] == 7


def test_a_loop_is_charged_only_while_nothing_runs_inside_it_on_any_thread() -> None:
    seconds = _seconds(_op("loop", 0, 10), _op("a.1", 1, 4), _op("a.2", 3, 8, "two"))
    assert seconds["loop"] == 3
    assert seconds["a.1"] == 2.5
    assert seconds["a.2"] == 4.5


def test_operations_that_begin_together_are_nested_by_length() -> None:
    assert _seconds(_op("a.1", 0, 1), _op("loop", 0, 10))["loop"] == 9


def test_an_operation_without_duration_is_charged_nothing() -> None:
    assert _seconds(_op("a.1", 0, 10), _op("a.2", 4, 4)) == {"a.1": 10}


def test_programs_that_nobody_asked_about_are_the_host() -> None:
    assert _seconds(_op("a.1", 2, 3, module="jit_other")) == {HOST: 10}


def test_what_outlasts_the_step_is_cut_off() -> None:
    assert _seconds(_op("a.1", 8, 12)) == {HOST: 8, "a.1": 2}


@given(
    st.lists(
        st.tuples(
            st.sampled_from(["a.1", "a.2", "loop", "call"]),
            st.integers(0, 99),
            st.integers(0, 50),
            st.sampled_from(["one", "two", "three"]),
        ),
        max_size=12,
    )
)
def test_every_moment_is_charged_exactly_once(spans: list[tuple[str, int, int, str]]) -> None:
    ops = [_op(name, start, start + length, thread) for name, start, length, thread in spans]
    seconds = _seconds(*ops, end=100.0)
    assert sum(seconds.values()) == pytest.approx(100.0)
    assert all(value >= 0 for value in seconds.values())


def test_stages_of_a_real_step_add_up_to_it(recorded: Recorded) -> None:
    for step in recorded.steps:
        stages = stage_seconds(op_seconds(step, recorded.modules), recorded.modules)
        assert tuple(stages) == ROWS
        assert sum(stages.values()) == pytest.approx(step.duration_s)
        assert all(stages[row] > 0 for row in ("attention", "router", "experts", "shared", "mlp", "head", "sample"))


def test_the_mean_is_that_of_the_middle_half() -> None:
    steps = [Step("step", 0.0, end, ()) for end in (1000.0, 3.0, 5.0, 0.0)]
    assert sum(mean_op_seconds(steps, MODULES).values()) == 4
    with pytest.raises(ValueError, match="no steps were recorded"):
        mean_op_seconds([], MODULES)


def test_the_slowest_are_grouped_over_layers() -> None:
    charged = {("jit_step", "a.1"): 1.0, ("jit_step", "a.2"): 3.0, ("jit_step", "call"): 2.0, ("", HOST): 9.0}
    first, second = slowest(charged, MODULES, count=5)
    assert (first.stage, first.label, first.type, first.count, first.seconds) == ("router", "a", "f32[8]", 2, 4.0)
    assert (second.stage, second.label) == ("head", "mine")
    assert len(slowest(charged, MODULES, count=1)) == 1
