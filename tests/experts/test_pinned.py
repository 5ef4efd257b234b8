"""Pinned stores: one copy of the experts, read by kernels, copies and devices alike; and what the driver may refuse."""

from __future__ import annotations

import ctypes
import gc
from collections.abc import Iterator

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from hmoe_jax.experts import pinned
from hmoe_jax.experts.pinned import StagingBuffer
from hmoe_jax.experts.store import ExpertStore, StoreShape
from hmoe_jax.kernels.moe_experts import moe_experts
from hmoe_jax.kernels.pool import ThreadPool
from tests.experts.gpu import StandInDriver
from tests.kernels.expert_case import Batch, Experts

SHAPE = StoreShape(num_layers=2, num_experts=3, hidden=256, ffn=128)
CUDA_HOST = 3
CPU = jax.devices("cpu")[0]


@pytest.fixture
def store(driver: StandInDriver) -> Iterator[ExpertStore]:
    with (
        ThreadPool(1) as pool,
        ExpertStore(
            Experts.random(SHAPE, "fp8_block").tensors, shape=SHAPE, codec="fp8_block", pool=pool, residency="arena"
        ) as store,
    ):
        yield store


def test_kernels_copies_and_devices_read_the_same_bytes(store: ExpertStore, driver: StandInDriver) -> None:
    store.pin()
    assert store.residency == "pinned"
    memory = store.native.record(1, 2, 0)
    assert memory.__dlpack_device__() == (CUDA_HOST, 0)
    assert store.native.record(1, 2, 1).__dlpack_device__() == (CUDA_HOST, 1)
    seen = np.from_dlpack(memory)
    array = store.record(1, 2, CPU)
    assert array.unsafe_buffer_pointer() == seen.ctypes.data  # no copy
    batch = Batch.random(SHAPE, 4, slots=1)
    ids = jnp.full_like(batch.ids, 2)

    def outputs() -> tuple[np.ndarray, np.ndarray]:
        copied = np.zeros((1, store.record_layout.num_bytes), np.uint8)
        store.copy_records(1, np.array([2], np.int32), copied)
        return np.asarray(moe_experts(batch.hidden, ids, batch.weights, layer=1, store=store.id)), copied

    before, copied = outputs()
    assert np.abs(before).max() > 0
    np.testing.assert_array_equal(copied, seen)
    ctypes.memset(seen.ctypes.data, 0, seen.nbytes)  # what a device sees, the kernels and the copies see too
    after, copied = outputs()
    assert not after.any()
    assert not copied.any()
    del seen, array, memory
    gc.collect()


def test_pinning_reports_its_progress(
    store: ExpertStore, driver: StandInDriver, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("hmoe_jax.experts.store.PIN_BYTES", 2 * store.record_layout.num_bytes + 4096)
    told: list[int] = []
    store.pin(advance=told.append)
    assert len(told) == len(driver.calls()) > 1
    assert sum(told) == driver.pinned_bytes >= store.num_bytes


@pytest.mark.parametrize("in_calls", [1, 2, 3])
def test_what_the_driver_refuses_leaves_an_arena(
    store: ExpertStore, driver: StandInDriver, monkeypatch: pytest.MonkeyPatch, in_calls: int
) -> None:
    monkeypatch.setattr("hmoe_jax.experts.store.PIN_BYTES", 1)
    driver.fail("cuMemHostRegister_v2", in_calls=in_calls)
    with pytest.raises(ValueError, match=r"cuMemHostRegister: out of memory \(2\)"):
        store.pin()
    assert (driver.pinned_bytes, store.residency) == (0, "arena")
    with pytest.raises(ValueError, match="the expert store is not pinned"):
        store.record(0, 0, CPU)
    batch = Batch.random(SHAPE, 2, slots=2)
    assert np.isfinite(moe_experts(batch.hidden, batch.ids, batch.weights, layer=0, store=store.id)).all()


def test_without_a_driver_nothing_is_pinned(store: ExpertStore, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(pinned, "GPU_DRIVER", "libno_such_driver.so")
    with pytest.raises(ValueError, match="the GPU's driver is not to be had: libno_such_driver"):
        store.pin()
    assert store.residency == "arena"


def test_mapped_files_are_not_pinned(driver: StandInDriver) -> None:
    tensors = Experts.random(SHAPE, "bf16").tensors
    with (
        ThreadPool(1) as pool,
        ExpertStore(tensors, shape=SHAPE, codec="bf16", pool=pool, residency="mmap") as store,
        pytest.raises(ValueError, match="only an arena can be pinned"),
    ):
        store.pin()


def test_a_store_that_is_closed_leaves_what_is_being_copied(store: ExpertStore, driver: StandInDriver) -> None:
    store.pin()
    held, expected = store.record(0, 1, CPU), np.array(store.record(0, 1, CPU))
    store.close()
    with pytest.raises(ValueError, match="is closed"):
        store.record(0, 1, CPU)
    assert driver.pinned_bytes > 0
    np.testing.assert_array_equal(held, expected)
    del held
    gc.collect()
    assert driver.pinned_bytes == 0
    assert driver.calls()[-1].startswith("unregister ")


@pytest.mark.parametrize("is_pinned", [True, False])
def test_a_staging_buffer_sends_what_it_holds(
    driver: StandInDriver, monkeypatch: pytest.MonkeyPatch, is_pinned: bool
) -> None:
    if not is_pinned:
        driver.fail("cuMemHostRegister_v2")
    buffer = StagingBuffer(5000, CPU)
    assert (driver.pinned_bytes > 0) is is_pinned
    sent = []
    for value in (3, 4):
        buffer.wait()
        buffer.memory[:] = value
        sent.append(buffer.send().block_until_ready())
    assert [int(array[0, -1]) for array in sent] == [3, 4]
    assert sent[0].shape == (1, 5000)
    del buffer, sent
    gc.collect()
