"""The roofline plot: multiply-adds per second over multiply-adds per byte, beneath what the hardware allows."""

from __future__ import annotations

import statistics
from collections.abc import Sequence
from typing import Any

import numpy as np

from benchmarks.cases import Result
from hmoe_jax.perf.picture import FAINT, INK, LIMIT, new_figure, to_png

COLORS = ("#3b6ea5", "#e08a3c", "#6fb1a8", "#7a5aa6", "#b98b5e", "#7f9cb8", "#c8372d", "#8d99a6")
MARKERS = "osD^vP*X"


def draw(results: Sequence[Result], *, title: str) -> bytes:
    """A PNG with one panel per number of threads; a line joins the token counts of a format and its side."""
    counts = sorted({result.case.threads for result in results})
    figure = new_figure(title, size=(1.5 + 5.5 * len(counts), 6.0))
    panels = figure.subplots(1, len(counts), squeeze=False, sharey=True)[0]
    for axes, threads in zip(panels, counts, strict=True):
        own = [result for result in results if result.case.threads == threads]
        _draw_points(axes, own, results)
        _draw_limits(axes, own)
        axes.set_title(f"{threads} thread{'s' if threads > 1 else ''}", loc="left", fontsize=11, color=INK)
        axes.set_xlabel("multiply-adds per byte of weights", color=INK, fontsize=9)
        _clean(axes)
    panels[0].set_ylabel("GMAC/s", color=INK, fontsize=9)
    handles, labels = panels[-1].get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside right upper", fontsize=8, frameon=False)
    return to_png(figure)


def _intensity(result: Result) -> float:
    return result.multiply_adds / result.num_bytes


def _draw_points(axes: Any, own: Sequence[Result], everyone: Sequence[Result]) -> None:
    formats = list(dict.fromkeys(result.case.format for result in everyone))
    sides = list(dict.fromkeys(result.case.by for result in everyone))
    for f, name in enumerate(formats):
        for s, by in enumerate(sides):
            line = [r for r in own if (r.case.format, r.case.by) == (name, by)]
            line.sort(key=lambda result: result.case.tokens)
            xs, ys = [_intensity(r) for r in line], [r.gmacs for r in line]
            look = {"color": COLORS[f % len(COLORS)], "marker": MARKERS[s % len(MARKERS)], "markersize": 5}
            axes.plot(xs, ys, linewidth=0.9, label=f"{name}, {by}", **look)


def _draw_limits(axes: Any, own: Sequence[Result]) -> None:
    """The slope is the read bandwidth; every ISA has a ceiling of its own."""
    read = statistics.median(sample.limits.read_gbps for result in own for sample in result.samples)
    low = min(map(_intensity, own)) / 2
    high = 2 * max(map(_intensity, own))
    ceilings: dict[str, float] = {}
    for result in own:
        if result.dot_share is not None:
            ceilings[result.case.by] = statistics.median(sample.limits.dot_gmacs or 0.0 for sample in result.samples)
    for isa, peak in ceilings.items():
        xs = np.geomspace(low, max(high, 2 * peak / read), 100)
        axes.plot(xs, np.minimum(xs * read, peak), color=LIMIT, linewidth=1.3, zorder=1)
        axes.annotate(
            f"{isa} {peak:,.0f} GMAC/s", (xs[-1], peak), xytext=(0, 3), textcoords="offset points",
            ha="right", va="bottom", fontsize=8, color=LIMIT,
        )  # fmt: skip
    axes.annotate(
        f"read {read:.1f} GB/s", (low, low * read), xytext=(0, 8), textcoords="offset points",
        ha="left", va="bottom", fontsize=8, color=LIMIT,
    )  # fmt: skip


def _clean(axes: Any) -> None:
    axes.set_xscale("log")
    axes.set_yscale("log")
    axes.spines[["top", "right"]].set_visible(False)
    axes.spines[["bottom", "left"]].set_color(FAINT)
    axes.tick_params(which="both", colors=FAINT, labelsize=8.5)
    axes.grid(color="#eceff2", linewidth=0.8)
    axes.set_axisbelow(True)
