from __future__ import annotations

from collections.abc import Iterator

import numpy as np
import pytest
from benchmarks.cases import Batch, Layer
from benchmarks.measure import Effort, Group, measure
from benchmarks.timing import Timer

from hmoe_jax.experts.store import StoreShape
from hmoe_jax.kernels.pool import ThreadPool
from hmoe_jax.quant.formats import FORMATS

LAYER = Layer(StoreShape(num_layers=1, num_experts=4, hidden=128, ffn=128), 2, "uniform")


class Pretender:
    """Takes `call_s` per token without doing anything."""

    def __init__(self, by: str, log: list[tuple[str, int]], *, call_s: float = 1e-3, answer: float = 1.0):
        self.by, self.log, self.call_s, self.answer = by, log, call_s, answer

    def visit(self, batch: Batch, *, seconds: float) -> list[float]:
        self.log.append((self.by, batch.tokens))
        return [self.call_s * batch.tokens] * 3

    def output(self, batch: Batch) -> np.ndarray:
        return np.full((batch.tokens, 128), self.answer, np.float32)

    def close(self) -> None: ...


@pytest.fixture
def pool() -> Iterator[ThreadPool]:
    with ThreadPool(1, isa="scalar") as pool:
        yield pool


def group(pool: ThreadPool, *sides: Pretender) -> Group:
    return Group(FORMATS["bf16"], 1, {"scalar": pool}, sides, [LAYER.batch(1), LAYER.batch(3)])


def test_sides_take_turns_in_every_round(pool: ThreadPool) -> None:
    log: list[tuple[str, int]] = []
    effort = Effort(rounds=2, visit_s=0.01, max_call_s=1, read_megabytes=1)
    results = measure(group(pool, Pretender("scalar", log), Pretender("other", log)), effort, tick=lambda _: None)
    assert log == [("scalar", 1), ("other", 1), ("scalar", 3), ("other", 3)] * 2
    assert [(r.case.by, r.case.tokens, len(r.samples)) for r in results] == [
        ("scalar", 1, 2), ("other", 1, 2), ("scalar", 3, 2), ("other", 3, 2),
    ]  # fmt: skip
    assert results[2].seconds == pytest.approx(3e-3)
    assert results[0].dot_share is not None
    assert results[1].dot_share is None


def test_a_side_that_is_too_slow_is_not_asked_for_more_tokens(pool: ThreadPool) -> None:
    log: list[tuple[str, int]] = []
    effort = Effort(rounds=2, visit_s=0.01, max_call_s=1, read_megabytes=1)
    slow = Pretender("other", log, call_s=2)
    results = measure(group(pool, Pretender("scalar", log), slow), effort, tick=lambda _: None)
    assert ("other", 3) not in log
    assert {r.case.tokens for r in results if r.case.by == "other"} == {1}


def test_sides_that_compute_different_things_are_not_compared(pool: ThreadPool) -> None:
    effort = Effort(rounds=1, visit_s=0.01, max_call_s=1, read_megabytes=1)
    wrong = group(pool, Pretender("scalar", []), Pretender("other", [], answer=1.03))
    with pytest.raises(ValueError, match=r"bf16: other and scalar disagree by 3\.00% .* expected less than 2%"):
        measure(wrong, effort, tick=lambda _: None)


def test_a_timer_counts_calls_but_not_the_first_of_a_visit() -> None:
    seen: list[int] = []
    timer = Timer(seen.append)
    assert len(timer.visit(seconds=1e9)) == 1000
    assert seen == list(range(1001))
    assert len(timer.visit(seconds=0)) == 1
    assert seen == list(range(1002))  # longer than the visit: nothing to warm up
