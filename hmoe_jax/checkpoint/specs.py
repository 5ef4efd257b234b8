"""What a model expects of its checkpoint: which tensors, of which shape and dtype, with which scales."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import partial

import ml_dtypes
import numpy as np

from hmoe_jax.checkpoint.header import NUMPY_DTYPES, TensorEntry
from hmoe_jax.checkpoint.index import Checkpoint
from hmoe_jax.core import CheckpointError

NAMES_SHOWN = 5


@dataclass(frozen=True)
class TensorSpec:
    """One tensor that a model needs; `dtypes` are safetensors names, any of which will do.

    `other_shapes` will do as well as `shape`: they hold the same numbers in the same order.
    """

    name: str
    shape: tuple[int, ...]
    dtypes: tuple[str, ...]
    other_shapes: tuple[tuple[int, ...], ...] = ()

    def __post_init__(self) -> None:
        if not self.dtypes or not set(self.dtypes) <= NUMPY_DTYPES.keys():
            raise ValueError(f"{self.name}: dtypes must be of {', '.join(NUMPY_DTYPES)}, got {self.dtypes}")


def ignore_nothing(name: str) -> bool:
    """The default of `check_tensors`: every tensor of the checkpoint must be expected."""
    return False


def check_tensors(
    checkpoint: Checkpoint,
    expected: Mapping[str, TensorSpec],
    *,
    ignore: Callable[[str], bool] = ignore_nothing,
) -> None:
    """Raises `CheckpointError` unless the checkpoint has just the expected tensors, of right shape and dtype.

    `ignore(name)` is true of tensors that are skipped knowingly (layers of multi-token prediction,
    `rotary_emb.inv_freq`): they may be there. It excuses no expected tensor from being there.
    Looks at headers only: `check_scales` looks at values, and two tensors of one shape and dtype whose data
    are exchanged can be told apart by `integrity` alone.
    """
    _check_names(checkpoint, expected, ignore=ignore)
    for name, spec in expected.items():
        if name != spec.name:
            raise ValueError(f"expected['{name}'] is the spec of '{spec.name}'")
        _check_entry(checkpoint.entries[name], spec, file=str(checkpoint.file_of(name)))


def check_scales(name: str, scales: np.ndarray, *, file: str = "") -> None:
    """Raises `CheckpointError` unless all `scales` are FP32 or BF16, finite and above 0.

    The error gives the index of the first offender, and `file`, where they came from.
    """
    error = partial(CheckpointError, file=file, tensor=name)
    if scales.dtype not in (np.float32, ml_dtypes.bfloat16):
        raise error("wrong dtype of scales", expected="float32 or bfloat16", actual=scales.dtype)
    good = np.isfinite(scales) & (scales > 0)
    if not good.all():
        first = tuple(int(i) for i in np.argwhere(~good)[0])
        raise error(f"bad scale at index {first}", expected="finite and above 0", actual=float(scales[first]))


def check_stored_shape(name: str, stored: np.ndarray, expected: tuple[int, int], *, file: str = "") -> None:
    """Raises `CheckpointError` unless the tensor holds the two numbers of the matrix's shape."""
    if stored.tolist() != list(expected):
        error = "not the shape of its matrix"
        raise CheckpointError(error, file=file, tensor=name, expected=list(expected), actual=stored.tolist())


def _check_names(checkpoint: Checkpoint, expected: Mapping[str, TensorSpec], *, ignore: Callable[[str], bool]) -> None:
    missing = [name for name in expected if name not in checkpoint.entries]
    unknown = [name for name in checkpoint.entries if name not in expected and not ignore(name)]
    if missing or unknown:
        raise CheckpointError(
            "tensors do not match the model",
            file=str(checkpoint.folder),
            tensor=(missing or unknown)[0],
            expected=f"{len(expected)} tensors",
            actual=f"{_listed(missing)} missing and {_listed(unknown)} unknown",
        )


def _check_entry(entry: TensorEntry, spec: TensorSpec, *, file: str) -> None:
    error = partial(CheckpointError, file=file, tensor=entry.name)
    if entry.shape not in (spec.shape, *spec.other_shapes):
        expected = " or ".join(str(list(shape)) for shape in (spec.shape, *spec.other_shapes))
        raise error("wrong shape", expected=expected, actual=list(entry.shape))
    if entry.dtype not in spec.dtypes:
        raise error("wrong dtype", expected=" or ".join(spec.dtypes), actual=entry.dtype)


def _listed(names: list[str]) -> str:
    """The count and the first few names: `7 (a, b, c, d, e, ...)`."""
    if not names:
        return "0"
    shown = names[:NAMES_SHOWN] + ["..."] * (len(names) > NAMES_SHOWN)
    return f"{len(names)} ({', '.join(shown)})"
