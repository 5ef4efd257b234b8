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
from hmoe_jax.core import CheckpointError
from hmoe_jax.exec.backend import ExpertBackend
from hmoe_jax.exec.load import read_matrix, stored_bytes
from hmoe_jax.kernels.moe_experts_reference import ExpertArrays, ExpertMatrices, moe_experts_reference
from hmoe_jax.nn.linear import Projection


def load_experts(
    config: ModelConfig, checkpoint: Checkpoint, *, dtype: DTypeLike, advance: Callable[[int], None]
) -> ExpertBackend:
    """Copies all experts to the default device; those stored without scales become `dtype`. `advance` is told bytes.

    Raises `CheckpointError` if the experts of a layer are not stored alike.
    """
    stacks: dict[tuple[int, str], list[Projection]] = {}
    for spec in describe_experts(config):
        stacks.setdefault((spec.layer, spec.matrix), []).append(spec.projection)

    def read(layer: int, matrix: str) -> ExpertMatrices:
        experts = stacks[layer, matrix]
        codecs = sorted({projection.codec for projection in experts})
        if len(codecs) > 1:
            place = f"experts of MoE layer {layer}, {matrix}"
            raise CheckpointError(
                f"{place}: stored differently", file=str(checkpoint.folder), expected="one codec", actual=codecs
            )
        advance(stored_bytes(checkpoint, experts))
        return _stack([read_matrix(checkpoint, projection) for projection in experts], codecs[0], dtype)

    operand = tuple(
        ExpertArrays(**{matrix: read(layer, matrix) for matrix in MATRICES}) for layer in range(config.num_moe_layers)
    )
    return ExpertBackend(operand=operand, bind=_bind, store=None, close=lambda: None)


def _stack(experts: list[tuple[np.ndarray, np.ndarray | None]], codec: str, dtype: DTypeLike) -> ExpertMatrices:
    weights, scales = zip(*experts, strict=True)
    weight = jax.device_put(np.stack(weights))
    if scales[0] is None:
        return ExpertMatrices(weight.astype(dtype))
    return ExpertMatrices(weight, jax.device_put(np.stack(scales)), codec=codec)


def _bind(operand: tuple[ExpertArrays, ...]) -> RoutedExperts:
    return lambda layer, hidden, ids, weights: moe_experts_reference(hidden, ids, weights, operand[layer])
