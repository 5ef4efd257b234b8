"""Who computes the routed experts: the record that the executors differ in."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from hmoe_jax.architectures.deepseek_v3 import RoutedExperts
from hmoe_jax.experts.store import StoreStats


@dataclass(frozen=True)
class ExpertBackend:
    """`bind(operand)` makes the experts of a traced program, where `operand` is a pytree of arrays passed to it.

    `stats` is None where XLA computes the experts and nobody counts. `close` frees what the backend owns.
    """

    operand: Any
    bind: Callable[[Any], RoutedExperts]
    stats: Callable[[], StoreStats] | None
    close: Callable[[], None]
