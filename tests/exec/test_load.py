from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import jax
import numpy as np
import pytest

from hmoe_jax.checkpoint.index import open_checkpoint
from hmoe_jax.config import read_config
from hmoe_jax.core import CheckpointError
from hmoe_jax.exec.load import check_checkpoint, load_weights, read_scales
from hmoe_jax.nn.linear import Projection
from tests.tiny import write_tiny


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
    projections = jax.tree.leaves(weights, is_leaf=lambda node: isinstance(node, Projection))
    assert {node.pool for node in projections if isinstance(node, Projection)} == {7}
    assert sum(told) > 0


def test_bytes_told_are_those_of_the_tensors_that_are_read(folder: Path) -> None:
    told = []
    config = read_config(folder)
    with open_checkpoint(folder) as checkpoint:
        load_weights(config, checkpoint, dtype="bfloat16", pool=None, advance=told.append)
        dense = [name for name in checkpoint.entries if ".experts." not in name]
        assert sum(told) == sum(checkpoint.array(name).nbytes for name in dense)


def test_scales_must_be_positive_and_finite(folder: Path) -> None:
    name = "model.layers.0.self_attn.q_proj.weight_scale_inv"
    with open_checkpoint(folder) as checkpoint:
        good = read_scales(checkpoint, name)
        assert (good > 0).all()
        bad = good.copy()
        bad[0, 0] = 0.0
        checkpoint.array = lambda _: bad
        with pytest.raises(CheckpointError, match=name):
            read_scales(checkpoint, name)


def test_a_checkpoint_without_a_promised_tensor_is_refused(folder: Path) -> None:
    config = read_config(folder)
    with open_checkpoint(folder) as checkpoint:
        check_checkpoint(config, checkpoint)
        with pytest.raises(CheckpointError, match=r"model\.layers\.2\."):
            check_checkpoint(replace(config, num_layers=3), checkpoint)
