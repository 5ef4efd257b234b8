"""Traffic that services recorded, to be replayed: arrivals, lengths and common beginnings, with random tokens."""

from __future__ import annotations

import csv
import json
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from datetime import datetime
from pathlib import Path

import numpy as np

from serving.workload import Ask, draw_tokens, read_text

BLOCK = 512
"""Tokens that a hash of Mooncake's traces stands for."""


@dataclass(frozen=True)
class Recorded:
    """A request: when it came, in seconds, how many tokens it had and got, and the hashes of its prompt's blocks."""

    at_s: float
    prompt_len: int
    answer_len: int
    blocks: tuple[int, ...] = ()


def read_trace(path: Path) -> list[Recorded]:
    """Azure's CSV (`TIMESTAMP,ContextTokens,GeneratedTokens`) or Mooncake's JSONL (`timestamp` in milliseconds,
    `input_length`, `output_length`, `hash_ids`), either as it is or as `.gz`.

    Raises `ValueError` naming the line that is neither.
    """
    lines = read_text(path).splitlines()
    read = _read_jsonl if lines and lines[0].startswith("{") else _read_csv
    requests: list[Recorded] = []
    try:
        for request in read(lines):
            requests.append(request)
    except (KeyError, TypeError, ValueError) as error:
        raise ValueError(f"{path}: request {len(requests) + 1}: neither Azure's nor Mooncake's: {error!r}") from None
    if not requests:
        raise ValueError(f"{path}: no requests")
    return requests


def trace_asks(
    requests: Sequence[Recorded], count: int, *, scale: float, max_len: int, vocab_size: int, seed: int
) -> list[Ask]:
    """The first `count` that fit into `max_len` tokens, if all lengths are divided by `scale`.

    The same hash is the same tokens. Raises `ValueError` if none fits.
    """
    asks = []
    for index, request in enumerate(requests):
        prompt_len, answer_len = (max(1, round(each / scale)) for each in (request.prompt_len, request.answer_len))
        if prompt_len + answer_len > max_len:
            continue
        block_len = max(1, round(BLOCK / scale))
        names = [*((0, name) for name in request.blocks), *((1, index, part) for part in range(prompt_len))]
        pieces: tuple[int, ...] = ()
        for name in names:
            if len(pieces) >= prompt_len:
                break
            pieces += draw_tokens(np.random.default_rng((seed, *name)), block_len, vocab_size)
        asks.append(Ask(pieces[:prompt_len], answer_len, request.at_s - requests[0].at_s))
        if len(asks) == count:
            break
    if not asks:
        raise ValueError(f"no request of the trace fits into {max_len} tokens at a scale of {scale:g}")
    return asks


def at_rate(asks: Sequence[Ask], *, rate: float) -> list[Ask]:
    """In the rhythm in which they came, but `rate` per second on the average; an infinite rate is all at once."""
    begin, end = asks[0].arrival_s, asks[-1].arrival_s
    stretch = (len(asks) - 1) / rate / (end - begin) if end > begin else 0.0
    return [replace(ask, arrival_s=(ask.arrival_s - begin) * stretch) for ask in asks]


def _read_csv(lines: Sequence[str]) -> Iterator[Recorded]:
    for row in csv.DictReader(lines):
        at_s = datetime.fromisoformat(row["TIMESTAMP"][:26]).timestamp()  # the seventh digit is beyond datetime
        yield Recorded(at_s, int(row["ContextTokens"]), int(row["GeneratedTokens"]))


def _read_jsonl(lines: Sequence[str]) -> Iterator[Recorded]:
    for record in map(json.loads, lines):
        lengths = int(record["input_length"]), int(record["output_length"])
        yield Recorded(record["timestamp"] / 1e3, *lengths, tuple(map(int, record["hash_ids"])))
