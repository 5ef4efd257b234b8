"""Expected tensors and scales: what a checkpoint has too much, too little or wrong is said by name."""

import numpy as np
import pytest
from safetensors.numpy import save_file

from hmoe_jax.checkpoint.index import open_checkpoint
from hmoe_jax.checkpoint.specs import TensorSpec, check_scales, check_tensors
from hmoe_jax.core import CheckpointError

from .crafted import SPECS, folder_content, write_folder

NORM = "model.norm.weight"


@pytest.fixture
def checkpoint(tmp_path):
    with open_checkpoint(write_folder(tmp_path, folder_content())) as checkpoint:
        yield checkpoint


def rejected(checkpoint, specs, **options) -> CheckpointError:
    with pytest.raises(CheckpointError) as caught:
        check_tensors(checkpoint, specs, **options)
    return caught.value


def without(*names):
    return {name: spec for name, spec in SPECS.items() if name not in names}


def test_the_expected_checkpoint_passes(checkpoint):
    check_tensors(checkpoint, SPECS)


def test_any_of_the_allowed_dtypes_passes(checkpoint):
    check_tensors(checkpoint, SPECS | {NORM: TensorSpec(NORM, (3,), ("F32", "BF16"))})


def test_missing_and_unknown_tensors_are_counted_and_the_first_named(checkpoint):
    wanted = {f"w{i}": TensorSpec(f"w{i}", (1,), ("F32",)) for i in range(7)}
    error = rejected(checkpoint, without(NORM) | wanted)
    assert str(error) == (
        f"{checkpoint.folder} tensor 'w0': tensors do not match the model: expected 10 tensors, "
        f"got 7 (w0, w1, w2, w3, w4, ...) missing and 1 ({NORM}) unknown"
    )


def test_unknown_tensors_are_refused_unless_ignored(checkpoint):
    error = rejected(checkpoint, without(NORM))
    assert (error.tensor, error.actual) == (NORM, f"0 missing and 1 ({NORM}) unknown")
    check_tensors(checkpoint, without(NORM), ignore=lambda name: name == NORM)


def test_ignoring_excuses_no_missing_tensor(checkpoint):
    wanted = {"w": TensorSpec("w", (1,), ("F32",))}
    assert rejected(checkpoint, SPECS | wanted, ignore=lambda name: True).tensor == "w"


def test_a_wrong_shape_is_shown_beside_the_expected_one(checkpoint):
    error = rejected(checkpoint, SPECS | {NORM: TensorSpec(NORM, (1, 3), ("BF16",))})
    assert (error.problem, error.tensor, error.expected, error.actual) == ("wrong shape", NORM, "[1, 3]", [3])
    assert error.file == str(checkpoint.file_of(NORM))


def test_a_wrong_dtype_is_shown_beside_the_allowed_ones(checkpoint):
    error = rejected(checkpoint, SPECS | {NORM: TensorSpec(NORM, (3,), ("F32", "F16"))})
    assert (error.problem, error.tensor, error.expected, error.actual) == (
        "wrong dtype",
        NORM,
        "F32 or F16",
        "BF16",
    )


def test_any_of_the_allowed_shapes_passes_and_all_are_shown(checkpoint):
    check_tensors(checkpoint, SPECS | {NORM: TensorSpec(NORM, (3, 1), ("BF16",), other_shapes=((3,),))})
    error = rejected(checkpoint, SPECS | {NORM: TensorSpec(NORM, (3, 1), ("BF16",), other_shapes=((1, 3),))})
    assert error.expected == "[3, 1] or [1, 3]"


@pytest.mark.parametrize("dtypes", [(), ("float32",), ("F32", "F4")])
def test_a_spec_of_unknown_dtypes_is_the_callers_mistake(dtypes):
    with pytest.raises(ValueError, match="w: dtypes must be of BOOL, U8"):
        TensorSpec("w", (1,), dtypes)


def test_a_spec_under_another_name_is_the_callers_mistake(checkpoint):
    with pytest.raises(ValueError, match=r"expected\['model.norm.weight'\] is the spec of 'w'"):
        check_tensors(checkpoint, SPECS | {NORM: TensorSpec("w", (3,), ("BF16",))})


@pytest.mark.parametrize(
    ("place", "value"),
    [((0, 0), 0.0), ((1, 2), -1.0), ((0, 1), np.inf), ((1, 0), np.nan), ((1, 1), -0.0)],
)
def test_the_first_bad_scale_is_named_with_its_index(place, value):
    scales = np.full((2, 3), 1e-40, np.float32)  # subnormal, and fine
    check_scales("s", scales)
    scales[place] = value
    scales[1, 2] = min(scales[1, 2], 0)
    with pytest.raises(CheckpointError) as caught:
        check_scales("s", scales, file="m.safetensors")
    error = caught.value
    assert error.problem == f"bad scale at index {place}"
    assert (error.file, error.tensor, error.expected) == ("m.safetensors", "s", "finite and above 0")
    assert str(error.actual) == str(float(value))


def test_scales_of_another_dtype_are_refused():
    with pytest.raises(CheckpointError, match="wrong dtype of scales: expected float32 or bfloat16, got float64"):
        check_scales("s", np.ones(2))


def test_scales_are_checked_in_the_mapped_unaligned_file(tmp_path):
    save_file({"s": np.ones((2, 2), np.float32), "b": np.ones(1, np.uint8)}, tmp_path / "model.safetensors")
    with open_checkpoint(tmp_path) as checkpoint:
        check_scales("s", checkpoint.array("s"))
