"""What the user asked for, the model and the machine, resolved once into one frozen plan."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, field, fields, replace
from typing import Any, Literal, get_args, no_type_check

import jax
import jax.numpy as jnp

from hmoe_jax.config import ModelConfig
from hmoe_jax.exec import host_memory
from hmoe_jax.exec.buckets import Buckets
from hmoe_jax.exec.durations import Durations
from hmoe_jax.exec.passes import MIN_PASS, StreamPlan, stream_sizes
from hmoe_jax.experts.store import PlannedResidency
from hmoe_jax.kernels.pool import available_isas, resolve_num_threads
from hmoe_jax.kv.pages import CacheLayout
from hmoe_jax.nn.attention import GpuAttention
from hmoe_jax.nn.expanded import CHUNK_LEN
from hmoe_jax.nn.linear import GpuProducts
from hmoe_jax.perf.cost import Rates, gains_by_parts, held_bytes, prefill_cost, streams_from
from hmoe_jax.perf.machines import UNMEASURED_CPU, expected_rates
from hmoe_jax.perf.sizes import count_parameters

PAGE_SIZE = 64
"""Tokens in a page of the cache."""

PREFILL_LEN = 512
"""Tokens of a prompt that one step takes by default, where experts are computed in place."""

STREAM_SHARE = 0.25
"""The part of the memory that streaming may take on the CPU platform."""

MEMORY_FRACTION = "XLA_PYTHON_CLIENT_MEM_FRACTION"

DEVICE_SHARE = 0.9
"""The part of an accelerator's memory that is planned for: programs and the allocator's gaps take the rest."""

KV_SHARE = 0.25
"""The part of the device's memory that the cache may take by default."""

SMALLEST_PREFILL = 32

TURNS_SLOWDOWN = 1.0
"""Where prompts and decoding take turns: half of the time each."""

BESIDE_SLOWDOWN = 0.15
"""Where prompts are computed while decoding leaves the device idle."""

LEAST_SLOWDOWN = 0.001
"""A prompt beside decoding sequences would hardly ever end with less."""


@no_type_check  # for run-time checkers: wrong types get the same ValueError under pytest as elsewhere
@dataclass(frozen=True)
class EngineOptions:
    """The user's wishes; "auto" and None leave the choice to `resolve`. Raises `ValueError` naming the option.

    `residency` says where routed experts lie in host memory (`ExpertStore`): in the mapped files, in an arena, or in an
    arena that GPUs read too. `prefill` "stream" copies experts to `prefill_devices` devices for prompts; "step"
    computes prompts as `executor` does; "auto" streams those that are predicted to gain by it. With `prefill_apart`
    these are other devices than the one that decodes, which goes on beside them. `link_gbps` slows copies
    down to a link's bandwidth, to see what streaming would do there. Executor "overlap" computes routed experts beside
    everything else, with `microbatches` parts of a batch in turn: 2, or 1 where splitting loses. `expert_cpus` are the
    CPUs of the native kernels' threads, of each NUMA node, like "0-15;16-31". At most `max_num_waiting` sequences wait
    for one of `max_num_seqs` places. `enable_prefix_caching` keeps what prompts left in the cache, for later ones that
    begin alike. `max_decode_slowdown` is how much longer tokens may take on the average while a prompt is computed: 1.0
    is twice as long; "auto" is 0.15 for prompts that are computed beside decoding, and 1.0 for the others.
    """

    dtype: Literal["auto", "bfloat16", "float32"] = "auto"
    max_model_len: int | None = None
    max_num_seqs: int = 8
    max_prefill_tokens: int | None = None
    num_threads: int | Literal["auto"] = "auto"
    device: Literal["auto", "cpu", "gpu"] = "auto"
    executor: Literal["auto", "graph", "fused", "overlap"] = "auto"
    expert_cpus: str = "auto"
    microbatches: int | Literal["auto"] = "auto"
    residency: PlannedResidency = "auto"
    prefill: Literal["auto", "step", "stream"] = "auto"
    prefill_devices: int = 1
    prefill_apart: bool = False
    link_gbps: float | None = None
    isa: str = "auto"
    kv_cache_bytes: int | None = None
    max_num_waiting: int = 1024
    enable_prefix_caching: bool = True
    max_decode_slowdown: float | Literal["auto"] = "auto"

    def __post_init__(self) -> None:
        for name in ("max_num_seqs", "max_num_waiting", "prefill_devices"):
            _check_positive(name, getattr(self, name))
        for name in ("max_prefill_tokens", "max_model_len", "kv_cache_bytes"):
            if getattr(self, name) is not None:
                _check_positive(name, getattr(self, name))
        for name in ("enable_prefix_caching", "prefill_apart"):
            if not isinstance(getattr(self, name), bool):
                raise ValueError(f"{name} must be True or False, got {getattr(self, name)!r}")
        slowdown = self.max_decode_slowdown
        is_number = isinstance(slowdown, int | float) and not isinstance(slowdown, bool)
        if slowdown != "auto" and not (is_number and LEAST_SLOWDOWN <= slowdown < math.inf):
            raise ValueError(f"max_decode_slowdown must be auto or at least {LEAST_SLOWDOWN}, got {slowdown!r}")
        if self.link_gbps is not None and not self.link_gbps > 0:
            raise ValueError(f"link_gbps must be above 0, got {self.link_gbps!r}")
        choices = {
            "dtype": ("auto", "bfloat16", "float32"),
            "device": ("auto", "cpu", "gpu"),
            "executor": ("auto", "graph", "fused", "overlap"),
            "microbatches": ("auto", 1, 2),
            "residency": get_args(PlannedResidency),
            "prefill": ("auto", "step", "stream"),
        }
        for name, allowed in choices.items():
            if getattr(self, name) not in allowed:
                raise ValueError(f"{name} must be one of {', '.join(map(str, allowed))}, got {getattr(self, name)!r}")


def _check_positive(name: str, value: Any) -> None:
    if isinstance(value, bool) or not isinstance(value, int) or value < 1:
        raise ValueError(f"{name} must be an integer of at least 1, got {value!r}")


def engine_options(options: Mapping[str, Any]) -> EngineOptions:
    """The options by name. Raises `ValueError` for a name that is none, with those that are."""
    known = [option.name for option in fields(EngineOptions)]
    for name in options:
        if name not in known:
            raise ValueError(f"unknown option {name!r}: expected one of {', '.join(known)}")
    return EngineOptions(**options)


@dataclass(frozen=True)
class Hardware:
    """What the plan needs to know of the machine: the chosen device, its memory, and how fast its parts are."""

    device: jax.Device
    memory_bytes: int
    rates: Rates = UNMEASURED_CPU

    @property
    def platform(self) -> str:
        return self.device.platform


@dataclass(frozen=True)
class Plan:
    """Every choice made; `reasons` tells why, for the automatic ones."""

    device: jax.Device
    executor: Literal["graph", "fused", "overlap"]
    residency: PlannedResidency
    dtype: Any
    isa: str
    num_threads: int
    attention: GpuAttention
    products: GpuProducts
    layout: CacheLayout
    buckets: Buckets
    max_num_waiting: int
    enable_prefix_caching: bool
    max_decode_slowdown: float
    max_turn_slowdown: float
    expert_cpus: str
    split_sizes: tuple[int, ...]
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
    return Hardware(found, _memory_bytes(found), expected_rates(found))


def _memory_bytes(device: jax.Device) -> int:
    """What is left of an accelerator's memory for this process; all of the host's on the CPU platform."""
    if device.platform == "cpu":
        return host_memory.usable_bytes()
    stats = device.memory_stats()
    if not stats or "bytes_limit" not in stats:
        raise ValueError(
            f"device {device}: JAX does not say how much memory it has, as with XLA_PYTHON_CLIENT_ALLOCATOR=platform"
        )
    return stats["bytes_limit"] - stats.get("bytes_in_use", 0)


def resolve(options: EngineOptions, config: ModelConfig, hardware: Hardware) -> Plan:
    """Pure but for asking the CPU for its instruction sets. Raises `ValueError` for wishes that exclude each other."""
    reasons: dict[str, str] = {}
    dtype = config.dtype if options.dtype == "auto" else options.dtype
    if options.dtype == "auto":
        reasons["dtype"] = f"{dtype}, as the checkpoint says"
    executor = _executor(options, config, hardware, dtype, reasons)
    residency = _residency(options, hardware, executor, reasons)
    isa, isas = options.isa, available_isas()
    if isa != "auto" and isa not in isas:
        raise ValueError(f"isa must be auto or one of {', '.join(isas)}, which this CPU offers, got {isa!r}")
    if isa == "auto":
        isa = isas[0]
        reasons["isa"] = f"{isa}, the best that this CPU offers"
    num_threads = resolve_num_threads(options.num_threads, topology=options.expert_cpus)
    if options.num_threads == "auto":
        reasons["num_threads"] = f"{num_threads}, the physical cores that this process may use"
    if hardware.platform != "cpu":
        reasons["attention"] = f"{hardware.rates.attention}, by the rates of {hardware.rates.name}"
    layout = _layout(options, config, hardware, executor, dtype, reasons)
    stream = _stream(options, config, hardware, executor, layout, reasons)
    buckets = _buckets(options, layout, stream)
    return Plan(
        device=hardware.device,
        executor=executor,
        residency=residency,
        dtype=jnp.dtype(dtype),
        isa=isa,
        num_threads=num_threads,
        attention=hardware.rates.attention,
        products="kernel" if hardware.rates.variant == "kernel" else "xla",
        layout=layout,
        buckets=buckets,
        max_num_waiting=options.max_num_waiting,
        enable_prefix_caching=options.enable_prefix_caching,
        max_decode_slowdown=_slowdown(options, stream, reasons),
        max_turn_slowdown=TURNS_SLOWDOWN if options.max_decode_slowdown == "auto" else options.max_decode_slowdown,
        expert_cpus=options.expert_cpus,
        split_sizes=_split_sizes(options, config, hardware, executor, layout, buckets, reasons),
        stream=stream,
        reasons=reasons,
    )


def _executor(
    options: EngineOptions, config: ModelConfig, hardware: Hardware, dtype: str, reasons: dict[str, str]
) -> Literal["graph", "fused", "overlap"]:
    needed, memory = _weight_bytes(config, dtype), hardware.memory_bytes
    numbers = f"all weights need {needed:,} bytes and device {hardware.platform!r} has {memory:,}"
    if options.executor in ("fused", "overlap") and dtype == "float32":
        raise ValueError(f"executor {options.executor!r} computes in bfloat16; dtype 'float32' needs executor 'graph'")
    if options.executor == "overlap" and options.expert_cpus == "auto" and hardware.platform == "cpu":
        raise ValueError(
            "executor 'overlap' needs expert_cpus on the CPU platform, where both sides compute on CPUs: those that "
            "the other side leaves to the experts, like '1-3'"
        )
    if options.executor in ("fused", "overlap"):
        return options.executor
    if options.executor == "auto" and dtype != "float32":
        if hardware.platform == "cpu":
            reasons["executor"] = "fused: routed experts in native kernels, on the CPU platform"
            return "fused"
        if needed > memory:
            reasons["executor"] = f"overlap: routed experts by the CPU, as {numbers}"
            return "overlap"
    if needed > memory:
        raise ValueError(f"executor 'graph' is refused, as {numbers}: use executor 'fused' and dtype 'bfloat16'")
    if options.executor == "auto":
        fits = f"all weights fit device {hardware.platform!r}"
        reasons["executor"] = f"graph, as {'dtype is float32' if dtype == 'float32' else fits}"
    return "graph"


def _weight_bytes(config: ModelConfig, dtype: str) -> int:
    """At least: neither scales nor what a quantised checkpoint keeps in BF16 is counted."""
    count, itemsize = count_parameters(config), jnp.dtype(dtype).itemsize
    matrices = count.attention + count.dense_mlp + count.shared_experts + count.routed
    bits = config.quantization.smallest_bits if config.quantization else itemsize * 8
    return matrices * bits // 8 + (count.total - matrices) * itemsize


def _residency(options: EngineOptions, hardware: Hardware, executor: str, reasons: dict[str, str]) -> PlannedResidency:
    if options.residency != "auto" and executor == "graph":
        raise ValueError(f"residency {options.residency!r} needs executor 'fused', got {executor!r}")
    if options.residency == "auto" and executor != "graph" and hardware.platform != "cpu":
        reasons["residency"] = f"pinned, for copies to device {hardware.platform!r}"
        return "pinned"
    return options.residency


def _layout(
    options: EngineOptions,
    config: ModelConfig,
    hardware: Hardware,
    executor: str,
    dtype: str,
    reasons: dict[str, str],
) -> CacheLayout:
    max_len = options.max_model_len or config.max_len
    if max_len > config.max_len:
        raise ValueError(f"max_model_len {max_len} exceeds the model's {config.max_len} positions")
    page_bytes = config.num_layers * PAGE_SIZE * config.latent_dim * jnp.dtype(dtype).itemsize
    # Each device that prompts are streamed to has a cache; those of the CPU platform share one memory.
    copies = options.prefill_devices + options.prefill_apart if hardware.platform == "cpu" else 1
    room, of_what = hardware.memory_bytes, "the memory"
    if hardware.platform != "cpu" and executor != "graph":
        room, of_what = _beside_weights(config, hardware.memory_bytes), "the memory beside the weights"
    budget = options.kv_cache_bytes or int(room * KV_SHARE) // copies
    pages_each = -(-max_len // PAGE_SIZE)
    num_pages = 1 + min(options.max_num_seqs * pages_each, budget // page_bytes)
    if num_pages <= pages_each:
        name = "kv_cache_bytes" if options.kv_cache_bytes else f"{KV_SHARE:.0%} of {of_what}"
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
    """How prompts are streamed; None where all of them are computed in place."""
    if options.prefill == "stream" and executor == "graph":
        raise ValueError(f"prefill 'stream' needs executor 'fused', with experts in host memory, got {executor!r}")
    planned = None
    if executor != "graph" and options.prefill != "step":
        planned = _plan_stream(options, config, hardware, layout, reasons)
    if planned is None and options.prefill_devices > 1:
        raise ValueError(f"prefill_devices {options.prefill_devices} needs prefill 'stream'")
    if planned is None and options.prefill_apart:
        raise ValueError("prefill_apart needs prefill 'stream'")
    if planned is None and options.link_gbps is not None:
        raise ValueError(f"link_gbps {options.link_gbps} needs prefill 'stream'")
    if planned is None or executor != "overlap" or options.prefill_apart:
        return planned
    # Several processes must start the same programs, and each has a clock of its own.
    is_alone = {device.process_index for device in planned.devices} == {jax.process_index()}
    return replace(planned, fills_gaps=is_alone)


def _plan_stream(
    options: EngineOptions, config: ModelConfig, hardware: Hardware, layout: CacheLayout, reasons: dict[str, str]
) -> StreamPlan | None:
    """None if it was left to us and no prompt gains by it."""
    devices, is_free = jax.devices(hardware.platform), options.prefill == "auto"
    if options.prefill_apart:
        devices = [device for device in jax.local_devices(backend=hardware.platform) if device != hardware.device]
    if options.prefill_devices > len(devices):
        beside = " beside the one that decodes" if options.prefill_apart else ""
        raise ValueError(
            f"prefill_devices {options.prefill_devices}: {hardware.platform!r} has {len(devices)} devices{beside}"
        )
    chosen = tuple(devices[: options.prefill_devices])
    if hardware.device not in chosen and not options.prefill_apart:
        raise ValueError(f"prefill_devices {options.prefill_devices}: none of them is process {jax.process_index()}'s")
    cache = layout.num_bytes(jnp.bfloat16)
    memory_bytes = stream_bytes(
        config, hardware.memory_bytes, platform=hardware.platform, cache_bytes=cache, num_devices=len(chosen)
    )
    try:
        sizes = stream_sizes(config, len(chosen), memory_bytes=memory_bytes, max_len=layout.max_len)
    except ValueError as error:
        remedy = "" if hardware.platform == "cpu" else f" ({MEMORY_FRACTION} says how much of a GPU's memory JAX takes)"
        if not is_free:
            raise ValueError(f"{error}{remedy}") from None
        reasons["prefill"] = f"step: {error}{remedy}"
        return None
    link = options.link_gbps or hardware.rates.link_gbps
    rates = replace(hardware.rates, link_gbps=link, num_devices=len(chosen))
    costs, least = sizes.costs(len(chosen)), 1
    if is_free:
        shortest = streams_from(config, rates, max_len=layout.max_len, **costs)
        if shortest is None:
            reasons["prefill"] = f"step: no prompt is streamed sooner, by the rates of {rates.name}"
            return None
        least = shortest
        reasons["prefill"] = f"stream from {least} tokens on, by the rates of {rates.name}"
    cancelling = Durations(config, rates).cancelling(sizes)
    longest = prefill_cost(config, rates, layout.max_len, **costs)
    reasons["stream"] = (
        f"passes of at most {sizes.pass_len} tokens, experts in groups of {sizes.group_size} on each of "
        f"{len(chosen)} device(s); {layout.max_len} tokens should take {longest.seconds:.3g} s, limited by "
        f"{longest.limit} ({rates.name}), and is cancelled within {cancelling * 1e3:.0f} ms"
    )
    sizes = replace(sizes, variant=rates.variant)
    return StreamPlan(**vars(sizes), rates=rates, devices=chosen, least_tokens=least, link_gbps=options.link_gbps)


def stream_bytes(config: ModelConfig, memory_bytes: int, *, platform: str, cache_bytes: int, num_devices: int) -> int:
    """Of each device's memory that streaming may take: what weights and cache leave of an accelerator's.

    Devices of the CPU platform share one memory, with experts and page cache: there it is a share.
    """
    if platform == "cpu":
        return int(memory_bytes * STREAM_SHARE) // num_devices
    return max(_beside_weights(config, memory_bytes) - cache_bytes, 0)


def _beside_weights(config: ModelConfig, memory_bytes: int) -> int:
    """Of an accelerator's memory, without routed experts."""
    return max(int(memory_bytes * DEVICE_SHARE) - held_bytes(config), 0)


def _slowdown(options: EngineOptions, stream: StreamPlan | None, reasons: dict[str, str]) -> float:
    """Of decoding by prompts. Where some are computed beside it, those that must take turns all the same have
    `max_turn_slowdown`: they are short, and cannot be cut."""
    if options.max_decode_slowdown != "auto":
        return options.max_decode_slowdown
    if stream is None or not (stream.fills_gaps or options.prefill_apart):
        reasons["max_decode_slowdown"] = f"{TURNS_SLOWDOWN}, as prompts and decoding take turns"
        return TURNS_SLOWDOWN
    where = "on devices of their own" if options.prefill_apart else "in the gaps of decode steps"
    others = f"; {TURNS_SLOWDOWN} for those computed in place" if stream.least_tokens > 1 else ""
    reasons["max_decode_slowdown"] = f"{BESIDE_SLOWDOWN}, as prompts are computed {where}{others}"
    return BESIDE_SLOWDOWN


def _split_sizes(
    options: EngineOptions,
    config: ModelConfig,
    hardware: Hardware,
    executor: str,
    layout: CacheLayout,
    buckets: Buckets,
    reasons: dict[str, str],
) -> tuple[int, ...]:
    """The sizes of decode batches that are computed in two parts."""
    if executor != "overlap":
        if options.microbatches != "auto":
            raise ValueError(f"microbatches {options.microbatches} needs executor 'overlap', got {executor!r}")
        return ()
    even = [size for size in buckets.decode if size % 2 == 0]
    if options.microbatches != "auto":
        return tuple(even) if options.microbatches == 2 else ()
    context = layout.max_len // 2
    gaining = [size for size in even if gains_by_parts(config, hardware.rates, batch=size, context=context)]
    sizes = f"decode batches of {', '.join(map(str, gaining))} in two parts" if gaining else "no batch in two parts"
    reasons["microbatches"] = f"{sizes}, by the rates of {hardware.rates.name}"
    return tuple(gaining)


def _buckets(options: EngineOptions, layout: CacheLayout, stream: StreamPlan | None) -> Buckets:
    """32, 128, 512... tokens and 1, 4, 16... sequences up to the limits: padding against programs to compile."""
    decode = _geometric(1, options.max_num_seqs)
    if stream is None:
        prefill = _geometric(SMALLEST_PREFILL, min(options.max_prefill_tokens or PREFILL_LEN, layout.max_len))
        return Buckets(prefill=prefill, decode=decode, scored=prefill[min(1, len(prefill) - 1)])
    longest = min(stream.pass_len, layout.max_len)
    limit = min(options.max_prefill_tokens or longest, longest)
    in_place = _geometric(SMALLEST_PREFILL, min(stream.least_tokens - 1, limit)) if stream.least_tokens > 1 else ()
    streamed = _geometric(MIN_PASS, limit, factor=8)  # only buffers are padded, so that few sizes do
    prefill = (*in_place, *(size for size in streamed if size >= stream.least_tokens))
    return Buckets(prefill=prefill, decode=decode, balances_prefill=True)


def _geometric(first: int, limit: int, *, factor: int = 4) -> tuple[int, ...]:
    sizes = []
    while first < limit:
        sizes.append(first)
        first *= factor
    return (*sizes, limit)
