"""Random traffic at saturation, every answer of which is known beforehand."""

from __future__ import annotations

import random
import time
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

from hmoe_jax.core import QueueFullError
from hmoe_jax.engine import Engine
from hmoe_jax.outputs import RequestOutput
from hmoe_jax.sampling_params import SamplingParams


@dataclass(frozen=True)
class Known:
    """A request, and what it gets alone."""

    prompt_ids: tuple[int, ...]
    params: SamplingParams
    token_ids: tuple[int, ...]


@dataclass(frozen=True)
class Sample:
    """What the process held at a moment."""

    seconds: float
    rss_bytes: int
    num_threads: int


@dataclass
class Tally:
    """`wrong`: answers that differ from the known ones. `longest_stall_s`: the longest in which nobody got a token,
    though somebody waited."""

    ends: Counter[str] = field(default_factory=Counter)
    wrong: list[str] = field(default_factory=list)
    longest_stall_s: float = 0.0
    samples: list[Sample] = field(default_factory=list)


def known_requests(engine: Engine, count: int, *, seed: int) -> list[Known]:
    """Prompts of all lengths, some of which begin alike; greedy and drawn. Each is computed alone, with a salt of its
    own: nothing is found in the cache."""
    draw, longest = random.Random(seed), engine.max_model_len
    vocab_size = engine.config.vocab_size
    shared = [draw.randrange(2, vocab_size) for _ in range(longest // 3)]
    known = []
    for index in range(count):
        begin = shared[: draw.choice([0, 0, len(shared) // 2, len(shared)])]
        own = draw.randint(1, longest // 4)
        ids = [*begin, *(draw.randrange(2, vocab_size) for _ in range(own))]
        drawn: dict[str, Any] = {"temperature": draw.choice([0.0, 0.7, 1.2]), "seed": index}
        drawn |= {"frequency_penalty": draw.choice([0.0, 0.5]), "ignore_eos": draw.random() < 0.7}
        params = SamplingParams(max_tokens=draw.randint(1, longest // 4), **drawn)
        alone = {"prompt_token_ids": ids, "cache_salt": f"alone {index}"}
        (output,) = engine.generate(alone, params, use_tqdm=False)
        known.append(Known(tuple(ids), params, tuple(output.outputs[0].token_ids)))
    return known


class Traffic:
    """Keeps an engine saturated with known requests, some of which are aborted or run out of time."""

    def __init__(self, engine: Engine, known: Sequence[Known], *, seed: int, outstanding: int):
        self.engine, self._known, self._outstanding = engine, known, outstanding
        self._draw = random.Random(seed)
        self._open: dict[str, Known] = {}
        self._number = 0
        self.tally = Tally()

    def run(self, seconds: float, *, sample_s: float, max_stall_s: float) -> Tally:
        """So long, and then until nothing is left, or nobody has got a token for `max_stall_s`."""
        begin = last_token = time.perf_counter()
        sampled, num_tokens = -sample_s, self.engine.metrics().num_generated_tokens
        while (elapsed := time.perf_counter() - begin) < seconds or self.engine.has_unfinished_requests:
            if elapsed < seconds:
                self._submit()
            if self._open and self._draw.random() < 0.05:
                self.engine.abort(self._draw.choice(list(self._open)))
            for output in self.engine.step():
                self._check(output)
            now, generated = time.perf_counter(), self.engine.metrics().num_generated_tokens
            self.tally.longest_stall_s = max(self.tally.longest_stall_s, now - last_token)
            if generated > num_tokens or not self._open:
                last_token, num_tokens = now, generated
            if now - last_token > max_stall_s:
                break
            if elapsed - sampled >= sample_s:
                sampled = elapsed
                self.tally.samples.append(_sample(elapsed))
        return self.tally

    def _submit(self) -> None:
        while len(self._open) < self._outstanding:
            self._number += 1
            known, name = self._draw.choice(self._known), str(self._number)
            wishes: dict[str, Any] = {"priority": self._draw.choice([0, 0, 0, 1, -1])}
            if self._draw.random() < 0.05:
                wishes["timeout_s"] = self._draw.uniform(0, 0.5)
            try:
                self.engine.add_request(name, list(known.prompt_ids), known.params, **wishes)
            except QueueFullError:
                self.tally.ends["refused"] += 1
                return
            self._open[name] = known

    def _check(self, output: RequestOutput) -> None:
        if not output.finished:
            return
        known, (completion,) = self._open.pop(output.request_id), output.outputs
        self.tally.ends[str(completion.finish_reason)] += 1
        tokens = tuple(completion.token_ids)
        is_whole = completion.finish_reason in ("stop", "length")
        if tokens != (known.token_ids if is_whole else known.token_ids[: len(tokens)]):
            self.tally.wrong.append(f"request {output.request_id}: {tokens} instead of {known.token_ids}")


def _sample(seconds: float) -> Sample:
    fields = dict(line.split(":", 1) for line in open("/proc/self/status", encoding="ascii"))  # noqa: SIM115
    return Sample(seconds, int(fields["VmRSS"].split()[0]) * 1024, int(fields["Threads"]))
