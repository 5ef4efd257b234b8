"""A decode step gives every sequence the bits that it gets alone."""

from __future__ import annotations

from collections.abc import Iterator
from functools import partial
from pathlib import Path

import numpy as np
import pytest

from hmoe_jax.exec.batch import DecodeRow, decode_batch
from hmoe_jax.exec.open import open_executor
from hmoe_jax.exec.plan import EngineOptions
from hmoe_jax.exec.programs import Executor
from hmoe_jax.exec.step import decode_logits
from tests.oracle.models import EMBEDDED
from tests.tiny import write_tiny

NUM_SEQUENCES = 16
NUM_STEPS = 16
PAGES_EACH = 2


@pytest.fixture(scope="module", params=["deepseek", "kimi", "embedded"])
def executor(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Executor]:
    name = request.param
    folder: Path = EMBEDDED if name == "embedded" else write_tiny(tmp_path_factory.mktemp("bits"), name)
    options = EngineOptions(max_num_seqs=NUM_SEQUENCES, max_model_len=128, executor="fused", device="cpu")
    executor, _ = open_executor(folder, options)
    yield executor
    executor.close()


def logits(executor: Executor, tokens: np.ndarray, *, position: int, sequences: list[int], size: int) -> np.ndarray:
    """One step of the given sequences, padded to `size`: their logits."""
    rows = [
        DecodeRow(int(tokens[i]), position, slot=i, pages=range(1 + i * PAGES_EACH, 1 + (i + 1) * PAGES_EACH))
        for i in sequences
    ]
    batch = decode_batch(rows, executor.layout, size=size, num_slots=executor.num_slots)
    return np.asarray(executor.run(decode_logits, batch))[: len(rows)]


def test_logits_do_not_depend_on_the_other_sequences_of_the_step(executor: Executor) -> None:
    """Of any number and in any places. Roundings that XLA makes otherwise for few rows show once in some hundred."""
    draw = np.random.default_rng(0)
    tokens = draw.integers(2, executor.config.vocab_size, (NUM_STEPS, NUM_SEQUENCES))
    for position in range(NUM_STEPS):
        step = partial(logits, executor, tokens[position], position=position)
        together = step(sequences=list(range(NUM_SEQUENCES)), size=NUM_SEQUENCES)
        for size in (1, 2, 3, 8):
            shuffled = draw.permutation(NUM_SEQUENCES).tolist()
            for begin in range(0, NUM_SEQUENCES, size):
                some = shuffled[begin : begin + size]
                np.testing.assert_array_equal(step(sequences=some, size=size), together[some])
