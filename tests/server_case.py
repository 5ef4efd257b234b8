"""A server on a fake executor, with a clock that only the test and the executor move."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from hmoe_jax.clock import steady
from hmoe_jax.request import Request, Sequence, StopRules, Terms
from hmoe_jax.sampling_params import SamplingParams
from hmoe_jax.scheduler import Scheduler
from hmoe_jax.server import Server
from hmoe_jax.turns import Turns
from tests.fake_executor import MAX_LEN, NUM_SLOTS, FakeExecutor, solo_run

STAGES = ["admit", "begin", "part", "decode"]


class Case:
    """A server, its fake executor, and a clock that only the test and the executor move."""

    def __init__(self, *, max_waiting: int = 100, slowdown_permille: int = 1000, step_s: float = 0.01, **beside: Any):
        """`beside` decoding: the fake executor's `gap_s` and `is_apart`."""
        self.now_s = 100.0
        self.executor = FakeExecutor(
            seconds=lambda stage: self.pass_time(0.0 if stage in ("begin", "intact") else step_s),
            idles=self.pass_time,
            **beside,
        )
        layout, buckets = self.executor.layout, self.executor.buckets
        self.scheduler = Scheduler(layout, num_slots=NUM_SLOTS, piece_len=buckets.piece_len)
        self.clock = steady(lambda: self.now_s)
        turns = Turns(slowdown_permille)
        self.server = Server(self.executor, self.scheduler, turns, max_waiting=max_waiting, clock=self.clock)
        self.num_requests = 0

    def pass_time(self, seconds: float) -> None:
        self.now_s += seconds

    def request(
        self, prompt: int | list[int], max_tokens: int = 6, *, n: int = 1, timeout_s: float | None = None, **params: Any
    ) -> Request:
        """Not submitted yet. With so many tokens of its own, or with those given."""
        self.num_requests += 1
        ids = [(7 * self.num_requests + i) % 50 for i in range(prompt)] if isinstance(prompt, int) else prompt
        deadline_ns = None if timeout_s is None else int((self.clock() + timeout_s) * 1e9)
        rules = StopRules(eos_ids=(), stop_ids=(), max_len=MAX_LEN)
        wishes = SamplingParams(max_tokens=max_tokens, n=n, **params)
        terms = Terms(deadline_ns=deadline_ns)
        sequences = [
            Sequence(ids, wishes, index=i, seed=1000 * self.num_requests + i, rules=rules, tokenizer=None, terms=terms)
            for i in range(n)
        ]
        return Request(str(self.num_requests), None, sequences, self.clock)

    def submit(self, *args: Any, **kwargs: Any) -> Request:
        request = self.request(*args, **kwargs)
        self.server.submit(request)
        return request

    def run(self, *, most_steps: int = 2000) -> None:
        while self.server.has_work and most_steps:
            self.server.step()
            most_steps -= 1
        assert not self.server.has_work, "somebody starves"
        assert self.executor.num_open_prompts == 0
        self.scheduler.check()


def assert_right(*requests: Request) -> None:
    """Finished by itself, with the tokens that it gets alone."""
    for request in requests:
        for one in request.sequences:
            assert one.finish_reason == "length"
            assert one.token_ids == solo_run(
                one.prompt_ids, seed=one.seed, max_tokens=one.max_len - len(one.prompt_ids)
            )


def fail_once(message: str = "out of luck", *, after: int = 0) -> Callable[[list[int]], None]:
    calls = iter(range(10**6))

    def stage(slots: list[int]) -> None:
        if next(calls) == after:
            raise RuntimeError(message)

    return stage
