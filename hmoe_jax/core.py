"""What every other module may use: error types, records of arrays, and where the engine keeps its files."""

from __future__ import annotations

import os
from collections.abc import Iterable
from dataclasses import fields
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

import jax
import numpy as np

T = TypeVar("T")

# Type checkers see Any: a union would forbid both to index (NumPy only) and to pass on to JAX functions.
if TYPE_CHECKING:
    AnyArray = Any
else:
    AnyArray = jax.Array | np.ndarray
"""An array on either side of the border: a batch is NumPy outside a jitted function, traced inside."""


class HmoeError(Exception):
    """Base of every error that this package raises on purpose."""


class QueueFullError(HmoeError):
    """So many requests wait already that another one is refused; it may be sent again later."""


class EngineDeadError(HmoeError):
    """The device or the model's files are lost: no request can be served any more. Its cause says why."""


class ConfigError(HmoeError, ValueError):
    """A model's `config.json` is malformed, or asks for mathematics that is not implemented."""


class CheckpointError(HmoeError, ValueError):
    """A checkpoint's files are not what its config and headers promise.

    `file`, `tensor`, `expected` and `actual` repeat what the message says, for programs ("" where one does not apply).
    """

    def __init__(self, problem: str, *, file: str = "", tensor: str = "", expected: object = "", actual: object = ""):
        self.problem, self.file, self.tensor = problem, file, tensor
        self.expected, self.actual = expected, actual
        where = " ".join(part for part in (file, f"tensor '{tensor}'" if tensor else "") if part)
        detail = f": expected {expected}, got {actual}" if expected != "" or actual != "" else ""
        super().__init__(f"{where}: {problem}{detail}" if where else f"{problem}{detail}")


def cache_home() -> Path:
    """`$XDG_CACHE_HOME/hmoe_jax`, or the same below `~/.cache`: for what can be made again.

    Raises `RuntimeError` where there is no home directory.
    """
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "hmoe_jax"


def unchecked(cls: type[T], **values: Any) -> T:
    """A record whose fields hold something else than their annotations say, as JAX's own placeholders do."""
    value = object.__new__(cls)
    for name, each in values.items():
        object.__setattr__(value, name, each)
    return value


def record(cls: type[T]) -> type[T]:
    """Registers a frozen dataclass of arrays as a pytree, one child per field.

    Unlike `jax.tree_util.register_dataclass`, rebuilding skips `__init__`: JAX rebuilds with placeholders that the
    annotations of the fields, checked in tests, would refuse. Costs a microsecond per record and dispatch, so the
    hundreds of records of a model's weights are registered JAX's way, with fields of type Any.
    """
    names = [field.name for field in fields(cls)]  # type: ignore[arg-type]

    def flatten_with_keys(value: T) -> tuple[list[tuple[Any, Any]], None]:
        return [(jax.tree_util.GetAttrKey(name), getattr(value, name)) for name in names], None

    def unflatten(_: None, children: Iterable[Any]) -> T:
        return unchecked(cls, **dict(zip(names, children, strict=True)))

    def flatten(value: T) -> tuple[list[Any], None]:
        return [getattr(value, name) for name in names], None

    jax.tree_util.register_pytree_with_keys(cls, flatten_with_keys, unflatten, flatten)
    return cls
