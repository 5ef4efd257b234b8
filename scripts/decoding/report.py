"""The results as a table for people and a record for machines."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import pairwise
from typing import Any

import numpy as np

from decoding.timing import DecodeResult, PrefillResult
from hmoe_jax.perf.scopes import OTHER, STAGES


def decode_table(results: Sequence[DecodeResult]) -> str:
    head = (
        f"{'decode':<8}{'layers':>7}{'batch':>7}{'context':>9}{'ms/step':>9}{'tok/s':>8}{'GB/step':>9}{'GB/s':>8}"
        f"{'limit':>8}{'step/bound':>12}"
    )
    return "\n".join([head, *map(_decode_line, results)])


def layer_table(results: Sequence[DecodeResult]) -> str:
    """What each further MoE layer costs, from models of different depth; the bound takes out unequal experts."""
    lines = [f"{'per MoE layer':<16}{'ms':>8}{'GB':>8}{'ms/bound':>10}"]
    for shallow, deep in pairwise(results):
        count = deep.num_layers - shallow.num_layers
        ms, gigabytes = (
            (deep.step_s - shallow.step_s) / count * 1e3,
            (deep.step_bytes - shallow.step_bytes) / count / 1e9,
        )
        limit_ms = gigabytes / deep.read_gbps * 1e3
        name = f"{shallow.num_layers} -> {deep.num_layers}"
        lines.append(f"{name:<16}{ms:>8.2f}{gigabytes:>8.3f}{ms / limit_ms:>10.2f}")
    return "\n".join(lines)


def prefill_table(results: Sequence[PrefillResult]) -> str:
    lines = [f"{'prefill':<9}{'seconds':>9}{'tok/s':>9}{'GFLOP/s':>10}{'dot peak':>10}{'share':>8}"]
    for each in results:
        peak, share = f"{each.dot_gflops:.0f}", f"{each.gflops / each.dot_gflops:.1%}"
        lines.append(
            f"{each.num_tokens:<9}{each.seconds:>9.3f}{each.tok_per_s:>9.1f}{each.gflops:>10.1f}{peak:>10}{share:>8}"
        )
    return "\n".join(lines)


def load_line(load: np.ndarray) -> str:
    """How unequally busy the experts are, over all layers: busiest, median and idlest against the mean."""
    share = load / np.maximum(load.mean(axis=1, keepdims=True), 1e-9)
    low, middle, high = share.min(axis=1).mean(), np.median(share, axis=1).mean(), share.max(axis=1).mean()
    return (
        f"experts' load over the prompts, against the mean: busiest {high:.2f}, median {middle:.2f}, idlest {low:.2f} "
        f"({load.shape[1]} experts, mean over {load.shape[0]} layers)"
    )


def decode_record(result: DecodeResult) -> dict[str, Any]:
    return {
        "num_layers": result.num_layers,
        "batch": result.batch,
        "context": result.context,
        "step_ms": result.step_s * 1e3,
        "tok_per_s": result.tok_per_s,
        "read_gbps": result.read_gbps,
        "ratio": result.ratio,
        "bytes": {stage: result.num_bytes[stage] for stage in (*STAGES, OTHER) if result.num_bytes.get(stage)},
        "load": result.load.tolist(),
    }


def prefill_record(result: PrefillResult) -> dict[str, Any]:
    return {
        "tokens": result.num_tokens,
        "seconds": result.seconds,
        "tok_per_s": result.tok_per_s,
        "gflops": result.gflops,
        "dot_gflops": result.dot_gflops,
    }


def _decode_line(each: DecodeResult) -> str:
    return (
        f"{'':<8}{each.num_layers:>7}{each.batch:>7}{each.context:>9}{each.step_s * 1e3:>9.2f}{each.tok_per_s:>8.1f}"
        f"{each.step_bytes / 1e9:>9.3f}{each.step_bytes / each.step_s / 1e9:>8.1f}{each.read_gbps:>8.1f}"
        f"{each.ratio:>12.3f}"
    )
