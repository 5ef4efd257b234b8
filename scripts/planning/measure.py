"""The rates of this machine's parts, each by the code that serves."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any, Literal

import jax
import jax.numpy as jnp
import numpy as np

from hmoe_jax.architectures.deepseek_v3_checkpoint import MATRICES
from hmoe_jax.exec.copies import aligned
from hmoe_jax.experts.store import ExpertStore, ExpertTensor, StoreShape
from hmoe_jax.kernels.grouped.experts import VARIANTS
from hmoe_jax.kernels.grouped.routes import GroupRows
from hmoe_jax.kernels.moe_experts import moe_experts
from hmoe_jax.kernels.pool import ThreadPool, cpu_name, resolve_num_threads
from hmoe_jax.nn.attention import Context, Pages, Queries, UpProjections, attend_decompressed
from hmoe_jax.nn.linear import Projection, linear
from hmoe_jax.perf.cost import Rates
from hmoe_jax.quant.formats import FORMATS

CODEC = "fp8_block"
HIDDEN, FFN, TOP_K = 7168, 2048, 8
HEADS, NOPE, ROPE, VALUE, RANK = 16, 128, 64, 128, 512
ROWS, GROUP, CONTEXT, PAGE = 512, 2, 4096, 64
SEED = 0


@dataclass(frozen=True)
class Bench:
    """What the measurements share: a device, a pool, random experts of DeepSeek-V3's widths, and their duration."""

    device: jax.Device
    pool: ThreadPool
    store: ExpertStore
    seconds: float

    @property
    def native_pool(self) -> int | None:
        return self.pool.id if self.device.platform == "cpu" else None

    def time(self, call: Callable[[], Any]) -> float:
        """The median time of a call, which is waited for."""
        jax.block_until_ready(call())
        times, end = [], time.perf_counter() + self.seconds
        while time.perf_counter() < end or len(times) < 3:
            begin = time.perf_counter()
            jax.block_until_ready(call())
            times.append(time.perf_counter() - begin)
        return statistics.median(times)


def measure_rates(device: jax.Device, *, num_threads: int | Literal["auto"], num_experts: int, seconds: float) -> Rates:
    with ThreadPool(resolve_num_threads(num_threads)) as pool:
        shape = StoreShape(1, num_experts, HIDDEN, FFN)
        with (
            jax.default_device(device),
            ExpertStore(_random_experts(shape), shape=shape, codec=CODEC, pool=pool) as store,
        ):
            bench = Bench(device, pool, store, seconds)
            name = cpu_name() if device.platform == "cpu" else f"{cpu_name()}, {device.device_kind}"
            return Rates(
                name=name,
                expert_gbps=_expert_gbps(bench),
                link_gbps=_link_gbps(bench),
                device_gbps=_device_gbps(bench),
                linear_tflops=_linear_tflops(bench),
                **_grouped(bench),
                attention_tflops=_attention_tflops(bench),
                dispatch_s=_dispatch_s(bench),
            )


def _random_experts(shape: StoreShape) -> Iterator[ExpertTensor]:
    rng = np.random.default_rng(SEED)
    for expert in range(shape.num_experts):
        for matrix in MATRICES:
            yield ExpertTensor(0, expert, matrix, *random_matrix(rng, *shape.matrix(matrix)))


def random_matrix(rng: np.random.Generator, rows: int, cols: int) -> tuple[np.ndarray, np.ndarray]:
    layout = FORMATS[CODEC]
    codes = rng.integers(0, 120, (rows, cols), dtype=np.uint8)  # finite, as E4M3
    scale = np.full(layout.scale_blocks[0].grid(rows, cols), 2.0**-9, np.float32)
    return codes.view(layout.encoding.dtype), scale


def _expert_gbps(bench: Bench) -> float:
    """One token, other experts every time, so that they come from memory. By the CPU, whatever the device is."""
    cpu = jax.local_devices(backend="cpu")[0]
    count = bench.store.shape.num_experts // TOP_K
    ids = [np.arange(TOP_K, dtype=np.int32)[None] + TOP_K * i for i in range(count)]
    with jax.default_device(cpu):
        hidden, weights = jnp.ones((1, HIDDEN), jnp.bfloat16), jnp.ones((1, TOP_K), jnp.float32)
        call = jax.jit(lambda ids: moe_experts(hidden, ids, weights, layer=0, store=bench.store.id))
        before = bench.store.stats()
        bench.time(lambda: [call(each) for each in ids])
        after = bench.store.stats()
    return (after.expert_bytes - before.expert_bytes) / (after.seconds - before.seconds) / 1e9


def _link_gbps(bench: Bench) -> float:
    """Records from the store to the device, as a copy lane brings them."""
    buffer = aligned((TOP_K, bench.store.record_layout.num_bytes))
    count = bench.store.shape.num_experts // TOP_K
    state = {"next": 0}

    def copy() -> jax.Array:
        first = TOP_K * (state["next"] % count)
        state["next"] += 1
        bench.store.copy_records(0, np.arange(first, first + TOP_K, dtype=np.int32), buffer)
        return jax.device_put(buffer, bench.device, may_alias=True)

    return buffer.nbytes / bench.time(copy) / 1e9


def _device_gbps(bench: Bench) -> float:
    """Dense projections of one token, of more weights than the caches hold."""
    layers = [_projection(bench, HIDDEN, 2 * HIDDEN) for _ in range(4)]
    num_bytes = sum(layer.weight.nbytes + layer.scale.nbytes for layer in layers)
    x = jnp.ones((1, 2 * HIDDEN), jnp.bfloat16)
    call = jax.jit(lambda x, layers: [linear(x, layer) for layer in layers])
    return num_bytes / bench.time(lambda: call(x, layers)) / 1e9


def _linear_tflops(bench: Bench) -> float:
    layer, x = _projection(bench, FFN, HIDDEN), jnp.ones((ROWS, HIDDEN), jnp.bfloat16)
    call = jax.jit(linear)
    return 2 * ROWS * HIDDEN * FFN / bench.time(lambda: call(x, layer)) / 1e12


def _grouped(bench: Bench) -> dict[str, float]:
    """What a tile costs however few tokens it has, and what each token adds: from a short and a long one."""
    few, many = 32, ROWS
    short_s, long_s = _tile_s(bench, few), _tile_s(bench, many)
    flops = 2 * GROUP * (many - few) * 3 * HIDDEN * FFN
    per_token_s = (long_s - short_s) / (many - few)
    fixed_s = max(short_s - few * per_token_s, 1e-9)
    return {
        "grouped_tflops": flops / (long_s - short_s) / 1e12,
        "unpack_gbps": GROUP * bench.store.record_layout.num_bytes / fixed_s / 1e9,
    }


def _tile_s(bench: Bench, num_tokens: int) -> float:
    layout = bench.store.record_layout
    records = np.zeros((GROUP, layout.num_bytes), np.uint8)
    bench.store.copy_records(0, np.arange(GROUP, dtype=np.int32), records)
    on_device, hidden = jax.device_put(records), jnp.ones((ROWS, HIDDEN), jnp.bfloat16)
    rows = GroupRows(
        tokens=jnp.broadcast_to(jnp.arange(num_tokens, dtype=jnp.int32), (GROUP, num_tokens)),
        weights=jnp.ones((GROUP, num_tokens), jnp.float32),
    )
    call = jax.jit(
        lambda routed, hidden, rows, records: VARIANTS["batched"](routed, hidden, rows, layout.unpack(records))
    )
    routed = jnp.zeros((ROWS, HIDDEN), jnp.float32)
    return bench.time(lambda: call(routed, hidden, rows, on_device))


def _attention_tflops(bench: Bench) -> float:
    """The last block of a prompt of `CONTEXT` tokens, with some of the heads."""
    key = jax.random.key(SEED)
    queries = Queries(
        nope=jax.random.normal(key, (ROWS, HEADS, NOPE), jnp.bfloat16),
        rope=jax.random.normal(key, (ROWS, HEADS, ROPE), jnp.bfloat16),
    )
    up = UpProjections(
        key=jnp.full((HEADS, NOPE, RANK), 0.01, jnp.bfloat16),
        value=jnp.full((HEADS, VALUE, RANK), 0.01, jnp.bfloat16),
        pool=bench.native_pool,
    )
    cache = jnp.full((CONTEXT // PAGE, PAGE, RANK + ROPE), 0x3C00, jnp.uint16)
    table = jnp.arange(CONTEXT // PAGE, dtype=jnp.int32)
    positions = jnp.arange(CONTEXT - ROWS, CONTEXT, dtype=jnp.int32)
    chunk_len = 256

    @jax.jit
    def attend(queries: Queries, up: UpProjections, cache: jax.Array) -> jax.Array:
        latents = jax.lax.bitcast_convert_type(cache, jnp.bfloat16).reshape(CONTEXT, -1)
        context = Context(
            chunk=lambda i: jax.lax.dynamic_slice_in_dim(latents, i * chunk_len, chunk_len),
            chunk_len=chunk_len,
            num_chunks=jnp.int32(CONTEXT // chunk_len),
            positions=positions,
            pages=Pages(cache, table),
        )
        return attend_decompressed(queries, up, context, scale=0.1)

    pairs = ROWS * (CONTEXT - ROWS / 2)
    return 2 * HEADS * (NOPE + ROPE + VALUE) * pairs / bench.time(lambda: attend(queries, up, cache)) / 1e12


def _dispatch_s(bench: Bench) -> float:
    """An operation of a program that has nothing to do: twenty in turn."""
    step = jax.jit(lambda x: x + 1).lower(jnp.zeros(8)).compile()

    def twenty() -> jax.Array:
        x = jnp.zeros(8)
        for _ in range(20):
            x = step(x)
        return x

    return bench.time(twenty) / 20


def _projection(bench: Bench, rows: int, cols: int) -> Projection:
    weight, scale = random_matrix(np.random.default_rng(SEED), rows, cols)
    return Projection(jax.device_put(weight), jax.device_put(scale), codec=CODEC, pool=bench.native_pool)
