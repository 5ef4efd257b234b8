"""A decode step gives every sequence the bits that it gets alone."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest

from hmoe_jax.exec.batch import DecodeRow, decode_batch
from hmoe_jax.exec.open import open_executor
from hmoe_jax.exec.plan import EngineOptions
from hmoe_jax.exec.programs import Executor
from hmoe_jax.exec.step import decode_logits
from tests.tiny import write_tiny

NUM_SEQUENCES = 6
CONTEXT = 5
PAGES_EACH = 2


@pytest.fixture(scope="module", params=["deepseek", "kimi"])
def executor(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Executor]:
    folder: Path = write_tiny(tmp_path_factory.mktemp("bits"), request.param)
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
    tokens = np.random.default_rng(0).integers(2, executor.config.vocab_size, (CONTEXT + 1, NUM_SEQUENCES))
    everyone = list(range(NUM_SEQUENCES))
    for position in range(CONTEXT):
        logits(executor, tokens[position], position=position, sequences=everyone, size=NUM_SEQUENCES)
    last = {"tokens": tokens[CONTEXT], "position": CONTEXT}
    together = logits(executor, **last, sequences=everyone, size=NUM_SEQUENCES)
    for sequences, size in [([0], 1), ([3], 1), ([2, 4], 2), ([5, 1, 0], 3), ([1], 4)]:
        alone = logits(executor, **last, sequences=sequences, size=size)
        np.testing.assert_array_equal(alone, together[sequences])
