"""Random traffic: at whatever moment something happens, every token is right, and every page is somewhere."""

from __future__ import annotations

from collections import Counter
from typing import Any

from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule

from hmoe_jax.core import QueueFullError
from hmoe_jax.request import Request, Sequence
from tests.fake_executor import PART_S, solo_run
from tests.server_case import STAGES, Case, fail_once


class ServerMachine(RuleBasedStateMachine):
    """Traffic with aborts, deadlines, clock jumps and failures, all at random moments. The model: solo runs."""

    @initialize(
        max_waiting=st.integers(1, 12),
        slowdown=st.sampled_from([1, 150, 1000]),
        beside=st.sampled_from([{}, {"gap_s": 0.5 * PART_S}, {"gap_s": 2.5 * PART_S}, {"is_apart": True}]),
    )
    def begin(self, max_waiting: int, slowdown: int, beside: dict[str, Any]) -> None:
        self.case = Case(max_waiting=max_waiting, slowdown_permille=slowdown, **beside)
        self.requests: list[Request] = []
        self.aborted: set[Request] = set()
        self.num_failures: Counter[Sequence] = Counter()
        self.reasons: dict[Sequence, str] = {}

    @rule(
        shared=st.integers(0, 12),
        own=st.integers(1, 12),
        max_tokens=st.integers(1, 16),
        n=st.sampled_from([1, 1, 1, 2, 3]),
        timeout_s=st.none() | st.floats(0, 1),
    )
    def submit(self, shared: int, own: int, max_tokens: int, n: int, timeout_s: float | None) -> None:
        ids = [*range(shared), *[own] * own]
        request = self.case.request(ids, max_tokens, n=n, timeout_s=timeout_s)
        try:
            self.case.server.submit(request)
        except QueueFullError:
            return
        self.requests.append(request)

    @precondition(lambda self: self.requests)
    @rule(data=st.data())
    def abort(self, data: st.DataObject) -> None:
        doomed = data.draw(st.sampled_from(self.requests))
        self.aborted.add(doomed)
        self.case.server.abort(doomed.sequences)

    @rule(stage=st.sampled_from(STAGES), after=st.integers(0, 5))
    def fail_later(self, stage: str, after: int) -> None:
        fail = fail_once(after=after)

        def blame(slots: list[int]) -> None:
            try:
                fail(slots)
            except RuntimeError:
                self.num_failures.update(each for each in self.case.scheduler.running if each.slot in slots)
                raise

        self.case.executor.on[stage] = blame

    @rule(seconds=st.floats(-5, 5))
    def jump(self, seconds: float) -> None:
        self.case.pass_time(seconds)

    @rule(interrupts=st.lists(st.booleans(), max_size=3))
    def step(self, interrupts: list[bool]) -> None:
        answers = iter(interrupts)
        self.case.server.step(lambda: next(answers, False))

    @rule()
    def run_until_nothing_is_left(self) -> None:
        self.case.run(most_steps=20_000)
        for request in self.requests:
            assert request.is_finished
        num_finished = self.case.server.meters.num_finished.values()
        assert sum(num_finished) == sum(len(request.sequences) for request in self.requests)

    def teardown(self) -> None:
        if hasattr(self, "case"):
            self.run_until_nothing_is_left()

    @invariant()
    def every_token_is_right_and_every_page_is_somewhere(self) -> None:
        if not hasattr(self, "case"):
            return
        self.case.scheduler.check()
        for request in self.requests:
            for one in request.sequences:
                whole = solo_run(one.prompt_ids, seed=one.seed, max_tokens=len(one.token_ids))
                assert one.token_ids == whole
                assert (one.finish_reason is None) == (one in self.case.server._requests or not one.arrival >= 0)
                if one.finish_reason is not None:
                    assert self.reasons.setdefault(one, one.finish_reason) == one.finish_reason
                assert one.finish_reason != "error" or self.num_failures[one] > 1
                assert one.finish_reason != "abort" or request in self.aborted
                assert one.finish_reason != "timeout" or one.terms.deadline_ns is not None


TestServer = ServerMachine.TestCase
TestServer.settings = settings(max_examples=100, stateful_step_count=30)
