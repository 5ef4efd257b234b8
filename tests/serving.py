"""What the engine's tests share: a model to serve, a prompt of any length, and a look at what an engine still holds."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np

from hmoe_jax.engine import Engine
from hmoe_jax.outputs import RequestOutput
from hmoe_jax.sampling_params import SamplingParams
from tests.tiny import random_ids, write_tiny

MODEL = "mscales"
"""FP32, so that a different order of sums (another batch size) turns no near tie, on no machine."""

MAX_LEN = 320
PREFILL_LEN = 32
NUM_SLOTS = 8
NUM_PAGES = 12
"""Two long requests fill them, or twelve short ones, which is more than there are slots."""

LETTERS = {2 + byte_rank: 60.0 for byte_rank in range(ord("a") - ord("!"), ord("z") - ord("!") + 1)}
"""A bias towards the letters a to z: `tiny`'s tokenizer numbers the printable bytes from 2 on."""


def write_served(folder: Path) -> Path:
    """The model with what an engine reads besides: room for two chunks of context, a chat template, recommendations."""
    write_tiny(folder, MODEL, with_tokenizer=True)
    _edit(folder / "config.json", max_position_embeddings=2 * MAX_LEN)
    _edit(folder / "generation_config.json", temperature=0.8, top_p=0.9, max_new_tokens=9, eos_token_id=1)
    template = "{{ bos_token }}{% for m in messages %}[{{ m.role }}]{{ m.content }}{% endfor %}{{ suffix }}"
    (folder / "chat_template.jinja").write_text(template)
    return folder


def prompt(length: int, *, seed: int = 0) -> list[int]:
    """Token ids of a prompt, special tokens excluded."""
    return random_ids(MODEL, length, seed=seed).tolist()


def greedy(max_tokens: int, **params: Any) -> SamplingParams:
    return SamplingParams(**{"temperature": 0.0, "max_tokens": max_tokens, "ignore_eos": True, **params})


def drawn(max_tokens: int, *, seed: int, **params: Any) -> SamplingParams:
    return SamplingParams(**{"seed": seed, "max_tokens": max_tokens, "ignore_eos": True, **params})


def tokens(outputs: list[RequestOutput]) -> list[list[int]]:
    """Of each request with one sequence, what it generated."""
    return [list(output.outputs[0].token_ids) for output in outputs]


def assert_idle(engine: Engine) -> None:
    """Nobody is served, and every slot and page is free."""
    scheduler = engine._scheduler
    assert not scheduler.has_work
    assert scheduler.num_free_slots == engine._executor.num_slots
    assert scheduler.num_free_pages == engine.plan.layout.num_pages - 1
    scheduler.check()
    assert not engine._loop.server.has_work
    assert not engine._polled


def log_softmax(logits: np.ndarray) -> np.ndarray:
    wide = logits.astype(np.float64)
    wide = wide - wide.max(axis=-1, keepdims=True)
    return wide - np.log(np.exp(wide).sum(axis=-1, keepdims=True))


def _edit(path: Path, **changes: Any) -> None:
    fields = json.loads(path.read_text()) if path.exists() else {}
    path.write_text(json.dumps(fields | changes))
