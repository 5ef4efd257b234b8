"""The GPU's product with block-scaled FP8: its code, interpreted, against FP64, and that it lowers for CUDA."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest

from hmoe_jax.kernels.grouped.experts import VARIANTS
from hmoe_jax.kernels.grouped.fp8_product import fits, multiply_fp8
from hmoe_jax.kernels.grouped.routes import GroupRows
from hmoe_jax.kernels.moe_experts_reference import ExpertArrays, ExpertMatrices
from hmoe_jax.nn.linear import Projection, linear

NAN_CODE = 0x7F


def matrices(num_experts: int, outputs: int, inputs: int, *, seed: int = 0) -> ExpertMatrices:
    """Every code but the NaNs; scales of any size."""
    rng = np.random.default_rng(seed)
    codes = rng.integers(0, 256, (num_experts, outputs, inputs), dtype=np.uint8)
    codes[codes & 0x7F == NAN_CODE] = 0
    scale = np.exp2(rng.uniform(-20, 20, (num_experts, outputs // 128, inputs // 128))).astype(np.float32)
    return ExpertMatrices(jnp.asarray(codes.view(ml_dtypes.float8_e4m3fn)), jnp.asarray(scale), codec="fp8_block")


def rows(num_experts: int, num_rows: int, width: int) -> jax.Array:
    return jax.random.normal(jax.random.key(0), (num_experts, num_rows, width), jnp.bfloat16)


@pytest.mark.parametrize("num_rows", [16, 48, 256])
def test_products_lose_nothing_but_their_sums_roundings(num_rows: int) -> None:
    x, matrix = rows(2, num_rows, 384), matrices(2, 256, 384)
    actual = multiply_fp8(x, matrix, interpret=True)
    scale = np.repeat(np.repeat(np.asarray(matrix.scale, np.float64), 128, axis=1), 128, axis=2)
    weight = np.asarray(matrix.weight).astype(np.float64) * scale
    expected = np.einsum("eci,eoi->eco", np.asarray(x, np.float64), weight)
    magnitude = np.einsum("eci,eoi->eco", np.abs(np.asarray(x, np.float64)), np.abs(weight))
    assert (np.abs(actual - expected) <= 2.0**-17 * magnitude).all()


def test_a_nan_stays_in_its_row_of_the_weight() -> None:
    x, matrix = rows(1, 16, 128), matrices(1, 128, 128)
    codes = np.array(matrix.weight).view(np.uint8)
    codes[0, 5, 7] = NAN_CODE
    poisoned = ExpertMatrices(jnp.asarray(codes.view(ml_dtypes.float8_e4m3fn)), matrix.scale, codec="fp8_block")
    is_nan = np.isnan(multiply_fp8(x, poisoned, interpret=True))
    assert is_nan[..., 5].all()
    assert not np.delete(is_nan, 5, axis=-1).any()


def test_what_fits() -> None:
    matrix = matrices(1, 128, 256)
    assert fits(rows(1, 16, 256), matrix)
    assert not fits(rows(1, 17, 256), matrix)
    assert not fits(rows(1, 16, 256).astype(jnp.float32), matrix)
    by_row = ExpertMatrices(matrix.weight, jnp.ones((1, 128, 1)), codec="fp8_channel")
    assert not fits(rows(1, 16, 256), by_row)


def test_a_group_at_deepseek_v3s_widths_lowers_for_cuda_without_unpacking_to_memory() -> None:
    hidden, ffn, num_rows = 7168, 2048, 64

    def stack(outputs: int, inputs: int) -> ExpertMatrices:
        weight = jax.ShapeDtypeStruct((4, outputs, inputs), jnp.float8_e4m3fn)
        return ExpertMatrices(
            weight, jax.ShapeDtypeStruct((4, outputs // 128, inputs // 128), jnp.float32), "fp8_block"
        )

    experts = ExpertArrays(gate=stack(ffn, hidden), up=stack(ffn, hidden), down=stack(hidden, ffn))
    places = GroupRows(jnp.zeros((4, num_rows), jnp.int32), jnp.ones((4, num_rows)))
    routed, x = jnp.zeros((num_rows, hidden)), jnp.zeros((num_rows, hidden), jnp.bfloat16)
    traced = jax.jit(VARIANTS["kernel"]).trace(routed, x, places, experts)
    text = traced.lower(lowering_platforms=("cuda",)).as_text()
    assert text.count("__gpu$xla.gpu.triton") == 3
    assert f"4x{ffn}x{hidden}xbf16" not in text
    assert f"4x{ffn}x{hidden}xf32" not in text


@pytest.mark.parametrize(("on_gpu", "num_tokens", "count"), [("kernel", 32, 1), ("kernel", 1, 0), ("xla", 32, 0)])
def test_a_dense_projection_uses_it_where_it_was_chosen_and_fits(on_gpu: str, num_tokens: int, count: int) -> None:
    matrix = matrices(1, 256, 128)
    projection = Projection(matrix.weight[0], matrix.scale[0], codec="fp8_block", on_gpu=on_gpu)
    traced = jax.jit(linear).trace(rows(1, num_tokens, 128)[0], projection)
    assert traced.lower(lowering_platforms=("cuda",)).as_text().count("__gpu$xla.gpu.triton") == count
