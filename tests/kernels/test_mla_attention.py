"""Native latent attention against the formula in FP64, for every instruction set."""

from __future__ import annotations

from dataclasses import dataclass, replace

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest

from hmoe_jax.kernels.mla_attention import mla_attention
from hmoe_jax.kernels.pool import ThreadPool, resolve_num_threads
from tests.kernels.expert_case import XLA_ERRORS

BF16_ROUNDING = 2.0**-9
"""What rounding to BF16 changes at most, relative to the value."""


@dataclass(frozen=True)
class Case:
    """Arguments of `mla_attention`; latents as BF16 `[pages, slots, w]`."""

    nope: np.ndarray
    rope: np.ndarray
    key: np.ndarray
    value: np.ndarray
    latents: np.ndarray
    tables: np.ndarray
    positions: np.ndarray
    scale: float

    def run(self, pool: ThreadPool) -> np.ndarray:
        arrays = [self.nope, self.rope, self.key, self.value, self.latents.view(np.uint16), self.tables, self.positions]
        return np.asarray(mla_attention(*map(jnp.asarray, arrays), scale=self.scale, pool=pool.id))

    def only(self, tokens: slice) -> Case:
        rows = {name: getattr(self, name)[tokens] for name in ("nope", "rope", "tables", "positions")}
        return replace(self, **rows)

    def formula_and_bound(self) -> tuple[np.ndarray, np.ndarray]:
        """The result in FP64, and how far one with the roundings of the kernel may be from it, element by element."""
        outs, bounds = zip(*(self._of_token(t) for t in range(len(self.positions))), strict=True)
        return np.stack(outs), np.stack(bounds)

    def _of_token(self, t: int) -> tuple[np.ndarray, np.ndarray]:
        rank, seen = self.key.shape[2], int(self.positions[t]) + 1
        latents = wide(self.latents[self.tables[t]]).reshape(-1, self.latents.shape[2])[:seen]
        c, k_pe = latents[:, :rank], latents[:, rank:]
        query = np.einsum("hn,hnr->hr", wide(self.nope[t]), wide(self.key))
        scores = self.scale * (query @ c.T + wide(self.rope[t]) @ k_pe.T)
        p = np.exp(scores - scores.max(axis=1, keepdims=True))
        p /= p.sum(axis=1, keepdims=True)
        mixed = p @ c
        out = np.einsum("hr,hvr->hv", mixed, wide(self.value))
        # The absorbed query is rounded, which moves all scores; a softmax whose scores are off by x has its weights off
        # by a factor within e^(2x). The weights are rounded, then the mixture, then the result. FP32 sums of thousands
        # of terms add some per cent to that: 1.1.
        off = self.scale * BF16_ROUNDING * (np.abs(query) @ np.abs(c).T).max(axis=1, keepdims=True)
        mixed_bound = (np.expm1(2 * off) + BF16_ROUNDING) * (p @ np.abs(c)) + BF16_ROUNDING * np.abs(mixed)
        bound = np.einsum("hr,hvr->hv", mixed_bound, np.abs(wide(self.value))) + BF16_ROUNDING * np.abs(out)
        return out, 1.1 * bound


def wide(x: np.ndarray) -> np.ndarray:
    return x.astype(np.float64)


def random_case(
    positions: list[int], *, heads: int, nope: int, rope: int, rank: int, value: int, page_size: int, seed: int = 0
) -> Case:
    rng = np.random.default_rng(seed)

    def normal(*shape: int) -> np.ndarray:
        return rng.standard_normal(shape).astype(ml_dtypes.bfloat16)

    t, pages_each = len(positions), max(positions) // page_size + 2
    tables = rng.permutation(1 + t * pages_each)[: t * pages_each].reshape(t, pages_each)
    return Case(
        nope=normal(t, heads, nope),
        rope=normal(t, heads, rope),
        key=(normal(heads, nope, rank) * rank**-0.5).astype(ml_dtypes.bfloat16),
        value=(normal(heads, value, rank) * rank**-0.5).astype(ml_dtypes.bfloat16),
        latents=normal(1 + t * pages_each, page_size, rank + rope),
        tables=tables.astype(np.int32),
        positions=np.array(positions, np.int32),
        scale=float((nope + rope) ** -0.5),
    )


SMALL = {"heads": 3, "nope": 5, "rope": 4, "rank": 11, "value": 7, "page_size": 4}
CASES = {
    "odd sizes": random_case([0, 23, 12, 5], **SMALL),
    "one token": random_case([31], **SMALL),
    "more tokens than a tile has rows": random_case(list(range(19)), **SMALL),
    "around a chunk": random_case([510, 511, 512, 1200], **{**SMALL, "heads": 33, "page_size": 64}),
    "several chunks in a part": random_case([8191, 8192, 17000], **{**SMALL, "page_size": 64}),
    "DeepSeek-V3's sizes": random_case(
        [700, 40], heads=128, nope=128, rope=64, rank=512, value=128, page_size=64, seed=1
    ),
}


@pytest.mark.parametrize("name", CASES)
def test_is_the_formula_within_the_roundings(pool: ThreadPool, name: str) -> None:
    exact, bound = CASES[name].formula_and_bound()
    excess = np.abs(wide(CASES[name].run(pool)) - exact) - bound
    worst = np.unravel_index(np.argmax(excess), excess.shape)
    assert excess[worst] <= 0, f"at {worst}: {excess[worst]} beyond the bound {bound[worst]} of {exact[worst]}"


@pytest.mark.parametrize("name", CASES)
def test_roundings_add_up_as_independent_ones_do(pool: ThreadPool, name: str) -> None:
    # The bounds above are for roundings that conspire. In the root mean square one is 2^-9 of a value, and there are
    # three beside that of the absorbed query, which moves scores of deviation 1 by sqrt(2) of that; 2 for the tail.
    exact, _ = CASES[name].formula_and_bound()
    error = np.linalg.norm(wide(CASES[name].run(pool)) - exact) / np.linalg.norm(exact)
    assert error <= 2 * BF16_ROUNDING * (3 + 2) ** 0.5


@pytest.mark.parametrize("name", ["more tokens than a tile has rows", "around a chunk", "several chunks in a part"])
def test_threads_and_batch_do_not_change_the_bits(isa: str, name: str) -> None:
    case = CASES[name]
    with ThreadPool(1, isa=isa) as one, ThreadPool(resolve_num_threads("auto"), isa=isa) as all_cpus:
        together = case.run(one)
        np.testing.assert_array_equal(case.run(all_cpus), together)
        for tokens in (slice(0, 1), slice(1, 3), slice(2, None)):
            np.testing.assert_array_equal(case.only(tokens).run(all_cpus), together[tokens])


def test_what_earlier_sequences_left_behind_the_position_is_not_seen(pool: ThreadPool) -> None:
    case = CASES["around a chunk"]
    poisoned = case.latents.copy()
    for table, position in zip(case.tables, case.positions, strict=True):
        slots = np.arange(table.size * poisoned.shape[1]).reshape(table.size, -1)
        poisoned[table] = np.where(slots[..., None] > position, np.nan, poisoned[table])
    unused = np.setdiff1d(np.arange(len(poisoned)), case.tables)
    poisoned[unused] = np.nan
    np.testing.assert_array_equal(replace(case, latents=poisoned).run(pool), case.run(pool))


@pytest.mark.parametrize("part", ["nope", "rope", "latents"])
@pytest.mark.parametrize("value", [np.nan, np.inf])
def test_what_is_not_a_number_stays_so_and_stays_in_its_sequence(pool: ThreadPool, part: str, value: float) -> None:
    case = CASES["odd sizes"]
    poisoned = getattr(case, part).copy()
    if part == "latents":
        poisoned[case.tables[1, 2], 3, 10] = value
    else:
        poisoned[1, 2, 3] = value
    out, clean = replace(case, **{part: poisoned}).run(pool), case.run(pool)
    hit = slice(None) if part == "latents" else slice(2, 3)
    assert not np.isfinite(wide(out[1, hit])).any()
    np.testing.assert_array_equal(np.delete(out, 1, axis=0), np.delete(clean, 1, axis=0))


@pytest.mark.parametrize("factor", [1e4, 1e-30])
def test_scores_of_any_size_give_a_mixture(pool: ThreadPool, factor: float) -> None:
    case = CASES["odd sizes"]
    scaled = (wide(case.nope) * factor).astype(ml_dtypes.bfloat16)
    assert np.isfinite(wide(replace(case, nope=scaled).run(pool))).all()


def test_no_tokens_is_an_empty_result(pool: ThreadPool) -> None:
    assert CASES["odd sizes"].only(slice(0, 0)).run(pool).shape == (0, 3, 7)


def raw(pool_id: int, **changes: np.ndarray) -> jax.Array:
    """Past the front door, whose own checks and annotations would speak first."""
    case = {**vars(CASES["odd sizes"]), **changes}
    latents = case["latents"]
    cache = latents if latents.dtype != ml_dtypes.bfloat16 else latents.view(np.uint16)
    names = ("nope", "rope", "key", "value")
    call = jax.ffi.ffi_call("hmoe_mla_attention", jax.ShapeDtypeStruct((4, 3, 7), jnp.bfloat16))
    operands = [*(case[name] for name in names), cache, case["tables"], case["positions"]]
    return call(*map(jnp.asarray, operands), pool=np.int64(pool_id), scale=np.float32(0.1))


@pytest.mark.parametrize(
    ("name", "change", "sentence"),
    [
        ("nope", lambda x: x[0], r"nope: expected shape \[any, any, any\], got \[3, 5\]"),
        ("nope", lambda x: x.astype(np.float32), "nope: expected dtype bfloat16, got float32"),
        ("rope", lambda x: x[:2], r"rope: expected shape \[4, 3, any\], got \[2, 3, 4\]"),
        ("key", lambda x: x[:, 1:], r"key: expected shape \[3, 5, any\], got \[3, 4, 11\]"),
        ("value", lambda x: x[..., 1:], r"value: expected shape \[3, any, 11\], got \[3, 7, 10\]"),
        ("latents", lambda x: x[..., 1:].copy(), r"cache: expected shape \[any, any, 15\], got \[\d+, 4, 14\]"),
        ("latents", lambda x: x.view(np.int16), "cache: expected dtype uint16, got dtype number"),
        ("tables", lambda x: x[1:], r"tables: expected shape \[4, any\], got \[3, 7\]"),
        ("positions", lambda x: x[None], r"positions: expected shape \[4\], got \[1, 4\]"),
        ("positions", lambda x: x * 0 - 1, r"positions\[0\]: expected 0 <= position < 28, .* got -1"),
        ("positions", lambda x: x + 5, r"positions\[1\]: expected 0 <= position < 28, which the table covers, got 28"),
        ("tables", lambda x: x * 0 + 29, r"tables\[0, 0\]: expected 0 <= page < 29, got 29"),
        ("tables", lambda x: x * 0 - 1, r"tables\[0, 0\]: expected 0 <= page < 29, got -1"),
    ],
)
def test_the_handler_says_what_it_expected(name: str, change: object, sentence: str) -> None:
    changed = change(vars(CASES["odd sizes"])[name])
    with ThreadPool(1) as pool, pytest.raises(XLA_ERRORS, match=sentence):
        raw(pool.id, **{name: changed}).block_until_ready()


def test_a_pool_that_is_closed_is_named() -> None:
    with ThreadPool(1) as pool:
        pass
    with pytest.raises(XLA_ERRORS, match=f"thread pool {pool.id} is closed"):
        raw(pool.id).block_until_ready()
