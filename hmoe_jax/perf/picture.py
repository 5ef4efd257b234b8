"""The stage table as a picture, and how all pictures look. The one file that needs matplotlib (the `plot` extra)."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from io import BytesIO
from typing import Any

from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from matplotlib.layout_engine import ConstrainedLayoutEngine

from hmoe_jax.perf.lanes import Span
from hmoe_jax.perf.report import Profile
from hmoe_jax.perf.scopes import OTHER, STAGES

INK, FAINT, LIMIT = "#22272e", "#9aa3ad", "#c8372d"
COLORS = dict(
    zip(STAGES, ("#7f9cb8", "#3b6ea5", "#6fb1a8", "#e08a3c", "#f0b775", "#b98b5e", "#7a5aa6", "#b59ad0"), strict=True)
) | {OTHER: "#8d99a6"}
IDLE = "#d3d8dd"
"""Where nothing of the model runs."""

ROW_INCHES, FRAME_INCHES, BAR = 0.34, 1.25, 0.72


def draw(profiles: Sequence[Profile], *, title: str) -> bytes:
    """A PNG: for each profile the time of every stage beside the bandwidth that it reaches."""
    heights = [len(profile.rows) * ROW_INCHES + FRAME_INCHES for profile in profiles]
    figure = new_figure(title, size=(11.5, sum(heights) + 0.6), hspace=0.08, wspace=0.04)
    grid = figure.subplots(len(profiles), 2, squeeze=False, height_ratios=heights, width_ratios=(1.25, 1), sharey="row")
    for (times, bandwidths), profile in zip(grid, profiles, strict=True):
        _draw_times(times, profile)
        _draw_bandwidths(bandwidths, profile)
    return to_png(figure)


def new_figure(title: str, *, size: tuple[float, float], hspace: float = 0.02, wspace: float = 0.02) -> Figure:
    """An empty one, `size` in inches; the spaces between its panels are parts of theirs."""
    layout = ConstrainedLayoutEngine(w_pad=0.1, h_pad=0.1, hspace=hspace, wspace=wspace)
    figure = Figure(figsize=size, facecolor="white", layout=layout)
    figure.suptitle(title, x=0.012, ha="left", fontsize=12, fontweight="bold", color=INK)
    return figure


def bars(spans: Iterable[Span], begin: float) -> list[tuple[float, float]]:
    """Where each starts and how long it is, for `broken_barh`."""
    return [(span.begin - begin, span.end - span.begin) for span in spans]


def to_png(figure: Figure) -> bytes:
    buffer = BytesIO()
    FigureCanvasAgg(figure).print_figure(buffer, format="png", dpi=150)
    return buffer.getvalue()


def _draw_times(axes: Any, profile: Profile) -> None:
    values = [profile.seconds[row] * 1e3 for row in profile.rows]
    limits = [profile.roofline_s(row) * 1e3 for row in profile.rows]
    axes.barh(profile.rows, values, color=_colors(profile), height=BAR)
    for y, (row, value, limit) in enumerate(zip(profile.rows, values, limits, strict=True)):
        if profile.has_bytes(row):
            axes.plot([limit] * 2, [y - BAR / 2, y + BAR / 2], color=LIMIT, linewidth=1.8, solid_capstyle="butt")
        _label(axes, (max(value, limit), y), f"{value:.3f} ms", f"{profile.seconds[row] / profile.step_s:.0%}")
    axes.set_xlim(0, 1.28 * max(values + limits))
    axes.invert_yaxis()
    rate, step_ms = profile.tokens / profile.untraced_s, profile.untraced_s * 1e3
    axes.set_title(f"{profile.name}: {step_ms:.2f} ms a step, {rate:,.0f} tok/s", loc="left", fontsize=11, color=INK)
    axes.set_xlabel("ms of a step, under the profiler  (red: what the roofline allows)", color=INK, fontsize=9)
    _clean(axes)


def _draw_bandwidths(axes: Any, profile: Profile) -> None:
    limit = profile.roofline_gbps
    values = [profile.gbps(row) if profile.has_bytes(row) else 0.0 for row in profile.rows]
    axes.axvline(limit, color=LIMIT, linewidth=1.6, linestyle=(0, (5, 3)), zorder=0.5)
    axes.barh(profile.rows, values, color=_colors(profile), height=BAR)
    for y, (row, value) in enumerate(zip(profile.rows, values, strict=True)):
        if profile.has_bytes(row):
            _label(axes, (value, y), f"{value:.2f} GB/s", f"{value / limit:.0%}")
    axes.set_xlim(0, 1.36 * max(limit, *values))
    axes.annotate(
        f"roofline {limit:.1f} GB/s", (limit, 1), xycoords=("data", "axes fraction"), xytext=(0, 4),
        textcoords="offset points", ha="center", va="bottom", fontsize=9, color=LIMIT,
    )  # fmt: skip
    axes.set_xlabel("GB/s of weights and cache", color=INK, fontsize=9)
    axes.tick_params(axis="y", labelleft=False)
    _clean(axes)


def _label(axes: Any, end: tuple[float, int], text: str, detail: str) -> None:
    """The figure in ink and, fainter, its share, right of the bar's end."""
    look: dict[str, Any] = {"textcoords": "offset points", "va": "center", "fontsize": 8.5}
    look["bbox"] = {"facecolor": "white", "edgecolor": "none", "pad": 0.6}
    note = axes.annotate(text, end, xytext=(5, 0), color=INK, **look)
    axes.annotate(detail, (1, 0.5), xycoords=note, xytext=(5, 0), color=FAINT, **look)


def _colors(profile: Profile) -> list[str]:
    return [COLORS.get(row, IDLE) for row in profile.rows]


def _clean(axes: Any) -> None:
    axes.spines[["top", "right", "left"]].set_visible(False)
    axes.spines["bottom"].set_color(FAINT)
    axes.tick_params(axis="y", length=0, labelsize=9.5, labelcolor=INK)
    axes.tick_params(axis="x", colors=FAINT, labelsize=8.5)
    axes.grid(axis="x", color="#eceff2", linewidth=0.8)
    axes.set_axisbelow(True)
