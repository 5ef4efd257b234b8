from __future__ import annotations

from itertools import pairwise

import numpy as np
import pytest
from benchmarks.cases import Layer
from benchmarks.formats import BF16, E4M3, ExpertMemory, expert_bytes, native_formats, random_tile
from benchmarks.sides import Ours

from hmoe_jax.experts.store import ExpertStore, StoreShape
from hmoe_jax.kernels.pool import ThreadPool
from hmoe_jax.quant.formats import FORMATS

SHAPE = StoreShape(num_layers=1, num_experts=5, hidden=384, ffn=128)


@pytest.mark.parametrize(
    ("name", "bits"),
    [
        ("bf16", 16),
        ("fp8_block", 8 + 32 / 128**2),
        ("int4_group32", 4 + 16 / 32),
        ("int4_group64", 4 + 16 / 64),
        ("int4_group128", 4 + 16 / 128),
        ("mxfp4", 4 + 8 / 32),
    ],
)
def test_an_expert_has_the_bits_per_weight_of_its_format(name: str, bits: float) -> None:
    assert expert_bytes(FORMATS[name], SHAPE) == 3 * 384 * 128 * bits / 8


@pytest.mark.parametrize("name", ["fp8_channel", "int8_channel"])
def test_a_scale_per_channel_is_four_bytes_per_row(name: str) -> None:
    assert expert_bytes(FORMATS[name], SHAPE) == 3 * 384 * 128 + 4 * (128 + 128 + 384)


@pytest.mark.parametrize("name", FORMATS)
def test_overlapping_experts_have_the_values_of_the_distinct_ones(name: str) -> None:
    distinct, overlapping = (list(ExpertMemory(FORMATS[name], SHAPE, overlap=o).tensors()) for o in (False, True))
    assert len(distinct) == len(overlapping) == 15
    for a, b in zip(distinct, overlapping, strict=True):
        assert (a.layer, a.expert, a.matrix) == (b.layer, b.expert, b.matrix)
        assert a.weight.tobytes() == b.weight.tobytes()
        assert (a.scale is None) == (b.scale is None)
        assert a.scale is None or a.scale.tobytes() == b.scale.tobytes()


@pytest.mark.parametrize("name", FORMATS)
def test_distinct_experts_share_no_byte(name: str) -> None:
    spans = []
    for tensor in ExpertMemory(FORMATS[name], SHAPE).tensors():
        spans += [(a.ctypes.data, a.nbytes) for a in (tensor.weight, tensor.scale) if a is not None]
    spans.sort()
    assert all(begin + size <= after for (begin, size), (after, _) in pairwise(spans))


def test_the_tile_is_made_of_ordinary_numbers_in_every_format() -> None:
    tile = random_tile()[: 1 << 20]
    bf16 = np.abs(tile.view(BF16).astype(np.float32))
    assert bf16.min() > 2.0**-10
    assert bf16.max() < 0.2
    e4m3 = np.abs(tile.view(E4M3).astype(np.float32))
    assert np.isfinite(e4m3).all()
    assert (e4m3 < 2.0**-6).mean() < 1e-3


def test_every_format_that_the_native_module_knows_runs_and_reads_the_bytes_that_are_counted() -> None:
    with ThreadPool(1) as pool:
        names = native_formats()
        assert {"bf16", "fp8_block"} <= set(names)
        batch = Layer(SHAPE, 2, "skewed").batch(3)
        for name in names:
            store = ExpertStore(ExpertMemory(FORMATS[name], SHAPE).tensors(), shape=SHAPE, codec=name, pool=pool)
            side = Ours(store, isa=pool.isa)
            out = side.output(batch)
            assert np.isfinite(out).all()
            assert np.abs(out).max() > 0
            assert store.stats().expert_bytes == batch.distinct_bytes(FORMATS[name])
            side.close()
