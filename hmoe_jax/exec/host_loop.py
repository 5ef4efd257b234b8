"""Decode steps whose layers are driven by the host: small compiled programs, and the calls of an expert lane between.

The loop is that of the compiled step (`deepseek_v3.through_layers`). It costs dispatches, and gives the device back
while the lane computes: then it is free for something else, such as a part of a prompt.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, NamedTuple

import jax
import numpy as np
from jaxtyping import Array, Float, Float32, Int32

from hmoe_jax.architectures import deepseek_v3
from hmoe_jax.architectures.deepseek_v3 import Flow, Layer, Seam, Weights, through_layers
from hmoe_jax.config import ModelConfig
from hmoe_jax.core import AnyArray
from hmoe_jax.exec.batch import DecodeBatch
from hmoe_jax.exec.copies import aligned
from hmoe_jax.exec.durations import averaged
from hmoe_jax.exec.state import LiveState
from hmoe_jax.exec.step import StepOutput, decode_attention, decode_tokens, in_parts, layer_kinds
from hmoe_jax.experts.lane import ExpertLane
from hmoe_jax.kv.pages import CacheLayout
from hmoe_jax.nn.norm import rms_norm
from hmoe_jax.sampling import Sampled, SamplerState, sample

Meanwhile = Callable[[float], bool]
"""Computes something else on the device, which is free for so many seconds. False if there is nothing so short."""


class HostLoop:
    """Runs decode steps of one model. What they change is passed in, and replaced array by array."""

    def __init__(
        self, config: ModelConfig, layout: CacheLayout, weights: Weights, lane: ExpertLane, device: jax.Device
    ):
        self._config, self._lane, self._device = config, lane, device
        self._layers, self._kinds, self._outside = weights.layers, layer_kinds(weights), replace(weights, layers=())
        self._programs = _Programs(config, layout)
        self._job_s: dict[tuple[int, int], float] = {}

    def step(
        self,
        batch: DecodeBatch,
        state: LiveState,
        *,
        num_parts: int,
        meanwhile: Meanwhile = lambda _: False,
    ) -> StepOutput:
        """One token further for every sequence of the batch, which `num_parts` divides. What runs `meanwhile` may
        change the state of others."""
        whole, parts = jax.device_put((batch, in_parts(batch, num_parts)), self._device)
        size, num_rows = len(batch.tokens) // num_parts, int(batch.valid.sum())
        job_s = self._job_s.get((num_rows, num_parts), 0.0)
        # Programs read them in place: a part's next `front`, which has ended before the part's next job is submitted;
        # in the end `tail`, perhaps while the next step begins, which has others.
        outs = [aligned((size, 4 * self._config.hidden_size)).view(np.float32) for _ in parts]
        experts = _ExpertsOnLane(self._lane, outs, meanwhile, job_s=job_s)
        flows = [self._flow(part, rows, experts) for part, rows in enumerate(parts)]
        busy_s = self._lane.busy_s
        through_layers(flows, state.caches, experts)
        if num_rows:
            self._learn(num_rows, num_parts, self._lane.busy_s - busy_s)
        last = (self._outside, state.sampler, whole, tuple(flow.x for flow in flows))
        sampled, state.sampler = self._programs.run(("tail", size, num_parts), self._programs.tail, *last, donated=1)
        return StepOutput(sampled, self._routes(flows))

    def _flow(self, part: int, batch: DecodeBatch, experts: _ExpertsOnLane) -> Flow[Array]:
        x = self._programs.run(("embed", len(batch.tokens)), self._programs.embed, self._outside, batch)
        stages = _OnDevice(self._programs, self._layers, self._kinds, batch)
        return Flow(self._config, stages, experts, part, x)

    def _routes(self, flows: Sequence[Flow[Array]]) -> Int32[np.ndarray, "m t k"]:
        """Of all MoE layers: the host has seen them already."""
        parts = [np.array([np.asarray(ids) for ids in flow.routes], np.int32) for flow in flows]
        shape = (self._config.num_moe_layers, -1, self._config.top_k)
        return np.stack([each.reshape(shape) for each in parts], axis=2).reshape(shape)

    def _learn(self, num_rows: int, num_parts: int, busy_s: float) -> None:
        num_jobs = num_parts * self._config.num_moe_layers
        if num_jobs:
            job_s = busy_s / num_jobs
            key = (num_rows, num_parts)
            self._job_s[key] = averaged(self._job_s.get(key, job_s), job_s)


class Unfinished(NamedTuple):
    """Activations after a layer, before `back` has added them up: the next program does."""

    residual: Float[Array, "t d"]
    shared: Float32[Array, "t d"]
    routed: Float32[AnyArray, "t d"]


Activations = Array | Unfinished


@dataclass(frozen=True)
class _OnDevice:
    """Stages of one part as programs (see `deepseek_v3.Stages`)."""

    programs: _Programs
    layers: tuple[Layer, ...]
    kinds: list[str]
    batch: DecodeBatch

    def dense(self, index: int, x: Activations, cache: Array) -> tuple[Activations, Array]:
        return self._run("dense", self.programs.dense, index, x, self.batch, cache, donated=3)

    def front(self, index: int, x: Activations, cache: Array) -> tuple[Seam, Array]:
        return self._run("front", self.programs.front, index, x, self.batch, cache, donated=3)

    def shared(self, index: int, hidden: Array) -> Array:
        return self._run("shared", deepseek_v3.shared_experts, index, hidden)

    def back(self, seam: Seam, shared: Array, routed: Any) -> Activations:
        return Unfinished(seam.residual, shared, routed)

    def _run(
        self, name: str, function: Callable[..., Any], index: int, *operands: Any, donated: int | None = None
    ) -> Any:
        key = (name, len(self.batch.tokens), self.kinds[index], type(operands[0]))
        return self.programs.run(key, function, self.layers[index], *operands, donated=donated)


@dataclass
class _Job:
    ticket: int
    until: float
    """When it should be done, in seconds of `time.perf_counter`."""


@dataclass
class _ExpertsOnLane:
    """Routed experts by the lane, called from the host; a job should take `job_s`. Each part has an array in `outs`,
    which the next program takes as it is: to make a JAX array of it would take the host 0.3 ms."""

    lane: ExpertLane
    outs: Sequence[Float32[np.ndarray, "t d"]]
    meanwhile: Meanwhile
    job_s: float
    until: float = field(default=0.0, init=False)
    num_open: int = field(default=0, init=False)

    def start(self, part: int, layer: int, seam: Seam) -> tuple[_Job, Array]:
        operands = (seam.hidden, seam.ids, seam.weights)
        for each in operands:
            each.copy_to_host_async()
        hidden, ids, weights = map(np.asarray, operands)  # waits for the device
        ticket = self.lane.submit(part, layer, hidden.view(np.uint16), ids, weights)
        self.until = max(self.until, time.perf_counter()) + self.job_s
        self.num_open += 1
        return _Job(ticket, self.until), seam.hidden

    def finish(self, part: int, job: _Job) -> Any:
        while not self.lane.is_done(part, job.ticket) and self.meanwhile(job.until - time.perf_counter()):
            pass
        self.lane.wait(part, job.ticket, self.outs[part])
        self.num_open -= 1
        self.until = min(self.until, time.perf_counter() + self.num_open * self.job_s)  # it may have been early
        return self.outs[part]

    def in_order(self, value: Any, after: Array) -> Any:
        return value


class _Programs:
    """Compiled when they are first run with operands of a size."""

    def __init__(self, config: ModelConfig, layout: CacheLayout):
        self._config, self._layout = config, layout
        self.compiled: dict[tuple[Any, ...], Callable[..., Any]] = {}

    def run(
        self, key: tuple[Any, ...], function: Callable[..., Any], *operands: Any, donated: int | None = None
    ) -> Any:
        """`donated` is the place of the operand whose memory the results may take."""
        if key not in self.compiled:
            jitted = jax.jit(function, donate_argnums=() if donated is None else donated)
            self.compiled[key] = jitted.lower(*operands).compile()
        return self.compiled[key](*operands)

    # What follows is traced.

    def embed(self, outside: Weights, batch: DecodeBatch) -> Array:
        return outside.embed[batch.tokens]

    def dense(self, layer: Layer, x: Activations, batch: DecodeBatch, cache: Array) -> tuple[Array, Array]:
        attend = decode_attention(self._config, self._layout, batch)
        return deepseek_v3.dense_layer(self._config, layer, _closed(x), decode_tokens(batch), cache, attend)

    def front(self, layer: Layer, x: Activations, batch: DecodeBatch, cache: Array) -> tuple[Seam, Array]:
        attend = decode_attention(self._config, self._layout, batch)
        return deepseek_v3.front(self._config, layer, _closed(x), decode_tokens(batch), cache, attend)

    def tail(
        self, outside: Weights, sampler: SamplerState, batch: DecodeBatch, parts: tuple[Activations, ...]
    ) -> tuple[Sampled, SamplerState]:
        x = deepseek_v3.put_together([_closed(part) for part in parts])
        logits = deepseek_v3.logits(outside, rms_norm(x, outside.norm, self._config.norm_eps))
        return sample(sampler, batch.slots, logits, batch.draws)


def _closed(x: Activations) -> Array:
    return deepseek_v3.back(*x) if isinstance(x, Unfinished) else x
