"""The stage table of a kind of step: seconds and bytes against the measured limit, for people and for machines."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

from hmoe_jax.perf.stages import BETWEEN, HOST, OpGroup


@dataclass(frozen=True)
class Profile:
    """One kind of step. `seconds` (by row) add up to a traced step; `untraced_s` is a step without the profiler.

    `num_bytes` are those that a stage must read at least; `tokens` come out of a step or go into it.
    """

    name: str
    tokens: int
    seconds: Mapping[str, float]
    num_bytes: Mapping[str, int]
    roofline_gbps: float
    untraced_s: float
    slowest: Sequence[OpGroup]

    def __post_init__(self) -> None:
        if self.roofline_gbps <= 0:
            raise ValueError(f"the roofline must be above 0 GB/s, got {self.roofline_gbps}")

    @property
    def rows(self) -> list[str]:
        """The stages that took time, in the order of the step."""
        return [row for row, seconds in self.seconds.items() if seconds > 0]

    @property
    def step_s(self) -> float:
        return sum(self.seconds.values())

    @property
    def program_s(self) -> float:
        """The step without Python and dispatch."""
        return self.step_s - self.seconds.get(HOST, 0.0)

    @property
    def step_bytes(self) -> int:
        return sum(self.num_bytes.values())

    def has_bytes(self, row: str) -> bool:
        return self.num_bytes.get(row, 0) > 0

    def gbps(self, row: str) -> float:
        return self.num_bytes.get(row, 0) / self.seconds[row] / 1e9

    def roofline_s(self, row: str) -> float:
        """How long the row would take at the measured limit."""
        return self.num_bytes.get(row, 0) / self.roofline_gbps / 1e9

    def summary(self) -> dict[str, Any]:
        """For JSON."""
        return {
            "tokens": self.tokens,
            "step_ms": self.step_s * 1e3,
            "untraced_ms": self.untraced_s * 1e3,
            "tok_per_s": self.tokens / self.untraced_s,
            "bytes": self.step_bytes,
            "roofline_gbps": self.roofline_gbps,
            "stages": {row: self._row_summary(row) for row in self.rows},
            "slowest": [asdict(op) for op in self.slowest],
        }

    def _row_summary(self, row: str) -> dict[str, Any]:
        figures: dict[str, Any] = {"ms": self.seconds[row] * 1e3}
        if self.has_bytes(row):
            gbps = self.gbps(row)
            percent = 100 * gbps / self.roofline_gbps
            figures |= {"bytes": self.num_bytes[row], "gbps": gbps, "roofline_percent": percent}
        return figures


def table(profile: Profile) -> str:
    """Stages, their sum, and the slowest operations."""
    head = (
        f"{profile.name}: {profile.untraced_s * 1e3:.3f} ms a step, {profile.tokens / profile.untraced_s:,.0f} tok/s "
        f"(under the profiler {profile.step_s * 1e3:.3f} ms)"
    )
    columns = f"{'stage':<14}{'ms':>9}{'time':>8}{'MB':>10}{'GB/s':>8}{'roofline':>10}"
    rows = [_row(profile, row) for row in profile.rows]
    total_gbps = profile.step_bytes / profile.step_s / 1e9
    total = _figures("sum", profile.step_s, 1.0, profile.step_bytes, total_gbps, profile.roofline_gbps)
    slow = [f"{op.stage:<14}{op.seconds * 1e3:>9.3f}  {op.count:>3} x {op.label} {op.type}" for op in profile.slowest]
    return "\n".join([head, columns, *rows, total, *(["slowest operations:"] if slow else []), *slow])


def footnote(roofline_gbps: float) -> str:
    return (
        f"MB: what a stage must read at least. Roofline: {roofline_gbps:.1f} GB/s, the memory's plain read bandwidth "
        "measured in this run;\na stage whose weights stay in the caches can exceed it. "
        f"'{BETWEEN}': the runtime picks the next operation. '{HOST}': Python and dispatch."
    )


def _row(profile: Profile, row: str) -> str:
    seconds, share = profile.seconds[row], profile.seconds[row] / profile.step_s
    if not profile.has_bytes(row):
        return f"{row:<14}{seconds * 1e3:>9.3f}{share:>8.1%}{'-':>10}{'-':>8}{'-':>10}"
    return _figures(row, seconds, share, profile.num_bytes[row], profile.gbps(row), profile.roofline_gbps)


def _figures(name: str, seconds: float, share: float, num_bytes: int, gbps: float, limit: float) -> str:
    return f"{name:<14}{seconds * 1e3:>9.3f}{share:>8.1%}{num_bytes / 1e6:>10.3f}{gbps:>8.2f}{gbps / limit:>10.1%}"
