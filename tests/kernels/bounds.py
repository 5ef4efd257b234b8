"""How far a kernel may be from the exact result: derived from the arithmetic, for any order of additions.

The product of two BF16 numbers is exact in FP32, and every code is exact in BF16; so rounding happens in additions, in
the scaling of a group's sum, and where results are put together: n terms, n roundings and a few more. Each is at most
u = 2^-24 of what is rounded. Two bounds, of which the smaller counts:

- Any data: n u (1 + n u) times the sum of magnitudes (Higham, Accuracy and Stability of Numerical Algorithms, 4.2).
- Terms of random sign, as in these tests, whose 2-norm is T. After i of n terms a sum has the deviation T sqrt(i / n),
  and a rounding is uniform, so has u / sqrt(3) of it; independent roundings add up to u T sqrt(n / 6). Six times that
  is a deviation that a thousand million outputs do not show. The sums on the way to one output are alike, so that they
  may all be large together: three times, which as many outputs hardly show. 18 / sqrt(6) is less than 8.

AVX512_BF16 and AMX take subnormal operands for zero and flush subnormal sums: errors below 2^-126 each, times what
they are multiplied by.

The results of two instruction sets, each within this bound of the exact one, are within twice of it of each other.
"""

from __future__ import annotations

from dataclasses import dataclass

import ml_dtypes
import numpy as np

from tests.quant.exact import exact_values, spread

TINY = 2.0**-126
EXTRA_ROUNDINGS = 8
"""A scale times a power of two, a sum times a scale, lanes that are added up where a sum has fewer terms than lanes."""

SILU_ERROR = 2.0**-20
"""Eight units in the last place: an exponential within 4, an addition, a division, and what is left."""

SILU_SLOPE = 1.1
"""The largest of the derivative of silu is 1.0999."""


@dataclass(frozen=True)
class Within:
    """Values in FP64, and how far a kernel's may be from each."""

    value: np.ndarray
    error: np.ndarray


@dataclass(frozen=True)
class ExactMatrix:
    """A stored matrix in FP64: the value of every code and the scale of every weight, both `[rows, cols]`."""

    codes: np.ndarray
    scales: np.ndarray

    @staticmethod
    def of(codec: str, weight: np.ndarray, scale: np.ndarray | None) -> ExactMatrix:
        codes = exact_values(codec, np.asarray(weight))
        scales = np.ones(codes.shape) if scale is None else spread(codec, np.asarray(scale), *codes.shape)
        return ExactMatrix(codes, scales)

    @property
    def weights(self) -> np.ndarray:
        return self.codes * self.scales

    def times(self, x: np.ndarray) -> Within:
        """x @ weights.T, for finite `x [t, cols]`."""
        magnitude = np.abs(x) @ np.abs(self.weights).T
        norm = np.sqrt(x**2 @ (self.weights**2).T)
        error = np.minimum(roundings(x.shape[1]) * magnitude, random_roundings(x.shape[1]) * norm)
        return Within(x @ self.weights.T, error + self._flushed(x))

    def _flushed(self, x: np.ndarray) -> np.ndarray:
        """Operands, each partial sum, scales and results that were subnormal."""
        codes, largest_scale = np.abs(self.codes), self.scales.max(axis=1, initial=0)
        operands = np.abs(x).sum(axis=1)[:, None] + codes.sum(axis=1) + 2 * x.shape[1]
        return TINY * (operands * largest_scale + np.abs(x) @ codes.T + 1)


def roundings(num_terms: int) -> float:
    """The error of a sum of so many terms, and of what is done to it, relative to the sum of magnitudes."""
    count = num_terms + EXTRA_ROUNDINGS
    return count * 2.0**-24 * (1 + count * 2.0**-24)


def random_roundings(num_terms: int) -> float:
    """The same for terms of random sign, relative to their 2-norm."""
    return 8 * np.sqrt(num_terms + EXTRA_ROUNDINGS) * 2.0**-24


def silu_times(gate: Within, up: Within) -> Within:
    """silu(gate) * up, rounded to BF16.

    The values are the rounded ones of the exact product; where its error reaches over a border of rounding, the kernel
    may have taken the neighbour.
    """
    silu = gate.value / (1 + np.exp(-gate.value))
    exact = silu * up.value
    error = SILU_SLOPE * gate.error * (np.abs(up.value) + up.error) + np.abs(silu) * up.error
    error += SILU_ERROR * np.abs(exact) + TINY
    rounded, low, high = (_bf16(exact + offset) for offset in (0, -error, error))
    return Within(rounded, np.maximum(high - rounded, rounded - low) + TINY)


def times_uncertain(matrix: ExactMatrix, x: Within) -> Within:
    """As `ExactMatrix.times`, of values that may be off themselves."""
    product = matrix.times(x.value)
    moved = x.error @ np.abs(matrix.weights).T
    return Within(product.value, product.error + (1 + roundings(x.value.shape[1])) * moved)


def assert_within(actual: np.ndarray, expected: Within, *, what: str = "") -> None:
    """Every element; a failure prints the worst."""
    actual = np.asarray(actual, np.float64)
    assert actual.shape == expected.value.shape
    if not actual.size:
        return
    excess = np.abs(actual - expected.value) - expected.error
    excess = np.where(np.isnan(excess), np.inf, excess)
    worst = np.unravel_index(np.argmax(excess), excess.shape)
    assert excess[worst] <= 0, (
        f"{what} at {worst}: got {actual[worst]}, expected {expected.value[worst]} +- {expected.error[worst]}"
    )


def _bf16(values: np.ndarray) -> np.ndarray:
    """By way of FP32, so a value very near a tie may go to the other side: much nearer than `error` is wide."""
    return values.astype(ml_dtypes.bfloat16).astype(np.float64)
