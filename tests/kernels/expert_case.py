"""Random experts, in both forms: arrays for the oracle, a store for the kernels; and a bound on their difference."""

from __future__ import annotations

from dataclasses import dataclass

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np

from hmoe_jax import quant
from hmoe_jax.architectures.deepseek_v3_checkpoint import MATRICES
from hmoe_jax.experts.store import ExpertStore, ExpertTensor, StoreShape
from hmoe_jax.kernels.moe_experts_reference import ExpertArrays, ExpertMatrices
from hmoe_jax.kernels.pool import ThreadPool

BF16_EPS = 2.0**-8
# What JAX makes of a refusal by a handler: compiled programs and eager calls differ.
XLA_ERRORS = (ValueError, jax.errors.JaxRuntimeError)


def random_matrix(rng: np.random.Generator, shape: tuple[int, int], codec: str) -> tuple[np.ndarray, np.ndarray | None]:
    """A matrix that keeps the size of what it multiplies, as (stored weight, scale)."""
    weight = (rng.standard_normal(shape) / np.sqrt(shape[1])).astype(np.float32)
    return (weight.astype(ml_dtypes.bfloat16), None) if codec == "bf16" else quant.quantize(weight)


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
            scale = None if self.codec == "bf16" else jnp.asarray(np.stack([t.scale for t in chosen]))
            return ExpertMatrices(jnp.asarray(np.stack([t.weight for t in chosen])), scale)

        return ExpertArrays(**{matrix: stack(matrix) for matrix in MATRICES})


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


def assert_close(actual: jax.Array, expected: jax.Array, *, bound: float) -> None:
    """Every element within `bound` of the expected array's root mean square; a failure prints the worst."""
    actual, expected = np.asarray(actual, np.float64), np.asarray(expected, np.float64)
    assert actual.shape == expected.shape
    if not expected.size:
        return
    error = np.abs(actual - expected)
    worst = np.unravel_index(np.argmax(error), error.shape)
    allowed = bound * max(np.sqrt(np.mean(expected**2)), np.finfo(np.float32).tiny)
    assert error[worst] <= allowed, f"at {worst}: got {actual[worst]}, expected {expected[worst]} +- {allowed}"
