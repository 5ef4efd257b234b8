"""What was served, as the table that vLLM's users know, and as records for machines."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from serving.drive import Served

LATENCIES = {
    "ttft": "Time to first token",
    "tpot": "Time per output token",
    "itl": "Inter-token latency",
    "e2e": "End to end",
}
WIDTH = 52


@dataclass(frozen=True)
class Summary:
    """One run. `latencies_ms`: mean, median and p99 of each of `LATENCIES`, None where nobody has one. Throughputs are
    per second of the run; `goodput` is that of requests that met all limits, None without limits."""

    duration_s: float
    completed: int
    failed: int
    num_prompt_tokens: int
    num_tokens: int
    latencies_ms: Mapping[str, Mapping[str, float] | None]
    goodput: float | None

    @property
    def request_throughput(self) -> float:
        return self.completed / self.duration_s

    @property
    def output_throughput(self) -> float:
        return self.num_tokens / self.duration_s

    @property
    def total_throughput(self) -> float:
        return (self.num_prompt_tokens + self.num_tokens) / self.duration_s


def summarize(results: Sequence[Served], duration_s: float, limits_s: Mapping[str, float]) -> Summary:
    good = [each for each in results if each.error is None and each.came]
    values = {
        "ttft": [each.ttft_s for each in good],
        "tpot": [each.tpot_s for each in good if each.tpot_s is not None],
        "itl": [gap for each in good for gap in each.itl_s],
        "e2e": [each.e2e_s for each in good],
    }
    num_met = sum(
        all((getattr(each, f"{name}_s") or 0.0) <= limit for name, limit in limits_s.items()) for each in good
    )
    return Summary(
        duration_s=duration_s,
        completed=len(good),
        failed=len(results) - len(good),
        num_prompt_tokens=sum(len(each.ask.prompt_ids) for each in good),
        num_tokens=sum(each.num_tokens for each in good),
        latencies_ms={name: _spread(seconds) for name, seconds in values.items()},
        goodput=num_met / duration_s if limits_s else None,
    )


def parse_goodput(text: str) -> dict[str, float]:
    """`"ttft:30,tpot:0.05"`: limits in seconds. Raises `ValueError` saying what is expected."""
    limits = {}
    for part in filter(None, text.split(",")):
        name, _, value = part.partition(":")
        try:
            limits[name] = float(value)
        except ValueError:
            limits[name] = -1.0
        if name not in ("ttft", "tpot", "e2e") or limits[name] < 0:
            raise ValueError(
                f"--goodput: expected ttft, tpot or e2e with seconds, like ttft:30,tpot:0.05, got {part!r}"
            )
    return limits


def table(summary: Summary) -> str:
    rows: list[tuple[str, str] | str] = [
        ("Successful requests", f"{summary.completed}"),
        ("Failed requests", f"{summary.failed}"),
        ("Benchmark duration (s)", f"{summary.duration_s:.2f}"),
        ("Total input tokens", f"{summary.num_prompt_tokens}"),
        ("Total generated tokens", f"{summary.num_tokens}"),
        ("Request throughput (req/s)", f"{summary.request_throughput:.2f}"),
        ("Output token throughput (tok/s)", f"{summary.output_throughput:.2f}"),
        ("Total token throughput (tok/s)", f"{summary.total_throughput:.2f}"),
    ]
    if summary.goodput is not None:
        rows.append(("Request goodput (req/s)", f"{summary.goodput:.2f}"))
    for name, title in LATENCIES.items():
        spread = summary.latencies_ms[name]
        rows.append(f" {title} ".center(WIDTH, "-"))
        for kind in ("mean", "median", "p99"):
            label = f"{kind.upper() if kind == 'p99' else kind.capitalize()} {name.upper()} (ms)"
            rows.append((label, f"{spread[kind]:.2f}" if spread else "-"))
    lines = [row if isinstance(row, str) else f"{row[0] + ':':<36}{row[1]:>{WIDTH - 36}}" for row in rows]
    return "\n".join([" Serving benchmark ".center(WIDTH, "="), *lines, "=" * WIDTH])


def record(summary: Summary, results: Sequence[Served]) -> dict[str, Any]:
    """The summary and every request."""
    return {
        "duration_s": summary.duration_s,
        "completed": summary.completed,
        "failed": summary.failed,
        "total_input_tokens": summary.num_prompt_tokens,
        "total_output_tokens": summary.num_tokens,
        "request_throughput": summary.request_throughput,
        "output_throughput": summary.output_throughput,
        "total_token_throughput": summary.total_throughput,
        "request_goodput": summary.goodput,
        **{
            f"{kind}_{name}_ms": spread and spread[kind]
            for name, spread in summary.latencies_ms.items()
            for kind in ("mean", "median", "p99")
        },
        "requests": [
            {
                "arrival_s": each.ask.arrival_s,
                "sent_s": each.sent_s,
                "input_tokens": len(each.ask.prompt_ids),
                "output_tokens": each.num_tokens,
                "came": each.came,
                "error": each.error,
            }
            for each in results
        ],
    }


def _spread(seconds: Sequence[float]) -> dict[str, float] | None:
    if not seconds:
        return None
    ms = np.array(seconds) * 1e3
    return {"mean": float(ms.mean()), "median": float(np.median(ms)), "p99": float(np.percentile(ms, 99))}
