"""Random weights at the speed of a disk: windows into pools of random numbers, in the checkpoint's own format.

A pool's length is prime, and every tensor begins somewhere else in it: rows and experts differ, and reading them from
the file costs what reading a real model costs. Activations stay near 1, as matrices are scaled by the root of
their width.
"""

from __future__ import annotations

import zlib
from collections.abc import Iterator
from functools import cache

import jax
import ml_dtypes
import numpy as np

from hmoe_jax.architectures.deepseek_v3 import Moe
from hmoe_jax.architectures.deepseek_v3_checkpoint import describe, describe_experts
from hmoe_jax.checkpoint.specs import TensorSpec
from hmoe_jax.config import ModelConfig
from hmoe_jax.nn.linear import Projection
from hmoe_jax.quant.encodings import E4M3
from synthetic.routing import skewed_bias

POOL_LEN = 33_554_393
"""The largest prime below 2^25: 32 MB of FP8."""

SIGMAS = 4.5
"""The largest magnitude of a pool: a block of 128 x 128 normal values seldom has a larger one."""

LOGIT_SCALE = 1.5
"""The deviation of the router's logits: scores between 0.1 and 0.9."""


class RandomWeights:
    """All tensors of a config, shard by shard. `skew` is the exponent of the experts' load, see `routing`."""

    def __init__(self, config: ModelConfig, *, seed: int, skew: float):
        self.config, self._skew, self._seed = config, skew, seed
        rng = np.random.default_rng(seed)
        normal = rng.standard_normal(POOL_LEN, np.float32)
        self._normal = np.clip(normal, -SIGMAS, SIGMAS)
        self._codes = (self._normal * np.float32(E4M3.largest / SIGMAS)).astype(ml_dtypes.float8_e4m3fn)
        self._bf16 = cache(lambda width: (self._normal * np.float32(width**-0.5)).astype(ml_dtypes.bfloat16))
        self._tree, self._experts = describe(config), list(describe_experts(config))
        self._widths = {node.scale.name: node.weight.shape[1] for node in self._projections() if node.scale is not None}
        self._routers = {layer.mlp.router.name for layer in self._tree.layers if isinstance(layer.mlp, Moe)}

    def shards(self) -> Iterator[list[TensorSpec]]:
        """The tensors of each shard: embedding and head, then layer by layer. Fewer layers are fewer shards."""
        experts: list[list[Projection]] = [[] for _ in range(self.config.num_layers)]
        for spec in self._experts:
            experts[spec.layer + self.config.num_dense_layers].append(spec.projection)
        yield jax.tree.leaves((self._tree.embed, self._tree.norm, self._tree.head))
        for layer, projections in zip(self._tree.layers, experts, strict=True):
            yield jax.tree.leaves((layer, projections))

    def dtype(self, spec: TensorSpec) -> str:
        """Its safetensors name. Published checkpoints keep the routing bias in FP32 whatever the rest is."""
        return "F32" if spec.name.endswith("e_score_correction_bias") else spec.dtypes[0]

    def pieces(self, spec: TensorSpec) -> Iterator[np.ndarray]:
        """The values, flat, in pieces that follow each other."""
        count, rng = int(np.prod(spec.shape)), self._rng(spec)
        if spec.name.endswith("e_score_correction_bias"):
            yield skewed_bias(self.config, LOGIT_SCALE, rng, skew=self._skew)
        elif spec.name.endswith("weight_scale_inv"):
            width = self._widths[spec.name]
            spread = rng.uniform(0.8, 1.2, count).astype(np.float32)
            yield spread * np.float32(SIGMAS / E4M3.largest * width**-0.5)
        elif len(spec.shape) == 1:
            yield (1 + 0.1 * rng.standard_normal(count)).astype(ml_dtypes.bfloat16)
        elif self.dtype(spec) == "F8_E4M3":
            yield from _window(self._codes, count, rng)
        else:
            yield from _window(self._bf16(self._effective_width(spec)), count, rng)

    def _effective_width(self, spec: TensorSpec) -> float:
        if spec.name.endswith("embed_tokens.weight"):
            return 1.0
        return spec.shape[1] / LOGIT_SCALE**2 if spec.name in self._routers else spec.shape[1]

    def _projections(self) -> list[Projection]:
        nodes = jax.tree.leaves(self._tree, is_leaf=lambda node: isinstance(node, Projection))
        return [*(node for node in nodes if isinstance(node, Projection)), *(spec.projection for spec in self._experts)]

    def _rng(self, spec: TensorSpec) -> np.random.Generator:
        return np.random.default_rng([self._seed, zlib.crc32(spec.name.encode())])


def _window(pool: np.ndarray, count: int, rng: np.random.Generator) -> Iterator[np.ndarray]:
    """`count` values of the pool from a random place on, round and round."""
    begin = int(rng.integers(len(pool)))
    while count > 0:
        piece = pool[begin : begin + count]
        yield piece
        begin, count = 0, count - len(piece)
