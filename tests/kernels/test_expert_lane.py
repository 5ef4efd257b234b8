"""The two halves of `moe_experts`, from a program and from the host."""

from __future__ import annotations

import time
from collections.abc import Iterator

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from hmoe_jax.experts.lane import ExpertLane
from hmoe_jax.experts.store import ExpertStore, StoreShape
from hmoe_jax.kernels.expert_lane import experts_submit, experts_wait
from hmoe_jax.kernels.moe_experts import moe_experts
from hmoe_jax.kernels.pool import ThreadPool
from tests.kernels.expert_case import XLA_ERRORS, Batch, Experts

SHAPE = StoreShape(num_layers=2, num_experts=5, hidden=256, ffn=128)
START = jnp.zeros((), jnp.int32)


@pytest.fixture(scope="module")
def store() -> Iterator[ExpertStore]:
    with ThreadPool(2) as pool, Experts.random(SHAPE, "fp8_block").store(pool) as store:
        yield store


@pytest.fixture
def lane(store: ExpertStore) -> Iterator[ExpertLane]:
    with ExpertLane(store, num_slots=2) as lane:
        yield lane


def beside(batch: Batch, lane: ExpertLane, *, layer: int = 1, slot: int = 0) -> jax.Array:
    where = {"lane": lane.id, "slot": slot}
    ticket = experts_submit(*batch.operands, layer=layer, after=START, **where)
    return experts_wait(ticket, shape=batch.hidden.shape, after=ticket, **where)


@pytest.mark.parametrize("tokens", [0, 1, 7, 130])
def test_two_parts_in_a_program_get_the_bits_of_the_whole_call(
    store: ExpertStore, lane: ExpertLane, tokens: int
) -> None:
    first, second = Batch.random(SHAPE, tokens, 3), Batch.random(SHAPE, 4, 2, seed=2)

    @jax.jit
    def both(first: tuple, second: tuple) -> tuple[jax.Array, jax.Array]:
        a = experts_submit(*first, layer=1, after=START, lane=lane.id, slot=0)
        b = experts_submit(*second, layer=0, after=a, lane=lane.id, slot=1)
        results = [
            experts_wait(ticket, shape=operands[0].shape, after=b, lane=lane.id, slot=slot)
            for slot, (ticket, operands) in enumerate(((a, first), (b, second)))
        ]
        return results[0], results[1]

    for _ in range(3):
        for out, batch, layer in zip(both(first.operands, second.operands), (first, second), (1, 0), strict=True):
            np.testing.assert_array_equal(out, moe_experts(*batch.operands, layer=layer, store=store.id))


def test_the_host_gets_the_same(store: ExpertStore, lane: ExpertLane) -> None:
    batch = Batch.random(SHAPE, 6, 3)
    hidden, ids, weights = (np.asarray(each) for each in batch.operands)
    ticket = lane.submit(1, 0, hidden.view(np.uint16), ids, weights)
    out = np.empty(hidden.shape, np.float32)
    lane.wait(1, ticket, out)
    np.testing.assert_array_equal(out, moe_experts(*batch.operands, layer=0, store=store.id))
    (job,) = [each for each in lane.jobs() if each.slot == 1][-1:]
    assert job.submitted_s <= job.begun_s <= job.done_s <= job.fetched_s <= time.perf_counter()
    rounding_s = 1e-6  # of seconds since the machine started
    assert lane.busy_s + rounding_s >= job.done_s - job.begun_s > 0
    assert lane.waited_s + rounding_s >= job.fetched_s - job.awaited_s > 0


def test_what_is_wrong_is_said_by_the_half_that_sees_it(lane: ExpertLane) -> None:
    batch = Batch.random(SHAPE, 3, 2)
    with pytest.raises(XLA_ERRORS, match="slot: expected 0 to 1, got 7"):
        jax.block_until_ready(beside(batch, lane, slot=7))
    with pytest.raises(XLA_ERRORS, match="layer: expected 0 <= layer < 2, got 9"):
        jax.block_until_ready(beside(batch, lane, layer=9))
    narrow = Batch(batch.hidden[:, :128], batch.ids, batch.weights)
    with pytest.raises(XLA_ERRORS, match=r"hidden: expected .*256"):
        jax.block_until_ready(beside(narrow, lane))
    with pytest.raises(ValueError, match=r"hidden: expected shape \[3, 256\], got \[3, 128\]"):
        lane.submit(0, 0, *(np.asarray(each) for each in (narrow.hidden.view(jnp.uint16), batch.ids, batch.weights)))
    with pytest.raises(ValueError, match="ticket 99 of slot 1"):
        lane.wait(1, 99, np.empty((3, 256), np.float32))
    np.testing.assert_array_equal(beside(batch, lane), beside(batch, lane))


def test_a_job_that_is_late_is_an_error_and_the_lane_goes_on(store: ExpertStore) -> None:
    """Jobs of thousands of tokens against a patience of a millisecond."""
    batch, late = Batch.random(SHAPE, 4000, 4), "the routed experts of layer 1 are not done after 1 ms"
    hidden, ids, weights = (np.asarray(each) for each in batch.operands)
    with ExpertLane(store, num_slots=3, patience_s=1e-3) as lane:
        program = jax.jit(lambda: beside(batch, lane, slot=2)).lower().compile()
        tickets = [lane.submit(slot, 1, hidden.view(np.uint16), ids, weights) for slot in range(2)]
        out = np.empty(hidden.shape, np.float32)
        with pytest.raises(ValueError, match=late):
            lane.wait(1, tickets[1], out)
        with pytest.raises(XLA_ERRORS, match=late):
            jax.block_until_ready(program())
        while not lane.is_done(1, tickets[1]):
            time.sleep(1e-3)
        lane.wait(1, tickets[1], out)
    np.testing.assert_array_equal(out, moe_experts(*batch.operands, layer=1, store=store.id))


def test_a_closed_lane_says_so(store: ExpertStore) -> None:
    lane = ExpertLane(store, num_slots=1)
    jax.block_until_ready(beside(Batch.random(SHAPE, 3, 2), lane))
    did = lane.busy_s, lane.waited_s, lane.jobs()
    lane.close()
    lane.close()
    assert (lane.busy_s, lane.waited_s, lane.jobs()) == did
    assert len(did[2]) == 1
    with pytest.raises(XLA_ERRORS, match=rf"expert lane {lane.id} is closed"):
        jax.block_until_ready(beside(Batch.random(SHAPE, 3, 2), lane))
    with pytest.raises(ValueError, match="is closed"):
        lane.is_done(0, 1)


def test_a_lane_needs_a_slot(store: ExpertStore) -> None:
    with pytest.raises(ValueError, match="num_slots: expected at least 1, got 0"):
        ExpertLane(store, num_slots=0)
