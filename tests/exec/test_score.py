"""The same tokens by every way through the step programs: all at once, in pieces, one by one, in either executor.

300 tokens go over four borders of pages and one of chunks. With FP32 the ways differ by rounding only. BF16 rounds
enough to turn near ties of the router, after which two passes have nothing in common: there the *median* token is
asked, whose experts agree.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import ExitStack
from functools import cache
from pathlib import Path

import numpy as np
import pytest

from hmoe_jax.config import read_config
from hmoe_jax.exec.plan import CHUNK_LEN, PAGE_SIZE
from hmoe_jax.exec.score import Scorer, load_for_scoring
from tests.oracle.bounds import relative_error
from tests.oracle.compare import assert_logits_close, relative_errors
from tests.tiny import CONFIGS, random_ids, write_tiny

FP8, BF16 = "factor", "plain"
PIECE = 60
EXACT = {"executor": "graph", "dtype": "float32"}
GRAPH = {"executor": "graph", "dtype": "bfloat16"}
FUSED = {"executor": "fused", "dtype": "bfloat16"}


@pytest.fixture(scope="module")
def folder_of(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Path]:
    return cache(lambda name: write_tiny(tmp_path_factory.mktemp(name), name))


@pytest.fixture(scope="module")
def exact_of(folder_of: Callable[[str], Path]) -> Iterator[Callable[[str], Scorer]]:
    with ExitStack() as scorers:
        yield cache(lambda name: scorers.enter_context(load_for_scoring(folder_of(name), **EXACT)))


@pytest.fixture(scope="module")
def truth_of(exact_of: Callable[[str], Scorer]) -> Callable[[str], np.ndarray]:
    return cache(lambda name: exact_of(name).logits(ids(name)))


@pytest.fixture
def exact(exact_of: Callable[[str], Scorer]) -> Scorer:
    return exact_of(FP8)


@pytest.fixture
def at_once(truth_of: Callable[[str], np.ndarray]) -> np.ndarray:
    return truth_of(FP8)


def ids(name: str) -> list[int]:
    """As many as there are positions, up to 300; a whole number of pieces."""
    return random_ids(name, min(300, CONFIGS[name]["max_position_embeddings"]) // PIECE * PIECE).tolist()


def stepwise(scorer: Scorer, token_ids: list[int]) -> np.ndarray:
    """Logits after each token from the second piece on, by cached decode."""
    scorer.logits(token_ids[:PIECE])
    return np.stack([scorer.next_logits(token, PIECE + i) for i, token in enumerate(token_ids[PIECE:])])


def exact_bound(scorer: Scorer) -> float:
    return relative_error(scorer.executor.config, "float32", num_tokens=len(ids(FP8)))


def test_the_tokens_go_over_pages_and_chunks() -> None:
    assert len(ids(FP8)) > CHUNK_LEN
    assert PAGE_SIZE % PIECE
    assert CHUNK_LEN % PIECE


def test_a_prefill_in_pieces_gives_the_logits_of_one_pass(exact: Scorer, at_once: np.ndarray) -> None:
    assert_logits_close(exact.logits(ids(FP8), piece=PIECE), at_once, bound=exact_bound(exact))


def test_cached_decode_gives_the_logits_of_full_recomputation(exact: Scorer, at_once: np.ndarray) -> None:
    assert_logits_close(stepwise(exact, ids(FP8)), at_once[PIECE:], bound=exact_bound(exact))


def test_logits_do_not_depend_on_what_the_cache_held_before(exact: Scorer, at_once: np.ndarray) -> None:
    exact.logits(random_ids(FP8, 300, seed=9).tolist())
    np.testing.assert_array_equal(exact.logits(ids(FP8)), at_once)


def test_greedy_takes_the_best_of_each_steps_logits(exact: Scorer) -> None:
    tokens, logits = exact.greedy(ids(FP8)[:PIECE], 5)
    assert (tokens == logits.argmax(axis=1)).all()
    whole = [*ids(FP8)[:PIECE], *tokens.tolist()]
    padded = exact.logits([*whole, *[0] * (300 - len(whole))])
    assert_logits_close(logits, padded[PIECE - 1 : PIECE + 4], bound=exact_bound(exact))


@pytest.mark.parametrize("name", [FP8, BF16])
def test_native_kernels_are_as_near_to_exact_results_as_plain_jax(
    folder_of: Callable[[str], Path], truth_of: Callable[[str], np.ndarray], name: str
) -> None:
    tokens, folder, truth = ids(name), folder_of(name), truth_of(name)

    def median_error(logits: np.ndarray, truth: np.ndarray) -> float:
        return float(np.median(relative_errors(logits, truth)))

    with load_for_scoring(folder, **GRAPH) as scorer:
        plain = median_error(scorer.logits(tokens), truth)
    with load_for_scoring(folder, **FUSED) as scorer:
        native = median_error(scorer.logits(tokens), truth)
        cached = median_error(stepwise(scorer, tokens), truth[PIECE:])
    # BF16 that rounds at the same places errs as much; a wrong scale or a lost column errs by far more.
    assert 0 < plain <= relative_error(read_config(folder), "bfloat16", num_tokens=len(tokens))
    assert native <= 1.25 * plain
    assert cached <= 1.25 * plain
