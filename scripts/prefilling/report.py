"""The rounds as a table for people and records for machines."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from prefilling.timing import Limits, Round

COLUMNS = (
    "tokens", "TTFT s", "tok/s", "GB copied", "GB/s", "of link", "expert TFLOP/s", "of peak", "copy s", "compute s",
    "overlap", "host",
)  # fmt: skip


def table(rounds: Sequence[Round], limits: Limits) -> str:
    lines = [f"| {' | '.join(COLUMNS)} |", f"|{'---:|' * len(COLUMNS)}"]
    lines += [f"| {' | '.join(_cells(each, limits))} |" for each in rounds]
    return "\n".join(lines)


def record(each: Round, limits: Limits) -> dict[str, Any]:
    return {
        "tokens": each.num_tokens,
        "ttft_s": each.seconds,
        "tok_per_s": each.num_tokens / each.seconds,
        "copied_bytes": each.copied_bytes,
        "copy_gbps": _gbps(each),
        "link_gbps": limits.link_gbps,
        "expert_tflops": _tflops(each),
        "gemm_tflops": limits.gemm_tflops,
        "copy_s": each.copy_s,
        "compute_s": each.compute_s,
        "overlap_efficiency": each.recorder.overlap_efficiency,
        "host_share": each.host_share,
    }


def _cells(each: Round, limits: Limits) -> list[str]:
    return [
        f"{each.num_tokens:,}",
        f"{each.seconds:.2f}",
        f"{each.num_tokens / each.seconds:,.0f}",
        f"{each.copied_bytes / 1e9:.2f}",
        f"{_gbps(each):.2f}",
        f"{_gbps(each) / limits.link_gbps:.0%}",
        f"{_tflops(each):.3f}",
        f"{_tflops(each) / limits.gemm_tflops:.0%}",
        f"{each.copy_s:.2f}",
        f"{each.compute_s:.2f}",
        f"{each.recorder.overlap_efficiency:.2f}",
        f"{each.host_share:.1%}",
    ]


def _gbps(each: Round) -> float:
    return each.copied_bytes / each.copy_s / 1e9


def _tflops(each: Round) -> float:
    return each.expert_flops / each.expert_s / 1e12
