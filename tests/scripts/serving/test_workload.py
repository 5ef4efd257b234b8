"""Requests of a benchmark: their lengths, what they share, and when they come."""

from __future__ import annotations

import json
import math
from pathlib import Path

import numpy as np
import pytest
from serving.workload import Ask, Lengths, agent_asks, arrive, random_asks, real_asks

from hmoe_jax.tokenizer import Tokenizer

SIZES = {"vocab_size": 300, "seed": 3}


def test_random_lengths_lie_within_their_spread_and_repeat_under_a_seed() -> None:
    asks = random_asks(200, Lengths(100, 10, 0.5), **SIZES)
    assert asks == random_asks(200, Lengths(100, 10, 0.5), **SIZES)
    lengths = [len(ask.prompt_ids) for ask in asks]
    assert 50 <= min(lengths) < 60
    assert 140 < max(lengths) <= 150
    assert {5, 15} <= {ask.max_tokens for ask in asks} <= set(range(5, 16))
    assert all(100 <= token < 300 for ask in asks for token in ask.prompt_ids)


def test_an_agents_prompt_goes_on_from_its_last_one_until_it_would_not_fit() -> None:
    asks = agent_asks(20, Lengths(10, 5), system_len=8, num_agents=2, max_len=60, **SIZES)
    for index in range(2, 20):
        before, prompt = asks[index - 2].prompt_ids, asks[index].prompt_ids
        begins_anew = len(prompt) == 18
        assert prompt[:8] == asks[0].prompt_ids[:8]
        assert begins_anew or prompt[: len(before)] == before
        assert len(prompt) + 5 <= 60
    assert sum(len(ask.prompt_ids) == 18 for ask in asks) > 2


@pytest.mark.parametrize("burstiness", [0.3, 1.0, 4.0])
def test_requests_come_at_their_rate_and_in_bursts_if_asked_for(burstiness: float) -> None:
    asks = arrive([Ask((1,), 1)] * 4000, rate=5.0, burstiness=burstiness, seed=1)
    times = np.array([ask.arrival_s for ask in asks])
    assert times[0] == 0
    gaps = np.diff(times)
    assert gaps.mean() == pytest.approx(0.2, rel=0.1)
    assert gaps.std() / gaps.mean() == pytest.approx(burstiness**-0.5, rel=0.15)


def test_an_infinite_rate_is_all_at_once() -> None:
    assert {ask.arrival_s for ask in arrive([Ask((1,), 1)] * 3, rate=math.inf, burstiness=1.0, seed=1)} == {0.0}


def test_real_prompts_are_taken_over_and_over_and_cut(served_folder: Path, tmp_path: Path) -> None:
    tokenizer, path = Tokenizer.from_folder(served_folder), tmp_path / "prompts.jsonl"
    records = [{"turns": ["abc", "later"]}, {"question": "defg"}, {"instruction": "x" * 50}]
    path.write_text("\n".join(json.dumps(each) for each in records))
    asks = real_asks(5, path, tokenizer, answer_len=4, max_len=20)
    assert [len(ask.prompt_ids) for ask in asks[:3]] == [*(len(tokenizer.encode(text)) for text in ("abc", "defg")), 16]
    assert asks[3:] == asks[:2]


@pytest.mark.parametrize(("text", "message"), [("", "no prompts"), ('{"a": 1}', r":1: expected a field turns")])
def test_a_file_without_prompts_is_refused(served_folder: Path, tmp_path: Path, text: str, message: str) -> None:
    (tmp_path / "p.jsonl").write_text(text)
    with pytest.raises(ValueError, match=message):
        real_asks(1, tmp_path / "p.jsonl", Tokenizer.from_folder(served_folder), answer_len=1, max_len=9)
