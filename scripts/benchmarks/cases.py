"""What is measured: so many tokens through one layer's experts, and what that costs at least."""

from __future__ import annotations

import statistics
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from jaxtyping import Int32

from benchmarks.formats import expert_bytes
from benchmarks.routing import choose, least_reuse, rotate
from hmoe_jax.experts.store import StoreShape
from hmoe_jax.quant.formats import Format

NAIVE = "naive"


@dataclass(frozen=True)
class Layer:
    """One layer's experts and how tokens choose among them."""

    shape: StoreShape
    top_k: int
    routing: str

    def batch(self, tokens: int) -> Batch:
        ids = choose(self.routing, tokens=tokens, top_k=self.top_k, num_experts=self.shape.num_experts)
        return Batch(self, tokens, rotate(ids, self.shape.num_experts))


@dataclass(frozen=True)
class Batch:
    """`rotation` holds the ids of successive calls, `[t, k]` each: one pattern on other experts every time."""

    layer: Layer
    tokens: int
    rotation: Sequence[Int32[np.ndarray, "t k"]]

    @property
    def num_active(self) -> int:
        """Experts that a call reads."""
        return len(np.unique(self.rotation[0]))

    @property
    def multiply_adds(self) -> int:
        shape = self.layer.shape
        return self.rotation[0].size * 3 * shape.hidden * shape.ffn

    def distinct_bytes(self, format_: Format) -> int:
        """Weights and scales of the experts of a call, each once."""
        return self.num_active * expert_bytes(format_, self.layer.shape)

    def reuse_bytes(self, format_: Format) -> int:
        """What is read of others, at least, before the same bytes are read again."""
        return least_reuse(self.rotation) * expert_bytes(format_, self.layer.shape)


@dataclass(frozen=True)
class Limits:
    """The hardware's, measured in one round. `dot_gmacs` is of the ISA that computes; None where that is not ours."""

    read_gbps: float
    dot_gmacs: float | None

    def bound_s(self, *, num_bytes: int, multiply_adds: int) -> float:
        """No program that reads so many bytes and does so many multiply-adds is faster."""
        read_s = num_bytes / self.read_gbps / 1e9
        return read_s if self.dot_gmacs is None else max(read_s, multiply_adds / self.dot_gmacs / 1e9)


@dataclass(frozen=True)
class Sample:
    """One round of a case: the median of its calls, the fastest of them, and the limits of that round."""

    seconds: float
    best_s: float
    num_calls: int
    limits: Limits


@dataclass(frozen=True)
class Case:
    """`by` is an ISA of ours, `naive`, or the name of a peer."""

    format: str
    threads: int
    tokens: int
    by: str


@dataclass(frozen=True)
class Result:
    """A case and its rounds. Every figure is the median over the rounds of what the round gives."""

    case: Case
    num_bytes: int
    multiply_adds: int
    reuse_bytes: int
    samples: Sequence[Sample]

    def _median(self, figure: Callable[[Sample], float]) -> float:
        return statistics.median(map(figure, self.samples))

    @property
    def seconds(self) -> float:
        return self._median(lambda sample: sample.seconds)

    @property
    def gbps(self) -> float:
        return self.num_bytes / self.seconds / 1e9

    @property
    def gmacs(self) -> float:
        return self.multiply_adds / self.seconds / 1e9

    @property
    def read_share(self) -> float:
        """Of the read roofline."""
        return self._median(lambda s: self.num_bytes / s.seconds / 1e9 / s.limits.read_gbps)

    @property
    def dot_share(self) -> float | None:
        """Of the dot peak; None where it is not known."""
        if self.samples[0].limits.dot_gmacs is None:
            return None
        return self._median(lambda s: self.multiply_adds / s.seconds / 1e9 / (s.limits.dot_gmacs or 0))

    @property
    def bound_s(self) -> float:
        return self._median(self._bound_s)

    @property
    def efficiency(self) -> float:
        """Bound / time."""
        return self._median(lambda sample: self._bound_s(sample) / sample.seconds)

    @property
    def best_efficiency(self) -> float:
        """The best limits of any round against the best call of any: what is left when disturbances are.

        Others on the machine make a median slower, and the limits are the best of several passes.
        """
        limits = [sample.limits for sample in self.samples]
        dots = [each.dot_gmacs for each in limits if each.dot_gmacs is not None]
        best = Limits(max(each.read_gbps for each in limits), max(dots, default=None))
        bound_s = best.bound_s(num_bytes=self.num_bytes, multiply_adds=self.multiply_adds)
        return bound_s / min(sample.best_s for sample in self.samples)

    def _bound_s(self, sample: Sample) -> float:
        return sample.limits.bound_s(num_bytes=self.num_bytes, multiply_adds=self.multiply_adds)

    def summary(self) -> dict[str, Any]:
        """For JSON."""
        case = self.case
        return {
            "format": case.format,
            "by": case.by,
            "threads": case.threads,
            "tokens": case.tokens,
            "us": self.seconds * 1e6,
            "best_us": min(sample.best_s for sample in self.samples) * 1e6,
            "us_of_rounds": [sample.seconds * 1e6 for sample in self.samples],
            "calls_of_rounds": [sample.num_calls for sample in self.samples],
            "read_gbps_of_rounds": [sample.limits.read_gbps for sample in self.samples],
            "dot_gmacs_of_rounds": [sample.limits.dot_gmacs for sample in self.samples],
            "bytes": self.num_bytes,
            "multiply_adds": self.multiply_adds,
            "reuse_bytes": self.reuse_bytes,
            "gbps": self.gbps,
            "read_percent": 100 * self.read_share,
            "gmacs": self.gmacs,
            "gflops": 2 * self.gmacs,
            "dot_percent": None if self.dot_share is None else 100 * self.dot_share,
            "bound_us": self.bound_s * 1e6,
            "efficiency": self.efficiency,
            "best_efficiency": self.best_efficiency,
        }


def speedup(ours: Result, other: Result) -> float:
    """How many times faster ours is: the median of the rounds' ratios, as a round sees both under the same load."""
    pairs = zip(ours.samples, other.samples, strict=False)
    return statistics.median(theirs.seconds / mine.seconds for mine, theirs in pairs)
