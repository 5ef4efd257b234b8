"""What the suite measures of experts in host memory: pinned memory, every executor, and streamed prompts."""

from __future__ import annotations

import statistics
import time
from contextlib import closing
from pathlib import Path
from typing import Any

import jax
import numpy as np
from measuring.experts import random_store
from prefilling.timing import Round, measure_limits, run

from hmoe_jax.config import read_config
from hmoe_jax.exec.open import open_executor
from hmoe_jax.exec.plan import EngineOptions
from hmoe_jax.exec.score import load_for_scoring
from hmoe_jax.exec.session import Session
from hmoe_jax.exec.stream import StreamExecutor
from hmoe_jax.experts.pinned import in_device_memory
from hmoe_jax.experts.store import StoreShape
from hmoe_jax.kernels.pool import ThreadPool
from hmoe_jax.perf.cost import held_bytes
from suite.checks import FULL, Figures, Scale
from suite.layers import DeepSeekLayers

LENGTHS = (8192, 16384, 32768)
SMALL_LENGTHS = (200,)

WORST_ERROR = 0.05
"""Of logits in BF16 against FP32."""

DEEPSEEK_MOE_LAYERS = 58


def pinned(device: jax.Device, scale: Scale) -> Figures:
    """Whether JAX takes a pinned store's memory without a copy, and how fast the device copies from it."""
    shape = StoreShape(1, 4 * scale.group, scale.hidden, scale.ffn)
    with ThreadPool() as pool, random_store(shape, pool, residency="arena") as store:
        begin = time.perf_counter()
        try:
            store.pin()
        except ValueError as refusal:
            if device.platform == "cpu":
                return {"skipped": str(refusal)}
            raise
        figures: Figures = {"pin_gbps": store.num_bytes / (time.perf_counter() - begin) / 1e9}
        record = store.record(0, 1, device)
        address = np.from_dlpack(store.native.record(0, 1, 0)).ctypes.data
        figures["memory_kind"] = str(record.sharding.memory_kind)
        figures["zero_copy"] = str(record.unsafe_buffer_pointer() == address)
        expected = np.zeros(record.shape, np.uint8)
        store.copy_records(0, np.array([1], np.int32), expected)
        here = in_device_memory(device)
        if not np.array_equal(np.asarray(jax.device_put(record, here)), expected):
            raise ValueError("a device sees other bytes than the store has")
        times = []
        for _ in range(scale.effort.calls):
            begin = time.perf_counter()
            records = [store.record(0, expert, device) for expert in range(shape.num_experts)]
            jax.block_until_ready(jax.device_put(records, here))
            times.append(time.perf_counter() - begin)
    return figures | {"h2d_gbps": store.num_bytes / statistics.median(times) / 1e9}


def executors(device: jax.Device, scale: Scale, *, embedded: Path) -> Figures:
    """Logits of the embedded model, and its greedy tokens, by every executor against FP32 on the CPU platform."""
    length = 600 if scale is FULL else 60
    prompt, platform = np.random.default_rng(0).integers(3, 4000, length).tolist(), device.platform
    ways: dict[str, dict[str, Any]] = {
        "graph_f32": {"executor": "graph", "dtype": "float32"},
        "graph": {"executor": "graph"},
        "fused": {"executor": "fused", "prefill": "step"},
        "stream": {"executor": "fused", "prefill": "stream"},
        "overlap": {"executor": "overlap", "prefill": "stream", "expert_cpus": "1" if platform == "cpu" else "auto"},
    }
    with load_for_scoring(
        embedded, device="cpu", executor="graph", dtype="float32", max_model_len=length + 8
    ) as scorer:
        tokens, expected = scorer.greedy(prompt, 8)
    figures: Figures = {}
    for name, wishes in ways.items():
        with load_for_scoring(embedded, device=platform, **wishes, max_model_len=length + 8) as scorer:
            actual = scorer.greedy(prompt, 8)
        agreeing = int(np.cumprod(actual[0] == tokens).sum())
        rows = slice(0, min(agreeing + 1, len(tokens)))  # what follows another token is another text
        errors = np.linalg.norm(actual[1] - expected, axis=-1) / np.linalg.norm(expected, axis=-1)
        figures |= {f"{name}_error": float(errors[rows].max()), f"{name}_same_tokens": agreeing}
        if not errors[rows].max() < WORST_ERROR:
            raise ValueError(f"{name}: logits are off by {errors[rows].max():.3g}")
    return figures


def stream(device: jax.Device, scale: Scale, *, embedded: Path, layers: DeepSeekLayers) -> Figures:
    """Prompts through true DeepSeek-V3 layers; on the CPU platform through the embedded model."""
    return _prompts(layers.folder, LENGTHS) if scale is FULL else _prompts(embedded, SMALL_LENGTHS)


def _prompts(folder: Path, lengths: tuple[int, ...]) -> Figures:
    config = read_config(folder)
    wishes = EngineOptions(executor="fused", prefill="stream", max_num_seqs=1, max_model_len=max(lengths) + 1)
    begin = time.perf_counter()
    executor, plan = open_executor(folder, wishes)
    assert isinstance(executor, StreamExecutor)
    with closing(executor):
        figures: Figures = {"load_s": time.perf_counter() - begin, "moe_layers": config.num_moe_layers}
        executor.watches_computing = True
        limits = measure_limits(executor)
        figures |= {"link_gbps": limits.link_gbps, "square_tflops": limits.gemm_tflops}
        for length in lengths:
            session = Session(executor, prompt_len=length, num_steps=1)
            run(session)  # compiles
            best = min((run(session) for _ in range(2)), key=lambda each: each.seconds)
            figures |= {f"{length}_{name}": value for name, value in _of_round(best, config.num_moe_layers).items()}
            # Of the wall that the link alone would need: spans of copies count their waiting for the device too.
            figures[f"{length}_link_share"] = best.copied_bytes / limits.link_gbps / 1e9 / best.recorder.wall_s
        stats = plan.device.memory_stats() or {}
        if stats:
            planned = held_bytes(config) + plan.layout.num_bytes(plan.dtype) + executor.stream.num_bytes(config)
            figures |= {"peak_gb": stats["peak_bytes_in_use"] / 1e9, "planned_gb": planned / 1e9}
            if stats["peak_bytes_in_use"] > planned:
                raise ValueError(f"{stats['peak_bytes_in_use']:,} bytes of the device were in use, {planned:,} planned")
    return figures


def _of_round(best: Round, moe_layers: int) -> dict[str, float]:
    return {
        "s": best.seconds,
        "overlap": best.recorder.overlap_efficiency,
        "copy_gbps": best.copied_bytes / best.copy_s / 1e9,
        "expert_tflops": best.expert_flops / best.expert_s / 1e12,
        "host_share": best.host_share,
        # By the layers with experts of the whole model; what comes with them, a dense layer and the head, counts too.
        f"s_times_{DEEPSEEK_MOE_LAYERS}_over_{moe_layers}_extrapolated": best.seconds
        * DEEPSEEK_MOE_LAYERS
        / moe_layers,
    }
