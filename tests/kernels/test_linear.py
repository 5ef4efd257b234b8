import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest

from hmoe_jax import quant
from hmoe_jax.kernels.linear import linear
from hmoe_jax.kernels.pool import ThreadPool, resolve_num_threads
from tests.kernels.expert_case import XLA_ERRORS, random_matrix


def case(codec, tokens, rows, cols):
    rng = np.random.default_rng(rows)
    weight, scale = random_matrix(rng, (rows, cols), codec)
    x = jnp.asarray(rng.standard_normal((tokens, cols)), jnp.bfloat16)
    return x, jnp.asarray(weight), None if scale is None else jnp.asarray(scale)


@pytest.mark.parametrize(("rows", "cols"), [(1, 1), (136, 200), (129, 128), (7, 333), (300, 1)])
def test_equals_a_double_precision_product_for_every_number_of_tokens(pool, codec, rows, cols):
    x, weight, scale = case(codec, 33, rows, cols)
    exact_weight = weight if scale is None else quant.dequantize(weight, scale, jnp.float32)
    x64, w64 = np.asarray(x, np.float64), np.asarray(exact_weight, np.float64)
    # The product of a code and its scale is rounded once here, in FP32, and never there; sums have at most
    # 128 + cols / 128 + 16 roundings in a row, of half an epsilon each.
    bound = (128 + cols / 128 + 17) * np.finfo(np.float32).eps / 2 * (np.abs(x64) @ np.abs(w64).T)
    for tokens in (1, 2, 3, 5, 7, 8, 9, 33):
        actual = np.asarray(linear(x[:tokens], weight, scale, pool=pool.id), np.float64)
        excess = np.abs(actual - x64[:tokens] @ w64.T) - bound[:tokens]
        worst = np.unravel_index(np.argmax(excess), excess.shape)
        assert excess[worst] <= 0, f"{tokens} tokens, at {worst}: {excess[worst]} beyond the bound {bound[worst]}"


def test_threads_and_batch_do_not_change_the_bits(isa, codec):
    x, weight, scale = case(codec, 19, 261, 456)
    with ThreadPool(1, isa=isa) as one, ThreadPool(resolve_num_threads("auto"), isa=isa) as all_cpus:
        together = np.asarray(linear(x, weight, scale, pool=one.id))
        np.testing.assert_array_equal(linear(x, weight, scale, pool=all_cpus.id), together)
        for begin, end in [(0, 1), (3, 10), (10, 19)]:
            np.testing.assert_array_equal(linear(x[begin:end], weight, scale, pool=all_cpus.id), together[begin:end])


def test_nan_weights_stay_nan_and_stay_in_their_row(pool):
    x, weight, scale = case("fp8_block", 2, 5, 200)
    for code in (0x7F, 0xFF):
        poisoned = np.array(weight)
        poisoned.view(np.uint8)[3, 199] = code
        out = np.asarray(linear(x, jnp.asarray(poisoned), scale, pool=pool.id))
        np.testing.assert_array_equal(np.isnan(out), np.arange(5)[None, :].repeat(2, 0) == 3)


def test_no_tokens_is_an_empty_result(pool, codec):
    x, weight, scale = case(codec, 1, 5, 7)
    assert linear(x[:0], weight, scale, pool=pool.id).shape == (0, 5)


def test_runs_inside_jit_and_is_not_differentiable(pool):
    x, weight, _ = case("bf16", 3, 9, 17)
    expected = linear(x, weight, pool=pool.id)
    np.testing.assert_array_equal(jax.jit(lambda x: linear(x, weight, pool=pool.id))(x), expected)
    with pytest.raises(ValueError, match="cannot be differentiated"):
        jax.grad(lambda x: linear(x, weight, pool=pool.id).sum())(x)


@pytest.mark.parametrize(
    ("change", "sentence"),
    [
        (lambda x, w, s: (x[:, :-1], w, s), r"weight: expected shape \[any, 199\], got \[136, 200\]"),
        (lambda x, w, s: (x, w, s[:1]), r"scale: expected shape \[2, 2\], got \[1, 2\]"),
        (lambda x, w, s: (x[0], w, s), r"x: expected shape \[any, any\], got \[200\]"),
        (lambda x, w, s: (x.astype(jnp.float16), w, s), "x: expected dtype bfloat16, got float16"),
        (lambda x, w, s: (x, w, s.astype(jnp.bfloat16)), "scale: expected dtype float32, got bfloat16"),
        (lambda x, w, s: (x, w.astype(jnp.float32), s), "weight: expected dtype float8_e4m3fn or uint8, got float32"),
    ],
)
def test_the_handler_says_what_it_expected(change, sentence):
    operands = change(*case("fp8_block", 3, 136, 200))
    with ThreadPool(1) as pool, pytest.raises(XLA_ERRORS, match=sentence):
        raw(*operands, pool=pool.id).block_until_ready()


def raw(x, weight, scale, *, pool, codec="fp8_block"):
    """Past the front door, whose own checks and annotations would speak first."""
    call = jax.ffi.ffi_call("hmoe_linear", jax.ShapeDtypeStruct((3, 136), jnp.float32))
    return call(x, weight, scale, pool=np.int64(pool), codec=codec)


def test_pools_and_codecs_that_do_not_exist_are_named():
    operands = case("fp8_block", 3, 136, 200)
    with ThreadPool(1) as pool, pytest.raises(XLA_ERRORS, match="codec 'int3' is unknown"):
        raw(*operands, pool=pool.id, codec="int3").block_until_ready()
    with pytest.raises(XLA_ERRORS, match=f"thread pool {pool.id} is closed"):
        raw(*operands, pool=pool.id).block_until_ready()
    with pytest.raises(XLA_ERRORS, match="thread pool 123456 does not exist"):
        raw(*operands, pool=123456).block_until_ready()


def test_the_front_door_refuses_a_weight_that_does_not_fit_its_scale():
    x, weight, scale = case("fp8_block", 1, 5, 7)
    with pytest.raises(ValueError, match="expected bfloat16 without a scale, or float8_e4m3fn with one, got float8"):
        linear(x, weight, pool=1)
    with pytest.raises(ValueError, match="got bfloat16 with one"):
        linear(x, jnp.asarray(np.zeros((5, 7), ml_dtypes.bfloat16)), scale, pool=1)
