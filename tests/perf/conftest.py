"""One tiny model, its compiled decode program, and a recording of a few steps of it."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import jax
import pytest

from hmoe_jax.exec.batch import DecodeRow, decode_batch
from hmoe_jax.exec.open import open_executor
from hmoe_jax.exec.plan import EngineOptions
from hmoe_jax.perf import programs, trace
from hmoe_jax.perf.programs import Program
from tests.tiny import write_tiny

NUM_STEPS = 3


@dataclass(frozen=True)
class Recorded:
    """`expert_bytes` are those of one step."""

    program: Program
    steps: list[trace.Step]
    expert_bytes: int

    @property
    def modules(self) -> dict[str, Program]:
        return {self.program.module.name: self.program}


@pytest.fixture(scope="session")
def recorded(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Recorded]:
    folder = write_tiny(tmp_path_factory.mktemp("perf") / "model", "deepseek")
    executor, _ = open_executor(folder, EngineOptions(max_num_seqs=1, executor="fused", device="cpu"))
    assert executor.expert_stats is not None

    def step() -> None:
        batch = decode_batch([DecodeRow(7, 40, 0, range(1, 2))], executor.layout, size=1, num_slots=1)
        jax.device_get(executor.step(batch).sampled)

    step()
    before = executor.expert_stats().expert_bytes
    recording = trace.record("decode", step, num_steps=NUM_STEPS)
    expert_bytes = (executor.expert_stats().expert_bytes - before) // NUM_STEPS
    program = programs.inspect(executor.programs["decode", 1])
    yield Recorded(program, trace.read_steps(recording), expert_bytes)
    executor.close()
