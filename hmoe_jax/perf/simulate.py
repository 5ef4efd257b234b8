"""Decoding and a prompt side by side, event by event, from how long their stages take.

The decoding device and the lane of routed experts are served in the order of `forward_in_parts`. A prompt is computed
on a device of its own, or in quanta on the decoding device, where that would wait for the lane.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

from hmoe_jax.config import ModelConfig
from hmoe_jax.perf.cost import PrefillCost, Rates, cache_s, experts_s, head_share, resident_s
from hmoe_jax.perf.lanes import Span, busy_seconds
from hmoe_jax.perf.sizes import count_parameters


@dataclass(frozen=True)
class Stages:
    """Seconds of one part of a batch at one layer: on the device what needs the experts' result and what they need, and
    what is computed beside them; on the lane the experts. `tail_s` follows the last layer. What device and lane do at
    the same time takes `contention` times as long."""

    num_layers: int
    front_s: float
    shared_s: float
    experts_s: float
    tail_s: float = 0.0
    contention: float = 1.0


@dataclass(frozen=True)
class Prompt:
    """What a prompt needs of a device and of the link to it. A quantum of `quantum_s` is not cut, and none can begin
    before its experts have come: `copy_s` is spread evenly over `compute_s`. While copies run, the lane's experts take
    `stretch` times as long, as both read host memory."""

    compute_s: float
    copy_s: float
    quantum_s: float
    stretch: float = 1.0
    has_device: bool = False

    @property
    def alone_s(self) -> float:
        return max(self.compute_s, self.copy_s)


@dataclass(frozen=True)
class Outcome:
    """`num_steps` decode steps in `seconds`, until the prompt was done. `spans` of "device", "lane" and "prompt"."""

    num_steps: int
    seconds: float
    spans: tuple[Span, ...]

    @property
    def step_s(self) -> float:
        return self.seconds / self.num_steps

    def share(self, name: str) -> float:
        """Of the time, that something of this name was under way."""
        return busy_seconds(span for span in self.spans if span.name == name) / self.seconds


@dataclass(frozen=True)
class Beside:
    """A prompt beside decoding against decoding alone, and against taking turns: the prompt alone takes
    `prompt_alone_s`."""

    alone: Outcome
    together: Outcome
    prompt: Prompt
    prompt_alone_s: float

    @property
    def slowdown(self) -> float:
        """Of the time between tokens, while the prompt is computed."""
        return self.together.step_s / self.alone.step_s - 1

    @property
    def gain(self) -> float:
        """In throughput: how much longer the same steps and the same prompt take in turns."""
        in_turns = self.together.num_steps * self.alone.step_s + self.prompt_alone_s
        return in_turns / self.together.seconds - 1


def stages(config: ModelConfig, rates: Rates, *, batch: int, context: int, num_parts: int) -> list[Stages]:
    """By the model of costs; all parts are alike."""
    tokens = batch / num_parts
    layers, moe_layers, count = config.num_layers, config.num_moe_layers, count_parameters(config)
    resident = resident_s(config, rates, tokens)
    shared = resident * count.shared_experts / (count.active - count.chosen) / moe_layers
    dense = resident * count.dense_mlp / (count.active - count.chosen)
    head = head_share(config)
    logits = head * resident_s(config, rates, batch) / num_parts  # of all parts at once
    attention = cache_s(config, rates, batch=tokens, context=context)
    front = ((1 - head) * resident - dense + attention) / layers + rates.dispatch_s - shared * moe_layers / layers
    outside = logits + dense + (layers - moe_layers) * front
    experts = experts_s(config, rates, tokens) / moe_layers
    return [Stages(moe_layers, front, shared, experts, outside, rates.contention)] * num_parts


def prompt_of(
    cost: PrefillCost, rates: Rates, *, quantum_s: float, dram_gbps: float, has_device: bool = False
) -> Prompt:
    """A streamed prompt, whose copies take their share of the host memory's bandwidth from the lane."""
    copied_gbps = min(
        rates.link_gbps * rates.num_devices, cost.copy_s / cost.seconds * rates.link_gbps * rates.num_devices
    )
    stretch = rates.expert_gbps / max(min(rates.expert_gbps, dram_gbps - copied_gbps), 1e-9)
    return Prompt(cost.front_s + cost.experts_s, cost.copy_s, quantum_s, stretch, has_device)


def simulate(
    parts: Sequence[Stages], *, prompt: Prompt | None = None, max_slowdown: float = 0.15, num_steps: int = 3
) -> Outcome:
    """Decode steps one after the other: `num_steps`, or as many as there are until the prompt is done.

    A quantum that ends later than the lane makes decoding late; it is begun while that is at most `max_slowdown` of the
    time that decoding would have taken without.
    """
    run = _Run(list(parts), prompt, max_slowdown)
    steps = 0
    while steps < num_steps if prompt is None else not run.prompt_done:
        run.step()
        steps += 1
    return Outcome(steps, run.device_s, tuple(run.spans))


def beside(
    parts: Sequence[Stages], prompt: Prompt, *, alone_s: float | None = None, max_slowdown: float = 0.15
) -> Beside:
    """`alone_s`: of the prompt where nobody decodes, if it is cut less finely then."""
    together = simulate(parts, prompt=prompt, max_slowdown=max_slowdown)
    return Beside(simulate(parts), together, prompt, prompt.alone_s if alone_s is None else alone_s)


@dataclass
class _Job:
    """Of the lane: a part's experts."""

    begin_s: float
    done_s: float


@dataclass
class _Run:
    """`device_s`: until when the device is busy. `jobs`: of each part, the latest."""

    parts: list[Stages]
    prompt: Prompt | None
    max_slowdown: float
    device_s: float = 0.0
    jobs: list[_Job] = field(default_factory=list)
    prompted_s: float = 0.0
    late_s: float = 0.0
    spans: list[Span] = field(default_factory=list)

    @property
    def prompt_done(self) -> bool:
        if self.prompt is None:
            return True
        if self.prompt.has_device:
            return self.device_s >= self.prompt.alone_s
        return self.prompted_s >= self.prompt.compute_s

    def step(self) -> None:
        self.jobs = [_Job(self.device_s, self.device_s) for _ in self.parts]
        for _ in range(self.parts[0].num_layers):
            for index, part in enumerate(self.parts):
                self._await(self.jobs[index])
                self._compute("device", part.front_s)
                self.jobs[index] = self._experts(part.experts_s)
                self._compute("device", part.shared_s)
        for job, part in zip(self.jobs, self.parts, strict=True):
            self._await(job)
            self._compute("device", part.tail_s)

    def _compute(self, name: str, seconds: float) -> None:
        begin, slowed_s = self.device_s, [self._slowed_s(job.done_s, seconds) for job in self.jobs]
        for job, more_s in zip(self.jobs, slowed_s, strict=True):
            job.done_s += more_s
        self.device_s += seconds + max(slowed_s)
        self.spans.append(Span(name, begin, self.device_s))

    def _slowed_s(self, done_s: float, seconds: float) -> float:
        """What `seconds` on the device from now on, and a job that would be done by then, add to each other."""
        return min(max(done_s - self.device_s, 0.0), seconds) * (self.parts[0].contention - 1)

    def _experts(self, seconds: float) -> _Job:
        begin = max(self.device_s, *(job.done_s for job in self.jobs))
        stretch = 1.0 if self.prompt is None or self.prompt_done else self.prompt.stretch
        return _Job(begin, begin + seconds * stretch)

    def _await(self, job: _Job) -> None:
        while self._runs_quantum(job.done_s):
            pass
        self.device_s = max(self.device_s, job.done_s)
        self.spans.append(Span("lane", job.begin_s, job.done_s))

    def _runs_quantum(self, ready_s: float) -> bool:
        prompt = self.prompt
        if prompt is None or prompt.has_device or self.prompt_done:
            return False
        seconds = min(prompt.quantum_s, prompt.compute_s - self.prompted_s)
        has_come = self.device_s >= (self.prompted_s + seconds) * prompt.copy_s / prompt.compute_s
        late_s = max(self.device_s + seconds - max(ready_s, self.device_s), 0.0) + self._slowed_s(ready_s, seconds)
        on_time_s = self.device_s - self.late_s
        if not has_come or self.late_s + late_s > self.max_slowdown * on_time_s:
            return False
        self._compute("prompt", seconds)
        self.prompted_s += seconds
        self.late_s += late_s
        return True
