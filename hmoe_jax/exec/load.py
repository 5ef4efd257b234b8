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
    expected_shapes,
    expected_tensors,
    is_ignored,
)
from hmoe_jax.checkpoint.index import Checkpoint
from hmoe_jax.checkpoint.specs import TensorSpec, check_scales, check_stored_shape, check_tensors
from hmoe_jax.config import ModelConfig
from hmoe_jax.nn.attention import GpuAttention, UpProjections
from hmoe_jax.nn.linear import GpuProducts, Projection
from hmoe_jax.quant.formats import FORMATS

logger = logging.getLogger(__name__)


CHECKED_SCALE_BYTES = 2**30
"""Up to here the scales of mapped experts are read and checked at start, which takes about a second. DeepSeek-V3's are
160 MB; with one scale for 32 weights they are a ninth of a checkpoint, 60 GB of Kimi-K2-Thinking."""


def check_checkpoint(config: ModelConfig, checkpoint: Checkpoint) -> None:
    """Raises `CheckpointError` unless the tensors are those that `config` promises."""
    expected = expected_tensors(config)
    check_tensors(checkpoint, expected, ignore=is_ignored(config))
    for name, shape in expected_shapes(config).items():
        check_stored_shape(name, checkpoint.array(name), shape, file=str(checkpoint.file_of(name)))
    num_skipped = len(checkpoint.entries) - len(expected)
    if num_skipped:
        logger.info("skipped: %d tensors that the model does not need", num_skipped)


def bytes_to_read(config: ModelConfig, checkpoint: Checkpoint, *, maps_experts: bool) -> int:
    """What a load reads of a checked checkpoint: of experts that are mapped, at most the scales."""
    experts: list[Any] = [spec.projection for spec in describe_experts(config)]
    if maps_experts:
        experts = [projection.scale for projection in experts] if checks_mapped_scales(config, checkpoint) else []
    return stored_bytes(checkpoint, (describe(config), experts))


def checks_mapped_scales(config: ModelConfig, checkpoint: Checkpoint) -> bool:
    """Whether the scales of experts whose files are only mapped are few enough to be read for a check."""
    scales = [spec.projection.scale for spec in describe_experts(config)]
    return stored_bytes(checkpoint, scales) <= CHECKED_SCALE_BYTES


def stored_bytes(checkpoint: Checkpoint, specs: Any) -> int:
    """Of all tensors of a tree of `TensorSpec`s, in the files."""
    return sum(checkpoint.entries[spec.name].num_bytes for spec in jax.tree.leaves(specs))


def load_weights(
    config: ModelConfig,
    checkpoint: Checkpoint,
    *,
    dtype: DTypeLike,
    pool: int | None,
    attention: GpuAttention = "xla",
    products: GpuProducts = "xla",
    advance: Callable[[int], None],
) -> Weights:
    """Everything but the routed experts, copied to the default device and prepared.

    Quantised projections stay as stored; router weights stay `dtype` if they are that, and become FP32 otherwise;
    everything else becomes `dtype`. On the CPU platform the native thread pool with the id `pool` multiplies and
    attends, or XLA if it is None; `attention` and `products` say who does on a GPU. `advance` is told bytes.
    """

    def read(node: Any) -> Any:
        advance(stored_bytes(checkpoint, node))
        if not isinstance(node, Projection):
            return jax.device_put(checkpoint.array(node.name))
        weight, scale = jax.device_put(read_matrix(checkpoint, node))
        return replace(node, weight=weight, scale=scale)

    weights = jax.tree.map(read, describe(config), is_leaf=lambda node: isinstance(node, Projection))
    return _set_kernels(prepare(config, _cast(weights, dtype), dtype=dtype), pool, attention, products)


def read_matrix(
    checkpoint: Checkpoint, projection: Projection, *, checks_scales: bool = True
) -> tuple[np.ndarray, np.ndarray | None]:
    """Views of a stored matrix and of its scales, as a grid of two axes, for a `projection` of `TensorSpec`s.

    Scales are a copy where the file has them in a narrower dtype than the format.
    Raises `CheckpointError` for a scale that is not finite and above zero, unless `checks_scales` is false.
    """
    weight = checkpoint.array(projection.weight.name)
    if projection.scale is None:
        return weight, None
    spec: TensorSpec = projection.scale
    scale = checkpoint.array(spec.name)
    if checks_scales:
        check_scales(spec.name, scale, file=str(checkpoint.file_of(spec.name)))
    layout = FORMATS[projection.codec]
    if scale.dtype in layout.widened_scale_dtypes:
        scale = scale.astype(layout.scale_dtypes[0])
    return weight, scale.reshape(spec.shape)


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


def _set_kernels(weights: Weights, pool: int | None, attention: GpuAttention, products: GpuProducts) -> Weights:
    def has_pool(node: object) -> bool:
        return isinstance(node, Projection | UpProjections)

    def choose(node: Any) -> Any:
        if isinstance(node, UpProjections):
            return replace(node, pool=pool, on_gpu=attention)
        return replace(node, pool=pool, on_gpu=products) if isinstance(node, Projection) else node

    return jax.tree.map(choose, weights, is_leaf=has_pool)
