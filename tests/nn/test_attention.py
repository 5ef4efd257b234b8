"""The two forms of latent attention against each other and against plain attention over expanded keys and values."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import cache

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from hmoe_jax.kernels.pool import ThreadPool
from hmoe_jax.nn.attention import (
    Context,
    Pages,
    Queries,
    UpProjections,
    attend_absorbed,
    attend_decompressed,
    attend_decompressed_flash,
)

HEADS, NOPE, ROPE, VALUE, RANK = 3, 5, 4, 7, 11
SCALE = 0.4


@dataclass(frozen=True)
class Case:
    """Random inputs: t queries at `positions` of a context of s latents."""

    nope: np.ndarray
    rope: np.ndarray
    key: np.ndarray
    value: np.ndarray
    latents: np.ndarray
    positions: np.ndarray

    def queries(self, dtype: jnp.dtype = jnp.float32) -> Queries:
        return Queries(jnp.asarray(self.nope, dtype), jnp.asarray(self.rope, dtype))

    def up(self, dtype: jnp.dtype = jnp.float32) -> UpProjections:
        return UpProjections(jnp.asarray(self.key, dtype), jnp.asarray(self.value, dtype))

    def decompressed(
        self, *, chunk_len: int, num_chunks: int | None = None, dtype: jnp.dtype = jnp.float32
    ) -> np.ndarray:
        context = context_of(self.latents, self.positions, chunk_len=chunk_len, num_chunks=num_chunks, dtype=dtype)
        return np.asarray(attend_decompressed(self.queries(dtype), self.up(dtype), context, scale=SCALE))

    def absorbed(self, *, chunk_len: int, num_chunks: int | None = None, dtype: jnp.dtype = jnp.float32) -> np.ndarray:
        """Every query with a context of its own, which here is the same for all."""
        each = np.broadcast_to(self.latents, (len(self.positions), *self.latents.shape))
        context = context_of(each, self.positions, chunk_len=chunk_len, num_chunks=num_chunks, dtype=dtype)
        return np.asarray(attend_absorbed(self.queries(dtype), self.up(dtype), context, scale=SCALE))

    def formula(self) -> np.ndarray:
        """Keys and values written out, softmax in FP64, one query and head at a time."""
        c, k_pe = self.latents[:, :RANK].astype(np.float64), self.latents[:, RANK:]
        out = np.zeros((len(self.positions), HEADS, VALUE))
        for t, position in enumerate(self.positions):
            for h in range(HEADS):
                k = np.concatenate([c @ self.key[h].T, k_pe], axis=1)[: position + 1]
                scores = SCALE * (k @ np.concatenate([self.nope[t, h], self.rope[t, h]]))
                share = np.exp(scores - scores.max())
                out[t, h] = share / share.sum() @ (c @ self.value[h].T)[: position + 1]
        return out


def random_case(positions: list[int], context_len: int, *, seed: int = 0) -> Case:
    rng = np.random.default_rng(seed)

    def normal(*shape: int) -> np.ndarray:
        return rng.standard_normal(shape).astype(np.float32)

    t = len(positions)
    return Case(
        nope=normal(t, HEADS, NOPE),
        rope=normal(t, HEADS, ROPE),
        key=normal(HEADS, NOPE, RANK) / RANK**0.5,
        value=normal(HEADS, VALUE, RANK) / RANK**0.5,
        latents=normal(context_len, RANK + ROPE),
        positions=np.array(positions, np.int32),
    )


def context_of(
    latents: np.ndarray, positions: np.ndarray, *, chunk_len: int, num_chunks: int | None, dtype: jnp.dtype
) -> Context:
    """Latents `[..., s, w]` in chunks. What lies behind them, to fill the last chunk, must not matter: it is NaN."""
    context_len = latents.shape[-2]
    chunks = -(-context_len // chunk_len)
    fill = [(0, 0)] * (latents.ndim - 2) + [(0, chunks * chunk_len - context_len), (0, 0)]
    padded = jnp.asarray(np.pad(latents, fill, constant_values=np.nan), dtype)
    return Context(
        chunk=lambda i: jnp.take(
            padded.reshape(*padded.shape[:-2], chunks, chunk_len, -1), jnp.minimum(i, chunks - 1), axis=-3
        ),
        chunk_len=chunk_len,
        num_chunks=jnp.int32(chunks if num_chunks is None else num_chunks),
        positions=jnp.asarray(positions),
    )


CASES = {
    "prefill": random_case(list(range(13)), 13),
    "later piece": random_case(list(range(9, 14)), 14, seed=1),
    "decode": random_case([0, 12, 5, 3], 13, seed=2),
}
# Sums over width, rank and context of values near 1, on either side of a softmax of scores of a few units: some hundred
# roundings of 2^-24, were they all in one direction.
FP32_TOLERANCE = 128 * 2.0**-24


@cache
def output(name: str, form: str, chunk_len: int, dtype: str = "float32") -> np.ndarray:
    """What one form makes of a case, in FP32; made once, as each call compiles."""
    return getattr(CASES[name], form)(chunk_len=chunk_len, dtype=jnp.dtype(dtype)).astype(np.float32)


@pytest.mark.parametrize("name", CASES)
@pytest.mark.parametrize("chunk_len", [3, 64])
@pytest.mark.parametrize("form", ["absorbed", "decompressed"])
def test_each_form_is_plain_attention_in_chunks_and_in_one(name: str, chunk_len: int, form: str) -> None:
    np.testing.assert_allclose(output(name, form, chunk_len), CASES[name].formula(), atol=FP32_TOLERANCE)


@pytest.mark.parametrize("name", CASES)
def test_absorbed_and_decompressed_agree(name: str) -> None:
    absorbed, decompressed = (output(name, form, 3) for form in ("absorbed", "decompressed"))
    np.testing.assert_allclose(absorbed, decompressed, atol=FP32_TOLERANCE)


@pytest.mark.parametrize("name", CASES)
def test_absorbed_and_decompressed_agree_in_bfloat16(name: str) -> None:
    # Each form rounds four times on its way (keys or absorbed query, probabilities, values or mixed latents, result),
    # by 2^-9 in the mean square; the two are independent; the worst of some hundreds of elements is within four
    # deviations.
    absorbed, decompressed = (output(name, form, 3, "bfloat16") for form in ("absorbed", "decompressed"))
    assert np.abs(absorbed - decompressed).max() <= 4 * 8**0.5 * 2.0**-9 * np.abs(decompressed).max()


@pytest.mark.parametrize("form", ["absorbed", "decompressed"])
def test_chunks_behind_every_position_change_nothing(form: str) -> None:
    case = CASES["decode"]
    run = getattr(case, form)
    np.testing.assert_array_equal(run(chunk_len=4, num_chunks=4), run(chunk_len=4, num_chunks=9))


@pytest.mark.parametrize("form", ["absorbed", "decompressed"])
@pytest.mark.parametrize("factor", [7, np.inf, np.nan])
def test_latents_behind_every_position_change_nothing(form: str, factor: float) -> None:
    case = random_case([2, 2, 2], 9)
    other = Case(**{**vars(case), "latents": np.concatenate([case.latents[:3], factor * case.latents[3:]])})
    np.testing.assert_array_equal(getattr(case, form)(chunk_len=4), getattr(other, form)(chunk_len=4))


@pytest.mark.parametrize("form", ["absorbed", "decompressed"])
def test_scores_of_any_size_stay_finite(form: str) -> None:
    case = random_case([12, 5], 13)
    huge = Case(**{**vars(case), "nope": 1e4 * case.nope})
    assert np.isfinite(getattr(huge, form)(chunk_len=4)).all()


@pytest.mark.parametrize("form", ["absorbed", "decompressed"])
def test_the_result_has_the_dtype_of_the_queries(form: str) -> None:
    assert getattr(CASES["decode"], form)(chunk_len=4, dtype=jnp.bfloat16).dtype == jnp.bfloat16


def test_absorbed_queries_look_at_their_own_sequence() -> None:
    first, second = random_case([12], 13, seed=5), random_case([6], 13, seed=6)
    second = Case(**{**vars(second), "key": first.key, "value": first.value})
    together = Case(
        nope=np.concatenate([first.nope, second.nope]),
        rope=np.concatenate([first.rope, second.rope]),
        key=first.key,
        value=first.value,
        latents=np.stack([first.latents, second.latents]),
        positions=np.array([12, 6], np.int32),
    )
    together.latents[1, 7:] = np.nan  # left by an earlier sequence; the first one has its own there
    context = context_of(together.latents, together.positions, chunk_len=4, num_chunks=None, dtype=jnp.float32)
    got = np.asarray(attend_absorbed(together.queries(), together.up(), context, scale=SCALE))
    np.testing.assert_allclose(got, np.concatenate([first.formula(), second.formula()]), atol=FP32_TOLERANCE)


SLOTS = 4


def in_pages(latents: np.ndarray, *, table_len: int) -> tuple[np.ndarray, np.ndarray]:
    """(pages, tables) that hold the latents `[t, s, w]` of each sequence; what else is there is NaN."""
    count, width = len(latents), latents.shape[-1]
    tables = np.random.default_rng(0).permutation(1 + count * table_len)[1:].reshape(count, table_len)
    pages = np.full((1 + count * table_len, SLOTS, width), np.nan, np.float32)
    for table, each in zip(tables, latents, strict=True):
        padded = np.full((table_len * SLOTS, width), np.nan, np.float32)
        padded[: len(each)] = each
        pages[table] = padded.reshape(table_len, SLOTS, width)
    return pages, tables.astype(np.int32)


@pytest.mark.parametrize(
    ("attend", "name"),
    [(attend_absorbed, "decode"), (attend_decompressed, "prefill"), (attend_decompressed, "later piece")],
)
def test_a_pool_attends_to_pages_as_xla_does(attend: Callable[..., jax.Array], name: str) -> None:
    case, is_decode = CASES[name], attend is attend_absorbed
    latents = np.broadcast_to(case.latents, (len(case.positions) if is_decode else 1, *case.latents.shape))
    pages, tables = in_pages(latents, table_len=5)
    bits = jax.lax.bitcast_convert_type(jnp.asarray(pages, jnp.bfloat16), jnp.uint16)
    context = replace(
        context_of(
            latents if is_decode else case.latents, case.positions, chunk_len=4, num_chunks=None, dtype=jnp.bfloat16
        ),
        pages=Pages(bits, jnp.asarray(tables if is_decode else tables[0])),
    )
    queries, up = case.queries(jnp.bfloat16), case.up(jnp.bfloat16)
    plain = np.asarray(attend(queries, up, context, scale=SCALE), np.float32)
    with ThreadPool(1) as pool:
        native = np.asarray(attend(queries, replace(up, pool=pool.id), context, scale=SCALE), np.float32)
    # Both round at the same places; FP32 sums of another order move some of the four roundings to the neighbour.
    assert np.abs(native - plain).max() <= 4 * 2.0**-8 * np.abs(plain).max()


@pytest.mark.parametrize(("begin", "context_len"), [(0, 16), (100, 116), (1, 17)])
def test_the_kernel_for_gpus_is_plain_attention(begin: int, context_len: int) -> None:
    case = random_case(list(range(begin, begin + 16)), context_len, seed=3)
    context = context_of(case.latents, case.positions, chunk_len=8, num_chunks=None, dtype=jnp.float32)
    actual = attend_decompressed_flash(case.queries(), case.up(), context, scale=SCALE, interpret=True)
    np.testing.assert_allclose(actual, case.formula(), atol=FP32_TOLERANCE)


def test_on_a_gpu_it_is_used_where_it_was_chosen_and_fits() -> None:
    def lowered(on_gpu: str, width: int) -> str:
        shapes = {"nope": (16, 2, width), "rope": (16, 2, 16)}
        queries = Queries(**{name: jnp.zeros(shape, jnp.bfloat16) for name, shape in shapes.items()})
        up = UpProjections(*(jnp.zeros((2, width, 32), jnp.bfloat16),) * 2, on_gpu=on_gpu)
        latents = jnp.zeros((64, 32 + 16), jnp.bfloat16)

        def attend(queries: Queries, up: UpProjections) -> jax.Array:
            context = Context(lambda i: latents, 64, jnp.int32(1), jnp.arange(16, dtype=jnp.int32))
            return attend_decompressed(queries, up, context, scale=SCALE)

        return jax.jit(attend).trace(queries, up).lower(lowering_platforms=("cuda",)).as_text()

    assert "triton" in lowered("flash", 32)
    assert "triton" not in lowered("flash", 24)
    assert "triton" not in lowered("xla", 32)
