"""A prompt beside decoding over time: how long decode steps take, and what host memory and the link move."""

from __future__ import annotations

from companions.timing import Measured
from hmoe_jax.perf.picture import FAINT, INK, new_figure, to_png

STEP, READ, COPIED = "#3b6ea5", "#e08a3c", "#8d99a6"


def draw(measured: Measured) -> bytes:
    """A PNG of the last round: from when the prompt comes until it has its first token."""
    one = measured.rounds[-1]
    times = [look.seconds for look in one.traffic]
    load = measured.load
    title = f"{load.batch} sequences decode beside a prompt of {load.prompt_len:,} tokens"
    figure = new_figure(title, size=(11.5, 5.0))
    steps, traffic = figure.subplots(2, 1, sharex=True)
    steps.plot(times, [seconds * 1e3 for seconds in one.beside_s], color=STEP, linewidth=1, label="beside the prompt")
    steps.axhline(measured.alone_s * 1e3, color=FAINT, linestyle="--", linewidth=1, label="alone (median)")
    steps.set_ylabel("decode step, ms", color=INK, fontsize=9)
    traffic.plot(times, [look.expert_gbps for look in one.traffic], color=READ, linewidth=1, label="read by the CPU")
    traffic.plot(
        times, [look.copied_gbps for look in one.traffic], color=COPIED, linewidth=1, label="copied to the device"
    )
    traffic.set_ylabel("routed experts, GB/s", color=INK, fontsize=9)
    traffic.set_xlabel("seconds", color=INK, fontsize=9)
    for axes in (steps, traffic):
        axes.set_ylim(bottom=0)
        axes.spines[["top", "right"]].set_visible(False)
        axes.tick_params(colors=FAINT, labelsize=8)
        axes.legend(loc="upper right", fontsize=8, frameon=False)
    return to_png(figure)
