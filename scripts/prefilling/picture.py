"""A prefill's two lanes over time."""

from __future__ import annotations

from collections.abc import Sequence

from hmoe_jax.perf.picture import FAINT, INK, bars, new_figure, to_png
from prefilling.timing import Round

COLORS = {
    "expand": "#b7a3c9",
    "attention": "#6fb1a8",
    "mlp": "#a9d1c6",
    "front": "#3b6ea5",
    "experts": "#e08a3c",
    "back": "#7f9cb8",
}
COPY = "#8d99a6"


def draw(rounds: Sequence[Round], *, title: str) -> bytes:
    """A PNG: for each prompt a row of copies above a row of computations."""
    figure = new_figure(title, size=(11.5, 0.8 + 1.3 * len(rounds)))
    panels = figure.subplots(len(rounds), 1, squeeze=False)[:, 0]
    for axes, each in zip(panels, rounds, strict=True):
        begin = each.recorder.begin
        axes.broken_barh(bars(each.recorder.copies, begin), (1.1, 0.8), color=COPY, edgecolor="white", linewidth=0.2)
        for name, color in COLORS.items():
            own = [span for span in each.recorder.computed if span.name == name]
            axes.broken_barh(bars(own, begin), (0.1, 0.8), color=color, label=name)
        axes.set_yticks([0.5, 1.5], ["compute", "copy"], color=INK, fontsize=9)
        axes.set_xlim(0, each.recorder.wall_s)
        axes.set_title(
            f"{each.num_tokens:,} tokens, overlap {each.recorder.overlap_efficiency:.2f}",
            loc="left", fontsize=10, color=INK,
        )  # fmt: skip
        axes.spines[["top", "right", "left"]].set_visible(False)
        axes.tick_params(axis="x", colors=FAINT, labelsize=8)
    panels[-1].set_xlabel("seconds", color=INK, fontsize=9)
    handles, labels = panels[-1].get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside right upper", fontsize=8, frameon=False)
    return to_png(figure)
