"""The `graph` executor: experts resident on the accelerator, all of a step one XLA program.

For models that fit, and the oracle that every other executor is tested against.
"""

from __future__ import annotations

from collections.abc import Callable

import jax
import numpy as np
from jax.typing import DTypeLike

from hmoe_jax.architectures.deepseek_v3 import RoutedExperts
from hmoe_jax.architectures.deepseek_v3_checkpoint import MATRICES, describe_experts
from hmoe_jax.checkpoint.index import Checkpoint
from hmoe_jax.config import ModelConfig
from hmoe_jax.exec.backend import ExpertBackend
from hmoe_jax.exec.load import read_scales
from hmoe_jax.kernels.moe_experts_reference import ExpertArrays, ExpertMatrices, moe_experts_reference


def load_experts(
    config: ModelConfig, checkpoint: Checkpoint, *, dtype: DTypeLike, advance: Callable[[int], None]
) -> ExpertBackend:
    """Copies all experts to the default device; those stored without scales become `dtype`. `advance` is told bytes."""
    stacks: dict[tuple[int, str], list[tuple[np.ndarray, np.ndarray | None]]] = {}
    for spec in describe_experts(config):
        weight = checkpoint.array(spec.projection.weight.name)
        scale = spec.projection.scale and read_scales(checkpoint, spec.projection.scale.name)
        stacks.setdefault((spec.layer, spec.matrix), []).append((weight, scale))

    def read(layer: int, matrix: str) -> ExpertMatrices:
        experts = stacks.pop((layer, matrix))
        matrices = _stack(experts, dtype)
        advance(sum(weight.nbytes + (0 if scale is None else scale.nbytes) for weight, scale in experts))
        return matrices

    operand = tuple(
        ExpertArrays(**{matrix: read(layer, matrix) for matrix in MATRICES}) for layer in range(config.num_moe_layers)
    )
    return ExpertBackend(operand=operand, bind=_bind, stats=None, close=lambda: None)


def _stack(experts: list[tuple[np.ndarray, np.ndarray | None]], dtype: DTypeLike) -> ExpertMatrices:
    weights, scales = zip(*experts, strict=True)
    weight = jax.device_put(np.stack(weights))
    if scales[0] is None:
        return ExpertMatrices(weight.astype(dtype), None)
    return ExpertMatrices(weight, jax.device_put(np.stack(scales)))


def _bind(operand: tuple[ExpertArrays, ...]) -> RoutedExperts:
    return lambda layer, hidden, ids, weights: moe_experts_reference(hidden, ids, weights, operand[layer])
