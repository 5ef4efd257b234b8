"""What steps change on the device: the cache of every layer, and the sampler's rows."""

from __future__ import annotations

from dataclasses import dataclass

from jaxtyping import Array, UInt

from hmoe_jax.core import record
from hmoe_jax.sampling import SamplerState


@record
@dataclass(frozen=True)
class DeviceState:
    """What a step changes, all of it donated: one cache per layer, and the sampler's rows."""

    caches: tuple[UInt[Array, "pages slots w"], ...]
    sampler: SamplerState


class LiveState:
    """The same at every moment: programs take its arrays over and give others back."""

    def __init__(self, state: DeviceState):
        self.caches, self.sampler = list(state.caches), state.sampler

    @property
    def taken(self) -> DeviceState:
        return DeviceState(tuple(self.caches), self.sampler)

    def put(self, state: DeviceState) -> None:
        self.caches[:], self.sampler = state.caches, state.sampler
