from __future__ import annotations

import pytest

from hmoe_jax.perf.hlo import parse
from hmoe_jax.perf.scopes import STAGES, Scope, scope_of_parameter, scope_of_path, scopes
from tests.perf.conftest import Recorded

# What XLA:CPU makes of a BF16 cache: the conversions carry no scope.
WIDENED = """HloModule jit_decode_1

%widen (p: bf16[8]) -> f32[8] {
  %p = bf16[8]{0} parameter(0)
  ROOT %wide = f32[8]{0} convert(%p)
}

%body (s: f32[8]) -> f32[8] {
  %s = f32[8]{0} parameter(0)
  ROOT %bare = f32[8]{0} negate(%s)
}

%named (q: f32[8]) -> f32[8] {
  %q = f32[8]{0} parameter(0)
  ROOT %inner = f32[8]{0} exponential(%q), metadata={op_name="jit(decode_1)/head/exp"}
}

ENTRY %main (cache: bf16[8], batch: f32[8]) -> (f32[8], f32[8]) {
  %cache = bf16[8]{0} parameter(0), metadata={op_name="state.caches[2]"}
  %batch = f32[8]{0} parameter(1), metadata={op_name="batch.tokens"}
  %from_cache = f32[8]{0} fusion(%cache), kind=kLoop, calls=%widen
  %for_user = f32[8]{0} copy(%batch)
  %user = f32[8]{0} add(%for_user, %batch), metadata={op_name="jit(decode_1)/layer3/experts/add"}
  %from_inside = f32[8]{0} fusion(%batch), kind=kLoop, calls=%named
  %loop = f32[8]{0} while(%user), condition=%body, body=%body, metadata={op_name="jit(decode_1)/layer1/router/while"}
  %alone = f32[8]{0} rng-bit-generator(), algorithm=rng_default
  ROOT %out = (f32[8]{0}, f32[8]{0}) tuple(%loop, %from_cache), metadata={op_name="jit(decode_1)"}
}
"""


@pytest.mark.parametrize(
    ("path", "scope"),
    [
        ("jit(decode_1)/layer2/attention/while/body/dot_general", Scope("layer2", "attention")),
        ("jit(prefill_512)/layer10/experts/ffi_call", Scope("layer10", "experts")),
        ("jit(decode_1)/sample/jit(log_softmax)/reduce_max", Scope("", "sample")),
        ("jit(decode_1)/layer1/mul", Scope("layer1", "other")),
        ("jit(decode_1)/mul", Scope("", "other")),
    ],
)
def test_a_path_tells_layer_and_stage(path: str, scope: Scope) -> None:
    assert scope_of_path(path) == scope


@pytest.mark.parametrize(
    ("path", "scope"),
    [
        ("weights.embed", Scope("", "embed")),
        ("weights.layers[3].attention.q_a.weight", Scope("layer3", "attention")),
        ("weights.layers[3].attention_norm", Scope("layer3", "attention")),
        ("weights.layers[12].mlp.router_bias", Scope("layer12", "router")),
        ("weights.layers[1].mlp.shared.gate.weight", Scope("layer1", "shared")),
        ("weights.layers[0].mlp.gate.scale", Scope("layer0", "mlp")),
        ("weights.layers[1].mlp_norm", Scope("", "other")),
        ("weights.head.weight", Scope("", "head")),
        ("weights.norm", Scope("", "other")),
        ("operand[0].gate.weight", Scope("", "experts")),
        ("state.caches[4]", Scope("layer4", "attention")),
        ("state.sampler.counts", Scope("", "sample")),
        ("batch.tokens", None),
    ],
)
def test_an_argument_belongs_to_the_stage_that_reads_it(path: str, scope: Scope | None) -> None:
    assert scope_of_parameter(path) == scope


def test_lost_scopes_come_from_weights_or_cache_then_users_then_what_is_inside_then_callers() -> None:
    found = scopes(parse(WIDENED))
    assert found["from_cache"] == Scope("layer2", "attention")
    assert found["for_user"] == Scope("layer3", "experts")
    assert found["from_inside"] == Scope("", "head")
    assert found["bare"] == Scope("layer1", "router")
    assert found["alone"] == Scope("", "other")


def test_every_stage_of_the_model_is_found_in_its_compiled_program(recorded: Recorded) -> None:
    assert {scope.stage for scope in recorded.program.scopes.values()} >= set(STAGES)


def test_every_argument_but_the_batch_has_a_stage(recorded: Recorded) -> None:
    unknown = [each.op_name for each in recorded.program.module.parameters if scope_of_parameter(each.op_name) is None]
    assert unknown
    assert all(name.startswith("batch.") for name in unknown)
