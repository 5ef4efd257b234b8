"""The GPU's attention kernel: its code, interpreted, against a softmax over everything, and that it lowers for CUDA."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from hmoe_jax.kernels.flash_attention import Softmax, attend_run, fits

SCALE = 0.1


def operands(num_heads: int, num_tokens: int, num_keys: int, *, nope: int = 32, rope: int = 16, value: int = 32):
    keys = jax.random.split(jax.random.key(0), 5)
    shapes = [
        (num_heads, num_tokens, nope),
        (num_heads, num_tokens, rope),
        (num_heads, num_keys, nope),
        (num_keys, rope),
        (num_heads, num_keys, value),
    ]
    return [jax.random.normal(key, shape, jnp.bfloat16) for key, shape in zip(keys, shapes, strict=True)]


def expected(nope, rope, key, key_rope, value, positions):
    wide = [np.asarray(each, np.float64) for each in (nope, rope, key, key_rope, value)]
    scores = np.einsum("htn,hsn->hts", wide[0], wide[2]) + np.einsum("htp,sp->hts", wide[1], wide[3])
    scores = np.where(np.arange(key.shape[1]) <= np.asarray(positions)[:, None], scores * SCALE, -np.inf)
    weights = np.exp(scores - scores.max(axis=-1, keepdims=True))
    return np.einsum("hts,hsv->htv", weights / weights.sum(axis=-1, keepdims=True), wide[4])


@pytest.mark.parametrize(("num_tokens", "num_runs"), [(16, 1), (48, 2), (128, 3)])
def test_runs_one_after_the_other_are_a_softmax_over_all(num_tokens: int, num_runs: int) -> None:
    num_keys = 192 * num_runs
    nope, rope, key, key_rope, value = operands(3, num_tokens, num_keys)
    positions = jnp.sort(jax.random.randint(jax.random.key(1), (num_tokens,), 0, num_keys)).astype(jnp.int32)
    seen = Softmax.empty(3, num_tokens, value.shape[-1])
    for first in range(0, num_keys, 192):
        run = slice(first, first + 192)
        parts = (key[:, run], key_rope[run], value[:, run])
        seen = attend_run(seen, nope, rope, *parts, positions, jnp.int32(first), scale=SCALE, interpret=True)
    actual = seen.mixed / seen.total[..., None]
    np.testing.assert_allclose(actual, expected(nope, rope, key, key_rope, value, positions), atol=0.02)


def test_keys_that_nobody_sees_are_not_read() -> None:
    nope, rope, key, key_rope, value = operands(1, 16, 128)
    positions = jnp.arange(16, dtype=jnp.int32)
    poisoned = [part.at[..., 64:, :].set(jnp.nan) for part in (key, key_rope, value)]
    seen = Softmax.empty(1, 16, value.shape[-1])
    actual = attend_run(seen, nope, rope, *poisoned, positions, jnp.int32(0), scale=SCALE, interpret=True)
    assert jnp.isfinite(actual.mixed).all()
    later = attend_run(actual, nope, rope, *poisoned, positions, jnp.int32(4096), scale=SCALE, interpret=True)
    jax.tree.map(np.testing.assert_array_equal, later, actual)


def test_it_lowers_for_cuda_at_deepseek_v3s_widths() -> None:
    nope, rope, key, key_rope, value = operands(2, 1024, 4096, nope=128, rope=64, value=128)
    positions, first = jnp.arange(1024, dtype=jnp.int32), jnp.int32(0)
    run = jax.jit(lambda *args: attend_run(*args, scale=SCALE))
    traced = run.trace(Softmax.empty(2, 1024, 128), nope, rope, key, key_rope, value, positions, first)
    text = traced.lower(lowering_platforms=("cuda",)).as_text()
    assert text.count("__gpu$xla.gpu.triton") == 1


@pytest.mark.parametrize(
    ("num_tokens", "widths", "does"), [(1024, (128, 64, 128), True), (16, (24, 16), False), (20, (32,), False)]
)
def test_what_fits(num_tokens: int, widths: tuple[int, ...], does: bool) -> None:
    assert fits(num_tokens, *widths) is does
