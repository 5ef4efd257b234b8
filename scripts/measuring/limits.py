"""What links and matrix units reach when nothing else runs."""

from __future__ import annotations

import itertools
from collections.abc import Iterable, Sequence

import jax
import jax.numpy as jnp

from hmoe_jax.exec.copies import CopyLane, Group
from hmoe_jax.perf.lanes import Span, busy_seconds
from measuring.timing import Effort, median_seconds

NUM_GROUPS = 6


def link_gbps(lanes: Sequence[CopyLane], groups: Iterable[Group], *, depth: int) -> float:
    """All lanes at once, some of the groups in turn: first to touch their pages and the lanes' buffers, then again."""
    some = list(itertools.islice(groups, NUM_GROUPS))
    _copy(lanes, itertools.islice(itertools.cycle(some), max(depth, len(some))))
    spans = _copy(lanes, some)
    return sum(span.num_bytes for span in spans) / busy_seconds(spans) / 1e9


def _copy(lanes: Sequence[CopyLane], groups: Iterable[Group]) -> list[Span]:
    spans: list[Span] = []
    for group in groups:
        copies = [lane.submit(group.layer, experts) for lane, experts in zip(lanes, group.experts, strict=True)]
        spans += [copy.result()[1] for copy in copies]
    return spans


def square_tflops(devices: Sequence[jax.Device]) -> float:
    """Square products, of FP32 on the CPU platform (where the experts' products are) and of BF16 elsewhere."""
    size, dtype = (2048, jnp.float32) if devices[0].platform == "cpu" else (8192, jnp.bfloat16)
    operands = [jax.device_put(jnp.ones((size, size), dtype), device) for device in devices]
    multiply = jax.jit(jnp.matmul)
    seconds = median_seconds(lambda: [multiply(operand, operand) for operand in operands], Effort(calls=5))
    return len(devices) * 2 * size**3 / seconds / 1e12
