"""Stored results of the independent implementation, so that default tests need no PyTorch."""

from __future__ import annotations

from dataclasses import dataclass, fields
from pathlib import Path

import numpy as np

from tests.oracle import bounds
from tests.oracle.models import TRAINED

FOLDER = Path(__file__).parent.parent / "golden"

TEXT_LEN = 48
TRAINED_TEXT_LEN = 24
"""Shorter, as a row of the trained model's logits takes 16 KB."""

PROMPT_LENS = (1, 2, 3, 5, 8, 13, 17, 24)
NUM_GREEDY = 64


@dataclass(frozen=True)
class Golden:
    """One model's results in FP32: logits and experts for a text, and greedy continuations of p prompts.

    `text [t]`, `logits [t, v]`, `experts [m, t, k]`; `prompts [p, longest]` (padded with -1), `greedy [p, n]`, and
    for each greedy step `gaps [p, n]` between the two best logits and `norms [p, n]` of all logits.
    """

    text: np.ndarray
    logits: np.ndarray
    experts: np.ndarray
    prompts: np.ndarray
    greedy: np.ndarray
    gaps: np.ndarray
    norms: np.ndarray

    @property
    def prompt_ids(self) -> list[np.ndarray]:
        return [prompt[prompt >= 0] for prompt in self.prompts]

    def greedy_limits(self, relative_error: float) -> np.ndarray:
        """`[p, n]`: the gaps that an error of this size explains."""
        return bounds.greedy_gap(relative_error, self.norms[..., None])


def text_len(name: str) -> int:
    return TRAINED_TEXT_LEN if name in TRAINED else TEXT_LEN


def load_golden(name: str) -> Golden:
    with np.load(FOLDER / f"{name}.npz") as arrays:
        return Golden(**arrays)


def save_golden(name: str, golden: Golden) -> None:
    np.savez_compressed(FOLDER / f"{name}.npz", **{field.name: getattr(golden, field.name) for field in fields(golden)})
