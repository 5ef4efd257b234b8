"""What the user asked for, the model and the machine, resolved once into one frozen plan."""

from __future__ import annotations

import os
from collections.abc import Mapping
from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import Any, Literal, no_type_check

import jax
import jax.numpy as jnp

from hmoe_jax.config import ModelConfig
from hmoe_jax.exec.buckets import Buckets
from hmoe_jax.exec.passes import CHUNK_LEN, MIN_PASS, StreamPlan, stream_sizes
from hmoe_jax.kernels.pool import available_isas, resolve_num_threads
from hmoe_jax.kv.pages import CacheLayout
from hmoe_jax.perf.sizes import count_parameters

PAGE_SIZE = 64
"""Tokens in a page of the cache."""

PREFILL_LEN = 512
"""Tokens of a prompt that one step takes by default, where experts are computed in place."""

STREAM_SHARE = 0.25
"""The part of the device's memory that streaming may take."""

KV_SHARE = 0.25
"""The part of the device's memory that the cache may take by default."""

SMALLEST_PREFILL = 32

CGROUP_LIMITS = (Path("/sys/fs/cgroup/memory.max"), Path("/sys/fs/cgroup/memory/memory.limit_in_bytes"))
"""Where Linux tells a container how much memory it may use: control groups version 2 ("max" for all) and 1."""


@no_type_check  # for run-time checkers: wrong types get the same ValueError under pytest as elsewhere
@dataclass(frozen=True)
class EngineOptions:
    """The user's wishes; "auto" and None leave the choice to `resolve`. Raises `ValueError` naming the option.

    `prefill` "stream" copies experts to `prefill_devices` devices for prompts; "step" computes prompts as `executor`
    does. `link_gbps` slows these copies down to a link's bandwidth, to see what streaming would do there.
    """

    dtype: Literal["auto", "bfloat16", "float32"] = "auto"
    max_model_len: int | None = None
    max_num_seqs: int = 8
    max_prefill_tokens: int | None = None
    num_threads: int | Literal["auto"] = "auto"
    device: Literal["auto", "cpu", "gpu"] = "auto"
    executor: Literal["auto", "graph", "fused"] = "auto"
    prefill: Literal["auto", "step", "stream"] = "auto"
    prefill_devices: int = 1
    link_gbps: float | None = None
    isa: str = "auto"
    kv_cache_bytes: int | None = None

    def __post_init__(self) -> None:
        for name in ("max_num_seqs", "prefill_devices", "max_prefill_tokens", "max_model_len", "kv_cache_bytes"):
            value = getattr(self, name)
            optional = name not in ("max_num_seqs", "prefill_devices")
            if optional and value is None:
                continue
            if isinstance(value, bool) or not isinstance(value, int) or value < 1:
                raise ValueError(f"{name} must be an integer of at least 1, got {value!r}")
        if self.link_gbps is not None and not self.link_gbps > 0:
            raise ValueError(f"link_gbps must be above 0, got {self.link_gbps!r}")
        choices = {
            "dtype": ("auto", "bfloat16", "float32"),
            "device": ("auto", "cpu", "gpu"),
            "executor": ("auto", "graph", "fused"),
            "prefill": ("auto", "step", "stream"),
        }
        for name, allowed in choices.items():
            if getattr(self, name) not in allowed:
                raise ValueError(f"{name} must be one of {', '.join(allowed)}, got {getattr(self, name)!r}")


def engine_options(options: Mapping[str, Any]) -> EngineOptions:
    """The options by name. Raises `ValueError` for a name that is none, with those that are."""
    known = [option.name for option in fields(EngineOptions)]
    for name in options:
        if name not in known:
            raise ValueError(f"unknown option {name!r}: expected one of {', '.join(known)}")
    return EngineOptions(**options)


@dataclass(frozen=True)
class Hardware:
    """What the plan needs to know of the machine: the chosen device and its memory."""

    device: jax.Device
    memory_bytes: int

    @property
    def platform(self) -> str:
        return self.device.platform


@dataclass(frozen=True)
class Plan:
    """Every choice made; `reasons` tells why, for the automatic ones."""

    device: jax.Device
    executor: Literal["graph", "fused"]
    dtype: Any
    isa: str
    num_threads: int
    layout: CacheLayout
    buckets: Buckets
    stream: StreamPlan | None = None
    reasons: Mapping[str, str] = field(default_factory=dict)

    def describe(self) -> list[str]:
        """One line for each choice that was not the user's."""
        return [f"{name}: {reason}" for name, reason in self.reasons.items()]


def find_hardware(device: Literal["auto", "cpu", "gpu"]) -> Hardware:
    """The named device, or JAX's default one. Raises `ValueError` if there is none of that kind."""
    try:
        found = jax.local_devices(backend=None if device == "auto" else device)[0]
    except RuntimeError as error:
        raise ValueError(f"device {device!r} is not available: {error}") from None
    stats = found.memory_stats() if found.platform != "cpu" else None
    return Hardware(found, stats["bytes_limit"] if stats else _usable_ram_bytes())


def _usable_ram_bytes() -> int:
    limits = [file.read_text().strip() for file in CGROUP_LIMITS if file.is_file()]
    ram_bytes = os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    return min([ram_bytes, *(int(limit) for limit in limits if limit.isdecimal())])


def resolve(options: EngineOptions, config: ModelConfig, hardware: Hardware) -> Plan:
    """Pure but for asking the CPU for its instruction sets. Raises `ValueError` for wishes that exclude each other."""
    reasons: dict[str, str] = {}
    dtype = config.dtype if options.dtype == "auto" else options.dtype
    if options.dtype == "auto":
        reasons["dtype"] = f"{dtype}, as the checkpoint says"
    executor = _executor(options, hardware, dtype, reasons)
    if executor == "graph":
        _check_fits(config, hardware, dtype)
    isa, isas = options.isa, available_isas()
    if isa != "auto" and isa not in isas:
        raise ValueError(f"isa must be auto or one of {', '.join(isas)}, which this CPU offers, got {isa!r}")
    if isa == "auto":
        isa = isas[0]
        reasons["isa"] = f"{isa}, the best that this CPU offers"
    num_threads = resolve_num_threads(options.num_threads)
    if options.num_threads == "auto":
        reasons["num_threads"] = f"{num_threads}, the physical cores that this process may use"
    layout = _layout(options, config, hardware, dtype, reasons)
    stream = _stream(options, config, hardware, executor, layout, reasons)
    return Plan(
        device=hardware.device,
        executor=executor,
        dtype=jnp.dtype(dtype),
        isa=isa,
        num_threads=num_threads,
        layout=layout,
        buckets=_buckets(options, layout, stream),
        stream=stream,
        reasons=reasons,
    )


def _executor(
    options: EngineOptions, hardware: Hardware, dtype: str, reasons: dict[str, str]
) -> Literal["graph", "fused"]:
    if options.executor == "fused" and hardware.platform != "cpu":
        raise ValueError(f"executor 'fused' needs device 'cpu', got {hardware.platform!r}")
    if options.executor == "fused" and dtype == "float32":
        raise ValueError("executor 'fused' computes in bfloat16; dtype 'float32' needs executor 'graph'")
    if options.executor != "auto":
        return options.executor
    if hardware.platform != "cpu":
        reasons["executor"] = f"graph, as the device is {hardware.platform!r}: all weights must fit it"
        return "graph"
    if dtype == "float32":
        reasons["executor"] = "graph, as dtype is float32"
        return "graph"
    reasons["executor"] = "fused: routed experts in native kernels, on the CPU platform"
    return "fused"


def _check_fits(config: ModelConfig, hardware: Hardware, dtype: str) -> None:
    """Counts neither scales nor what a quantised checkpoint keeps in BF16: what is refused here cannot fit."""
    count, itemsize = count_parameters(config), jnp.dtype(dtype).itemsize
    matrices = count.attention + count.dense_mlp + count.shared_experts + count.routed
    bits = config.quantization.smallest_bits if config.quantization else itemsize * 8
    weight_bytes = matrices * bits // 8 + (count.total - matrices) * itemsize
    if weight_bytes > hardware.memory_bytes:
        raise ValueError(
            f"executor 'graph' needs all weights in memory, at least {weight_bytes:,} bytes, but device "
            f"{hardware.platform!r} has {hardware.memory_bytes:,}: "
            "use executor 'fused' with device 'cpu' and dtype 'bfloat16'"
        )


def _layout(
    options: EngineOptions, config: ModelConfig, hardware: Hardware, dtype: str, reasons: dict[str, str]
) -> CacheLayout:
    max_len = options.max_model_len or config.max_len
    if max_len > config.max_len:
        raise ValueError(f"max_model_len {max_len} exceeds the model's {config.max_len} positions")
    page_bytes = config.num_layers * PAGE_SIZE * config.latent_dim * jnp.dtype(dtype).itemsize
    # Each device that prompts are streamed to has a cache; those of the CPU platform share one memory.
    copies = options.prefill_devices if hardware.platform == "cpu" else 1
    budget = options.kv_cache_bytes or int(hardware.memory_bytes * KV_SHARE) // copies
    pages_each = -(-max_len // PAGE_SIZE)
    num_pages = 1 + min(options.max_num_seqs * pages_each, budget // page_bytes)
    if num_pages <= pages_each:
        name = "kv_cache_bytes" if options.kv_cache_bytes else f"{KV_SHARE:.0%} of the memory"
        raise ValueError(
            f"a sequence of max_model_len {max_len} needs {pages_each * page_bytes:,} bytes of cache, but {name} is "
            f"{budget:,}: lower max_model_len"
        )
    reasons["kv_cache"] = f"{num_pages - 1} pages of {PAGE_SIZE} tokens, {(num_pages - 1) * page_bytes / 1e9:.3g} GB"
    if options.max_model_len is None:
        reasons["max_model_len"] = f"{max_len}, the model's"
    return CacheLayout(
        num_layers=config.num_layers,
        num_pages=num_pages,
        page_size=PAGE_SIZE,
        latent_dim=config.latent_dim,
        chunk_pages=CHUNK_LEN // PAGE_SIZE,
        max_len=max_len,
    )


def _stream(
    options: EngineOptions,
    config: ModelConfig,
    hardware: Hardware,
    executor: str,
    layout: CacheLayout,
    reasons: dict[str, str],
) -> StreamPlan | None:
    if options.prefill != "stream":
        if options.prefill_devices > 1:
            raise ValueError(f"prefill_devices {options.prefill_devices} needs prefill 'stream'")
        if options.link_gbps is not None:
            raise ValueError(f"link_gbps {options.link_gbps} needs prefill 'stream'")
        return None
    if executor != "fused":
        raise ValueError(f"prefill 'stream' needs executor 'fused', with experts in host memory, got {executor!r}")
    devices = jax.devices(hardware.platform)
    if options.prefill_devices > len(devices):
        raise ValueError(f"prefill_devices {options.prefill_devices}: {hardware.platform!r} has {len(devices)} devices")
    chosen = tuple(devices[: options.prefill_devices])
    if hardware.device not in chosen:
        raise ValueError(f"prefill_devices {options.prefill_devices}: none of them is process {jax.process_index()}'s")
    # Devices of the CPU platform share one memory.
    shares = len(chosen) if hardware.platform == "cpu" else 1
    memory_bytes = int(hardware.memory_bytes * STREAM_SHARE) // shares
    sizes = stream_sizes(config, len(chosen), memory_bytes=memory_bytes, max_len=layout.max_len)
    stream = StreamPlan(**vars(sizes), devices=chosen, link_gbps=options.link_gbps)
    reasons["stream"] = (
        f"passes of at most {stream.pass_len} tokens, experts in groups of {stream.group_size} on each of "
        f"{len(chosen)} device(s)"
    )
    return stream


def _buckets(options: EngineOptions, layout: CacheLayout, stream: StreamPlan | None) -> Buckets:
    """32, 128, 512... tokens and 1, 4, 16... sequences up to the limits: padding against programs to compile."""
    longest = min(stream.pass_len, layout.max_len) if stream is not None else layout.max_len
    default = longest if stream is not None else PREFILL_LEN
    limit = min(options.max_prefill_tokens or default, longest)
    decode = _geometric(1, options.max_num_seqs)
    if stream is not None:  # only buffers are padded, so that few sizes do
        prefill = _geometric(MIN_PASS, limit, factor=8)
        return Buckets(prefill=prefill, decode=decode, scored=prefill[-1], balances_prefill=True)
    prefill = _geometric(SMALLEST_PREFILL, limit)
    return Buckets(prefill=prefill, decode=decode, scored=prefill[min(1, len(prefill) - 1)])


def _geometric(first: int, limit: int, *, factor: int = 4) -> tuple[int, ...]:
    sizes = []
    while first < limit:
        sizes.append(first)
        first *= factor
    return (*sizes, limit)
