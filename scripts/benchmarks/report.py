"""Results as Markdown tables for people, and as a record for machines."""

from __future__ import annotations

import statistics
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

from benchmarks.cases import NAIVE, Result, speedup
from benchmarks.overhead import Overhead


@dataclass(frozen=True)
class Report:
    """`setting` is what the figures hold for; `cache_bytes` the size of the last-level cache, 0 if unknown."""

    setting: Mapping[str, Any]
    results: Sequence[Result]
    overheads: Sequence[Overhead]
    cache_bytes: int

    def text(self) -> str:
        """Everything, as one Markdown document."""
        parts = [self._heading(), self._limits(), self._cases(), self._comparison(), self._overheads(), self._notes()]
        return "\n\n".join(part for part in parts if part) + "\n"

    def summary(self) -> dict[str, Any]:
        """For JSON."""
        return {
            **self.setting,
            "cache_bytes": self.cache_bytes,
            "results": [result.summary() for result in self.results],
            "speedups": [
                {**asdict(ours.case), "over": other.case.by, "speedup": speedup(ours, other)}
                for ours, other in self._pairs()
            ],
            "overheads": [asdict(each) for each in self.overheads],
        }

    def _heading(self) -> str:
        s = self.setting
        return (
            f"# Expert kernels: {s['cpu']}\n\n"
            f"hidden {s['hidden']}, ffn {s['ffn']}, top-{s['top_k']} of {s['num_experts']} experts, {s['routing']} "
            f"routing; medians of {s['rounds']} rounds"
            f"{'; against ' + s['peer'] if s['peer'] else ''}.\n\n    {s['command']}"
        )

    def _limits(self) -> str:
        rows = []
        for threads in sorted({result.case.threads for result in self.results}):
            own = [result for result in self.results if result.case.threads == threads]
            reads = [sample.limits.read_gbps for result in own for sample in result.samples]
            dots: dict[str, list[float]] = {}
            for result in own:
                measured = [s.limits.dot_gmacs for s in result.samples if s.limits.dot_gmacs is not None]
                dots.setdefault(result.case.by, []).extend(measured)
            peaks = ", ".join(f"{by} {statistics.median(each):.0f}" for by, each in dots.items() if each)
            rows.append([str(threads), f"{statistics.median(reads):.1f}", f"{min(reads):.1f}-{max(reads):.1f}", peaks])
        return markdown(["threads", "read GB/s", "of rounds", "dot peak GMAC/s"], rows)

    def _cases(self) -> str:
        header = ["format", "by", "threads", "tokens", "us", "GB/s", "of read", "GMAC/s", "of dot", "bound us"]
        return markdown([*header, "efficiency", "best"], [self._case(result) for result in self.results])

    def _case(self, result: Result) -> list[str]:
        case = result.case
        mark = "*" if result.reuse_bytes < 2 * self.cache_bytes else ""
        return [
            case.format, case.by, str(case.threads), str(case.tokens), f"{result.seconds * 1e6:,.0f}",
            f"{result.gbps:.1f}{mark}", f"{result.read_share:.0%}", f"{result.gmacs:.1f}",
            "-" if result.dot_share is None else f"{result.dot_share:.0%}",
            f"{result.bound_s * 1e6:,.0f}", f"{result.efficiency:.2f}",
            f"{result.best_efficiency:.2f}",
        ]  # fmt: skip

    def _comparison(self) -> str:
        rows = [
            [
                ours.case.format, str(ours.case.threads), str(ours.case.tokens), ours.case.by,
                f"{ours.seconds * 1e6:,.0f}", other.case.by, f"{other.seconds * 1e6:,.0f}",
                f"{speedup(ours, other):.2f}",
            ]
            for ours, other in self._pairs()
        ]  # fmt: skip
        return markdown(["format", "threads", "tokens", "ours", "us", "against", "us", "times faster"], rows)

    def _pairs(self) -> list[tuple[Result, Result]]:
        """Everyone else's result beside the fastest of ours for the same work."""
        pairs = []
        for other in self.results:
            if self._is_ours(other):
                continue
            work = (other.case.format, other.case.threads, other.case.tokens)
            same = [r for r in self.results if (r.case.format, r.case.threads, r.case.tokens) == work]
            ours = min(filter(self._is_ours, same), key=lambda result: result.seconds, default=None)
            if ours is not None:
                pairs.append((ours, other))
        return pairs

    @staticmethod
    def _is_ours(result: Result) -> bool:
        return result.samples[0].limits.dot_gmacs is not None

    def _overheads(self) -> str:
        rows = [[o.isa, str(o.threads), f"{o.dispatch_us:.1f}", f"{o.call_us:.1f}"] for o in self.overheads]
        table = markdown(["isa", "threads", "program of one call, us", "one call more in a program, us"], rows)
        return f"A call in which every slot is -1, the pool warm:\n\n{table}" if rows else ""

    def _notes(self) -> str:
        notes = [
            "GB/s: weights and scales of the experts that a call touches, each once. Read: the faster of plain and "
            "prefetched 512-bit loads (or the widest there are) over a large buffer, the best pass of each round. Dot: "
            "the ISA's dot instruction from registers. Bound: the larger of bytes / read and multiply-adds / dot. All "
            "with the same threads, in the same run. Efficiency: bound / time of a round. Best: the best limits over "
            "the best call, of all rounds.",
        ]
        if any(result.case.by == NAIVE for result in self.results):
            notes.append(f"{NAIVE}: a plain loop that turns a row into FP32 once, then multiplies it with every token.")
        if any(result.reuse_bytes < 2 * self.cache_bytes for result in self.results):
            notes.append("*: the same weights came back too soon to be sure that the last-level cache had lost them.")
        notes += [f"Not timed, after a call that took too long: {case}." for case in self._left_out()]
        return "\n\n".join(notes)

    def _left_out(self) -> list[str]:
        asked = sorted({result.case.tokens for result in self.results})
        timed: dict[tuple[str, str, int], int] = {}
        for result in self.results:
            key = (result.case.format, result.case.by, result.case.threads)
            timed[key] = max(timed.get(key, 0), result.case.tokens)
        return [
            f"{format_} by {by}, {threads} thread(s), more than {most} tokens"
            for (format_, by, threads), most in timed.items()
            if most < asked[-1]
        ]


def markdown(header: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """A table, aligned so that it reads as plain text too; empty without rows."""
    if not rows:
        return ""
    widths = [max(map(len, column)) for column in zip(header, *rows, strict=True)]

    def line(cells: Sequence[str]) -> str:
        return "| " + " | ".join(cell.rjust(width) for cell, width in zip(cells, widths, strict=True)) + " |"

    rule = "|" + "|".join("-" * (width + 1) + ":" for width in widths) + "|"
    return "\n".join([line(header), rule, *map(line, rows)])
