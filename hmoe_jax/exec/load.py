"""From a model folder to weights on the device: strict, with progress, routed experts left to the executor."""

from __future__ import annotations

import logging
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.typing import DTypeLike

from hmoe_jax.architectures.deepseek_v3 import Moe, Weights, prepare
from hmoe_jax.architectures.deepseek_v3_checkpoint import (
    describe,
    describe_experts,
    expected_tensors,
    is_ignored,
)
from hmoe_jax.checkpoint.index import Checkpoint
from hmoe_jax.checkpoint.specs import TensorSpec, check_scales, check_tensors
from hmoe_jax.config import ModelConfig
from hmoe_jax.nn.attention import UpProjections
from hmoe_jax.nn.linear import Projection

logger = logging.getLogger(__name__)


def check_checkpoint(config: ModelConfig, checkpoint: Checkpoint) -> None:
    """Raises `CheckpointError` unless the tensors are those that `config` promises."""
    expected = expected_tensors(config)
    check_tensors(checkpoint, expected, ignore=is_ignored(config))
    num_skipped = len(checkpoint.entries) - len(expected)
    if num_skipped:
        logger.info("skipped: %d tensors of multi-token-prediction layers or saved rotary frequencies", num_skipped)


def bytes_to_read(config: ModelConfig, checkpoint: Checkpoint, *, maps_experts: bool) -> int:
    """What a load reads of a checked checkpoint: of experts that are mapped, the scales alone."""
    experts = [spec.projection for spec in describe_experts(config)]
    read = [projection.scale for projection in experts] if maps_experts else experts
    return sum(checkpoint.entries[spec.name].num_bytes for spec in jax.tree.leaves((describe(config), read)))


def load_weights(
    config: ModelConfig,
    checkpoint: Checkpoint,
    *,
    dtype: DTypeLike,
    pool: int | None,
    advance: Callable[[int], None],
) -> Weights:
    """Everything but the routed experts, copied to the default device and prepared.

    FP8 projections stay FP8; router weights stay `dtype` if they are, else they become FP32; everything else becomes
    `dtype`. On the CPU platform the native thread pool with the id `pool` multiplies and attends, or XLA if it is None.
    `advance` is told bytes.
    """

    def read(spec: TensorSpec) -> jax.Array:
        is_scale = spec.name.endswith("weight_scale_inv")
        array = read_scales(checkpoint, spec.name) if is_scale else checkpoint.array(spec.name)
        advance(array.nbytes)
        return jax.device_put(array)

    weights = jax.tree.map(read, describe(config))
    return _set_pool(prepare(config, _cast(weights, dtype), dtype=dtype), pool)


def read_scales(checkpoint: Checkpoint, name: str) -> np.ndarray:
    """The scales of an FP8 tensor, all of them finite and above zero."""
    scales = checkpoint.array(name)
    check_scales(name, scales, file=str(checkpoint.file_of(name)))
    return scales


def _cast(weights: Weights, dtype: DTypeLike) -> Weights:
    def is_special(node: object) -> bool:
        return isinstance(node, Moe | Projection)

    def cast(node: Any) -> Any:
        if isinstance(node, Projection):
            return node if node.scale is not None else replace(node, weight=node.weight.astype(dtype))
        if isinstance(node, Moe):
            wide = {
                "router": node.router if node.router.dtype == dtype else node.router.astype(jnp.float32),
                "router_bias": node.router_bias.astype(jnp.float32),
            }
            return replace(node, shared=jax.tree.map(cast, node.shared, is_leaf=is_special), **wide)
        return node.astype(dtype)

    return jax.tree.map(cast, weights, is_leaf=is_special)


def _set_pool(weights: Weights, pool: int | None) -> Weights:
    def has_pool(node: object) -> bool:
        return isinstance(node, Projection | UpProjections)

    return jax.tree.map(lambda node: replace(node, pool=pool) if has_pool(node) else node, weights, is_leaf=has_pool)
