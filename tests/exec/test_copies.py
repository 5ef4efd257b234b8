"""The ring of groups, with lanes and computations that end when they are told to."""

from __future__ import annotations

import threading
from concurrent.futures import Future, ThreadPoolExecutor, TimeoutError
from typing import Any

import jax
import numpy as np
import pytest
from jax.sharding import Mesh

from hmoe_jax.exec.copies import AXIS, CopyLane, ExpertStream, Group
from hmoe_jax.perf.lanes import Recorder, Span

DEPTH = 3


class Lane(CopyLane):
    """Copies at once, or never."""

    def __init__(self) -> None:
        self.asked: list[int] = []
        self.is_stuck = False

    def submit(self, layer: int, experts: np.ndarray) -> Future[Any]:
        self.asked.append(layer)
        copy: Future[Any] = Future()
        if not self.is_stuck:
            records = jax.device_put(np.full((len(experts), 4), layer, np.uint8))
            copy.set_result(((records,), Span("copy", 0.0, 1.0, 8)))
        return copy


class Computation:
    def __init__(self) -> None:
        self.ended = threading.Event()

    def block_until_ready(self) -> None:
        assert self.ended.wait(30)


class FailedComputation(Computation):
    def block_until_ready(self) -> None:
        raise RuntimeError("out of memory")


@pytest.fixture
def lane() -> Lane:
    return Lane()


@pytest.fixture
def stream(lane: Lane) -> ExpertStream:
    mesh = Mesh(np.array(jax.devices()[:1]), (AXIS,))
    return ExpertStream({0: lane}, mesh, depth=DEPTH, recorder=Recorder())


def group(layer: int) -> Group:
    return Group(layer, np.array([[0, 1]], np.int32))


def test_groups_are_taken_in_the_order_in_which_they_were_asked_for(stream: ExpertStream) -> None:
    for layer in range(DEPTH):
        stream.ask(group(layer))
    assert [each.layer for each in stream.ahead] == [0, 1, 2]
    for layer in range(DEPTH):
        taken, (records,) = stream.take()
        assert taken.layer == layer
        assert (np.asarray(records) == layer).all()


def test_a_buffer_is_not_filled_again_while_it_is_read(lane: Lane, stream: ExpertStream) -> None:
    computations = [Computation() for _ in range(DEPTH)]
    for layer, computation in enumerate(computations):
        stream.ask(group(layer))
        stream.take()
        stream.computing(computation)
    with ThreadPoolExecutor(1) as thread:
        asking = thread.submit(stream.ask, group(DEPTH))
        with pytest.raises(TimeoutError):
            asking.result(timeout=0.2)
        assert lane.asked == [0, 1, 2]
        computations[1].ended.set()  # not the one that reads the oldest buffer
        with pytest.raises(TimeoutError):
            asking.result(timeout=0.2)
        computations[0].ended.set()
        asking.result(timeout=30)
    assert lane.asked == [0, 1, 2, DEPTH]
    computations[2].ended.set()
    stream.close()


def test_closing_drops_copies_that_have_not_begun(lane: Lane, stream: ExpertStream) -> None:
    lane.is_stuck = True
    for layer in range(DEPTH):
        stream.ask(group(layer))
    stream.close()  # would wait for ever
    assert stream.ahead == []


def test_closing_waits_for_every_computation_and_then_raises_what_failed(stream: ExpertStream) -> None:
    last = Computation()
    for layer, computation in enumerate((FailedComputation(), last)):
        stream.ask(group(layer))
        stream.take()
        stream.computing(computation)
    with ThreadPoolExecutor(1) as thread:
        closing = thread.submit(stream.close)
        with pytest.raises(TimeoutError):
            closing.result(timeout=0.2)
        last.ended.set()
        with pytest.raises(RuntimeError, match="out of memory"):
            closing.result(timeout=30)
    stream.close()  # nothing is left of it
