"""Native latent attention of a prefill against the formula in FP64, for every instruction set."""

from __future__ import annotations

from dataclasses import dataclass, replace

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from hmoe_jax.kernels.mla_prefill import mla_prefill
from hmoe_jax.kernels.pool import ThreadPool, resolve_num_threads
from tests.kernels.expert_case import XLA_ERRORS
from tests.kernels.test_mla_attention import BF16_ROUNDING, SMALL, Case, random_case, wide


@dataclass(frozen=True)
class PrefillCase(Case):
    """All tokens share the first table."""

    def run(self, pool: ThreadPool) -> np.ndarray:
        cache = self.latents.view(np.uint16)
        arrays = [self.nope, self.rope, self.key, self.value, cache, self.tables[0], self.positions]
        return np.asarray(mla_prefill(*map(jnp.asarray, arrays), scale=self.scale, pool=pool.id))

    def _of_token(self, t: int) -> tuple[np.ndarray, np.ndarray]:
        rank, seen = self.key.shape[2], int(self.positions[t]) + 1
        latents = wide(self.latents[self.tables[0]]).reshape(-1, self.latents.shape[2])[:seen]
        c, k_pe = latents[:, :rank], latents[:, rank:]
        k, v = (np.einsum("sr,hnr->hsn", c, wide(part)) for part in (self.key, self.value))
        scores = self.scale * (np.einsum("hn,hsn->hs", wide(self.nope[t]), k) + wide(self.rope[t]) @ k_pe.T)
        p = np.exp(scores - scores.max(axis=1, keepdims=True))
        p /= p.sum(axis=1, keepdims=True)
        out = np.einsum("hs,hsv->hv", p, v)
        # Keys are rounded, which moves scores, and scores off by x make weights off by a factor within e^(2x); weights,
        # values and the result are rounded. 1.1 for the FP32 sums.
        off = self.scale * BF16_ROUNDING * np.einsum("hn,hsn->hs", np.abs(wide(self.nope[t])), np.abs(k))
        weights_off = np.expm1(2 * off.max(axis=1)) + 2 * BF16_ROUNDING
        bound = weights_off[:, None] * np.einsum("hs,hsv->hv", p, np.abs(v)) + BF16_ROUNDING * np.abs(out)
        return out, 1.1 * bound


def prefill_case(positions: list[int], **sizes: int) -> PrefillCase:
    return PrefillCase(**vars(random_case(positions, **sizes)))


CASES = {
    "one token": prefill_case([0], **SMALL),
    "from the start": prefill_case(list(range(37)), **SMALL),
    "a later piece, padded": prefill_case([*range(20, 60), *[59] * 10], **SMALL),
    "over chunks": prefill_case(list(range(500, 1100)), **{**SMALL, "page_size": 64, "heads": 2}),
    "DeepSeek-V3's sizes": prefill_case(
        list(range(480, 530)), heads=4, nope=128, rope=64, rank=512, value=128, page_size=64
    ),
}


@pytest.mark.parametrize("name", CASES)
def test_is_the_formula_within_the_roundings(pool: ThreadPool, name: str) -> None:
    exact, bound = CASES[name].formula_and_bound()
    out = wide(CASES[name].run(pool))
    excess = np.abs(out - exact) - bound
    worst = np.unravel_index(np.argmax(excess), excess.shape)
    assert excess[worst] <= 0, f"at {worst}: {excess[worst]} beyond the bound {bound[worst]} of {exact[worst]}"
    # In the root mean square: weights, values and result, and keys in scores of deviation 1; 2 for the tail.
    assert np.linalg.norm(out - exact) <= 2 * BF16_ROUNDING * (3 + 2) ** 0.5 * np.linalg.norm(exact)


@pytest.mark.parametrize("name", ["from the start", "over chunks"])
def test_threads_and_pieces_do_not_change_the_bits(isa: str, name: str) -> None:
    case = CASES[name]
    with ThreadPool(1, isa=isa) as one, ThreadPool(resolve_num_threads("auto"), isa=isa) as all_cpus:
        together = case.run(one)
        np.testing.assert_array_equal(case.run(all_cpus), together)
        for tokens in (slice(0, 1), slice(1, 8), slice(8, None)):
            piece = replace(case.only(tokens), tables=case.tables)
            np.testing.assert_array_equal(piece.run(all_cpus), together[tokens])


def test_what_earlier_sequences_left_behind_the_last_position_is_not_seen(pool: ThreadPool) -> None:
    case = CASES["over chunks"]
    poisoned = np.full_like(case.latents, np.nan)
    seen = np.arange(case.tables[0].size * 64).reshape(case.tables[0].size, 64) <= case.positions.max()
    poisoned[case.tables[0]] = np.where(seen[..., None], case.latents[case.tables[0]], np.nan)
    np.testing.assert_array_equal(replace(case, latents=poisoned).run(pool), case.run(pool))


@pytest.mark.parametrize("value", [np.nan, np.inf])
def test_a_query_that_is_not_a_number_spoils_its_own_row(pool: ThreadPool, value: float) -> None:
    case = CASES["from the start"]
    poisoned = case.nope.copy()
    poisoned[5, 1, 2] = value
    out, clean = replace(case, nope=poisoned).run(pool).copy(), case.run(pool)
    assert not np.isfinite(wide(out[5, 1])).any()
    out[5, 1] = clean[5, 1]
    np.testing.assert_array_equal(out, clean)


def test_no_tokens_is_an_empty_result(pool: ThreadPool) -> None:
    case = CASES["from the start"]
    assert replace(case.only(slice(0, 0)), tables=case.tables).run(pool).shape == (0, 3, 7)


@pytest.mark.parametrize(
    ("name", "change", "sentence"),
    [
        ("tables", lambda x: x, r"tables: expected shape \[any\], got \[1, 2\]"),
        ("tables", lambda x: x[0] * 0 + 99, r"tables\[0, 0\]: expected 0 <= page < 3, got 99"),
        ("positions", lambda x: x + 8, r"positions\[0\]: expected 0 <= position < 8, which the table covers, got 8"),
    ],
)
def test_the_handler_says_what_it_expected(name: str, change: object, sentence: str) -> None:
    case = vars(CASES["one token"])
    case = {**case, "tables": case["tables"][0], name: change(case[name])}
    call = jax.ffi.ffi_call("hmoe_mla_prefill", jax.ShapeDtypeStruct((1, 3, 7), jnp.bfloat16))
    cache = case["latents"].view(np.uint16)
    operands = [*(case[part] for part in ("nope", "rope", "key", "value")), cache, case["tables"], case["positions"]]
    with ThreadPool(1) as pool, pytest.raises(XLA_ERRORS, match=sentence):
        call(*map(jnp.asarray, operands), pool=np.int64(pool.id), scale=np.float32(1)).block_until_ready()
