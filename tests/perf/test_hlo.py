from __future__ import annotations

import jax
import jax.numpy as jnp
import pytest

from hmoe_jax.perf.hlo import Instruction, parse


def _instruction(kind: str) -> Instruction:
    return Instruction("x", "add", kind, (), (), "", "")


@pytest.fixture(scope="module")
def text() -> str:
    def program(tables: tuple[jax.Array, jax.Array], ids: jax.Array) -> tuple[jax.Array, jax.Array]:
        with jax.named_scope("attention"):
            rows = jax.lax.fori_loop(0, ids[0], lambda i, x: jnp.sin(x) + i, tables[1][ids])
        return jax.lax.top_k(rows, 2)

    tables = (jnp.zeros(3), jnp.zeros((11, 7)))
    return jax.jit(program).lower(tables, jnp.zeros(5, jnp.int32)).compile().as_text()


def test_parameters_are_those_used_with_their_path_type_and_size(text: str) -> None:
    wide, ids = sorted(parse(text).parameters, key=lambda each: each.num_bytes, reverse=True)
    assert (wide.op_name, wide.shape, wide.num_bytes) == ("tables[1]", (11, 7), 11 * 7 * 4)
    assert (ids.op_name, ids.shape, ids.num_bytes) == ("ids", (5,), 20)


def test_custom_calls_have_their_target(text: str) -> None:
    assert [call.target for call in parse(text).custom_calls] == ["TopK"]


def test_loops_call_their_body_and_condition(text: str) -> None:
    module = parse(text)
    loop = next(each for each in module.instructions() if each.opcode == "while")
    assert len(loop.calls) == 2
    assert set(loop.calls) <= module.computations.keys()


def test_every_operand_is_an_instruction_of_the_same_computation(text: str) -> None:
    for computation in parse(text).computations.values():
        names = {each.name for each in computation}
        assert all(set(each.operands) <= names for each in computation)


@pytest.mark.parametrize(
    ("kind", "num_bytes"),
    [
        ("bf16[17,64,160]{2,1,0}", 17 * 64 * 160 * 2),
        ("f8e4m3fn[3,5]{1,0}", 15),
        ("s4[7]{0}", 4),
        ("pred[2,3]{1,0}", 6),
        ("f32[]", 4),
        ("token[]", 0),
        ("(s32[2]{0}, /*index=1*/f32[3]{0})", 20),
    ],
)
def test_bytes_of_a_type(kind: str, num_bytes: int) -> None:
    assert _instruction(kind).num_bytes == num_bytes


def test_a_tuple_has_no_shape() -> None:
    with pytest.raises(ValueError, match="x: expected one array"):
        _ = _instruction("(f32[2], f32[3])").shape


def test_other_text_is_refused() -> None:
    with pytest.raises(ValueError, match="no line begins with 'HloModule'"):
        parse("nonsense")
    with pytest.raises(ValueError, match="module 'm': no entry computation"):
        parse("HloModule m\n")
