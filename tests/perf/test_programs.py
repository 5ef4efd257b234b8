from __future__ import annotations

from hmoe_jax.perf import programs
from tests.perf.conftest import Recorded


def test_custom_calls_are_counted_by_stage(recorded: Recorded) -> None:
    # Three MoE layers and a dense one; q_a, q_b, kv_a and o in each; gate, up and down.
    calls = recorded.program.custom_calls
    assert calls["hmoe_moe_experts"] == {"experts": 3}
    assert calls["hmoe_linear"] == {"attention": 16, "router": 3, "shared": 9, "mlp": 3, "head": 1}
    assert calls["hmoe_mla_attention"] == {"attention": 4}


def test_cost_and_memory_are_plain_numbers(recorded: Recorded) -> None:
    summary = recorded.program.summary()
    assert summary["cost"]["flops"] > 0
    assert summary["memory"]["argument_size_in_bytes"] > 0
    assert not any("{" in name for name in summary["cost"])


def test_the_table_has_a_line_for_each_program_with_its_calls(recorded: Recorded) -> None:
    lines = programs.table({"decode_1": recorded.program}).splitlines()
    assert len(lines) == 2
    assert lines[1].startswith("decode_1")
    assert "hmoe_moe_experts x3" in lines[1]


def test_an_instruction_of_the_runtime_s_own_is_nobodys(recorded: Recorded) -> None:
    program = recorded.program
    assert (str(program.scope_of("made.up.3")), program.label("made.up.3"), program.type_of("made.up.3")) == (
        "other",
        "made.up",
        "",
    )
    assert not program.is_control("made.up.3")
