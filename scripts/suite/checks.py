"""What the suite measures, each as a function of the device and of how large it may be: name -> figures."""

from __future__ import annotations

import platform
import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import jaxlib
import numpy as np
from planning.measure import random_matrix

from hmoe_jax.exec.score import load_for_scoring
from hmoe_jax.kernels.grouped.experts import VARIANTS
from hmoe_jax.kernels.grouped.routes import GroupRows
from hmoe_jax.kernels.moe_experts_reference import ExpertArrays, ExpertMatrices
from hmoe_jax.kernels.pool import cpu_name
from hmoe_jax.nn.attention import Context, Queries, UpProjections, attend_decompressed

Figures = dict[str, float | str]


@dataclass(frozen=True)
class Scale:
    """Sizes: DeepSeek-V3's on a GPU, small ones on the CPU platform, where only that everything runs is of interest."""

    hidden: int
    ffn: int
    heads: int
    group: int
    rows: tuple[int, ...]
    contexts: tuple[int, ...]
    block_len: int
    copy_bytes: int
    gemm: int
    repeats: int


FULL = Scale(7168, 2048, 128, 16, (64, 512), (8192, 32768), 1024, 1 << 30, 8192, 10)
SMALL = Scale(256, 128, 4, 2, (16,), (1024,), 128, 1 << 22, 256, 3)


def seconds(call: Callable[[], Any], *, repeats: int) -> float:
    """The median of `repeats` calls, each waited for; one more before them."""
    jax.block_until_ready(call())
    times = []
    for _ in range(repeats):
        begin = time.perf_counter()
        jax.block_until_ready(call())
        times.append(time.perf_counter() - begin)
    return statistics.median(times)


def versions(device: jax.Device, scale: Scale) -> Figures:
    stats = device.memory_stats() or {}
    return {
        "jax": jax.__version__,
        "jaxlib": jaxlib.__version__,
        "python": platform.python_version(),
        "device": device.device_kind,
        "runtime": device.client.platform_version.splitlines()[0],
        "memory_gb": stats.get("bytes_limit", 0) / 1e9,
        "cpu": cpu_name(),
    }


def graph_executor(device: jax.Device, scale: Scale, *, model: Path) -> Figures:
    """Logits of the embedded model in FP32 on this device against those on the CPU platform."""
    ids = np.random.default_rng(0).integers(3, 4000, 200).tolist()
    rows = []
    for name in ("cpu", "cpu" if device.platform == "cpu" else "gpu"):
        with load_for_scoring(model, executor="graph", dtype="float32", device=name, max_model_len=256) as scorer:
            rows.append(scorer.logits(ids))
    error = np.linalg.norm(rows[0] - rows[1], axis=-1) / np.linalg.norm(rows[0], axis=-1)
    return {"relative_error": float(error.max()), "median_error": float(np.median(error))}


def copies(device: jax.Device, scale: Scale) -> Figures:
    """Host to device and back, from pageable memory and from JAX's pinned memory; and a small copy's time."""
    kinds = {memory.kind for memory in device.addressable_memories()}
    host, small = np.zeros(scale.copy_bytes, np.uint8), np.zeros(4096, np.uint8)
    on_device = jax.device_put(host, device)
    figures: Figures = {
        "h2d_pageable_gbps": host.nbytes / _timed(scale, lambda: jax.device_put(host, device)) / 1e9,
        "h2d_4kb_us": _timed(scale, lambda: jax.device_put(small, device)) * 1e6,
    }
    if "pinned_host" in kinds:
        pinned = jax.sharding.SingleDeviceSharding(device, memory_kind="pinned_host")
        here = jax.sharding.SingleDeviceSharding(device, memory_kind="device")
        held = jax.block_until_ready(jax.device_put(on_device, pinned))
        figures["h2d_pinned_gbps"] = host.nbytes / _timed(scale, lambda: jax.device_put(held, here)) / 1e9
        figures["d2h_pinned_gbps"] = host.nbytes / _timed(scale, lambda: jax.device_put(on_device, pinned)) / 1e9
    again = jax.jit(lambda array: array ^ 1)
    times = []
    for _ in range(scale.repeats):
        on_device = jax.block_until_ready(again(on_device))  # JAX keeps what it has brought back once
        begin = time.perf_counter()
        np.asarray(on_device)
        times.append(time.perf_counter() - begin)
    return figures | {"d2h_pageable_gbps": host.nbytes / statistics.median(times) / 1e9}


def overlap(device: jax.Device, scale: Scale) -> Figures:
    """A copy and products at once, against each alone: 1 is wholly hidden. The copy is asked for first."""
    host = np.zeros(scale.copy_bytes, np.uint8)
    a = jax.device_put(jnp.ones((scale.gemm, scale.gemm), jnp.bfloat16), device)
    products = jax.jit(lambda a: jax.lax.fori_loop(0, 16, lambda _, x: (x @ a) * jnp.bfloat16(0.001), a))
    copy_s = _timed(scale, lambda: jax.device_put(host, device))
    compute_s = _timed(scale, lambda: products(a))
    both_s = _timed(scale, lambda: (jax.device_put(host, device), products(a)))
    return {
        "copy_ms": copy_s * 1e3,
        "compute_ms": compute_s * 1e3,
        "both_ms": both_s * 1e3,
        "overlap": max(copy_s, compute_s) / both_s,
        "gemm_tflops": 16 * 2 * scale.gemm**3 / compute_s / 1e12,
    }


def grouped(device: jax.Device, scale: Scale) -> Figures:
    """Every way to multiply a group of experts in block FP8, by rows of each expert."""
    rng = np.random.default_rng(0)

    def stack(rows: int, cols: int) -> ExpertMatrices:
        weight, grid = random_matrix(rng, rows, cols)
        put = [jax.device_put(np.broadcast_to(each, (scale.group, *each.shape)), device) for each in (weight, grid)]
        return ExpertMatrices(*put, codec="fp8_block")

    up, down = (scale.ffn, scale.hidden), (scale.hidden, scale.ffn)
    experts = ExpertArrays(gate=stack(*up), up=stack(*up), down=stack(*down))
    figures: Figures = {}
    for rows in scale.rows:
        hidden = jnp.ones((rows, scale.hidden), jnp.bfloat16)
        routed = jnp.zeros((rows, scale.hidden), jnp.float32)
        tokens = jnp.broadcast_to(jnp.arange(rows, dtype=jnp.int32), (scale.group, rows))
        places = GroupRows(tokens, jnp.ones(tokens.shape, jnp.float32))
        operands = jax.device_put((routed, hidden, places, experts), device)
        flops = 2 * scale.group * rows * 3 * scale.hidden * scale.ffn
        for name, variant in VARIANTS.items():
            program = jax.jit(variant)
            figures[f"{name}_{rows}_tflops"] = flops / _timed(scale, partial(program, *operands)) / 1e12
    return figures


def attention(device: jax.Device, scale: Scale) -> Figures:
    """The last block of prompts: decompressed attention to the whole context."""
    figures: Figures = {}
    nope, rope, value, rank, chunk = 128, 64, 128, 512, 256
    key = jax.random.key(0)
    for context_len in scale.contexts:
        shapes = [
            (scale.block_len, scale.heads, nope),
            (scale.block_len, scale.heads, rope),
            (context_len, rank + rope),
        ]
        q_nope, q_rope, latents = (jax.random.normal(key, shape, jnp.bfloat16) for shape in shapes)
        up = UpProjections(
            key=jnp.full((scale.heads, nope, rank), 0.01, jnp.bfloat16),
            value=jnp.full((scale.heads, value, rank), 0.01, jnp.bfloat16),
        )

        def attend(queries: Queries, up: UpProjections, latents: jax.Array, length: int = context_len) -> jax.Array:
            context = Context(
                chunk=lambda i: jax.lax.dynamic_slice_in_dim(latents, i * chunk, chunk),
                chunk_len=chunk,
                num_chunks=jnp.int32(length // chunk),
                positions=jnp.arange(length - scale.block_len, length, dtype=jnp.int32),
            )
            return attend_decompressed(queries, up, context, scale=0.1)

        program = jax.jit(attend)
        operands = jax.device_put((Queries(q_nope, q_rope), up, latents), device)
        pairs = scale.block_len * (context_len - scale.block_len / 2)
        flops = 2 * scale.heads * (nope + rope + value) * pairs
        figures[f"{context_len}_tflops"] = flops / _timed(scale, partial(program, *operands)) / 1e12
    return figures


def _timed(scale: Scale, call: Callable[[], Any]) -> float:
    return seconds(call, repeats=scale.repeats)
