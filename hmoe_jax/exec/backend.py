"""Who computes the routed experts: the record that the executors differ in."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from hmoe_jax.architectures.deepseek_v3 import RoutedExperts
from hmoe_jax.experts.lane import ExpertLane
from hmoe_jax.experts.store import ExpertStore, StoreStats


@dataclass(frozen=True)
class ExpertBackend:
    """`bind(operand)` makes the experts of a traced program, where `operand` is a pytree of arrays passed to it.

    `store` holds the experts in host memory; None where XLA computes them, and nobody counts (`stats`). `lane` computes
    them beside the program, if decoding shall. `close` frees what the backend owns.
    """

    operand: Any
    bind: Callable[[Any], RoutedExperts]
    store: ExpertStore | None
    close: Callable[[], None]
    lane: ExpertLane | None = None

    @property
    def stats(self) -> Callable[[], StoreStats] | None:
        return self.store.stats if self.store is not None else None
