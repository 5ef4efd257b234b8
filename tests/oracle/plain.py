"""The engine's own model functions with the plainest attention and experts: no pages, no chunks, no dispatch.

What stands between this and an executor is the executor; what stands between this and `hf` is the mathematics of
`hmoe_jax.architectures` and `hmoe_jax.nn`. Where PyTorch is missing, its FP32 run is the truth (golden files tie it to
the independent implementation).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np

from hmoe_jax.architectures import deepseek_v3
from hmoe_jax.architectures.deepseek_v3 import Moe, Tokens, Weights
from hmoe_jax.architectures.deepseek_v3_checkpoint import (
    MATRICES,
    describe,
    describe_experts,
    expected_tensors,
    is_ignored,
)
from hmoe_jax.checkpoint.index import Checkpoint, open_checkpoint
from hmoe_jax.checkpoint.specs import TensorSpec, check_tensors
from hmoe_jax.config import ModelConfig, read_config
from hmoe_jax.exec.load import read_matrix
from hmoe_jax.nn.attention import Queries, UpProjections
from hmoe_jax.nn.linear import Projection
from hmoe_jax.quant.dequantize import dequantize
from tests.oracle.routing import Routing

Stacks = dict[str, jax.Array]
"""A layer's routed experts: `gate`, `up` `[e, f, d]`, `down` `[e, d, f]`."""


class Plain:
    """A loaded model; `run` takes one sequence from its start, of at most `max_tokens`, and is compiled once."""

    def __init__(self, folder: Path, dtype: jnp.dtype, *, max_tokens: int):
        self.config, self._max_tokens = read_config(folder), max_tokens
        with open_checkpoint(folder) as checkpoint:
            check_tensors(checkpoint, expected_tensors(self.config), ignore=is_ignored(self.config))
            loaded = jax.tree.map(partial(_leaf, checkpoint, dtype), describe(self.config), is_leaf=_is_projection)
            self._experts = _experts(self.config, checkpoint, dtype)
        self._weights = deepseek_v3.prepare(self.config, loaded, dtype=dtype)
        # Runs once or twice per compilation, so the compiler's care would cost more time than it saves.
        self._run = jax.jit(partial(_run, self.config), compiler_options={"xla_backend_optimization_level": 0})

    def run(
        self, token_ids: Sequence[int] | np.ndarray, *, forced: np.ndarray | None = None
    ) -> tuple[np.ndarray, Routing]:
        """Logits `[t, v]` in FP32 after each token, and the routing.

        With `forced [m, t, k]` tokens go to those experts; the returned scores are still what the router would have
        chosen by.
        """
        num_tokens = len(token_ids)
        # What comes after a token does not change it, so a short sequence is run with anything behind it.
        ids = np.zeros(self._max_tokens, np.int32)
        ids[:num_tokens] = token_ids
        # A negative id leaves the choice to the router.
        experts = np.full((self.config.num_moe_layers, self._max_tokens, self.config.top_k), -1, np.int32)
        if forced is not None:
            experts[:, :num_tokens] = forced
        logits, chosen, choice = self._run(self._weights, self._experts, ids, experts)
        chosen, choice = np.asarray(chosen)[:, :num_tokens], np.asarray(choice)[:, :num_tokens]
        return np.asarray(logits)[:num_tokens], Routing(self.config.num_groups, chosen, choice)


def _run(
    config: ModelConfig, weights: Weights, experts: list[Stacks], ids: jax.Array, forced: jax.Array
) -> tuple[jax.Array, jax.Array, jax.Array]:
    num_tokens = ids.shape[0]
    tokens = Tokens(ids, jnp.arange(num_tokens, dtype=jnp.int32), jnp.ones(num_tokens, jnp.bool_))
    routers = [layer.mlp for layer in weights.layers if isinstance(layer.mlp, Moe)]
    used, choices = [], []

    def attend(cache: None, queries: Queries, up: UpProjections, latents: jax.Array) -> tuple[jax.Array, None]:
        return _causal_attention(config, queries, up, latents), cache

    def routed(layer: int, hidden: jax.Array, ids: jax.Array, gates: jax.Array) -> jax.Array:
        scores = jax.nn.sigmoid(hidden.astype(jnp.float32) @ routers[layer].router.T)
        choices.append(scores + routers[layer].router_bias)
        gates = jnp.where(forced[layer] < 0, gates, _gates(config, scores, forced[layer]))
        used.append(jnp.where(forced[layer] < 0, ids, forced[layer]))
        outputs = jnp.take_along_axis(_all_experts(experts[layer], hidden), used[layer][..., None], axis=1)
        return jnp.einsum("tkd,tk->td", outputs, gates)

    hidden, _, _ = deepseek_v3.forward(config, weights, tokens, (None,) * config.num_layers, attend, routed)
    return deepseek_v3.logits(weights, hidden), jnp.stack(used), jnp.stack(choices)


def _causal_attention(config: ModelConfig, queries: Queries, up: UpProjections, latents: jax.Array) -> jax.Array:
    c, k_pe = latents[:, : config.kv_rank], latents[:, config.kv_rank :]
    k = _dot("sr,hnr->shn", c, up.key).astype(c.dtype)
    v = _dot("sr,hvr->shv", c, up.value).astype(c.dtype)
    scores = _dot("thn,shn->hts", queries.nope, k) + _dot("thp,sp->hts", queries.rope, k_pe)
    visible = jnp.tril(jnp.ones(scores.shape[1:], jnp.bool_))
    share = jax.nn.softmax(jnp.where(visible, scores * config.softmax_scale, -jnp.inf), axis=-1)
    return _dot("hts,shv->thv", share.astype(c.dtype), v).astype(c.dtype)


def _all_experts(experts: Stacks, hidden: jax.Array) -> jax.Array:
    """Every expert's output for every token, `[t, e, d]` in FP32."""
    inner = jax.nn.silu(_dot("td,efd->tef", hidden, experts["gate"])) * _dot("td,efd->tef", hidden, experts["up"])
    return _dot("tef,edf->ted", inner.astype(hidden.dtype), experts["down"])


def _gates(config: ModelConfig, scores: jax.Array, ids: jax.Array) -> jax.Array:
    chosen = jnp.take_along_axis(scores, ids, axis=1)
    return config.routed_scale * (chosen / chosen.sum(axis=1, keepdims=True) if config.norm_top_k else chosen)


def _dot(spec: str, a: jax.Array, b: jax.Array) -> jax.Array:
    return jnp.einsum(spec, a, b, preferred_element_type=jnp.float32)


def _is_projection(node: object) -> bool:
    return isinstance(node, Projection)


def _leaf(checkpoint: Checkpoint, dtype: jnp.dtype, spec: TensorSpec | Projection) -> jax.Array | Projection:
    if isinstance(spec, TensorSpec):
        return jnp.asarray(checkpoint.array(spec.name)).astype(jnp.float32 if ".mlp.gate." in spec.name else dtype)
    weight, scale = jax.tree.map(jnp.asarray, read_matrix(checkpoint, spec))
    return replace(spec, weight=weight.astype(dtype) if scale is None else weight, scale=scale)


def _experts(config: ModelConfig, checkpoint: Checkpoint, dtype: jnp.dtype) -> list[Stacks]:
    """One for each MoE layer. Quantised matrices are expanded in FP32, as `linear` does."""

    def matrix(projection: Projection) -> jax.Array:
        loaded = _leaf(checkpoint, dtype, projection)
        return dequantize(loaded.codec, loaded.weight, loaded.scale, dtype if loaded.scale is None else jnp.float32)

    stacks: list[dict[str, list[jax.Array]]] = [{m: [] for m in MATRICES} for _ in range(config.num_moe_layers)]
    for spec in describe_experts(config):
        stacks[spec.layer][spec.matrix].append(matrix(spec.projection))
    return [{name: jnp.stack(parts) for name, parts in layer.items()} for layer in stacks]
