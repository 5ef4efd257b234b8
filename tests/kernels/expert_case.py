"""Random experts, in both forms: arrays for the oracle, a store for the kernels; and the exact result of a call."""

from __future__ import annotations

from dataclasses import dataclass, replace

import jax
import jax.numpy as jnp
import numpy as np

from hmoe_jax.architectures.deepseek_v3_checkpoint import MATRICES
from hmoe_jax.experts.store import ExpertStore, ExpertTensor, StoreShape
from hmoe_jax.kernels.moe_experts_reference import ExpertArrays, ExpertMatrices
from hmoe_jax.kernels.pool import ThreadPool
from hmoe_jax.quant.formats import FORMATS, ScaleBlock
from hmoe_jax.quant.quantize import quantize
from tests.kernels.bounds import ExactMatrix, Within, roundings, silu_times, times_uncertain

# What JAX makes of a refusal by a handler: compiled programs and eager calls differ.
XLA_ERRORS = (ValueError, jax.errors.JaxRuntimeError)


def random_matrix(
    rng: np.random.Generator,
    shape: tuple[int, int],
    codec: str,
    *,
    block: ScaleBlock | None = None,
    scale_dtype: np.dtype | None = None,
) -> tuple[np.ndarray, np.ndarray | None]:
    """A matrix that keeps the size of what it multiplies, as (stored weight, scale)."""
    weight = (rng.standard_normal(shape) / np.sqrt(shape[1])).astype(np.float32)
    return quantize(codec, weight, block=block, scale_dtype=scale_dtype)


def cols_for(codec: str, cols: int) -> int:
    """The next number of columns that the format can hold."""
    multiple = FORMATS[codec].cols_multiple
    return -(-cols // multiple) * multiple


def shape_for(codec: str, shape: StoreShape) -> StoreShape:
    """The same with sizes that the format can hold."""
    return replace(shape, hidden=cols_for(codec, shape.hidden), ffn=cols_for(codec, shape.ffn))


@dataclass(frozen=True)
class Experts:
    shape: StoreShape
    codec: str
    tensors: tuple[ExpertTensor, ...]

    @staticmethod
    def random(shape: StoreShape, codec: str, seed: int = 0) -> Experts:
        rng = np.random.default_rng(seed)
        places = [
            (layer, expert, matrix)
            for layer in range(shape.num_layers)
            for expert in range(shape.num_experts)
            for matrix in MATRICES
        ]
        tensors = tuple(ExpertTensor(*place, *random_matrix(rng, shape.matrix(place[2]), codec)) for place in places)
        return Experts(shape, codec, tensors)

    def store(self, pool: ThreadPool) -> ExpertStore:
        return ExpertStore(self.tensors, shape=self.shape, codec=self.codec, pool=pool)

    def arrays(self, layer: int) -> ExpertArrays:
        def stack(matrix: str) -> ExpertMatrices:
            chosen = [t for t in self.tensors if t.layer == layer and t.matrix == matrix]
            scale = None if chosen[0].scale is None else jnp.asarray(np.stack([t.scale for t in chosen]))
            return ExpertMatrices(jnp.asarray(np.stack([t.weight for t in chosen])), scale, codec=self.codec)

        return ExpertArrays(**{matrix: stack(matrix) for matrix in MATRICES})

    def exact(self, layer: int, batch: Batch) -> Within:
        """What `moe_experts` must return."""
        hidden, gates = np.asarray(batch.hidden, np.float64), np.asarray(batch.weights, np.float64)
        total = Within(np.zeros(hidden.shape), np.zeros(hidden.shape))
        magnitude = np.zeros(hidden.shape)
        for expert in range(self.shape.num_experts):
            gate, up, down = (self._matrix(layer, expert, name) for name in MATRICES)
            routed = times_uncertain(down, silu_times(gate.times(hidden), up.times(hidden)))
            # Whether an expert's weights are added before or after it, each slot is one more addition.
            weight = np.where(np.asarray(batch.ids) == expert, gates, 0).sum(axis=1)[:, None]
            total = Within(total.value + weight * routed.value, total.error + weight * routed.error)
            magnitude += weight * (np.abs(routed.value) + routed.error)
        return Within(total.value, total.error + roundings(gates.shape[1]) * magnitude)

    def _matrix(self, layer: int, expert: int, name: str) -> ExactMatrix:
        (tensor,) = (t for t in self.tensors if (t.layer, t.expert, t.matrix) == (layer, expert, name))
        return ExactMatrix.of(self.codec, tensor.weight, tensor.scale)


@dataclass(frozen=True)
class Batch:
    hidden: jax.Array
    ids: jax.Array
    weights: jax.Array

    @staticmethod
    def random(shape: StoreShape, tokens: int, slots: int, seed: int = 1) -> Batch:
        """Some slots are unused, and some tokens name an expert twice."""
        rng = np.random.default_rng(seed)
        return Batch(
            jnp.asarray(rng.standard_normal((tokens, shape.hidden)), jnp.bfloat16),
            jnp.asarray(rng.integers(-1, shape.num_experts, (tokens, slots)), jnp.int32),
            jnp.asarray(rng.random((tokens, slots)), jnp.float32),
        )

    def rows(self, begin: int, end: int) -> Batch:
        return Batch(self.hidden[begin:end], self.ids[begin:end], self.weights[begin:end])

    @property
    def operands(self) -> tuple[jax.Array, jax.Array, jax.Array]:
        return self.hidden, self.ids, self.weights
