"""Fixtures of the engine's tests. An engine lives for the whole session: its programs take seconds to compile."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path

import jax
import numpy as np
import pytest
from hypothesis import settings

from hmoe_jax.engine import Engine
from hmoe_jax.exec.plan import PAGE_SIZE
from hmoe_jax.exec.score import Scorer
from tests.experts.gpu import driver, stand_in_library
from tests.serving import MAX_LEN, NUM_PAGES, NUM_SLOTS, PREFILL_LEN, assert_idle, write_served

__all__ = ["driver", "stand_in_library"]  # fixtures that are defined elsewhere

# The same examples on every machine, however slow, and nothing left behind in the working directory.
settings.register_profile("repeatable", derandomize=True, deadline=None, database=None)
settings.load_profile("repeatable")

# For what runs on several devices; all else takes the first.
jax.config.update("jax_num_cpu_devices", 4)

COMPILE_EVENT = "/jax/core/compile/backend_compile_duration"


@pytest.fixture(scope="session")
def compilations() -> list[str]:
    """The functions that XLA has compiled in this session so far."""
    compiled: list[str] = []

    def note(event: str, _: float, **details: str | int) -> None:
        if event == COMPILE_EVENT:
            compiled.append(str(details.get("fun_name")))

    jax.monitoring.register_event_duration_secs_listener(note)
    return compiled


@pytest.fixture(scope="session")
def served_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_served(tmp_path_factory.mktemp("served"))


@pytest.fixture(scope="session")
def warm_engine(served_folder: Path) -> Iterator[Engine]:
    """Warmed up. Tests take `engine`."""
    layers, latent_dim = 2, 28 + 16
    with Engine(
        served_folder,
        max_model_len=MAX_LEN,
        max_num_seqs=NUM_SLOTS,
        max_prefill_tokens=PREFILL_LEN,
        kv_cache_bytes=NUM_PAGES * layers * latent_dim * PAGE_SIZE * 4,
        compilation_cache=None,
        use_tqdm=False,
    ) as engine:
        yield engine


@pytest.fixture(scope="session")
def full_logits(warm_engine: Engine) -> Callable[[list[int]], np.ndarray]:
    """Logits `[t, v]` after each of the given tokens, all computed at once: no pieces, no cache of earlier steps."""
    scorer = Scorer(warm_engine._executor)

    def logits(token_ids: list[int]) -> np.ndarray:
        # Always the same size, so that only the first call compiles: later tokens change nothing before them.
        padded = [*token_ids, *[0] * (MAX_LEN - len(token_ids))]
        return scorer.logits(padded)[: len(token_ids)]

    logits([0])
    return logits


@pytest.fixture
def engine(warm_engine: Engine, compilations: list[str]) -> Iterator[Engine]:
    """The served model. Checks that nothing was compiled for the test, and that nothing is held after it."""
    num_compiled = len(compilations)
    yield warm_engine
    assert_idle(warm_engine)
    assert compilations[num_compiled:] == []
