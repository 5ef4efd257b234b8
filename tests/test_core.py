from __future__ import annotations

from dataclasses import FrozenInstanceError, dataclass

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jaxtyping import Float32, Int32

from hmoe_jax.core import AnyArray, CheckpointError, ConfigError, HmoeError, record
from hmoe_jax.exec.batch import DecodeBatch


@record
@dataclass(frozen=True)
class Pair:
    """Two arrays with an axis in common."""

    left: Float32[AnyArray, " n"]
    right: Int32[AnyArray, "n m"]


def pair() -> Pair:
    return Pair(np.arange(3, dtype=np.float32), np.zeros((3, 2), np.int32))


def test_errors_of_the_package_are_value_errors() -> None:
    assert issubclass(ConfigError, HmoeError)
    assert issubclass(CheckpointError, HmoeError)
    assert issubclass(ConfigError, ValueError)
    assert issubclass(CheckpointError, ValueError)


@pytest.mark.parametrize(
    ("details", "message"),
    [
        ({}, "too short"),
        ({"file": "a.safetensors"}, "a.safetensors: too short"),
        ({"tensor": "w"}, "tensor 'w': too short"),
        ({"file": "a", "tensor": "w", "expected": 8, "actual": 0}, "a tensor 'w': too short: expected 8, got 0"),
        ({"expected": (2, 3)}, "too short: expected (2, 3), got "),
    ],
)
def test_a_checkpoint_error_says_where_and_what(details: dict, message: str) -> None:
    error = CheckpointError("too short", **details)
    assert str(error) == message
    assert (error.problem, error.tensor, error.expected) == (
        "too short",
        details.get("tensor", ""),
        details.get("expected", ""),
    )


def test_a_record_passes_through_jax_and_keeps_its_type() -> None:
    doubled = jax.jit(lambda p: jax.tree.map(lambda x: 2 * x, p))(pair())
    assert isinstance(doubled, Pair)
    assert doubled.left.tolist() == [0.0, 2.0, 4.0]


def test_the_leaves_of_a_record_have_its_fields_names() -> None:
    paths = [jax.tree_util.keystr(path) for path, _ in jax.tree_util.tree_leaves_with_path(pair())]
    assert paths == [".left", ".right"]


def test_a_record_can_be_rebuilt_with_anything() -> None:
    # JAX does this while it traces: with shapes, axis numbers, or plain objects in the place of arrays.
    marked = jax.tree.map(lambda _: "leaf", pair())
    assert (marked.left, marked.right) == ("leaf", "leaf")
    assert jax.eval_shape(lambda p: p, pair()).right.shape == (3, 2)
    assert jax.vmap(lambda p: p.left + p.right.sum())(pair()).shape == (3,)


def test_a_record_is_frozen() -> None:
    with pytest.raises(FrozenInstanceError):
        pair().left = jnp.zeros(3)


def test_records_of_the_package_check_their_shapes_when_built() -> None:
    two, three = np.zeros(2, np.int32), np.zeros(3, np.int32)
    with pytest.raises(TypeError, match="DecodeBatch"):
        DecodeBatch(two, three, two > 0, draws=two > 0, slots=two, tables=np.zeros((2, 1), np.int32))
