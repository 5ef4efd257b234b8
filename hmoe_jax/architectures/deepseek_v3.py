"""The mathematics of the DeepSeek-V3 family (V3, V3.1, R1, Kimi-K2). For its files see `deepseek_v3_checkpoint`.

A layer has a seam: `front` ends at the routed experts' input, `back` begins at their output. Who computes the experts
in between, and where their weights are, is the executor's business. Sources: arXiv 2412.19437 and the reference code
published with it.
"""

from __future__ import annotations

from collections.abc import Callable, MutableSequence, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, Generic, Protocol, TypeVar, runtime_checkable

import jax
import jax.numpy as jnp
from jax.typing import DTypeLike
from jaxtyping import Array, Bool, Float, Float32, Int32, Shaped

from hmoe_jax.config import ModelConfig
from hmoe_jax.core import record
from hmoe_jax.nn.attention import Queries, UpProjections
from hmoe_jax.nn.linear import Projection, linear
from hmoe_jax.nn.norm import rms_norm
from hmoe_jax.nn.rope import rotary_angles, rotate
from hmoe_jax.nn.router import route
from hmoe_jax.quant.dequantize import dequantize

LATENT_NORM_EPS = 1e-6
"""The two norms inside MLA keep this value whatever `rms_norm_eps` says (so do the published implementations)."""


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class Attention:
    """`q_a` and its norm are None without `q_lora_rank`. `kv_b` is a `Projection` as stored, later `UpProjections`."""

    q_a: Projection | None
    q_a_norm: Any
    q_b: Projection
    kv_a: Projection
    kv_a_norm: Any
    kv_b: Any
    o: Projection


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class Mlp:
    gate: Projection
    up: Projection
    down: Projection


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class Moe:
    """`router [e, d]` in BF16 or FP32, `router_bias [e]` in FP32. The routed experts are the executors'."""

    router: Any
    router_bias: Any
    shared: Mlp


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class Layer:
    """`mlp` is an `Mlp` in the first, dense layers and a `Moe` in the others."""

    attention_norm: Any
    attention: Attention
    mlp_norm: Any
    mlp: Any


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class Weights:
    """Everything but the routed experts. `head` is None in a checkpoint that ties it to `embed`, set once prepared."""

    embed: Any
    layers: tuple[Layer, ...]
    norm: Any
    head: Any


@record
@dataclass(frozen=True)
class Seam:
    """What crosses from `front` to the experts and to `back`; `ids` are -1 for tokens that are only padding."""

    residual: Float[Array, "t d"]
    hidden: Float[Array, "t d"]
    ids: Int32[Array, "t k"]
    weights: Float32[Array, "t k"]


Cache = TypeVar("Cache")

Attend = Callable[[Cache, Queries, UpProjections, Float[Array, "t w"]], tuple[Float[Array, "t h v"], Cache]]
"""(cache of a layer, queries, up-projections, new latents) -> attention's output, and the cache with the latents."""

RoutedExperts = Callable[[int, Float[Array, "t d"], Int32[Array, "t k"], Float32[Array, "t k"]], Float32[Array, "t d"]]
"""(index among the MoE layers, hidden, ids, weights) -> the weighted sum of the chosen experts' outputs."""


@dataclass(frozen=True)
class Tokens:
    """A step's input, one row per token: `valid` is False for padding, which routes nowhere."""

    ids: Int32[Array, " t"]
    positions: Int32[Array, " t"]
    valid: Bool[Array, " t"]


Forward = tuple[Float[Array, "t d"], tuple[Cache, ...], Int32[Array, "m t k"]]
"""(final normed hidden, one cache per layer, expert ids of each MoE layer)"""


def forward(
    config: ModelConfig,
    weights: Weights,
    tokens: Tokens,
    caches: tuple[Cache, ...],
    attend: Attend[Cache],
    experts: RoutedExperts,
) -> Forward:
    """One pass over all layers."""
    return forward_in_parts(config, weights, [(tokens, attend)], caches, _Inline(experts))


def forward_in_parts(
    config: ModelConfig,
    weights: Weights,
    parts: Sequence[tuple[Tokens, Attend[Cache]]],
    caches: tuple[Cache, ...],
    experts: ExpertsBeside,
) -> Forward:
    """The same for tokens that are dealt out to parts of equal size, in turn; the results are in the tokens' order."""
    new_caches = list(caches)
    with jax.named_scope("embed"):
        flows = [
            Flow(config, _Inside(config, weights, tokens, attend), experts, part, weights.embed[tokens.ids])
            for part, (tokens, attend) in enumerate(parts)
        ]
    through_layers(flows, new_caches, experts)
    x = put_together([flow.x for flow in flows])
    hidden = rms_norm(x, weights.norm, config.norm_eps)
    routes = [put_together(each) for each in zip(*(flow.routes for flow in flows), strict=True)]
    return hidden, tuple(new_caches), stack_routes(config, routes, num_tokens=len(x))


def put_together(parts: Sequence[Shaped[Array, "t ..."]]) -> Shaped[Array, "n ..."]:
    """Rows of parts to which they were dealt out in turn, in their order."""
    return jnp.stack(parts, axis=1).reshape(-1, *parts[0].shape[1:])


def through_layers(flows: Sequence[Flow[Cache]], caches: MutableSequence[Cache], experts: ExpertsBeside) -> None:
    """The loop of every decode step, inside a program that is traced or on the host, in one part or in several.

    Between a part's `front` and its `back`, while somebody computes its routed experts, stand its shared experts and
    the `back` and `front` of the other parts.
    """
    for index in range(len(caches)):
        before = None
        for flow in flows:
            flow.end_layer()
            if before is not None:  # its experts are under way, and it has read the cache: this one may write to it
                flow.x = experts.in_order(flow.x, before.latest)
                caches[index] = experts.in_order(caches[index], before.latest)
            caches[index], before = flow.begin_layer(index, caches[index]), flow
    for flow in flows:
        flow.end_layer()


@runtime_checkable
class ExpertsBeside(Protocol):
    """Routed experts that are computed while a program goes on with something else."""

    def start(self, part: int, layer: int, seam: Seam) -> tuple[Any, Float[Array, "t d"]]:
        """What `finish` takes, and the seam's hidden states once the experts are under way: what is computed from these
        holds nobody up. `layer` counts the MoE layers."""

    def finish(self, part: int, started: Any) -> Float32[Array, "t d"]:
        """The weighted sum of the chosen experts' outputs."""

    def in_order(self, value: Any, after: Array) -> Any:
        """The value as it is, but not before `after` is there."""


@runtime_checkable
class Stages(Protocol[Cache]):
    """What is computed of a part of a batch outside the routed experts: in the program that is traced, or in programs
    of their own. `x` is the part's activations between two layers, in any form that `front` and `dense` take."""

    def dense(self, index: int, x: Any, cache: Cache) -> tuple[Any, Cache]: ...
    def front(self, index: int, x: Any, cache: Cache) -> tuple[Seam, Cache]: ...
    def shared(self, index: int, hidden: Float[Array, "t d"]) -> Float32[Array, "t d"]: ...
    def back(self, seam: Seam, shared: Float32[Array, "t d"], routed: Float32[Array, "t d"]) -> Any: ...


@dataclass(frozen=True)
class _Inside(Generic[Cache]):
    """In the program that is traced."""

    config: ModelConfig
    weights: Weights
    tokens: Tokens
    attend: Attend[Cache]

    def dense(self, index: int, x: Any, cache: Cache) -> tuple[Any, Cache]:
        return dense_layer(self.config, self.weights.layers[index], x, self.tokens, cache, self.attend)

    def front(self, index: int, x: Any, cache: Cache) -> tuple[Seam, Cache]:
        return front(self.config, self.weights.layers[index], x, self.tokens, cache, self.attend)

    def shared(self, index: int, hidden: Float[Array, "t d"]) -> Float32[Array, "t d"]:
        return shared_experts(self.weights.layers[index], hidden)

    def back(self, seam: Seam, shared: Float32[Array, "t d"], routed: Float32[Array, "t d"]) -> Any:
        return back(seam.residual, shared, routed)


@dataclass(frozen=True)
class _Inline:
    """Nobody beside: the experts are computed where they are started."""

    experts: RoutedExperts

    def start(self, part: int, layer: int, seam: Seam) -> tuple[Any, Float[Array, "t d"]]:
        return self.experts(layer, seam.hidden, seam.ids, seam.weights), seam.hidden

    def finish(self, part: int, started: Any) -> Float32[Array, "t d"]:
        return started

    def in_order(self, value: Any, after: Array) -> Any:
        return value


@dataclass
class Flow(Generic[Cache]):
    """One part on its way through the layers; an MoE layer that was begun is `open` until its experts are there."""

    config: ModelConfig
    stages: Stages[Cache]
    experts: ExpertsBeside
    part: int
    x: Any
    open: tuple[int, Seam, Array, Any] | None = None
    routes: list[Array] = field(default_factory=list)

    @property
    def latest(self) -> Array:
        """What was computed of this part last."""
        return self.x if self.open is None else self.open[1].hidden

    def begin_layer(self, index: int, cache: Cache) -> Cache:
        with jax.named_scope(f"layer{index}"):
            if index < self.config.num_dense_layers:
                self.x, cache = self.stages.dense(index, self.x, cache)
                return cache
            seam, cache = self.stages.front(index, self.x, cache)
            with jax.named_scope("experts"):
                started, hidden = self.experts.start(self.part, index - self.config.num_dense_layers, seam)
            self.open = index, replace(seam, hidden=hidden), self.stages.shared(index, hidden), started
            self.routes.append(seam.ids)
            return cache

    def end_layer(self) -> None:
        if self.open is None:
            return
        index, seam, shared, started = self.open
        with jax.named_scope(f"layer{index}"):
            with jax.named_scope("experts"):
                routed = self.experts.finish(self.part, started)
            self.x, self.open = self.stages.back(seam, shared, routed), None


def stack_routes(
    config: ModelConfig, routes: Sequence[Int32[Array, "t k"]], *, num_tokens: int
) -> Int32[Array, "m t k"]:
    """Of all MoE layers, of which there may be none."""
    return jnp.stack(routes) if routes else jnp.zeros((0, num_tokens, config.top_k), jnp.int32)


def front(
    config: ModelConfig, layer: Layer, x: Float[Array, "t d"], tokens: Tokens, cache: Cache, attend: Attend[Cache]
) -> tuple[Seam, Cache]:
    """Attention and routing of an MoE layer."""
    residual, cache = attention_block(config, layer, x, tokens, cache, attend)
    hidden = rms_norm(residual, layer.mlp_norm, config.norm_eps)
    with jax.named_scope("router"):
        pool = layer.mlp.shared.gate.pool
        ids, weights = route(config, hidden, layer.mlp.router, layer.mlp.router_bias, pool=pool)
        ids = jnp.where(tokens.valid[:, None], ids, -1)
    return Seam(residual, hidden, ids, weights), cache


def shared_experts(layer: Layer, hidden: Float[Array, "t d"]) -> Float32[Array, "t d"]:
    with jax.named_scope("shared"):
        return mlp(layer.mlp.shared, hidden)


def back(
    residual: Float[Array, "t d"], shared: Float32[Array, "t d"], routed: Float32[Array, "t d"]
) -> Float[Array, "t d"]:
    return (residual.astype(jnp.float32) + shared + routed).astype(residual.dtype)


def dense_layer(
    config: ModelConfig, layer: Layer, x: Float[Array, "t d"], tokens: Tokens, cache: Cache, attend: Attend[Cache]
) -> tuple[Float[Array, "t d"], Cache]:
    residual, cache = attention_block(config, layer, x, tokens, cache, attend)
    return dense_mlp(config, layer, residual), cache


def dense_mlp(config: ModelConfig, layer: Layer, residual: Float[Array, "t d"]) -> Float[Array, "t d"]:
    """What follows the attention of a dense layer."""
    with jax.named_scope("mlp"):
        return _add(residual, mlp(layer.mlp, rms_norm(residual, layer.mlp_norm, config.norm_eps)))


def attention_block(
    config: ModelConfig, layer: Layer, x: Float[Array, "t d"], tokens: Tokens, cache: Cache, attend: Attend[Cache]
) -> tuple[Float[Array, "t d"], Cache]:
    """The residual after a layer's attention."""
    with jax.named_scope("attention"):
        weights = layer.attention
        hidden = rms_norm(x, layer.attention_norm, config.norm_eps)
        angles = rotary_angles(config, tokens.positions)
        mixed, cache = attend(
            cache,
            _queries(config, weights, hidden, angles),
            weights.kv_b,
            _latents(config, weights, hidden, angles),
        )
        return _add(x, linear(mixed.reshape(mixed.shape[0], -1), weights.o)), cache


def mlp(weights: Mlp, x: Float[Array, "t d"]) -> Float32[Array, "t d"]:
    """SwiGLU: down(silu(gate(x)) * up(x))."""
    inner = jax.nn.silu(linear(x, weights.gate)) * linear(x, weights.up)
    return linear(inner.astype(x.dtype), weights.down)


def logits(weights: Weights, hidden: Float[Array, "t d"]) -> Float32[Array, "t v"]:
    with jax.named_scope("head"):
        return linear(hidden, weights.head)


def prepare(config: ModelConfig, weights: Weights, *, dtype: DTypeLike) -> Weights:
    """The loaded tree as `forward` wants it: a tied head filled in, `kv_b` split by heads.

    The absorbed form multiplies by `kv_b` from the other side, where its scales do not lie along the sum: it is the
    one projection that is dequantised to `dtype` (as the reference implementation does).
    """
    layers = tuple(
        replace(layer, attention=replace(layer.attention, kv_b=_split_kv_b(config, layer.attention.kv_b, dtype)))
        for layer in weights.layers
    )
    return replace(weights, layers=layers, head=weights.head or Projection(weights.embed))


def _split_kv_b(config: ModelConfig, kv_b: Projection, dtype: DTypeLike) -> UpProjections:
    weight = dequantize(kv_b.codec, kv_b.weight, kv_b.scale, dtype)
    by_head = weight.reshape(config.num_heads, config.nope_dim + config.v_dim, config.kv_rank)
    return UpProjections(key=by_head[:, : config.nope_dim], value=by_head[:, config.nope_dim :])


def _queries(config: ModelConfig, weights: Attention, hidden: Float[Array, "t d"], angles: tuple) -> Queries:
    if weights.q_a is not None:
        hidden = rms_norm(linear(hidden, weights.q_a).astype(hidden.dtype), weights.q_a_norm, LATENT_NORM_EPS)
    q = linear(hidden, weights.q_b).astype(hidden.dtype).reshape(-1, config.num_heads, config.qk_dim)
    nope, rope = jnp.split(q, [config.nope_dim], axis=-1)
    return Queries(nope=nope, rope=rotate(rope, *angles, interleave=config.rope_interleave))


def _latents(
    config: ModelConfig, weights: Attention, hidden: Float[Array, "t d"], angles: tuple
) -> Float[Array, "t w"]:
    latent, k_pe = jnp.split(linear(hidden, weights.kv_a).astype(hidden.dtype), [config.kv_rank], axis=-1)
    latent = rms_norm(latent, weights.kv_a_norm, LATENT_NORM_EPS)
    return jnp.concatenate([latent, rotate(k_pe, *angles, interleave=config.rope_interleave)], axis=-1)


def _add(x: Float[Array, "t d"], update: Float32[Array, "t d"]) -> Float[Array, "t d"]:
    return (x.astype(jnp.float32) + update).astype(x.dtype)
