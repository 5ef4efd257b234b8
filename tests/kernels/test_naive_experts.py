"""The loop that benchmarks compare with: it must be naive, not wrong."""

from __future__ import annotations

import numpy as np
import pytest

from hmoe_jax.experts.store import StoreShape
from hmoe_jax.kernels import _native
from hmoe_jax.kernels.pool import ThreadPool
from tests.kernels.expert_case import Batch, Experts

SHAPE = StoreShape(num_layers=1, num_experts=5, hidden=328, ffn=200)


def expected(experts: Experts, batch: Batch) -> np.ndarray:
    """In float64, from the dequantised weights."""

    def matrices(name: str) -> list[np.ndarray]:
        tensors = [tensor for tensor in experts.tensors if tensor.matrix == name]
        scales = [np.repeat(np.repeat(t.scale, 128, axis=0), 128, axis=1) for t in tensors]
        return [
            t.weight.astype(np.float64) * scale[: t.weight.shape[0], : t.weight.shape[1]]
            for t, scale in zip(tensors, scales, strict=True)
        ]

    gate, up, down = map(matrices, ("gate", "up", "down"))
    hidden = np.asarray(batch.hidden, np.float64)
    out = np.zeros_like(hidden)
    for t, slots in enumerate(np.asarray(batch.ids)):
        for k, expert in enumerate(slots):
            if expert >= 0:
                g = gate[expert] @ hidden[t]
                inner = g / (1 + np.exp(-g)) * (up[expert] @ hidden[t])
                out[t] += float(batch.weights[t, k]) * (down[expert] @ inner)
    return out


def operands(batch: Batch) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    return np.array(batch.hidden, np.float32), np.array(batch.ids), np.array(batch.weights)


@pytest.mark.parametrize("num_threads", [1, 2])
def test_it_agrees_with_float64(num_threads: int) -> None:
    experts, batch = Experts.random(SHAPE, "fp8_block"), Batch.random(SHAPE, tokens=7, slots=3)
    hidden, ids, weights = operands(batch)
    out = np.full_like(hidden, np.nan)
    pool = ThreadPool(1) if num_threads == 1 else ThreadPool("auto")
    with pool, experts.store(pool) as store:
        _native.naive_experts(store.native, hidden, ids, weights, out)
    exact = expected(experts, batch)
    # Three sums of up to 328 FP32 products, one after the other.
    bound = 3 * 328 * 2.0**-24 * np.sqrt(np.mean(exact**2))
    np.testing.assert_allclose(out, exact, rtol=0, atol=bound)


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        ({"hidden": np.zeros((2, 7), np.float32)}, r"hidden: expected shape \[2, 328\], got \[2, 7\]"),
        ({"weights": np.zeros((2, 4), np.float32)}, r"weights: expected shape \[2, 3\], got \[2, 4\]"),
        ({"out": np.zeros((1, 328), np.float32)}, r"out: expected shape \[2, 328\], got \[1, 328\]"),
        ({"ids": np.full((2, 3), 5, np.int32)}, "5"),
    ],
)
def test_wrong_operands_are_refused(wrong: dict[str, np.ndarray], message: str) -> None:
    right = {
        "hidden": np.zeros((2, 328), np.float32),
        "ids": np.zeros((2, 3), np.int32),
        "weights": np.zeros((2, 3), np.float32),
        "out": np.zeros((2, 328), np.float32),
    }
    with ThreadPool(1) as pool, Experts.random(SHAPE, "fp8_block").store(pool) as store:
        _native.naive_experts(store.native, **right)
        with pytest.raises(ValueError, match=message):
            _native.naive_experts(store.native, **(right | wrong))


def test_other_codecs_are_refused() -> None:
    hidden, ids, weights = operands(Batch.random(SHAPE, tokens=1, slots=1))
    with (
        ThreadPool(1) as pool,
        Experts.random(SHAPE, "bf16").store(pool) as store,
        pytest.raises(ValueError, match="naive_experts: expected codec fp8_block, got bf16"),
    ):
        _native.naive_experts(store.native, hidden, ids, weights, np.empty_like(hidden))
