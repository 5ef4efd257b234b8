"""Times streaming prefills, and the limits of both lanes in the same run."""

from __future__ import annotations

import statistics
import time
from dataclasses import dataclass

import jax
import jax.numpy as jnp
import numpy as np

from hmoe_jax.exec.session import Session
from hmoe_jax.exec.stream import StreamExecutor
from hmoe_jax.perf.lanes import Recorder, Span, busy_seconds

GEMM_SIZE = 2048
LINK_GROUPS = 6


@dataclass(frozen=True)
class Limits:
    """What the devices' links and their matrix units reach when nothing else runs."""

    link_gbps: float
    gemm_tflops: float


@dataclass(frozen=True)
class Round:
    """One prefill. `expert_flops` are two per multiply-add of the routed experts."""

    num_tokens: int
    seconds: float
    recorder: Recorder
    expert_flops: float

    @property
    def copied_bytes(self) -> int:
        return sum(span.num_bytes for span in self.recorder.copies)

    @property
    def copy_s(self) -> float:
        return busy_seconds(self.recorder.copies)

    @property
    def compute_s(self) -> float:
        return busy_seconds(self.recorder.computed)

    @property
    def expert_s(self) -> float:
        return busy_seconds(span for span in self.recorder.computed if span.name == "experts")

    @property
    def host_share(self) -> float:
        """Of the wall: the thread that starts everything, Python and the runtime's part of a dispatch, was on a CPU."""
        return self.recorder.host_s / self.recorder.wall_s


def measure_limits(executor: StreamExecutor) -> Limits:
    return Limits(link_gbps=_link_gbps(executor), gemm_tflops=_gemm_tflops(executor.stream.devices))


def run(session: Session) -> Round:
    """One prompt, through to its first token."""
    executor = session.executor
    assert isinstance(executor, StreamExecutor)
    sequence, config = session.sequences[0], executor.config
    pieces = session.pieces(sequence)
    recorders, begin = [], time.perf_counter()
    for piece in pieces:
        sampled = jax.device_get(executor.step(piece).sampled)
        recorders.append(executor.recorder)
    seconds = time.perf_counter() - begin
    assert sampled.tokens.shape == (1,)
    slots = config.num_moe_layers * config.top_k * len(sequence.prompt)
    flops = 2.0 * slots * 3 * config.hidden_size * config.expert_ffn
    return Round(len(sequence.prompt), seconds, _joined(recorders), flops)


def median_round(rounds: list[Round]) -> Round:
    """The one whose time is the median (the lower one of two)."""
    return sorted(rounds, key=lambda each: each.seconds)[(len(rounds) - 1) // 2]


def _joined(recorders: list[Recorder]) -> Recorder:
    whole = Recorder()
    whole.copies = [span for each in recorders for span in each.copies]
    whole.computed = [span for each in recorders for span in each.computed]
    whole.host_s = sum(each.host_s for each in recorders)
    whole.begin, whole.end = recorders[0].begin, recorders[-1].end
    return whole


def _link_gbps(executor: StreamExecutor) -> float:
    """All lanes at once, groups as in a prefill; the first ones only touch the buffers."""
    size = min(executor.stream.group_size, executor.config.num_experts // len(executor.stream.devices))
    layers, count = executor.config.num_moe_layers, executor.stream.depth + LINK_GROUPS
    spans: list[Span] = []
    for i in range(count):
        first = i * size % (executor.config.num_experts - size + 1)
        experts = np.arange(first, first + size, dtype=np.int32)
        copies = [lane.submit(i % layers, experts) for lane in executor.lanes]
        spans += [copy.result()[1] for copy in copies]
    spans = spans[executor.stream.depth * len(executor.lanes) :]
    return sum(span.num_bytes for span in spans) / busy_seconds(spans) / 1e9


def _gemm_tflops(devices: tuple[jax.Device, ...]) -> float:
    """Square products, of FP32 on the CPU platform (where the experts' products are) and of BF16 elsewhere."""
    dtype = jnp.float32 if devices[0].platform == "cpu" else jnp.bfloat16
    multiply = jax.jit(jnp.matmul)
    operands = [jax.device_put(jnp.ones((GEMM_SIZE, GEMM_SIZE), dtype), device) for device in devices]
    for operand in operands:
        multiply(operand, operand).block_until_ready()
    seconds = []
    for _ in range(5):
        begin = time.perf_counter()
        for product in [multiply(operand, operand) for operand in operands]:
            product.block_until_ready()
        seconds.append(time.perf_counter() - begin)
    return len(devices) * 2 * GEMM_SIZE**3 / statistics.median(seconds) / 1e12
