"""Requests to serve, and when they come: random lengths, agents that share their beginnings, and real prompts."""

from __future__ import annotations

import gzip
import json
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np

from hmoe_jax.tokenizer import Tokenizer


@dataclass(frozen=True)
class Ask:
    """One request: its prompt, how many tokens it wants, and when it comes (seconds from the start)."""

    prompt_ids: tuple[int, ...]
    max_tokens: int
    arrival_s: float = 0.0

    def __post_init__(self) -> None:
        if not self.prompt_ids or self.max_tokens < 1:
            raise ValueError(f"{len(self.prompt_ids)} prompt tokens and {self.max_tokens} to generate: want 1 of each")


@dataclass(frozen=True)
class Lengths:
    """Tokens of prompts and of answers; each is drawn evenly from `1 - spread` to `1 + spread` times as many."""

    prompt: int
    answer: int
    spread: float = 0.0

    def draw(self, rng: np.random.Generator) -> tuple[int, int]:
        low, high = 1 - self.spread, 1 + self.spread
        return tuple(max(1, round(rng.uniform(low, high) * each)) for each in (self.prompt, self.answer))


def random_asks(count: int, lengths: Lengths, *, vocab_size: int, seed: int) -> list[Ask]:
    """Random tokens, nothing shared."""
    rng = np.random.default_rng(seed)
    drawn = [lengths.draw(rng) for _ in range(count)]
    return [Ask(draw_tokens(rng, prompt, vocab_size), answer) for prompt, answer in drawn]


def agent_asks(
    count: int, lengths: Lengths, *, system_len: int, num_agents: int, max_len: int, vocab_size: int, seed: int
) -> list[Ask]:
    """Agents with one system prompt, in turn: every prompt is the agent's last one and so many tokens more.

    An agent whose prompt would not fit into `max_len` tokens begins anew, after the system prompt.
    """
    rng = np.random.default_rng(seed)
    system = draw_tokens(rng, system_len, vocab_size)
    history = [system] * num_agents
    asks = []
    for index in range(count):
        prompt, answer = lengths.draw(rng)
        agent = index % num_agents
        if len(history[agent]) + prompt + answer > max_len:
            history[agent] = system
        history[agent] += draw_tokens(rng, prompt, vocab_size)
        asks.append(Ask(history[agent], answer))
    return asks


def real_asks(count: int, path: Path, tokenizer: Tokenizer, *, answer_len: int, max_len: int) -> list[Ask]:
    """The prompts of a JSONL file (or .gz), over and over: its fields `turns` (the first), `prompt`, `question` or
    `instruction`.

    Prompts are cut to what `max_len` leaves beside the answer. Raises `ValueError` naming the line without such a
    field.
    """
    lines = [line for line in read_text(path).splitlines() if line.strip()]
    if not lines:
        raise ValueError(f"{path}: no prompts")
    texts = [_text_of(json.loads(line), f"{path}:{number}") for number, line in enumerate(lines, start=1)]
    asks = [Ask(tuple(tokenizer.encode(text)[: max_len - answer_len]), answer_len) for text in texts[:count]]
    return [asks[index % len(asks)] for index in range(count)]


def arrive(asks: Sequence[Ask], *, rate: float, burstiness: float, seed: int) -> list[Ask]:
    """The same, `rate` requests per second on the average: gamma-distributed gaps, of which `burstiness` 1 is Poisson
    and less comes in bursts. An infinite rate is all at once."""
    if not np.isfinite(rate):
        return [replace(ask, arrival_s=0.0) for ask in asks]
    gaps = np.random.default_rng(seed).gamma(burstiness, 1 / (rate * burstiness), len(asks))
    return [replace(ask, arrival_s=float(at)) for ask, at in zip(asks, np.cumsum(gaps) - gaps[0], strict=True)]


def _text_of(record: dict[str, Any], where: str) -> str:
    if record.get("turns"):
        return str(record["turns"][0])
    for name in ("prompt", "question", "instruction"):
        if record.get(name):
            return str(record[name])
    raise ValueError(f"{where}: expected a field turns, prompt, question or instruction, got {sorted(record)}")


def read_text(path: Path) -> str:
    """Of a file that may be compressed."""
    data = path.read_bytes()
    return (gzip.decompress(data) if path.suffix == ".gz" else data).decode()


def draw_tokens(rng: np.random.Generator, count: int, vocab_size: int) -> tuple[int, ...]:
    """Special tokens stand at the beginning of a vocabulary."""
    return tuple(rng.integers(min(100, vocab_size - 1), vocab_size, count).tolist())
