from __future__ import annotations

import jax
import numpy as np
import pytest

from hmoe_jax.experts.records import ALIGN
from hmoe_jax.experts.store import ExpertStore, StoreShape
from hmoe_jax.kernels.pool import ThreadPool
from tests.kernels.expert_case import Experts, shape_for
from tests.quant.exact import CODECS

SHAPE = StoreShape(num_layers=2, num_experts=3, hidden=136, ffn=24)


@pytest.mark.parametrize("residency", ["mmap", "arena"])
@pytest.mark.parametrize("codec", CODECS)
def test_unpacked_records_are_the_matrices(codec: str, residency: str) -> None:
    shape = shape_for(codec, SHAPE)
    experts = Experts.random(shape, codec)
    with (
        ThreadPool(2) as pool,
        ExpertStore(experts.tensors, shape=shape, codec=codec, pool=pool, residency=residency) as store,
    ):
        layout = store.record_layout
        assert layout.num_bytes % ALIGN == 0
        records = np.zeros((2, layout.num_bytes), np.uint8)
        store.copy_records(1, np.array([2, 0], np.int32), records)
    unpacked = jax.jit(layout.unpack)(records)
    expected = jax.tree.map(lambda leaf: leaf[np.array([2, 0])], experts.arrays(1))
    jax.tree.map(lambda a, b: np.testing.assert_array_equal(_bits(a), _bits(b)), unpacked, expected)


def test_what_cannot_be_copied_is_named() -> None:
    with ThreadPool(1) as pool:
        store = Experts.random(SHAPE, "bf16").store(pool)
        record_bytes = store.record_layout.num_bytes
        out = np.zeros((1, record_bytes), np.uint8)
        with pytest.raises(ValueError, match="expert: expected 0 <= expert < 3, got 3"):
            store.copy_records(0, np.array([3], np.int32), out)
        with pytest.raises(ValueError, match="layer: expected 0 <= layer < 2, got 2"):
            store.copy_records(2, np.array([0], np.int32), out)
        with pytest.raises(ValueError, match=f"out: expected 1 records of {record_bytes} bytes, got 64 bytes"):
            store.copy_records(0, np.array([0], np.int32), out[:, :64].copy())
        store.close()
        with pytest.raises(ValueError, match="is closed"):
            store.copy_records(0, np.array([0], np.int32), out)


def _bits(array: jax.Array) -> np.ndarray:
    return np.asarray(array).view(np.uint8)
