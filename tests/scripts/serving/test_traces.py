"""Recorded traffic: what is read of it, and what a replay keeps."""

from __future__ import annotations

import gzip
import json
import math
from pathlib import Path

import pytest
from serving.traces import Recorded, at_rate, read_trace, trace_asks

CSV = """TIMESTAMP,ContextTokens,GeneratedTokens
2023-11-16 18:17:03.9799600,4808,10
2023-11-16 18:17:04.0319600,3180,8
"""
RECORDS = [
    {"timestamp": 0, "input_length": 1200, "output_length": 40, "hash_ids": [7, 8, 9]},
    {"timestamp": 500, "input_length": 1100, "output_length": 4, "hash_ids": [7, 8, 10]},
    {"timestamp": 3000, "input_length": 90000, "output_length": 4, "hash_ids": [7, 8, 11]},
    {"timestamp": 4000, "input_length": 100, "output_length": 0, "hash_ids": [12]},
]
REQUESTS = [
    Recorded(record["timestamp"] / 1e3, record["input_length"], record["output_length"], tuple(record["hash_ids"]))
    for record in RECORDS
]
SIZES = {"max_len": 1000, "vocab_size": 300, "seed": 3}


def test_both_kinds_are_read_compressed_or_not(tmp_path: Path) -> None:
    (tmp_path / "a.csv").write_text(CSV)
    first, second = read_trace(tmp_path / "a.csv")
    assert (first.prompt_len, first.answer_len, second.prompt_len, second.answer_len) == (4808, 10, 3180, 8)
    assert second.at_s - first.at_s == pytest.approx(0.052, abs=1e-6)
    lines = "\n".join(map(json.dumps, RECORDS))
    (tmp_path / "b.jsonl.gz").write_bytes(gzip.compress(lines.encode()))
    assert read_trace(tmp_path / "b.jsonl.gz") == REQUESTS


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("", "no requests"),
        ("a,b\n1,2\n", "request 1: neither"),
        (CSV + "2023-11-16 18:17:05.0,many,1\n", "request 3: neither"),
        ('{"timestamp": 1}\n', "request 1: neither"),
    ],
)
def test_what_is_no_trace_is_refused_by_its_line(tmp_path: Path, text: str, message: str) -> None:
    (tmp_path / "trace").write_text(text)
    with pytest.raises(ValueError, match=message):
        read_trace(tmp_path / "trace")


@pytest.mark.parametrize("scale", [2.0, 16.0])
def test_a_replay_keeps_lengths_and_common_beginnings(scale: float) -> None:
    first, second, last = asks = trace_asks(REQUESTS, 9, scale=scale, **SIZES)
    assert [len(ask.prompt_ids) for ask in asks] == [round(length / scale) for length in (1200, 1100, 100)]
    assert [ask.max_tokens for ask in asks] == [round(40 / scale), max(1, round(4 / scale)), 1]
    assert [ask.arrival_s for ask in asks] == [0.0, 0.5, 4.0]
    common = round(1024 / scale)
    assert first.prompt_ids[:common] == second.prompt_ids[:common]
    assert first.prompt_ids[common:] != second.prompt_ids[common:]
    assert last.prompt_ids[:5] != first.prompt_ids[:5]
    assert trace_asks(REQUESTS, 2, scale=scale, **SIZES) == [first, second]


def test_requests_without_blocks_share_nothing() -> None:
    asks = trace_asks([Recorded(0.0, 50, 5)] * 3, 3, scale=1.0, **SIZES)
    assert len({ask.prompt_ids[:8] for ask in asks}) == 3


def test_a_trace_of_which_nothing_fits_is_refused() -> None:
    with pytest.raises(ValueError, match="no request of the trace fits into 1000 tokens at a scale of 1"):
        trace_asks(REQUESTS[:1], 9, scale=1.0, **SIZES)


def test_a_rate_keeps_the_rhythm() -> None:
    asks = trace_asks(REQUESTS, 9, scale=16.0, **SIZES)
    assert [ask.arrival_s for ask in at_rate(asks, rate=4.0)] == [0.0, 0.0625, 0.5]
    assert {ask.arrival_s for ask in at_rate(asks, rate=math.inf)} == {0.0}
    assert [ask.arrival_s for ask in at_rate(asks[:1], rate=1.0)] == [0.0]
