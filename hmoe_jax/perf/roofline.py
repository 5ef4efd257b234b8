"""The limit that memory sets, measured on this machine: nothing that streams weights can be faster."""

from __future__ import annotations

import time

import jax
import jax.numpy as jnp

from hmoe_jax.kernels.pool import ThreadPool

REPEATS = 3
"""The best of them is the limit: what disturbs a measurement only ever makes it slower."""

DEVICE_BYTES = 1 << 30


def read_gbps(device: jax.Device, *, num_threads: int, isa: str) -> float:
    """Bandwidth of plain reads: host memory by `num_threads` threads if `device` is the CPU, else the device's own."""
    if device.platform == "cpu":
        with ThreadPool(num_threads, isa=isa) as pool:
            return max(pool.read_gbps() for _ in range(REPEATS))
    return _device_read_gbps(device)


def _device_read_gbps(device: jax.Device) -> float:
    data = jax.device_put(jnp.zeros(DEVICE_BYTES // 4, jnp.int32), device)
    total = jax.jit(jnp.sum)
    total(data).block_until_ready()
    seconds = []
    for _ in range(REPEATS):
        begin = time.perf_counter()
        total(data).block_until_ready()
        seconds.append(time.perf_counter() - begin)
    return DEVICE_BYTES / min(seconds) / 1e9
