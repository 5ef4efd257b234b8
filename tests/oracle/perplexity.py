"""The perplexity of the trained model on unseen text: ours through the engine, and the stored one of the oracle."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path

import numpy as np

from hmoe_jax.engine import Engine
from hmoe_jax.evals import Perplexity, perplexity, split_windows
from hmoe_jax.tokenizer import Tokenizer
from tests.oracle.golden import FOLDER
from tests.oracle.models import EMBEDDED, HELD_OUT_TEXT

PERPLEXITY_CHARS = 12_000
WINDOW = 256
MAX_PERPLEXITY_ERROR = 1e-3

FILE = FOLDER / "perplexity.json"


def measure_perplexity() -> Perplexity:
    """What `scripts/eval_perplexity.py` computes, on the default executor."""
    with Engine(EMBEDDED, max_num_seqs=1, warm_up=False) as engine:
        return perplexity(engine, _text(), window=WINDOW, use_tqdm=False)


def oracle_perplexity(logits: Callable[[list[int]], np.ndarray]) -> Perplexity:
    """The same from a function that gives the logits `[t, v]` after each of the tokens."""
    tokenizer = Tokenizer.from_folder(EMBEDDED)
    windows = split_windows(tokenizer.encode(_text(), False), bos_id=tokenizer.bos_id, window=WINDOW)
    nats = [_nats(logits(window)[:-1], np.array(window[1:])) for window in windows]
    return Perplexity(float(sum(nats)), sum(len(window) - 1 for window in windows), PERPLEXITY_CHARS)


def check_perplexity(ours: Perplexity, oracle: Perplexity) -> None:
    """Asserts that both scored the same tokens and agree."""
    assert (ours.num_tokens, ours.num_chars) == (oracle.num_tokens, oracle.num_chars)
    error = abs(ours.perplexity / oracle.perplexity - 1)
    assert error < MAX_PERPLEXITY_ERROR, (
        f"perplexity {ours.perplexity:.5f}, the oracle's {oracle.perplexity:.5f}: {error:.2%} apart"
    )


def save_perplexity(result: Perplexity) -> None:
    FILE.write_text(json.dumps(asdict(result)) + "\n")


def load_perplexity(file: Path = FILE) -> Perplexity:
    return Perplexity(**json.loads(file.read_text()))


def _text() -> str:
    return HELD_OUT_TEXT.read_text(encoding="utf-8")[:PERPLEXITY_CHARS]


def _nats(logits: np.ndarray, targets: np.ndarray) -> float:
    wide = logits.astype(np.float64)
    best = wide.max(axis=-1, keepdims=True)
    log_total = best[:, 0] + np.log(np.exp(wide - best).sum(axis=-1))
    return float((log_total - np.take_along_axis(wide, targets[:, None], axis=1)[:, 0]).sum())
