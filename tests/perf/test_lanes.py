from __future__ import annotations

import threading
import time

import pytest

from hmoe_jax.perf.lanes import Recorder, Span, busy_seconds


def test_overlapping_spans_count_once() -> None:
    spans = [Span("a", 1.0, 3.0), Span("b", 2.0, 2.5), Span("c", 2.75, 4.0), Span("d", 6.0, 6.5)]
    assert busy_seconds(spans) == pytest.approx(3.5)
    assert busy_seconds(reversed(spans)) == pytest.approx(3.5)
    assert busy_seconds([]) == 0


def test_the_busier_lane_counts() -> None:
    recorder = Recorder()
    recorder.begin, recorder.end = 0.0, 10.0
    recorder.copied(Span("layer 0", 0.0, 4.0, 100))
    recorder.computed.append(Span("front", 1.0, 9.0))
    assert recorder.overlap_efficiency == pytest.approx(0.8)


class Output:
    """Becomes ready when it is told to."""

    def __init__(self) -> None:
        self.ready = threading.Event()

    def block_until_ready(self) -> None:
        assert self.ready.wait(10)


def test_a_computation_begins_when_the_one_before_it_ends() -> None:
    first, second = Output(), Output()
    with Recorder(watches_computing=True) as recorder:
        recorder.computing("first", first)
        recorder.computing("second", second)
        time.sleep(0.05)
        first.ready.set()
        time.sleep(0.05)
        second.ready.set()
    a, b = recorder.computed
    assert (a.name, b.name) == ("first", "second")
    assert a.end == b.begin
    assert b.end <= recorder.end
    assert min(a.end - a.begin, b.end - b.begin) >= 0.04


def test_waiting_is_no_work_of_the_host() -> None:
    with Recorder() as recorder:
        time.sleep(0.1)
    assert recorder.wall_s >= 0.1
    assert recorder.host_s < 0.05
