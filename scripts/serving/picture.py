"""Latencies over load, and what device and CPU did when."""

from __future__ import annotations

import math
from bisect import bisect
from collections.abc import Mapping, Sequence
from typing import Any

from hmoe_jax.exec.activity import BETWEEN, Activity
from hmoe_jax.perf.picture import FAINT, IDLE, INK, bars, new_figure, to_png

MEDIAN, P99, THROUGHPUT = "#3b6ea5", "#e08a3c", "#6fb1a8"
COLORS = {"A": "#3b6ea5", "B": "#7a5aa6", BETWEEN: IDLE}
PROMPT, COPY = "#e08a3c", "#8d99a6"

SHOWN_STEPS = 4
"""Decode steps of a timeline: more of them cannot be told apart."""


def draw_load(runs: Sequence[Mapping[str, Any]], *, title: str) -> bytes:
    """A PNG: time to first token, time per output token and throughput of `report.record`s, over the requests that came
    in a second; those that came all at once stand last."""
    ordered = sorted(runs, key=lambda run: math.inf if run["request_rate"] == "inf" else run["request_rate"])
    names = ["all at once" if run["request_rate"] == "inf" else f"{run['request_rate']:g}" for run in ordered]
    figure = new_figure(title, size=(11.5, 3.8))
    first, each, tokens = figure.subplots(1, 3)
    for axes, name, label in ((first, "ttft", "time to first token, ms"), (each, "tpot", "time per output token, ms")):
        for kind, color in (("median", MEDIAN), ("p99", P99)):
            values = [run[f"{kind}_{name}_ms"] for run in ordered]
            axes.plot(names, values, color=color, marker="o", markersize=4, linewidth=1.2, label=kind)
        axes.legend(fontsize=8, frameon=False)
        axes.set_ylabel(label, color=INK, fontsize=9)
    tokens.plot(names, [run["output_throughput"] for run in ordered], color=THROUGHPUT, marker="o", markersize=4)
    tokens.set_ylabel("output tokens per second", color=INK, fontsize=9)
    for axes in (first, each, tokens):
        axes.set_ylim(0, 1.05 * axes.get_ylim()[1])
        axes.set_xlabel("requests per second", color=INK, fontsize=9)
        _clean(axes)
    return to_png(figure)


def draw_timeline(activity: Activity, *, title: str) -> bytes:
    """A PNG: some steps beside the last prompt, or the last steps where none came while others decoded. There are
    steps."""
    begin, end = _window(activity)
    shown = {
        name: [span for span in spans if begin < span.end and span.begin < end]
        for name, spans in vars(activity).items()
    }
    figure = new_figure(title, size=(11.5, 2.6))
    axes = figure.subplots()
    for name, color in COLORS.items():
        for row, spans in ((1, shown["device"]), (0, shown["experts"])):
            own = [span for span in spans if span.name == name]
            label = (name if name == BETWEEN else f"part {name}") if row else None
            axes.broken_barh(bars(own, begin), (row + 0.1, 0.8), color=color, label=label, linewidth=0)
    axes.broken_barh(bars(shown["prompt"], begin), (1.1, 0.8), color=PROMPT, label="prompt", linewidth=0)
    axes.broken_barh(bars(shown["copies"], begin), (2.1, 0.8), color=COPY, linewidth=0)
    axes.set_yticks([0.5, 1.5, 2.5], ["experts (CPU)", "device", "link"], color=INK, fontsize=9)
    axes.set_xlim(0, end - begin)
    axes.set_ylim(0, 3)
    axes.set_xlabel("seconds", color=INK, fontsize=9)
    _clean(axes)
    handles, labels = axes.get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside right upper", fontsize=8, frameon=False)
    return to_png(figure)


def _window(activity: Activity) -> tuple[float, float]:
    """From the end of one step to that of another: of all such, the last one with the most parts of a prompt."""
    ends = [span.begin for span in activity.device if span.name == BETWEEN]
    windows = list(zip(ends, ends[SHOWN_STEPS:], strict=False))
    if not windows:  # too few steps to choose
        return activity.device[0].begin, activity.device[-1].end
    begins = sorted(span.begin for span in activity.prompt)
    return max(reversed(windows), key=lambda window: bisect(begins, window[1]) - bisect(begins, window[0]))


def _clean(axes: Any) -> None:
    axes.spines[["top", "right"]].set_visible(False)
    axes.tick_params(colors=FAINT, labelsize=8)
