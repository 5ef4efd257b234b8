"""The rates of this machine's parts, each by the code that serves."""

from __future__ import annotations

import itertools
import statistics
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, closing, contextmanager
from dataclasses import dataclass, replace
from functools import partial
from operator import truediv
from typing import Any, Literal

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Int32
from measuring.attention import attention_tflops, decode_tflops
from measuring.experts import CODEC, Variants, best_variant, measure_variants, random_matrix, random_store
from measuring.limits import link_gbps
from measuring.timing import Effort, median_seconds, median_seconds_beside, medians_in_turn

from hmoe_jax.exec.copies import CopyLane
from hmoe_jax.exec.fused import pin_experts
from hmoe_jax.exec.groups import guess
from hmoe_jax.exec.passes import MAX_GROUP, MIN_DEPTH, StreamPlan
from hmoe_jax.experts.lane import ExpertLane
from hmoe_jax.experts.store import ExpertStore, StoreShape
from hmoe_jax.kernels.moe_experts import moe_experts
from hmoe_jax.kernels.pool import ThreadPool, resolve_num_threads
from hmoe_jax.nn.attention import GpuAttention
from hmoe_jax.nn.linear import Projection, linear
from hmoe_jax.perf.cost import Rates
from hmoe_jax.perf.machines import machine_name

HIDDEN, FFN, TOP_K = 7168, 2048, 8
HEADS, ALL_HEADS, CONTEXT = 16, 128, 4096
FEW_ROWS, ROWS = 32, 512
DECODED = 8


@dataclass(frozen=True)
class Bench:
    """What the measurements share: a device, the threads of its native kernels, random experts of DeepSeek-V3's widths
    with theirs, and the effort."""

    device: jax.Device
    pool: ThreadPool
    experts: ThreadPool
    store: ExpertStore
    effort: Effort

    @property
    def native_pool(self) -> int | None:
        return self.pool.id if self.device.platform == "cpu" else None

    @property
    def has_two_sides(self) -> bool:
        """Whether the experts have threads that the device's kernels do not use."""
        return self.native_pool != self.experts.id

    @property
    def group_size(self) -> int:
        """Experts that are multiplied together: on the CPU platform few, or a call takes seconds."""
        return 2 if self.device.platform == "cpu" else min(MAX_GROUP, self.store.shape.num_experts)


@contextmanager
def open_bench(
    device: jax.Device,
    *,
    num_threads: int | Literal["auto"],
    num_experts: int,
    effort: Effort,
    expert_cpus: str = "auto",
) -> Iterator[Bench]:
    """Arrays are made on `device` inside. With `expert_cpus` the experts have these, and the device's kernels a thread
    elsewhere, as with executor "overlap"."""
    shape = StoreShape(1, num_experts, HIDDEN, FFN)
    with ExitStack() as owned:
        num_threads = resolve_num_threads(num_threads, topology=expert_cpus)
        experts = owned.enter_context(ThreadPool(num_threads, topology=expert_cpus))
        store = owned.enter_context(random_store(shape, experts, residency="arena"))
        owned.enter_context(jax.default_device(device))
        if device.platform != "cpu":
            pin_experts(store)
        pool = experts if expert_cpus == "auto" else owned.enter_context(ThreadPool(1))
        yield Bench(device, pool, experts, store, effort)


def measure_group(bench: Bench) -> Variants:
    return measure_variants(bench.store, group_size=bench.group_size, rows=(FEW_ROWS, ROWS), effort=bench.effort)


def measure_rates(bench: Bench, variants: Variants) -> Rates:
    """`variants` is what `measure_group` found: the best of them will serve."""
    best = best_variant(variants)
    attention = _attention(bench)
    fastest = max(attention, key=attention.__getitem__)
    return Rates(
        name=machine_name(bench.device),
        **measure_decode_rates(bench, variant=best),
        link_gbps=_link_gbps(bench),
        **_grouped(bench, variants[best]),
        attention_tflops=attention[fastest],
        variant=best,
        attention=fastest,
    )


def measure_decode_rates(bench: Bench, *, variant: str) -> dict[str, float]:
    """Those of a decode step, by the names of `Rates`. `variant` is the best way to multiply a group."""
    return {
        "expert_gbps": _expert_gbps(bench),
        "expert_tflops": _expert_tflops(bench),
        **_device_rates(bench),
        "decode_attention_tflops": _decode_attention_tflops(bench),
        "linear_tflops": _linear_tflops(bench, variant),
        "dispatch_s": _dispatch_s(bench),
        **({"contention": _contention(bench)} if bench.has_two_sides else {}),
    }


def _attention(bench: Bench) -> dict[GpuAttention, float]:
    """TFLOP/s of each way that the device has; one that does not run there is left out, and said."""
    on_cpu = bench.device.platform == "cpu"
    case = {"heads": HEADS if on_cpu else ALL_HEADS, "block_len": ROWS, "context_len": CONTEXT}
    rates = {"xla": attention_tflops(**case, pool=bench.native_pool, effort=bench.effort)}
    if not on_cpu:
        try:
            rates["flash"] = attention_tflops(**case, on_gpu="flash", effort=bench.effort)
        except jax.errors.JaxRuntimeError as error:
            print(f"attention by the kernel does not run here: {error}", file=sys.stderr)
    return rates


def _decode_attention_tflops(bench: Bench) -> float:
    case = {"heads": ALL_HEADS, "batch": DECODED, "context_len": CONTEXT, "pool": bench.native_pool}
    return decode_tflops(**case, effort=bench.effort)


def _expert_gbps(bench: Bench) -> float:
    """By the CPU, whatever the device is."""
    cpu, ids = jax.local_devices(backend="cpu")[0], _choices(bench)
    with jax.default_device(cpu):
        hidden, weights = jnp.ones((1, HIDDEN), jnp.bfloat16), jnp.ones((1, TOP_K), jnp.float32)
        call = jax.jit(lambda ids: moe_experts(hidden, ids, weights, layer=0, store=bench.store.id))
        before = bench.store.stats()
        median_seconds(lambda: [call(each) for each in ids], bench.effort)
        after = bench.store.stats()
    return (after.expert_bytes - before.expert_bytes) / (after.seconds - before.seconds) / 1e9


def _expert_tflops(bench: Bench) -> float:
    """Many tokens for each of a token's experts, by the CPU."""
    cpu = jax.local_devices(backend="cpu")[0]
    with jax.default_device(cpu):
        hidden, weights = jnp.ones((ROWS, HIDDEN), jnp.bfloat16), jnp.ones((ROWS, TOP_K), jnp.float32)
        ids = jnp.tile(jnp.arange(TOP_K, dtype=jnp.int32), (ROWS, 1))
        call = jax.jit(lambda ids: moe_experts(hidden, ids, weights, layer=0, store=bench.store.id))
        flops = 2 * ROWS * TOP_K * 3 * HIDDEN * FFN
        return flops / median_seconds(lambda: call(ids), bench.effort) / 1e12


def _link_gbps(bench: Bench) -> float:
    """Records from the store to the device, by a copy lane."""
    plan = StreamPlan(group_size=TOP_K, pass_len=ROWS, depth=MIN_DEPTH, tiles=(), max_len=ROWS, devices=(bench.device,))
    count = bench.store.shape.num_experts // TOP_K
    groups = guess(0, [range(count * TOP_K)], size=TOP_K, count=count)
    with closing(CopyLane(bench.store, bench.device, plan)) as lane:
        return link_gbps([lane], groups, depth=plan.depth)


def _device_rates(bench: Bench) -> dict[str, float]:
    """Dense projections of one token, of more weights than the caches hold, and what each further token adds."""
    layers = _projections(bench)
    num_bytes = sum(layer.weight.nbytes + layer.scale.nbytes for layer in layers)
    one_s, all_s = medians_in_turn([_projecting(layers, count) for count in (1, DECODED)], bench.effort)
    flops = 2 * len(layers) * HIDDEN * 2 * HIDDEN * (DECODED - 1)
    return {
        "device_gbps": num_bytes / one_s / 1e9,
        "decode_linear_tflops": flops / max(all_s - one_s, 1e-9) / 1e12,
    }


def _contention(bench: Bench) -> float:
    """A token's projections and, by a lane, its experts: how many times as long they take at the same time as alone."""
    with ExpertLane(bench.store, num_slots=1) as lane:
        both = [_projecting(_projections(bench), 1), _reading(bench, lane)]
        alone_s = medians_in_turn(both, bench.effort)
        beside_s = [median_seconds_beside(call, other, bench.effort) for call, other in (both, both[::-1])]
    return max(1.0, statistics.mean(map(truediv, beside_s, alone_s)))


def _projections(bench: Bench) -> list[Projection]:
    """More weights than the caches hold."""
    return [_projection(bench, HIDDEN, 2 * HIDDEN) for _ in range(4)]


def _projecting(layers: list[Projection], num_tokens: int) -> Callable[[], Any]:
    call = jax.jit(lambda x, layers: [linear(x, layer) for layer in layers])
    return partial(call, jnp.ones((num_tokens, 2 * HIDDEN), jnp.bfloat16), layers)


def _reading(bench: Bench, lane: ExpertLane) -> Callable[[], None]:
    hidden, weights = np.zeros((1, HIDDEN), np.uint16), np.ones((1, TOP_K), np.float32)
    ids, out = itertools.cycle(_choices(bench)), np.empty((1, HIDDEN), np.float32)
    return lambda: lane.wait(0, lane.submit(0, 0, hidden, next(ids), weights), out)


def _choices(bench: Bench) -> Sequence[Int32[np.ndarray, "1 k"]]:
    """Of one token at a time, other experts every time, so that they come from memory."""
    count = bench.store.shape.num_experts // TOP_K
    return np.split(np.arange(count * TOP_K, dtype=np.int32)[None], count, axis=1)


def _linear_tflops(bench: Bench, best: str) -> float:
    rows, cols = (ROWS, FFN) if bench.device.platform == "cpu" else (8 * ROWS, 2 * HIDDEN)  # more than a dispatch
    layer, x = _projection(bench, cols, HIDDEN), jnp.ones((rows, HIDDEN), jnp.bfloat16)
    layer = replace(layer, on_gpu="kernel" if best == "kernel" else "xla")
    call = jax.jit(linear)
    return 2 * rows * HIDDEN * cols / median_seconds(lambda: call(x, layer), bench.effort) / 1e12


def _grouped(bench: Bench, tflops: Mapping[int, float]) -> dict[str, float]:
    """What a tile costs however few tokens it has, and what each token adds: from a short and a long one."""
    flops_per_row = 2 * bench.group_size * 3 * HIDDEN * FFN
    short_s, long_s = (flops_per_row * rows / tflops[rows] / 1e12 for rows in (FEW_ROWS, ROWS))
    per_row_s = max(long_s - short_s, 1e-9) / (ROWS - FEW_ROWS)
    fixed_s = max(short_s - FEW_ROWS * per_row_s, 1e-9)
    return {
        "grouped_tflops": flops_per_row / per_row_s / 1e12,
        "unpack_gbps": bench.group_size * bench.store.record_layout.num_bytes / fixed_s / 1e9,
    }


def _dispatch_s(bench: Bench) -> float:
    """An operation of a program that has nothing to do: twenty in turn."""
    step = jax.jit(lambda x: x + 1).lower(jnp.zeros(8)).compile()

    def twenty() -> jax.Array:
        x = jnp.zeros(8)
        for _ in range(20):
            x = step(x)
        return x

    return median_seconds(twenty, bench.effort) / 20


def _projection(bench: Bench, rows: int, cols: int) -> Projection:
    weight, scale = random_matrix(np.random.default_rng(0), rows, cols)
    return Projection(jax.device_put(weight), jax.device_put(scale), codec=CODEC, pool=bench.native_pool)
