from __future__ import annotations

from hmoe_jax.perf.programs import Program
from hmoe_jax.perf.traffic import Load, stage_bytes
from tests.perf.conftest import Recorded

PROGRAM = Program(
    text="""HloModule jit_step

ENTRY %main (a: bf16[50,6]) -> bf16[50,6] {
  %a = bf16[50,6]{1,0} parameter(0), metadata={op_name="weights.embed"}
  %b = f8e4m3fn[10,6]{1,0} parameter(1), metadata={op_name="weights.layers[1].mlp.shared.up.weight"}
  %c = f32[1,1]{1,0} parameter(2), metadata={op_name="weights.layers[1].mlp.shared.up.scale"}
  %d = bf16[9,64,5]{2,1,0} parameter(3), metadata={op_name="state.caches[0]"}
  %e = f32[4,50]{1,0} parameter(4), metadata={op_name="state.sampler.bias"}
  %f = s32[3]{0} parameter(5), metadata={op_name="batch.tokens"}
  ROOT %g = f8e4m3fn[7,10,6]{2,1,0} parameter(6), metadata={op_name="operand[0].up.weight"}
}
""",
    cost={},
    memory={},
)
LOAD = Load(PROGRAM, tokens=3, sequences=2, context_tokens=100)


def test_weights_count_whole_tables_by_row_and_the_cache_by_its_live_part() -> None:
    assert stage_bytes([LOAD], expert_bytes=None) == {
        "embed": 3 * 6 * 2,
        "shared": 60 + 4,
        "attention": 100 * 5 * 2,
        "sample": 2 * 50 * 4,
        "experts": 7 * 60,
    }


def test_pieces_of_a_prompt_add_up() -> None:
    assert stage_bytes([LOAD, LOAD], expert_bytes=None)["shared"] == 2 * 64


def test_native_experts_are_what_the_store_has_counted(recorded: Recorded) -> None:
    load = Load(recorded.program, tokens=1, sequences=1, context_tokens=41)
    found = stage_bytes([load], expert_bytes=recorded.expert_bytes)
    # Three layers, four experts of three matrices each: E4M3, and a scale for each block of 128 x 128.
    assert found["experts"] == 3 * 4 * 3 * (136 * 192 + 4 * 2 * 2)
    assert found["head"] == 313 * 192 * 2
    assert found["embed"] == 192 * 2
