"""kt-kernel in a process of its own, driven through a pipe."""

from __future__ import annotations

import os
import signal
import time
from collections.abc import Callable
from multiprocessing.connection import Connection
from typing import Any

import numpy as np

from benchmarks.cases import Batch
from benchmarks.formats import ExpertMemory
from benchmarks.sides import activations
from benchmarks.timing import Timer
from hmoe_jax.experts.store import ExpertTensor, StoreShape
from hmoe_jax.quant.formats import FORMATS

MAX_TOKENS = 4096
SPIN_S = 0.1
"""Its threads spin for some 50 ms after a call; then they sleep, and the others can be timed."""


def serve(pipe: Connection, format_name: str, shape: StoreShape, top_k: int, threads: int) -> None:
    """Answers with True when it is ready, then each `(batch, seconds)`, until the pipe ends.

    The answer is the seconds of calls, or the output of one where `seconds` is None.
    """
    signal.signal(signal.SIGINT, signal.SIG_DFL)
    os.dup2(2, 1)  # It prints; standard output is ours.
    layer = _Layer(format_name, shape, top_k, threads)
    timers: dict[int, Timer] = {}
    pipe.send(True)
    while True:
        try:
            batch, seconds = pipe.recv()
        except EOFError:
            return
        if seconds is None:
            answer = layer.prepare(batch)(0).float().numpy()
        else:
            if batch.tokens not in timers:
                timers[batch.tokens] = Timer(layer.prepare(batch))
            answer = timers[batch.tokens].visit(seconds=seconds)
        time.sleep(SPIN_S)
        pipe.send(answer)


class _Layer:
    """One layer's experts in kt-kernel's own layout, by the calls that its `NativeMoEWrapper` makes.

    The wrapper itself cannot be used: it wants safetensors files, pinned memory and thereby CUDA.
    """

    def __init__(self, format_name: str, shape: StoreShape, top_k: int, threads: int):
        import kt_kernel  # noqa: PLC0415 (a peer that nothing else needs)
        import torch  # noqa: PLC0415

        self._torch, self._threads = torch, threads
        native = kt_kernel.kt_kernel_ext
        pool = native.WorkerPoolConfig()
        pool.subpool_count, pool.subpool_numa_map, pool.subpool_thread_count = 1, [0], [threads]
        self._cpu = native.CPUInfer(pool)

        self._on_gpu = torch.zeros(shape.num_experts, dtype=torch.bool)
        config = native.moe.MOEConfig(shape.num_experts, top_k, shape.hidden, shape.ffn, self._on_gpu.data_ptr())
        config.layer_idx, config.pool, config.max_len = 0, self._cpu.backend_, MAX_TOKENS
        memory = ExpertMemory(FORMATS[format_name], shape, overlap=True)  # It copies what it is given.
        tensors = list(memory.tensors())
        scales = {id(tensor): _scale(tensor, format_name) for tensor in tensors}
        for matrix in ("gate", "up", "down"):
            ours = [tensor for tensor in tensors if tensor.matrix == matrix]
            setattr(config, f"{matrix}_projs", [[tensor.weight.ctypes.data for tensor in ours]])
            setattr(config, f"{matrix}_scales", [[_address(scales[id(tensor)]) for tensor in ours]])
        _configure(config.quant_config, format_name)
        self._moe = getattr(native.moe, METHODS[format_name])(config)
        order = torch.arange(shape.num_experts, dtype=torch.int64)
        self._cpu.submit(self._moe.load_weights_task(order.data_ptr()))
        self._cpu.sync()

    def prepare(self, batch: Batch) -> Callable[[int], Any]:
        torch = self._torch
        hidden, weights = (torch.from_numpy(each) for each in activations(batch))
        hidden = hidden.to(torch.bfloat16).contiguous()
        out = torch.empty_like(hidden)
        count = torch.tensor([batch.tokens], dtype=torch.int32)
        ids = [torch.from_numpy(each.astype(np.int64)) for each in batch.rotation]

        def call(index: int) -> Any:
            chosen = ids[index % len(ids)]
            task = self._moe.forward_task(
                count.data_ptr(), batch.layer.top_k, chosen.data_ptr(), weights.data_ptr(), hidden.data_ptr(),
                out.data_ptr(), False,
            )  # fmt: skip
            self._cpu.submit(task)
            self._cpu.sync()
            return out

        return call


METHODS = {
    "bf16": "AMXBF16_MOE",
    "fp8_block": "AMXFP8_MOE",
    "fp8_channel": "AMXFP8PerChannel_MOE",
    "int4_group32": "AMXInt4_KGroup_MOE",
    "mxfp4": "AMXFP4_KGroup_MOE",
}
"""The class that its automatic choice takes for each format on a machine with AVX-512. It has no int8 with a scale per
channel, and version 0.7.2 answers NaN for int4 in groups of 64 and 128."""


def _configure(quant: Any, format_name: str) -> None:
    """As `NativeMoEWrapper.load_weights` does for the method of this format."""
    if format_name == "bf16":
        return
    quant.zero_point = False
    quant.bits = 8 if format_name.startswith("fp8") else 4
    if format_name == "fp8_channel":
        quant.per_channel = True
    else:
        quant.group_size = 128 if format_name == "fp8_block" else 32


def _scale(tensor: ExpertTensor, format_name: str) -> np.ndarray | None:
    """E8M0 as BF16, as its loader converts them; others as they are."""
    if format_name == "mxfp4" and tensor.scale is not None:
        return (tensor.scale.astype(np.uint16) << 7).reshape(tensor.scale.shape)
    return tensor.scale


def _address(array: np.ndarray | None) -> int:
    return 0 if array is None else array.ctypes.data
