"""What the suite measures, each as a function of JAX's default device and of how large it may be: name -> figures."""

from __future__ import annotations

import platform
import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
import jaxlib
import numpy as np
from measuring.attention import attention_call, attention_tflops, kept_call
from measuring.experts import measure_variants, random_store, variant_errors
from measuring.timing import Effort, median_seconds

from hmoe_jax.experts.store import StoreShape
from hmoe_jax.kernels.pool import ThreadPool, cpu_name

Figures = dict[str, float | str]

MOST_DISAGREEMENT = 0.02
"""Between two ways to compute the same in BF16, relative to the largest output."""


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
    effort: Effort


FULL = Scale(7168, 2048, 128, 16, (64, 512), (8192, 32768), 1024, 1 << 30, 8192, Effort(10))
SMALL = Scale(256, 128, 4, 2, (16,), (1024,), 128, 1 << 22, 256, Effort(3))


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


def copies(device: jax.Device, scale: Scale) -> Figures:
    """Host to device and back, from pageable memory and from JAX's pinned memory; and a small copy's time."""
    kinds = {memory.kind for memory in device.addressable_memories()}
    host, small = np.ones(scale.copy_bytes, np.uint8), np.ones(4096, np.uint8)
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
    figures["d2h_4kb_us"] = _fetching(scale, jax.device_put(small, device)) * 1e6
    return figures | {"d2h_pageable_gbps": host.nbytes / _fetching(scale, on_device) / 1e9}


def _fetching(scale: Scale, array: jax.Array) -> float:
    """Seconds from a device to NumPy: of an array that is new each time, as JAX keeps what it has brought back once."""
    again = jax.jit(lambda array: array ^ 1)
    times = []
    for _ in range(scale.effort.calls):
        array = jax.block_until_ready(again(array))
        begin = time.perf_counter()
        np.asarray(array)
        times.append(time.perf_counter() - begin)
    return statistics.median(times)


def overlap(device: jax.Device, scale: Scale) -> Figures:
    """A copy from pinned memory and products at once, against each alone: 1 is wholly hidden. The copy is asked for
    first."""
    kinds = {memory.kind for memory in device.addressable_memories()}
    host: Any = np.ones(scale.copy_bytes, np.uint8)  # zeros would all be one page
    if "pinned_host" in kinds:
        host = jax.device_put(host, jax.sharding.SingleDeviceSharding(device, memory_kind="pinned_host"))
    here = jax.sharding.SingleDeviceSharding(device, memory_kind=device.default_memory().kind)
    a = jax.device_put(jnp.ones((scale.gemm, scale.gemm), jnp.bfloat16), device)
    products = jax.jit(lambda a: jax.lax.fori_loop(0, 16, lambda _, x: (x @ a) * jnp.bfloat16(0.001), a))
    copy_s = _timed(scale, lambda: jax.device_put(host, here))
    compute_s = _timed(scale, lambda: products(a))
    both_s = _timed(scale, lambda: (jax.device_put(host, here), products(a)))
    return {
        "copy_ms": copy_s * 1e3,
        "compute_ms": compute_s * 1e3,
        "both_ms": both_s * 1e3,
        "overlap": max(copy_s, compute_s) / both_s,
        "gemm_tflops": 16 * 2 * scale.gemm**3 / compute_s / 1e12,
    }


def grouped(device: jax.Device, scale: Scale) -> Figures:
    """Every way to multiply a group of experts in block FP8, by rows of each expert, and that they agree."""
    shape = StoreShape(1, scale.group, scale.hidden, scale.ffn)
    with ThreadPool(1) as pool, random_store(shape, pool) as store:
        errors = variant_errors(store, group_size=scale.group, rows=scale.rows[0])
        rates = measure_variants(store, group_size=scale.group, rows=scale.rows, effort=scale.effort)
    figures: Figures = {f"{variant}_error": error for variant, error in errors.items()}
    if not max(errors.values()) < MOST_DISAGREEMENT:
        raise ValueError(f"a group's outputs differ: {errors}")
    return figures | {f"{way}_{rows}_tflops": rate for way, own in rates.items() for rows, rate in own.items()}


def attention(device: jax.Device, scale: Scale) -> Figures:
    """The last block of prompts: decompressed attention to the whole context, by XLA and by the kernel for GPUs, and to
    keys and values that are kept."""
    sizes = {"heads": scale.heads, "block_len": scale.block_len}
    figures: Figures = {}
    for length in scale.contexts:
        case = {**sizes, "context_len": length}
        figures[f"xla_{length}_tflops"] = attention_tflops(**case, effort=scale.effort)
        expected = np.asarray(attention_call(**case)(), np.float32)
        ways: dict[str, Callable[[], Any]] = {"kept": kept_call(**case)}
        if device.platform != "cpu":
            figures[f"flash_{length}_tflops"] = attention_tflops(**case, on_gpu="flash", effort=scale.effort)
            ways["flash"] = attention_call(**case, on_gpu="flash")
            ways["flash_kept"] = kept_call(**case, on_gpu="flash")
        for way, call in ways.items():
            actual = np.asarray(call(), np.float32)
            figures[f"{way}_{length}_ms"] = 1e3 * _timed(scale, call)
            figures[f"{way}_{length}_error"] = float(np.abs(actual - expected).max() / np.abs(expected).max())
            if not figures[f"{way}_{length}_error"] < MOST_DISAGREEMENT:
                raise ValueError(f"attention ({way}) is off by {figures[f'{way}_{length}_error']:.3g}")
    return figures


def _timed(scale: Scale, call: Callable[[], Any]) -> float:
    return median_seconds(call, scale.effort)
