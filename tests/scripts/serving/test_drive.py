"""When requests are sent, what is noted of them, and what the table makes of it."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator

import pytest
from serving import report
from serving.drive import Served, drive
from serving.workload import Ask


def served(sent_s: float, *came: tuple[float, int], error: str | None = None) -> Served:
    return Served(Ask((1, 2, 3), 9), sent_s, list(came), error)


def test_latencies_of_a_request() -> None:
    one = served(1.0, (1.5, 1), (1.7, 2), (2.5, 5))
    assert (one.num_tokens, one.ttft_s, one.e2e_s, one.tpot_s) == (5, 0.5, 1.5, 0.25)
    assert one.itl_s == pytest.approx([0.2, 0.8])
    assert served(0.0, (1.0, 1)).tpot_s is None


def test_no_more_are_served_at_a_time_than_may_and_each_is_sent_when_it_comes() -> None:
    running = most = 0

    async def send(ask: Ask) -> AsyncIterator[int]:
        nonlocal running, most
        running += 1
        most = max(most, running)
        await asyncio.sleep(0.01)
        running -= 1
        yield 1

    asks = [Ask((1,), 1, 0.02 * index) for index in range(6)]
    results, seconds = asyncio.run(drive([Ask((1,), 1)] * 12, send, max_concurrency=3))
    assert most == 3
    assert len(results) == 12
    results, seconds = asyncio.run(drive(asks, send, max_concurrency=None))
    assert seconds >= 0.1
    assert all(each.sent_s >= each.ask.arrival_s for each in results)


def test_a_request_that_fails_is_counted_and_stops_nobody() -> None:
    async def send(ask: Ask) -> AsyncIterator[int]:
        if ask.max_tokens == 2:
            raise ValueError("no room")
        yield 1

    results, seconds = asyncio.run(drive([Ask((1,), 1), Ask((1,), 2), Ask((1,), 1)], send, max_concurrency=None))
    assert [each.error for each in results] == [None, "ValueError: no room", None]
    summary = report.summarize(results, seconds, {})
    assert (summary.completed, summary.failed, summary.num_tokens, summary.goodput) == (2, 1, 2, None)


def test_goodput_counts_those_that_meet_every_limit() -> None:
    results = [
        served(0.0, (1.0, 1), (2.0, 11)),  # ttft 1, tpot 0.1
        served(0.0, (3.0, 1), (3.5, 11)),
        served(0.0, (0.5, 1), (9.5, 11)),
        served(0.0, (0.5, 1)),
    ]
    assert report.summarize(results, 4.0, report.parse_goodput("ttft:2,tpot:0.2")).goodput == 2 / 4
    assert report.summarize(results, 4.0, report.parse_goodput("e2e:3")).goodput == 2 / 4


@pytest.mark.parametrize("text", ["ttft", "ttft:x", "itl:3", "ttft:-1"])
def test_a_limit_is_a_name_and_seconds(text: str) -> None:
    with pytest.raises(ValueError, match=r"--goodput: expected ttft, tpot or e2e with seconds, .*got"):
        report.parse_goodput(text)


def test_the_table_and_the_record_say_the_same() -> None:
    results = [served(0.0, (0.1, 1), (0.3, 3)), served(1.0, (1.3, 1)), served(1.0, error="gone")]
    summary = report.summarize(results, 2.0, {"ttft": 0.2})
    text, record = report.table(summary), report.record(summary, results)
    assert "Mean TTFT (ms):" in text
    assert f"{record['mean_ttft_ms']:.2f}" in text
    assert (record["mean_ttft_ms"], record["completed"]) == (pytest.approx(200), 2)
    assert record["request_goodput"] == 0.5
    assert record["output_throughput"] == 2.0
    assert [each["error"] for each in record["requests"]] == [None, None, "gone"]
    assert len({len(line) for line in text.splitlines()}) == 1


def test_nothing_served_is_a_table_of_dashes() -> None:
    summary = report.summarize([served(0.0, error="gone")], 1.0, {})
    assert "Mean TPOT (ms):" in report.table(summary)
    assert summary.latencies_ms["ttft"] is None
