from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import jax
import numpy as np
import pytest

from hmoe_jax.architectures.deepseek_v3_checkpoint import describe, describe_experts
from hmoe_jax.checkpoint.index import open_checkpoint
from hmoe_jax.config import read_config
from hmoe_jax.core import CheckpointError
from hmoe_jax.exec import load
from hmoe_jax.exec.load import bytes_to_read, check_checkpoint, checks_mapped_scales, load_weights, read_matrix
from hmoe_jax.nn.linear import Projection
from hmoe_jax.quant.formats import FORMATS
from tests.tiny import FORMAT_CONFIGS, write_tiny


def is_projection(node: object) -> bool:
    return isinstance(node, Projection)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """FP8, but for one projection that the config names."""
    return write_tiny(tmp_path_factory.mktemp("factor"), "factor")


@pytest.mark.parametrize("dtype", ["bfloat16", "float32"])
def test_fp8_stays_fp8_routing_biases_are_fp32_and_the_rest_has_the_wanted_dtype(folder: Path, dtype: str) -> None:
    told = []
    config = read_config(folder)
    with open_checkpoint(folder) as checkpoint:
        weights = load_weights(config, checkpoint, dtype=dtype, pool=7, advance=told.append)
    first, second = weights.layers
    assert first.attention.q_b.weight.dtype == "float8_e4m3fn"
    assert first.attention.q_b.scale.dtype == np.float32
    assert (first.attention.o.weight.dtype, first.attention.o.scale) == (dtype, None)
    assert second.attention.o.weight.dtype == "float8_e4m3fn"
    assert (first.attention.kv_b.key.dtype, first.attention_norm.dtype, weights.embed.dtype) == (dtype,) * 3
    assert (first.mlp.router.dtype, first.mlp.router_bias.dtype) == (dtype, np.float32)
    assert first.attention.kv_b.pool == 7
    assert first.mlp.shared.gate.weight.dtype == "float8_e4m3fn"
    projections = jax.tree.leaves(weights, is_leaf=is_projection)
    assert {node.pool for node in projections if is_projection(node)} == {7}
    assert sum(told) > 0


def test_bytes_told_are_those_of_the_tensors_that_are_read(folder: Path) -> None:
    told = []
    config = read_config(folder)
    with open_checkpoint(folder) as checkpoint:
        load_weights(config, checkpoint, dtype="bfloat16", pool=None, advance=told.append)
        dense = [name for name in checkpoint.entries if ".experts." not in name]
        assert sum(told) == sum(checkpoint.array(name).nbytes for name in dense)


def test_scales_must_be_positive_and_finite(folder: Path) -> None:
    with open_checkpoint(folder) as checkpoint:
        projection = describe(read_config(folder)).layers[0].attention.q_b
        weight, scale = read_matrix(checkpoint, projection)
        assert (scale > 0).all()
        bad = scale.copy()
        bad[0, 0] = 0.0
        checkpoint.array = {projection.weight.name: weight, projection.scale.name: bad}.__getitem__
        with pytest.raises(CheckpointError, match=projection.scale.name):
            read_matrix(checkpoint, projection)
        read_matrix(checkpoint, projection, checks_scales=False)


@pytest.mark.parametrize("name", FORMAT_CONFIGS)
def test_matrices_in_every_format_keep_their_dtype_and_get_a_grid_of_scales(name: str, tmp_path: Path) -> None:
    config = read_config(write_tiny(tmp_path, name))
    with open_checkpoint(tmp_path) as checkpoint:
        check_checkpoint(config, checkpoint)
        weights = load_weights(config, checkpoint, dtype="bfloat16", pool=None, advance=lambda num_bytes: None)
        projections = [
            projection for projection in jax.tree.leaves(weights, is_leaf=is_projection) if is_projection(projection)
        ]
        assert {projection.codec for projection in projections} <= {"bf16", *FORMATS}
        for projection in projections:
            layout = FORMATS[projection.codec]
            rows, items = projection.weight.shape
            layout.check(rows, layout.num_cols(items), projection.weight, projection.scale)
        for spec in describe_experts(config):
            layout = FORMATS[spec.projection.codec]
            rows, items = spec.projection.weight.shape
            layout.check(rows, layout.num_cols(items), *read_matrix(checkpoint, spec.projection))


def test_a_shape_tensor_that_says_otherwise_is_named(tmp_path: Path) -> None:
    config = read_config(write_tiny(tmp_path, "int4-kimi"))
    name = "model.layers.1.mlp.experts.3.up_proj.weight_shape"
    with open_checkpoint(tmp_path) as checkpoint:
        good = checkpoint.array
        checkpoint.array = lambda asked: np.array([128, 248]) if asked == name else good(asked)
        message = rf"{name}': not the shape of its matrix: expected \[128, 256\], got \[128, 248\]"
        with pytest.raises(CheckpointError, match=message):
            check_checkpoint(config, checkpoint)


def test_scales_of_mapped_experts_are_read_at_start_only_if_they_are_few(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    config = read_config(write_tiny(tmp_path, "int4-kimi"))
    with open_checkpoint(tmp_path) as checkpoint:
        num_bytes = 6 * 3 * 256 * 128 // 32 * 2
        assert checks_mapped_scales(config, checkpoint)
        with_scales = bytes_to_read(config, checkpoint, maps_experts=True)
        monkeypatch.setattr(load, "CHECKED_SCALE_BYTES", num_bytes - 1)
        assert not checks_mapped_scales(config, checkpoint)
        assert bytes_to_read(config, checkpoint, maps_experts=True) == with_scales - num_bytes


def test_a_checkpoint_without_a_promised_tensor_is_refused(folder: Path) -> None:
    config = read_config(folder)
    with open_checkpoint(folder) as checkpoint:
        check_checkpoint(config, checkpoint)
        with pytest.raises(CheckpointError, match=r"model\.layers\.2\."):
            check_checkpoint(replace(config, num_layers=3), checkpoint)
