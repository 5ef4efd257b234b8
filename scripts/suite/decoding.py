"""What the suite measures of decoding: one microbatch against two, and a long prompt beside it."""

from __future__ import annotations

from contextlib import closing
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import jax
from companions.timing import Load, measure
from overlapping.timing import compare

from hmoe_jax.engine import Engine
from hmoe_jax.exec.open import open_executor
from hmoe_jax.exec.plan import EngineOptions
from suite.checks import FULL, Figures, Scale
from suite.layers import DeepSeekLayers


@dataclass(frozen=True)
class Sizes:
    """Of batches, and of the one beside which a prompt is computed."""

    batches: tuple[int, ...]
    context: int
    rounds: int
    load: Load
    steps: int


LARGE = Sizes((2, 8, 32), 4096, 15, Load(batch=8, context=4096, prompt_len=32768), steps=20)
TINY = Sizes((2,), 16, 1, Load(batch=2, context=8, prompt_len=40), steps=3)


def decode(device: jax.Device, scale: Scale, *, embedded: Path, layers: DeepSeekLayers) -> Figures:
    """Tokens per second in one microbatch and in two, in a compiled step and in the host's loop."""
    folder, sizes = _choose(scale, embedded, layers)
    wishes = _overlap(device) | {"max_num_seqs": max(sizes.batches), "max_model_len": sizes.context + 1}
    executor, _ = open_executor(folder, EngineOptions(**wishes))
    figures: Figures = {}
    with closing(executor):
        for batch in sizes.batches:
            found = compare(executor, batch=batch, context=sizes.context, num_rounds=sizes.rounds)
            for name in ("one", "two", "loop_one", "loop_two"):
                figures[f"{batch}_{name}_tok_s"] = batch / getattr(found, name).seconds
            figures[f"{batch}_experts_share"], figures[f"{batch}_ideal"] = found.experts_share, found.ideal
    return figures


def beside(device: jax.Device, scale: Scale, *, embedded: Path, layers: DeepSeekLayers) -> Figures:
    """Token latency alone and beside a long prompt, and the throughput against taking turns."""
    folder, sizes = _choose(scale, embedded, layers)
    load, rounds = sizes.load, {"num_rounds": 1, "num_steps": sizes.steps}
    wishes = _overlap(device) | {"prefill": "stream", "max_num_seqs": load.batch + 1}
    with Engine(folder, **wishes, max_model_len=load.max_len(**rounds), skip_tokenizer_init=True) as engine:
        measured = measure(engine, load, **rounds)
        efficiency = engine.metrics().overlap_efficiency
    return {
        "alone_ms": measured.alone_s * 1e3,
        "beside_ms": measured.beside_s * 1e3,
        "slowdown": measured.slowdown,
        "mean_slowdown": measured.mean_slowdown,
        "prompt_alone_s": measured.prompt_alone_s,
        "prompt_beside_s": measured.prompt_beside_s,
        "gain": measured.gain,
        "ideal_gain": measured.ideal_gain,
        "overlap_efficiency": efficiency,
    }


def _choose(scale: Scale, embedded: Path, layers: DeepSeekLayers) -> tuple[Path, Sizes]:
    return (layers.folder, LARGE) if scale is FULL else (embedded, TINY)


def _overlap(device: jax.Device) -> dict[str, Any]:
    """On the CPU platform the experts have a processor of their own, or would have."""
    return {
        "executor": "overlap",
        "device": device.platform,
        "expert_cpus": "1" if device.platform == "cpu" else "auto",
    }
