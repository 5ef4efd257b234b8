import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest

from hmoe_jax.kernels.linear import linear
from hmoe_jax.kernels.pool import ThreadPool, resolve_num_threads
from hmoe_jax.quant.formats import FORMATS, PER_TENSOR
from tests.kernels.bounds import ExactMatrix, Within, assert_within
from tests.kernels.codecs import needs_codec
from tests.kernels.expert_case import XLA_ERRORS, cols_for, random_matrix
from tests.quant.cases import LAYOUTS
from tests.quant.exact import SCALED

TOKENS = (1, 2, 3, 5, 7, 8, 9, 16, 33, 70)
# Every number of tokens compiles anew.
SIZES = [
    ((136, 200), TOKENS),
    *(((rows, cols), (1, 3, 9, 70)) for rows, cols in [(1, 1), (129, 128), (7, 333), (300, 1), (5, 4160)]),
]


def case(codec, tokens, rows, cols, **layout):
    rng = np.random.default_rng(rows)
    cols = cols_for(codec, cols)
    weight, scale = random_matrix(rng, (rows, cols), codec, **layout)
    x = jnp.asarray(rng.standard_normal((tokens, cols)), jnp.bfloat16)
    return x, jnp.asarray(weight), None if scale is None else jnp.asarray(scale)


def check(pool, codec, x, weight, scale, tokens=TOKENS):
    expected = ExactMatrix.of(codec, np.asarray(weight), scale).times(np.asarray(x, np.float64))
    for count in tokens:
        actual = linear(x[:count], weight, scale, codec=codec, pool=pool.id)
        assert_within(actual, Within(expected.value[:count], expected.error[:count]), what=f"{count} tokens")


@pytest.mark.parametrize(("size", "tokens"), SIZES, ids=str)
def test_equals_the_exact_product_for_every_number_of_tokens(pool, codec, size, tokens):
    check(pool, codec, *case(codec, max(tokens), *size), tokens=tokens)


@pytest.mark.parametrize(("codec", "block", "scale_dtype"), LAYOUTS, ids=str)
def test_every_layout_of_scales_is_read(pool, codec, block, scale_dtype):
    needs_codec(codec)
    check(pool, codec, *case(codec, 9, 261, 456, block=block, scale_dtype=scale_dtype), tokens=(1, 4, 9))


def test_every_code_counts_at_every_position(pool, codec):
    """Each output is one weight, so that no error can hide behind another."""
    encoding = FORMATS[codec].encoding
    rng = np.random.default_rng(0)
    cols = 128
    stored = rng.integers(0, 256, (512, cols * encoding.bits // 8), np.uint8)
    weight = stored.view(encoding.dtype)
    _, _, scale = case(codec, 1, len(stored), cols)
    exact = ExactMatrix.of(codec, weight, scale)
    finite = np.isfinite(exact.codes).all(axis=1)
    for begin in range(0, cols, 16):
        x = jnp.asarray(np.eye(16, cols, begin), jnp.bfloat16)
        actual = np.asarray(linear(x, jnp.asarray(weight), scale, codec=codec, pool=pool.id))
        expected = ExactMatrix(exact.codes[finite], exact.scales[finite]).times(np.eye(16, cols, begin))
        assert_within(actual[:, finite], expected)


def test_threads_and_batch_do_not_change_the_bits(isa, codec):
    x, weight, scale = case(codec, 71, 261, 456)
    with ThreadPool(1, isa=isa) as one, ThreadPool(resolve_num_threads("auto"), isa=isa) as all_cpus:
        together = np.asarray(linear(x, weight, scale, codec=codec, pool=one.id))
        np.testing.assert_array_equal(linear(x, weight, scale, codec=codec, pool=all_cpus.id), together)
        for begin, end in [(0, 1), (3, 10), (10, 19), (19, 71)]:
            part = linear(x[begin:end], weight, scale, codec=codec, pool=all_cpus.id)
            np.testing.assert_array_equal(part, together[begin:end])


def test_nan_weights_stay_nan_and_stay_in_their_row(pool):
    for codec in ("fp8_block", "fp8_channel"):
        needs_codec(codec)
        x, weight, scale = case(codec, 2, 5, 200)
        for code in (0x7F, 0xFF):
            poisoned = np.array(weight)
            poisoned.view(np.uint8)[3, 199] = code
            out = np.asarray(linear(x, jnp.asarray(poisoned), scale, codec=codec, pool=pool.id))
            np.testing.assert_array_equal(np.isnan(out), np.arange(5)[None, :].repeat(2, 0) == 3)


@pytest.mark.parametrize("codec", SCALED)
def test_nan_scales_make_their_rows_nan_and_no_others(pool, codec):
    needs_codec(codec)
    x, weight, scale = case(codec, 3, 300, 256)
    poisoned = np.array(scale)
    poisoned[1, -1] = 255 if scale.dtype == np.uint8 else np.nan
    rows_per_scale = 128 if codec == "fp8_block" else 1
    out = np.asarray(linear(x, weight, jnp.asarray(poisoned), codec=codec, pool=pool.id))
    np.testing.assert_array_equal(np.isnan(out), (np.arange(300) // rows_per_scale == 1)[None].repeat(3, 0))


@pytest.mark.parametrize("exponent", [0, 1, 2, 127, 252, 253, 254])
def test_extreme_e8m0_exponents(pool, exponent):
    needs_codec("mxfp4")
    x, weight, scale = case("mxfp4", 3, 20, 96)
    scale = np.array(scale)
    scale[:, 1] = exponent
    # Activations that keep the sum in the range of FP32.
    x = x * jnp.bfloat16(2.0**-10) if exponent > 127 else x
    exact = ExactMatrix.of("mxfp4", np.asarray(weight), scale)
    expected = exact.times(np.asarray(x, np.float64))
    # A weight beyond the range of FP32 may have become infinite before it is multiplied.
    overflows = (np.abs(exact.weights) >= 2.0**128).any(axis=1)
    assert overflows.any() == (exponent > 252)
    for tokens in (1, 3):
        actual = np.asarray(linear(x[:tokens], weight, jnp.asarray(scale), codec="mxfp4", pool=pool.id), np.float64)
        actual = np.where(overflows & ~np.isfinite(actual), expected.value[:tokens], actual)
        assert_within(actual, Within(expected.value[:tokens], expected.error[:tokens]))


@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf])
def test_activations_that_are_not_finite_propagate_like_the_exact_product(pool, codec, value):
    x, weight, scale = case(codec, 40, 40, 333)
    poisoned = np.array(x)
    poisoned[4, 130] = value
    poisoned[6, [1, 332]] = value, -value
    exact = ExactMatrix.of(codec, np.asarray(weight), scale).weights
    with np.errstate(invalid="ignore"):
        expected = poisoned.astype(np.float64) @ exact.T
    for tokens in (5, 9, 20, 40):
        out = np.asarray(linear(jnp.asarray(poisoned[:tokens]), weight, scale, codec=codec, pool=pool.id))
        np.testing.assert_array_equal(np.isnan(out), np.isnan(expected[:tokens]))
        infinite = np.isinf(expected[:tokens])
        np.testing.assert_array_equal(out[infinite], expected[:tokens][infinite])
        assert not np.isinf(out[~infinite]).any()


def test_subnormal_operands_are_used_or_taken_for_zero(pool):
    weight = np.full((3, 130), 2.0**-130).astype(ml_dtypes.bfloat16)
    x = np.full((2, 130), 2.0**-20).astype(ml_dtypes.bfloat16)
    check(pool, "bf16", jnp.asarray(x), jnp.asarray(weight), None, tokens=(1, 2))
    check(pool, "bf16", jnp.asarray(weight[:2]), jnp.asarray(x), None, tokens=(1, 2))


def test_no_tokens_is_an_empty_result(pool, codec):
    x, weight, scale = case(codec, 1, 5, 7)
    assert linear(x[:0], weight, scale, codec=codec, pool=pool.id).shape == (0, 5)


def test_runs_inside_jit_and_is_not_differentiable(pool):
    x, weight, _ = case("bf16", 3, 9, 17)
    expected = linear(x, weight, codec="bf16", pool=pool.id)
    np.testing.assert_array_equal(jax.jit(lambda x: linear(x, weight, codec="bf16", pool=pool.id))(x), expected)
    with pytest.raises(ValueError, match="cannot be differentiated"):
        jax.grad(lambda x: linear(x, weight, codec="bf16", pool=pool.id).sum())(x)


@pytest.mark.parametrize(
    ("change", "sentence"),
    [
        (lambda x, w, s: (x[:, :-1], w, s), r"expected 27064 bytes of weights for \[136, 199\] in codec fp8_block"),
        (lambda x, w, s: (x[0], w, s), r"x: expected shape \[any, any\], got \[200\]"),
        (lambda x, w, s: (x.astype(jnp.float16), w, s), "x: expected dtype bfloat16, got float16"),
        (lambda x, w, s: (x, w, s.astype(jnp.float64)), "scale: expected dtype float32 or .*, got float64"),
    ],
)
def test_the_handler_says_what_it_expected(change, sentence):
    with jax.enable_x64(True):
        operands = change(*case("fp8_block", 3, 136, 200))
        with ThreadPool(1) as pool, pytest.raises(XLA_ERRORS, match=sentence):
            raw(*operands, pool=pool.id).block_until_ready()


@pytest.mark.parametrize(
    ("change", "sentence"),
    [
        (lambda weight: weight[:, :-1], r"expected \d+ bytes of weights for \[136, 256\] in codec \w+, got \d+"),
        (lambda weight: weight.astype(jnp.float32), "weight: expected dtype .*, got float32"),
    ],
    ids=["truncated", "dtype"],
)
def test_the_handler_checks_weights_of_every_codec(codec, change, sentence):
    x, weight, scale = case(codec, 3, 136, 256)
    scale = jnp.zeros((0, 0), jnp.float32) if scale is None else scale
    with ThreadPool(1) as pool, pytest.raises(XLA_ERRORS, match=sentence):
        raw(x, change(weight), scale, pool=pool.id, codec=codec).block_until_ready()


@pytest.mark.parametrize("codec", SCALED)
@pytest.mark.parametrize(
    ("change", "sentence"),
    [
        (lambda scale: scale[:-1], r"scales for \[136, 256\] in codec \w+, got \d+ bytes"),
        (lambda scale: jnp.concatenate([scale, scale, scale]), r"scales for \[136, 256\] in codec \w+, got \d+ bytes"),
        (lambda scale: scale.astype(jnp.float16), "scale: expected dtype .*, got float16"),
    ],
    ids=["truncated", "too long", "dtype"],
)
def test_the_handler_checks_scales_of_every_codec_that_has_them(codec, change, sentence):
    needs_codec(codec)
    x, weight, scale = case(codec, 3, 136, 256)
    with ThreadPool(1) as pool, pytest.raises(XLA_ERRORS, match=sentence):
        raw(x, weight, change(scale), pool=pool.id, codec=codec).block_until_ready()


def raw(x, weight, scale, *, pool, codec="fp8_block"):
    """Past the front door, whose own checks and annotations would speak first."""
    call = jax.ffi.ffi_call("hmoe_linear", jax.ShapeDtypeStruct((3, 136), jnp.float32))
    return call(x, weight, scale, pool=np.int64(pool), codec=codec)


@pytest.mark.parametrize("codec", ["int4_group32", "int4_group64", "int4_group128", "mxfp4"])
def test_columns_that_groups_do_not_divide_are_refused(codec):
    needs_codec(codec)
    x, weight, scale = case(codec, 3, 136, 256)
    items = (256 - 16) // FORMATS[codec].encoding.weights_per_item
    with (
        ThreadPool(1) as pool,
        pytest.raises(XLA_ERRORS, match=f"a multiple of {FORMATS[codec].cols_multiple} columns, got 240"),
    ):
        raw(x[:, :240], weight[:, :items], scale[:, :-1], pool=pool.id, codec=codec).block_until_ready()
    with pytest.raises(ValueError, match=f"{codec} needs columns that {FORMATS[codec].cols_multiple} divides, got 240"):
        linear(x[:, :240], weight[:, :items], scale[:, :-1], codec=codec, pool=1)


def test_pools_and_codecs_that_do_not_exist_are_named():
    operands = case("fp8_block", 3, 136, 200)
    with ThreadPool(1) as pool, pytest.raises(XLA_ERRORS, match="codec 'int3' is unknown"):
        raw(*operands, pool=pool.id, codec="int3").block_until_ready()
    with pytest.raises(XLA_ERRORS, match=f"thread pool {pool.id} is closed"):
        raw(*operands, pool=pool.id).block_until_ready()
    with pytest.raises(XLA_ERRORS, match="thread pool 123456 does not exist"):
        raw(*operands, pool=123456).block_until_ready()


def test_the_front_door_refuses_arrays_that_are_not_of_the_format():
    x, weight, scale = case("fp8_block", 1, 5, 7)
    with pytest.raises(ValueError, match="weight: fp8_block needs scales, got None"):
        linear(x, weight, codec="fp8_block", pool=1)
    with pytest.raises(ValueError, match="weight: expected dtype float8_e4m3fn, got bfloat16"):
        linear(x, jnp.asarray(np.zeros((5, 7), ml_dtypes.bfloat16)), scale, codec="fp8_block", pool=1)
    with pytest.raises(ValueError, match="weight: bf16 has no scales"):
        linear(x, jnp.asarray(np.zeros((5, 7), ml_dtypes.bfloat16)), scale, codec="bf16", pool=1)
    with pytest.raises(ValueError, match="codec 'int3' is unknown: expected one of bf16"):
        linear(x, weight, scale, codec="int3", pool=1)
    with pytest.raises(ValueError, match=r"weight: expected shape \(5, 7\), got \(5, 6\)"):
        linear(x, weight[:, :6], scale, codec="fp8_block", pool=1)


def test_one_scale_per_tensor_is_taken_as_a_grid_of_one():
    needs_codec("fp8_channel")
    x, weight, scale = case("fp8_channel", 2, 5, 200, block=PER_TENSOR)
    assert scale.shape == (1, 1)
    with ThreadPool(1) as pool:
        check(pool, "fp8_channel", x, weight, scale, tokens=(2,))
