import threading
from concurrent.futures import ThreadPoolExecutor

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from hmoe_jax.architectures.deepseek_v3_checkpoint import MATRICES
from hmoe_jax.experts.store import StoreShape
from hmoe_jax.kernels.moe_experts import moe_experts
from hmoe_jax.kernels.moe_experts_reference import moe_experts_reference
from hmoe_jax.kernels.pool import ThreadPool, resolve_num_threads
from hmoe_jax.quant.formats import FORMATS
from tests.kernels.bounds import Within, assert_within
from tests.kernels.expert_case import XLA_ERRORS, Batch, Experts, shape_for

RAGGED = StoreShape(num_layers=2, num_experts=5, hidden=200, ffn=136)
UNEVEN = StoreShape(num_layers=1, num_experts=3, hidden=129, ffn=301)
TOKENS = (1, 2, 3, 4, 5, 6, 7, 8, 9, 17, 33, 70)
reference = jax.jit(moe_experts_reference)


def rows(expected: Within, end: int) -> Within:
    return Within(expected.value[:end], expected.error[:end])


@pytest.mark.parametrize("shape", [RAGGED, UNEVEN], ids=["ragged", "uneven"])
def test_equals_the_exact_sum_for_every_number_of_tokens(pool, codec, shape):
    shape = shape_for(codec, shape)
    experts, batch = Experts.random(shape, codec), Batch.random(shape, max(TOKENS), slots=3)
    layer = shape.num_layers - 1
    expected = experts.exact(layer, batch)
    with experts.store(pool) as store:
        for tokens in TOKENS:
            actual = moe_experts(*batch.rows(0, tokens).operands, layer=layer, store=store.id)
            assert_within(actual, rows(expected, tokens), what=f"{tokens} tokens")


def test_all_tokens_may_choose_one_expert(pool, codec):
    shape = shape_for(codec, UNEVEN)
    experts, batch = Experts.random(shape, codec), Batch.random(shape, 40, slots=1)
    batch = Batch(batch.hidden, jnp.full_like(batch.ids, 2), batch.weights)
    with experts.store(pool) as store:
        assert_within(moe_experts(*batch.operands, layer=0, store=store.id), experts.exact(0, batch))


def test_no_tokens_is_an_empty_result(pool, codec):
    shape = shape_for(codec, RAGGED)
    with Experts.random(shape, codec).store(pool) as store:
        out = moe_experts(*Batch.random(shape, 0, slots=2).operands, layer=0, store=store.id)
        assert out.shape == (0, shape.hidden)
        assert store.stats().expert_bytes == 0


@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf])
def test_activations_that_are_not_finite_propagate_like_the_reference(pool, codec, value):
    shape = shape_for(codec, RAGGED)
    experts, batch = Experts.random(shape, codec), Batch.random(shape, 9, slots=2)
    batch = Batch(batch.hidden.at[4, 131].set(value), batch.ids.at[4].set(jnp.array([1, 3])), batch.weights)
    expected = np.asarray(reference(*batch.operands, experts.arrays(0)))
    assert not np.isfinite(expected[4]).any()
    with experts.store(pool) as store:
        out = np.asarray(moe_experts(*batch.operands, layer=0, store=store.id))
    np.testing.assert_array_equal(np.isnan(out), np.isnan(expected))
    np.testing.assert_array_equal(np.isposinf(out), np.isposinf(expected))
    np.testing.assert_array_equal(np.isfinite(out).all(axis=1), np.arange(9) != 4)


def test_nan_in_an_expert_reaches_only_the_tokens_that_chose_it(pool):
    experts = Experts.random(RAGGED, "bf16")
    (down,) = (t for t in experts.tensors if (t.layer, t.expert, t.matrix) == (0, 2, "down"))
    down.weight[5, 7] = np.nan
    batch = Batch.random(RAGGED, 4, slots=1)
    ids = jnp.asarray([[1], [2], [-1], [3]], jnp.int32)
    with experts.store(pool) as store:
        out = np.asarray(moe_experts(batch.hidden, ids, batch.weights, layer=0, store=store.id))
    np.testing.assert_array_equal(np.argwhere(np.isnan(out)), [[1, 5]])


def test_two_stores_at_once_do_not_mix(pool, codec):
    """Two formats and two sets of experts on one pool, from two threads, as two engines in a process have them."""
    cases = []
    for name, seed in ((codec, 3), ("bf16", 4)):
        shape = shape_for(name, RAGGED)
        experts, batch = Experts.random(shape, name, seed), Batch.random(shape, 9, slots=2, seed=seed)
        cases.append((experts, batch, experts.exact(0, batch)))
    with cases[0][0].store(pool) as first, cases[1][0].store(pool) as second:

        def call(store, batch, expected):
            for _ in range(10):
                assert_within(moe_experts(*batch.operands, layer=0, store=store.id), expected)

        with ThreadPoolExecutor(2) as threads:
            calls = [threads.submit(call, store, *case[1:]) for store, case in zip((first, second), cases, strict=True)]
        for future in calls:
            future.result()


def test_unused_slots_read_nothing_and_add_nothing(pool, codec):
    shape = shape_for(codec, RAGGED)
    experts, batch = Experts.random(shape, codec), Batch.random(shape, 3, slots=2)
    unused = jnp.full_like(batch.ids, -1)
    with experts.store(pool) as store:
        out = moe_experts(batch.hidden, unused, batch.weights, layer=0, store=store.id)
        np.testing.assert_array_equal(out, np.zeros((3, shape.hidden), np.float32))
        assert store.stats().expert_bytes == 0

        one = moe_experts(*batch.operands, layer=0, store=store.id)
        padded_ids = jnp.concatenate([unused[:, :1], batch.ids], axis=1)
        padded_weights = jnp.concatenate([jnp.full((3, 1), jnp.nan), batch.weights], axis=1)
        np.testing.assert_array_equal(
            moe_experts(batch.hidden, padded_ids, padded_weights, layer=0, store=store.id), one
        )


def test_a_repeated_expert_counts_twice(pool, codec):
    shape = shape_for(codec, RAGGED)
    experts, hidden = Experts.random(shape, codec), Batch.random(shape, 1, slots=1).hidden
    with experts.store(pool) as store:
        twice = moe_experts(hidden, jnp.full((1, 2), 4), jnp.full((1, 2), 0.25), layer=0, store=store.id)
        once = moe_experts(hidden, jnp.full((1, 1), 4), jnp.full((1, 1), 0.5), layer=0, store=store.id)
    np.testing.assert_array_equal(twice, once)  # exact: the weights are powers of two


def test_threads_batches_and_microbatches_do_not_change_the_bits(isa, codec):
    shape = shape_for(codec, RAGGED)
    tokens = 70
    experts, batch = Experts.random(shape, codec), Batch.random(shape, tokens, slots=3)

    def run(pool: ThreadPool, splits: list[int]) -> np.ndarray:
        with experts.store(pool) as store:
            pieces = zip([0, *splits], [*splits, tokens], strict=True)
            parts = [batch.rows(begin, end).operands for begin, end in pieces]
            return np.concatenate([moe_experts(*part, layer=1, store=store.id) for part in parts])

    with ThreadPool(1, isa=isa) as one, ThreadPool(resolve_num_threads("auto"), isa=isa) as all_cpus:
        expected = run(one, [])
        for pool, splits in [(all_cpus, []), (all_cpus, [9]), (one, [1, 2, 12, 40]), (all_cpus, list(range(1, 19)))]:
            np.testing.assert_array_equal(run(pool, splits), expected)


def test_one_program_serves_all_layers():
    shape = StoreShape(num_layers=3, num_experts=4, hidden=72, ffn=40)
    experts, batch = Experts.random(shape, "fp8_block"), Batch.random(shape, 2, slots=2)
    traces = 0

    with ThreadPool() as pool, experts.store(pool) as store:

        @jax.jit
        def step(layer, hidden, ids, weights):
            nonlocal traces
            traces += 1
            return moe_experts(hidden, ids, weights, layer=layer, store=store.id)

        for layer in range(shape.num_layers):
            assert_within(step(jnp.int32(layer), *batch.operands), experts.exact(layer, batch))
    assert traces == 1


def test_stats_count_each_expert_once_per_call(codec):
    shape = shape_for(codec, RAGGED)
    with ThreadPool() as pool, Experts.random(shape, codec).store(pool) as store:
        batch = Batch.random(shape, 4, slots=2)
        ids = jnp.asarray([[0, 3], [3, 0], [3, -1], [0, 0]], jnp.int32)
        moe_experts(batch.hidden, ids, batch.weights, layer=0, store=store.id).block_until_ready()
        stats, layout = store.stats(), FORMATS[codec]
        num_bytes = sum(layout.num_bytes(*shape.matrix(matrix)) for matrix in MATRICES)
        assert (stats.calls, stats.expert_bytes) == (1, 2 * num_bytes)
        assert stats.seconds > 0
        assert stats.gbps == stats.expert_bytes / stats.seconds / 1e9
        store.reset_stats()
        assert (store.stats().calls, store.stats().gbps) == (0, 0)


def test_two_python_threads_may_call_at_once():
    experts, batch = Experts.random(RAGGED, "bf16"), Batch.random(RAGGED, 9, slots=3)
    with ThreadPool() as pool, experts.store(pool) as store:
        expected = np.asarray(moe_experts(*batch.operands, layer=0, store=store.id))
        results: list[np.ndarray] = []

        def call() -> None:
            for _ in range(20):
                results.append(np.asarray(moe_experts(*batch.operands, layer=0, store=store.id)))

        threads = [threading.Thread(target=call) for _ in range(2)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
    assert len(results) == 40
    for result in results:
        np.testing.assert_array_equal(result, expected)


def test_closing_while_calls_run_ends_them_with_an_error_or_a_result():
    batch = Batch.random(RAGGED, 9, slots=3)
    with ThreadPool() as pool:
        store = Experts.random(RAGGED, "bf16").store(pool)
        errors: list[str] = []

        def call() -> None:
            try:
                while True:
                    moe_experts(*batch.operands, layer=0, store=store.id).block_until_ready()
            except XLA_ERRORS as error:
                errors.append(str(error))

        threads = [threading.Thread(target=call) for _ in range(2)]
        for thread in threads:
            thread.start()
        while store.stats().calls < 3:
            pass
        store.close()
        for thread in threads:
            thread.join()
    assert len(errors) == 2
    assert all(f"expert store {store.id} is closed" in error for error in errors)


@pytest.mark.parametrize(
    ("change", "sentence"),
    [
        (lambda h, i, w: (h[:, 1:], i, w, 0), r"hidden: expected shape \[any, 200\], got \[3, 199\]"),
        (lambda h, i, w: (h.astype(jnp.float32), i, w, 0), "hidden: expected dtype bfloat16, got float32"),
        (lambda h, i, w: (h, i[:2], w, 0), r"ids: expected shape \[3, any\], got \[2, 2\]"),
        (lambda h, i, w: (h, i.astype(jnp.uint8), w, 0), "ids: expected dtype int32, got uint8"),
        (lambda h, i, w: (h, i, w[:, :1], 0), r"weights: expected shape \[3, 2\], got \[3, 1\]"),
        (lambda h, i, w: (h, i.at[1, 0].set(5), w, 0), "token 1, slot 0 names expert 5: expected 0 <= id < 5, or -1"),
        (lambda h, i, w: (h, i.at[2, 1].set(-2), w, 0), "token 2, slot 1 names expert -2"),
        (lambda h, i, w: (h, i, w, 2), "layer: expected 0 <= layer < 2, got 2"),
        (lambda h, i, w: (h, i, w, -1), "layer: expected 0 <= layer < 2, got -1"),
    ],
)
def test_the_handler_says_what_it_expected(change, sentence):
    hidden, ids, weights, layer = change(*Batch.random(RAGGED, 3, slots=2).operands)
    with ThreadPool() as pool, Experts.random(RAGGED, "bf16").store(pool) as store:
        # Past the front door, whose annotations would speak first.
        call = jax.ffi.ffi_call("hmoe_moe_experts", jax.ShapeDtypeStruct((3, 200), jnp.float32))
        with pytest.raises(XLA_ERRORS, match=sentence):
            call(hidden, ids, weights, jnp.int32(layer), store=np.int64(store.id)).block_until_ready()


def test_stores_that_are_closed_or_unknown_are_named():
    batch = Batch.random(RAGGED, 1, slots=1)
    with ThreadPool() as pool, Experts.random(RAGGED, "bf16").store(pool) as store:
        pass
    with pytest.raises(XLA_ERRORS, match=f"expert store {store.id} is closed"):
        moe_experts(*batch.operands, layer=0, store=store.id).block_until_ready()
    with pytest.raises(XLA_ERRORS, match="expert store 123456 does not exist"):
        moe_experts(*batch.operands, layer=0, store=123456).block_until_ready()
