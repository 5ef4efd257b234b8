"""What a machine should need for a prompt or a token, from the rates of its parts: no rate is fitted to a whole.

Rates come from data sheets (then predictions are limits) or from `scripts/calibrate.py` (then they are expectations).
"""

from __future__ import annotations

import itertools
import math
from dataclasses import dataclass

import jax

from hmoe_jax.architectures.deepseek_v3_checkpoint import MATRICES, describe, describe_experts
from hmoe_jax.checkpoint.specs import TensorSpec
from hmoe_jax.config import ModelConfig
from hmoe_jax.nn.linear import Projection
from hmoe_jax.perf.sizes import cache_bytes_per_token, count_parameters
from hmoe_jax.quant.formats import FORMATS

ROWS_PER_UNPACKING = 640
"""An expert with n tokens is unpacked 1.25 + n / 640 times, on the average over balanced and skewed routing: what
`exec.groups.tiles` makes of 64 to 1,024 tokens per expert."""


@dataclass(frozen=True)
class Rates:
    """Of one machine with `num_devices` accelerators. TFLOP/s count two operations per multiply-add.

    `expert_gbps`: the CPU kernels' reading of experts, on all cores. `link_gbps`: host memory to one device.
    `device_gbps`: a device's reading of weights when it decodes. `linear_tflops`, `grouped_tflops`, `attention_tflops`:
    one device's dense projections, routed experts and attention of a prompt. `unpack_gbps`: its turning of stored
    experts into what it multiplies, once for each tile of tokens. `dispatch_s`: starting one program.
    """

    name: str
    expert_gbps: float
    link_gbps: float
    device_gbps: float
    linear_tflops: float
    grouped_tflops: float
    attention_tflops: float
    unpack_gbps: float
    dispatch_s: float
    num_devices: int = 1


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
    """Seconds of a step of `batch` sequences: the CPU's experts, and everything else on the device, in turn."""

    batch: int
    experts_s: float
    device_s: float

    @property
    def seconds(self) -> float:
        return self.experts_s + self.device_s

    @property
    def tok_per_s(self) -> float:
        return self.batch / self.seconds

    @property
    def limit(self) -> str:
        return "host memory" if self.experts_s >= self.device_s else "device"


def prefill_cost(
    config: ModelConfig, rates: Rates, num_tokens: int, *, pass_len: int, ahead_experts: int = 0
) -> PrefillCost:
    """A prompt in passes of at most `pass_len` tokens; `ahead_experts` are copied while a layer's front is computed.

    A layer takes as long as its copies or its computation, whichever is longer; copies that have no room to run ahead
    wait for the front.
    """
    num_passes = -(-num_tokens // pass_len)
    count = count_parameters(config)
    moe_layers = max(config.num_moe_layers, 1)
    dense = count.attention + count.dense_mlp + count.shared_experts + count.routers
    record = expert_bytes(config)
    copy_s = front_s = experts_s = seconds = 0.0
    for index in range(num_passes):
        tokens = (index + 1) * num_tokens // num_passes - index * num_tokens // num_passes
        context = index * num_tokens // num_passes
        pairs = tokens * context + tokens * (tokens + 1) / 2
        attention = 2 * config.num_layers * config.num_heads * (config.qk_dim + config.v_dim) * pairs
        front = 2 * dense * tokens / rates.linear_tflops / 1e12 + attention / rates.attention_tflops / 1e12
        used = config.num_experts * used_share(config, tokens)
        stored = moe_layers * used * record / 1e9
        copy = stored / rates.link_gbps
        tiles = 1.25 + tokens * config.top_k / used / ROWS_PER_UNPACKING
        routed = 2 * count.chosen * tokens / rates.grouped_tflops / 1e12 + tiles * stored / rates.unpack_gbps
        front, routed, copy = (each / rates.num_devices for each in (front, routed, copy))
        beside_front = min(ahead_experts / used, 1.0) * copy
        waiting = max(routed, copy - min(beside_front, front))
        seconds += max(copy, front + waiting)
        copy_s, front_s, experts_s = copy_s + copy, front_s + front, experts_s + routed
    return PrefillCost(num_tokens, num_passes, copy_s, front_s, experts_s, seconds)


def decode_cost(config: ModelConfig, rates: Rates, *, batch: int, context: int) -> DecodeCost:
    """One step without overlap; sequences choose their experts independently of each other."""
    used = config.num_experts * used_share(config, batch)
    experts = config.num_moe_layers * used * expert_bytes(config) / rates.expert_gbps / 1e9
    cache = batch * context * cache_bytes_per_token(config, itemsize=2)
    device = (resident_bytes(config, looked_up=True) + cache) / rates.device_gbps / 1e9
    return DecodeCost(batch, experts, device + config.num_layers * rates.dispatch_s)


def used_share(config: ModelConfig, tokens: int) -> float:
    """Of a layer's experts, how many some token chooses, if all are as probable."""
    return 1 - (1 - config.top_k / config.num_experts) ** tokens


def expert_bytes(config: ModelConfig) -> int:
    """Of one routed expert: weights and scales."""
    return sum(_stored_bytes(spec.projection) for spec in itertools.islice(describe_experts(config), len(MATRICES)))


def resident_bytes(config: ModelConfig, *, looked_up: bool = False) -> int:
    """Of everything but the routed experts; `looked_up`: without the embedding, of which a step reads a row."""
    nodes = jax.tree.leaves(describe(config), is_leaf=lambda node: isinstance(node, Projection))
    total = sum(_stored_bytes(node) for node in nodes)
    return total - 2 * config.vocab_size * config.hidden_size if looked_up and not config.tie_embeddings else total


def _stored_bytes(node: Projection | TensorSpec) -> int:
    if isinstance(node, TensorSpec):
        return 2 * math.prod(node.shape)
    layout = FORMATS[node.codec]
    rows, items = node.weight.shape
    return layout.num_bytes(rows, layout.num_cols(items))
