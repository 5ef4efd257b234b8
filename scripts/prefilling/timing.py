"""Times streaming prefills, and the limits of both lanes in the same run."""

from __future__ import annotations

import itertools
import time
from dataclasses import dataclass

import jax
from measuring.limits import link_gbps, square_tflops

from hmoe_jax.exec.groups import guess, owned
from hmoe_jax.exec.session import Session
from hmoe_jax.exec.stream import StreamExecutor
from hmoe_jax.perf.lanes import Recorder, busy_seconds


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
    return Limits(link_gbps=_link_gbps(executor), gemm_tflops=square_tflops(executor.stream.devices))


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
    """Layer after layer, groups as in a prefill."""
    stream, config = executor.stream, executor.config
    owners, layers = owned(config.num_experts, len(stream.devices)), range(config.num_moe_layers)
    copied = (guess(layer, owners, size=stream.group_size, count=config.num_experts) for layer in layers)
    groups = itertools.chain.from_iterable(copied)
    return link_gbps(list(executor.lanes.values()), groups, depth=stream.depth)
