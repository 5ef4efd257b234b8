"""Recording steps with JAX's profiler, and reading back what it recorded.

On the CPU platform jax 0.10.2 records every operation that XLA's runtime executes (a "thunk"), with its thread, the
instruction's name (`hlo_op`) and the program's (`hlo_module`), but not the scope: that comes from the HLO text. What
happens inside a custom call's own threads is not seen.
"""

from __future__ import annotations

import tempfile
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import jax
from jax.profiler import ProfileData, ProfileOptions, StepTraceAnnotation


@dataclass(frozen=True)
class Op:
    """One execution of one instruction. `run` tells the executions of a program apart."""

    module: str
    name: str
    run: int
    thread: str
    start_s: float
    end_s: float


@dataclass(frozen=True)
class Step:
    """One annotated step: its window on the host's clock, and the operations that began inside it."""

    name: str
    start_s: float
    end_s: float
    ops: tuple[Op, ...]

    @property
    def duration_s(self) -> float:
        return self.end_s - self.start_s


def record(name: str, work: Callable[[], object], *, num_steps: int) -> bytes:
    """Calls `work` as `num_steps` steps under the profiler; returns the trace (`XSpace`, serialised).

    `work` must wait for its results: what runs on after it has returned is counted for nobody.
    """
    with tempfile.TemporaryDirectory() as folder:
        with jax.profiler.trace(folder, profiler_options=_options()):
            for index in range(num_steps):
                with StepTraceAnnotation(name, step_num=index):
                    work()
        return next(Path(folder).rglob("*.xplane.pb")).read_bytes()


def read_steps(trace: bytes) -> list[Step]:
    """The steps of a recorded trace, in order."""
    windows: list[tuple[float, float, str]] = []
    ops: list[Op] = []
    profile = ProfileData.from_serialized_xspace(trace)  # planes point into it
    for plane in profile.planes:
        for line in plane.lines:
            thread = f"{plane.name} {line.name}"
            for event in line.events:
                stats = dict(event.stats)
                start_s = event.start_ns * 1e-9
                end_s = start_s + event.duration_ns * 1e-9
                if "step_num" in stats:
                    windows.append((start_s, end_s, event.name))
                elif "hlo_op" in stats and "hlo_module" in stats:
                    run = int(stats.get("run_id", 0))
                    ops.append(Op(stats["hlo_module"], stats["hlo_op"], run, thread, start_s, end_s))
    return [
        Step(name, start_s, end_s, tuple(op for op in ops if start_s <= op.start_s < end_s))
        for start_s, end_s, name in sorted(windows)
    ]


def _options() -> ProfileOptions:
    """Without Python's own calls: recording them slows a step of a small model down by half."""
    options = ProfileOptions()
    options.python_tracer_level = 0
    return options
