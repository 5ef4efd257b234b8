"""Host memory that GPUs read at their own speed, and how JAX sees it."""

from __future__ import annotations

import jax
import numpy as np
from jaxtyping import Array, UInt8

from hmoe_jax.kernels import _native

GPU_DRIVER = "libcuda.so.1"

PIN_BYTES = 1 << 30
"""Pinned at a time: calling the driver costs nothing beside it, and the user sees progress."""


def open_driver() -> _native.GpuDriver:
    """Raises `ValueError` where there is none, or no GPU."""
    return _native.GpuDriver(GPU_DRIVER)


def as_array(memory: _native.ForGpu, device: jax.Device) -> UInt8[Array, "1 n"]:
    """Without a copy: memory of the kind `pinned_host` to a GPU, and a device's own on the CPU platform."""
    if device.platform == "cpu":
        return jax.device_put(np.from_dlpack(memory), device, may_alias=True)
    return jax.dlpack.from_dlpack(memory)


class StagingBuffer:
    """`memory`, `[1, num_bytes]`, on its way to `device`: pinned where the driver lets it be."""

    def __init__(self, num_bytes: int, device: jax.Device):
        self._pinned: UInt8[Array, "1 n"] | None = None
        try:
            buffer = _native.PinnedBuffer(num_bytes, open_driver())
        except ValueError:
            self.memory = np.empty((1, num_bytes), np.uint8)
        else:
            self.memory = buffer.for_host()
            self._pinned = as_array(buffer.for_gpu(device.local_hardware_id or 0), device)
        self._sharding = in_device_memory(device)
        self._sent: Array | None = None

    def wait(self) -> None:
        """Until the memory is not read any more."""
        if self._sent is not None:
            self._sent.block_until_ready()
            self._sent = None  # else it would stay on the device

    def send(self) -> UInt8[Array, "1 n"]:
        """What the memory holds now, on the device as soon as the result is ready."""
        source = self.memory.copy() if self._pinned is None else self._pinned  # JAX may keep what NumPy owns
        self._sent = jax.device_put(source, self._sharding, may_alias=False)
        return self._sent


def in_device_memory(device: jax.Device) -> jax.sharding.SingleDeviceSharding:
    return jax.sharding.SingleDeviceSharding(device, memory_kind=device.default_memory().kind)
