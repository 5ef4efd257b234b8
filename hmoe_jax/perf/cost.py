"""What a machine should need for a prompt or a token, from the rates of its parts: no rate is fitted to a whole.

Rates come from data sheets (then predictions are limits) or from `scripts/calibrate.py` (then they are expectations).
"""

from __future__ import annotations

import itertools
import math
from dataclasses import dataclass, replace
from functools import cache

import jax

from hmoe_jax.architectures.deepseek_v3_checkpoint import MATRICES, describe, describe_experts
from hmoe_jax.checkpoint.specs import TensorSpec
from hmoe_jax.config import ModelConfig
from hmoe_jax.nn.attention import GpuAttention
from hmoe_jax.nn.linear import Projection
from hmoe_jax.perf.sizes import cache_bytes_per_token, count_parameters
from hmoe_jax.quant.formats import FORMATS

ROWS_PER_UNPACKING = 640
"""An expert with n tokens is unpacked 1.25 + n / 640 times, on the average over balanced and skewed routing: what
`exec.groups.tiles` makes of 64 to 1,024 tokens per expert."""


@dataclass(frozen=True)
class Rates:
    """Of one machine with `num_devices` accelerators. TFLOP/s count two operations per multiply-add.

    `expert_gbps`: the CPU kernels' reading of experts, on all cores. `expert_tflops`: their products, for many tokens.
    `link_gbps`: host memory to one device.
    `device_gbps`: a device's reading of weights when it decodes; `decode_linear_tflops`: what it multiplies with them
    for each token but the first; `decode_attention_tflops`: its attention to latents then.
    `linear_tflops`, `grouped_tflops`, `attention_tflops`: one device's dense projections for many tokens, and routed
    experts and attention of a prompt. `unpack_gbps`: its turning of stored experts into what it multiplies, once for
    each tile of tokens. `dispatch_s`: starting one program.
    `contention`: how many times as long the CPU's experts and a device's decoding take where both are under way: 1 for
    a device with memory of its own, more where both read the same or share processors' power.
    `variant`: the fastest way to multiply a group (`kernels.grouped.VARIANTS`), whose rate `grouped_tflops` is;
    `attention`: the same of `attention_tflops`.
    """

    name: str
    expert_gbps: float
    expert_tflops: float
    link_gbps: float
    device_gbps: float
    decode_linear_tflops: float
    decode_attention_tflops: float
    linear_tflops: float
    grouped_tflops: float
    attention_tflops: float
    unpack_gbps: float
    dispatch_s: float
    num_devices: int = 1
    contention: float = 1.0
    variant: str = "batched"
    attention: GpuAttention = "xla"


@dataclass(frozen=True)
class PrefillCost:
    """Seconds of a prompt, and of each lane if nothing else were to do."""

    num_tokens: int
    num_passes: int
    copy_s: float
    front_s: float
    experts_s: float
    seconds: float

    @property
    def tok_per_s(self) -> float:
        return self.num_tokens / self.seconds

    @property
    def limit(self) -> str:
        lanes = {"link": self.copy_s, "projections and attention": self.front_s, "experts": self.experts_s}
        compute = self.front_s + self.experts_s
        return "link" if self.copy_s >= compute else max(list(lanes)[1:], key=lanes.__getitem__)


@dataclass(frozen=True)
class DecodeCost:
    """Seconds of a step of `batch` sequences: the CPU's experts, and everything else on the device, each alone. In one
    part the two take turns; in two they compute at once, slowed by `contention`, and each part's first or last stage
    stands alone."""

    batch: int
    experts_s: float
    device_s: float
    num_parts: int = 1
    num_layers: int = 1
    contention: float = 1.0

    @property
    def seconds(self) -> float:
        if self.num_parts == 1:
            return self.experts_s + self.device_s
        longer, shorter = max(self.experts_s, self.device_s), min(self.experts_s, self.device_s)
        return longer + shorter * (self.contention - 1 + 1 / (self.num_parts * self.num_layers))

    @property
    def tok_per_s(self) -> float:
        return self.batch / self.seconds

    @property
    def limit(self) -> str:
        return "host memory" if self.experts_s >= self.device_s else "device"


def prefill_cost(
    config: ModelConfig,
    rates: Rates,
    num_tokens: int,
    *,
    pass_len: int,
    block_len: int = 1024,
    ahead_experts: int = 0,
    expanded_len: int = 0,
) -> PrefillCost:
    """A streamed prompt in passes of at most `pass_len` tokens, which go through attention in blocks; `ahead_experts`
    are copied while a layer's front is computed. Keys and values are made once, if there are at most `expanded_len`.

    A layer takes as long as its copies or its computation, whichever is longer; copies that have no room to run ahead
    wait for the front.
    """
    copy_s = front_s = experts_s = seconds = 0.0
    pieces = _pieces(num_tokens, pass_len)
    for context, tokens in pieces:
        used = config.num_experts * used_share(config, tokens)
        stored = max(config.num_moe_layers, 1) * used * expert_bytes(config) / 1e9
        is_kept = context + tokens <= expanded_len
        front = _front_s(config, rates, tokens, context, block_len=block_len, is_kept=is_kept)
        routed = max(config.num_moe_layers, 1) * group_s(config, rates, tokens, used) / rates.num_devices
        copy = stored / rates.link_gbps / rates.num_devices
        beside_front = min(ahead_experts / used, 1.0) * copy
        waiting = max(routed, copy - min(beside_front, front))
        seconds += max(copy, front + waiting)
        copy_s, front_s, experts_s = copy_s + copy, front_s + front, experts_s + routed
    return PrefillCost(num_tokens, len(pieces), copy_s, front_s, experts_s, seconds)


def in_place_s(config: ModelConfig, rates: Rates, num_tokens: int) -> float:
    """Seconds of a prompt, in one piece, whose experts the CPU computes where they lie: the two sides take turns."""
    one = replace(rates, num_devices=1)
    front = _front_s(config, one, num_tokens, 0, block_len=num_tokens, is_kept=False)
    return experts_s(config, rates, num_tokens) + front


def experts_s(config: ModelConfig, rates: Rates, num_tokens: float | int) -> float:
    """Of all layers' routed experts on the CPU: each that some token chooses is read once, and multiplied with those
    that chose it."""
    used = config.num_experts * used_share(config, num_tokens)
    read = config.num_moe_layers * used * expert_bytes(config) / rates.expert_gbps / 1e9
    multiply = 2 * count_parameters(config).chosen * num_tokens / rates.expert_tflops / 1e12
    return max(read, multiply)


def streams_from(config: ModelConfig, rates: Rates, *, max_len: int, **passes: int) -> int | None:
    """The shortest prompt that is streamed sooner than it is computed in place, and so is every longer one.

    None if there is none up to `max_len` tokens. `passes` are what `prefill_cost` wants to know.
    """
    lengths = sorted({max_len, *(round(2 ** (i / 4)) for i in range(4 * max_len.bit_length()))})
    shortest = None
    for length in reversed([length for length in lengths if length <= max_len]):
        if prefill_cost(config, rates, length, **passes).seconds >= in_place_s(config, rates, length):
            break
        shortest = length
    return shortest


def group_s(config: ModelConfig, rates: Rates, tokens: int, experts: float | int) -> float:
    """Seconds of one device for `experts` of a layer, when a pass has so many tokens that choose evenly."""
    used = config.num_experts * used_share(config, tokens)
    rows = tokens * config.top_k / used
    repeated = 0.25 + rows / ROWS_PER_UNPACKING
    again = repeated * experts * expert_bytes(config) / rates.unpack_gbps / 1e9
    return tile_s(config, rates, rows, experts) + again


def tile_s(config: ModelConfig, rates: Rates, rows: float | int, experts: float | int) -> float:
    """Seconds of one device for `rows` tokens of each of so many experts, in one program."""
    flops = 2 * experts * rows * 3 * config.hidden_size * config.expert_ffn
    return flops / rates.grouped_tflops / 1e12 + experts * expert_bytes(config) / rates.unpack_gbps / 1e9


def attention_s(
    config: ModelConfig,
    rates: Rates,
    tokens: float | int,
    context: float | int,
    *,
    num_expanded: float | int | None = None,
) -> float:
    """Seconds of one device for a layer's attention of a block of `tokens` after `context` others.

    Projections; keys and values of `num_expanded` positions (None: of all that the block looks at); scores and their
    sums, for which all keys and values are read once.
    """
    projections_s = _linear_s(config, rates, count_parameters(config).attention / config.num_layers, tokens)
    pairs = tokens * context + tokens * (tokens + 1) / 2
    products = 2 * config.num_heads * (config.qk_dim + config.v_dim) * pairs
    expanding_s = expand_s(config, rates, context + tokens if num_expanded is None else num_expanded)
    read = (context + tokens) * expanded_bytes(config)
    attending_s = max(products / rates.attention_tflops / 1e12, read / rates.device_gbps / 1e9)
    return projections_s + expanding_s + attending_s


def expand_s(config: ModelConfig, rates: Rates, tokens: float | int) -> float:
    """Seconds of one device for one layer's keys and values of so many positions, from latents."""
    flops = 2 * config.num_heads * (config.nope_dim + config.v_dim) * config.kv_rank * tokens
    return flops / rates.attention_tflops / 1e12


def expanded_bytes(config: ModelConfig) -> int:
    """Of a device's memory for keys and values of a position of one layer, in BF16. (The native kernels of the CPU
    platform hold the rotated part for each head, of DeepSeek-V3 a quarter more.)"""
    return 2 * (config.num_heads * (config.nope_dim + config.v_dim) + config.rope_dim)


def mlp_s(config: ModelConfig, rates: Rates, tokens: float | int, inner: int) -> float:
    """Seconds of one device for an MLP that is not routed."""
    return _linear_s(config, rates, 3 * config.hidden_size * inner, tokens)


def _linear_s(config: ModelConfig, rates: Rates, num_parameters: float | int, tokens: float | int) -> float:
    """Of matrices with so many parameters, stored as those of the model on the average: read, or multiplied with."""
    count = count_parameters(config)
    read = resident_bytes(config, looked_up=True) * num_parameters / (count.active - count.chosen)
    return max(read / rates.device_gbps / 1e9, 2 * num_parameters * tokens / rates.linear_tflops / 1e12)


def _front_s(config: ModelConfig, rates: Rates, tokens: int, context: int, *, block_len: int, is_kept: bool) -> float:
    """Of all layers but for the routed experts, in blocks whose tokens the devices divide. Keys and values are made on
    each device. Routers are too small to count, and so are collectives between devices."""
    shared_ffn = config.num_shared_experts * config.expert_ffn
    seconds = config.num_layers * expand_s(config, rates, context if is_kept else 0)
    for begin, size in _pieces(tokens, block_len):
        share, num_expanded = size / rates.num_devices, size if is_kept else None
        before = context + begin + (size - share) / 2
        seconds += config.num_dense_layers * mlp_s(config, rates, share, config.dense_ffn)
        seconds += config.num_moe_layers * mlp_s(config, rates, share, shared_ffn)
        seconds += config.num_layers * attention_s(config, rates, share, before, num_expanded=num_expanded)
    return seconds


def _pieces(num_tokens: int, most: int) -> list[tuple[int, int]]:
    """(where it begins, how long it is) of each, as evenly as they divide."""
    count = -(-num_tokens // most)
    edges = [index * num_tokens // count for index in range(count + 1)]
    return [(begin, end - begin) for begin, end in itertools.pairwise(edges)]


def decode_cost(config: ModelConfig, rates: Rates, *, batch: int, context: int, num_parts: int = 1) -> DecodeCost:
    """One step; sequences choose their experts independently of each other. In parts, experts that several of them
    chose and all other weights but the head are read by each."""
    tokens, head = batch / num_parts, head_share(config)
    in_layers = (1 - head) * resident_s(config, rates, tokens)
    attention = cache_s(config, rates, batch=tokens, context=context)
    part = in_layers + attention + config.num_layers * rates.dispatch_s
    experts = num_parts * experts_s(config, rates, tokens)
    device = num_parts * part + head * resident_s(config, rates, batch)
    return DecodeCost(batch, experts, device, num_parts, config.num_layers, rates.contention)


def resident_s(config: ModelConfig, rates: Rates, tokens: float | int) -> float:
    """A device's work with everything but the routed experts: read with one token, and multiplied with the others."""
    count = count_parameters(config)
    read = resident_bytes(config, looked_up=True) / rates.device_gbps / 1e9
    others = max(tokens - 1, 0)
    return read + 2 * (count.active - count.chosen) * others / rates.decode_linear_tflops / 1e12


def head_share(config: ModelConfig) -> float:
    """Of what `resident_s` counts."""
    count = count_parameters(config)
    return count.head / (count.active - count.chosen)


def cache_s(config: ModelConfig, rates: Rates, *, batch: float | int, context: int) -> float:
    """A device's attention of so many tokens to the latents that each looks back at: read, and multiplied with every
    head's query and probabilities."""
    latents = batch * context
    read = latents * cache_bytes_per_token(config, itemsize=2) / rates.device_gbps / 1e9
    flops = 2 * config.num_layers * config.num_heads * (config.latent_dim + config.kv_rank) * latents
    return max(read, flops / rates.decode_attention_tflops / 1e12)


def gains_by_parts(config: ModelConfig, rates: Rates, *, batch: int, context: int) -> bool:
    """Whether a step of so many sequences is sooner done in two parts that overlap than in one."""
    one, two = (decode_cost(config, rates, batch=batch, context=context, num_parts=parts) for parts in (1, 2))
    return batch > 1 and two.seconds < one.seconds


def used_share(config: ModelConfig, tokens: float | int) -> float:
    """Of a layer's experts, how many some token chooses, if all are as probable."""
    return 1 - (1 - config.top_k / config.num_experts) ** tokens


@cache
def expert_bytes(config: ModelConfig) -> int:
    """Of one routed expert: weights and scales."""
    return sum(_stored_bytes(spec.projection) for spec in itertools.islice(describe_experts(config), len(MATRICES)))


@cache
def resident_bytes(config: ModelConfig, *, looked_up: bool = False) -> int:
    """Of everything but the routed experts; `looked_up`: without the embedding, of which a step reads a row."""
    nodes = jax.tree.leaves(describe(config), is_leaf=lambda node: isinstance(node, Projection))
    total = sum(_stored_bytes(node) for node in nodes)
    return total - 2 * config.vocab_size * config.hidden_size if looked_up and not config.tie_embeddings else total


def held_bytes(config: ModelConfig) -> int:
    """Of the same on a device: keys' and values' matrices are held in BF16 (`nn.attention.UpProjections`)."""
    if config.quantization is None:
        return resident_bytes(config)
    widened = config.num_layers * config.num_heads * (config.nope_dim + config.v_dim) * config.kv_rank
    return resident_bytes(config) + widened


def _stored_bytes(node: Projection | TensorSpec) -> int:
    if isinstance(node, TensorSpec):
        return 2 * math.prod(node.shape)
    layout = FORMATS[node.codec]
    rows, items = node.weight.shape
    return layout.num_bytes(rows, layout.num_cols(items))
