"""Where a step's time goes: compiled programs, a trace, and a table of stages against the memory's measured limit."""

from __future__ import annotations

import json
import statistics
import tempfile
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import jax
import numpy as np
from absl import flags
from flags import MODEL, engine_options, print_json, run_main, write_atomically
from tqdm import tqdm

from hmoe_jax.config import read_config
from hmoe_jax.exec.batch import DecodeRow, decode_batch, prefill_batch
from hmoe_jax.exec.open import open_executor
from hmoe_jax.exec.plan import EngineOptions, Plan
from hmoe_jax.exec.programs import Executor
from hmoe_jax.perf import programs, report, roofline, timeline, trace
from hmoe_jax.perf.programs import Program
from hmoe_jax.perf.report import Profile
from hmoe_jax.perf.stages import mean_op_seconds, slowest, stage_seconds
from hmoe_jax.perf.traffic import Load, stage_bytes
from hmoe_jax.sampling import sampler_row
from hmoe_jax.sampling_params import SamplingParams

_OUT = flags.DEFINE_string("out", "out/profile", "Folder for the results; made if it is missing.")
_STEPS = flags.DEFINE_integer("steps", 32, "Decode steps to time, and again to trace.", lower_bound=1)
_PROMPT_LEN = flags.DEFINE_integer("prompt_len", 128, "Tokens of each prompt.", lower_bound=1)
_BATCH = flags.DEFINE_integer("batch", 1, "Sequences that decode together.", lower_bound=1)
_SLOWEST = flags.DEFINE_integer("slowest", 8, "How many of the slowest operations to list.", lower_bound=0)

WARM_STEPS = 3
PREFILLS = 3
"""How often the prompt is run to time it, and again to trace it."""


def main() -> None:
    read_config(MODEL.value)  # Refuses a wrong --model before the folder is made.
    out = _make_folder(Path(_OUT.value))
    # A cached program keeps the scopes of the source that it was compiled from, not of today's.
    jax.config.update("jax_enable_compilation_cache", False)
    options = EngineOptions(**engine_options(), max_num_seqs=_BATCH.value)
    executor, plan = open_executor(MODEL.value, options)
    try:
        session = _Session(executor, prompt_len=_PROMPT_LEN.value, num_steps=WARM_STEPS + 2 * _STEPS.value)
        compiled = _compile(executor)
        _write_programs(out, compiled)
        measured = _measure(session, compiled)
    finally:
        executor.close()
    limit = roofline.read_gbps(plan.device, num_threads=plan.num_threads, isa=plan.isa)
    modules = {program.module.name: program for program in compiled.values()}
    for each in measured:
        _write_trace(out, each, modules)
    profiles = [_profile(each, modules, limit) for each in measured]
    _write_report(out, profiles, _setting(plan))


@dataclass
class _Sequence:
    """One prompt and how far it has come."""

    prompt: list[int]
    slot: int
    pages: range
    token: int = 0
    position: int = 0


@dataclass(frozen=True)
class _Measured:
    """A kind of step, timed without the profiler and recorded with it."""

    name: str
    tokens: int
    untraced_s: float
    recording: bytes
    steps: list[trace.Step]
    num_bytes: Mapping[str, int]


class _Session:
    """Drives an executor as the engine does: every step waits for its tokens, which the next one takes."""

    def __init__(self, executor: Executor, *, prompt_len: int, num_steps: int):
        self.executor = executor
        layout = executor.layout
        length = prompt_len + num_steps
        if length > layout.max_len:
            raise ValueError(
                f"--prompt_len {prompt_len} and {num_steps} steps to warm up, time and trace make {length} tokens, "
                f"but the longest sequence has {layout.max_len}: lower --prompt_len or --steps"
            )
        pages_each = layout.pages_for(length)
        if executor.num_slots * pages_each >= layout.num_pages:
            raise ValueError(
                f"{executor.num_slots} sequences of {length} tokens need {executor.num_slots * pages_each} pages of "
                f"cache, but there are {layout.num_pages - 1}: lower --batch"
            )
        prompts = np.random.default_rng(0).integers(0, executor.config.vocab_size, (executor.num_slots, prompt_len))
        self.sequences = [
            _Sequence(prompt.tolist(), slot, range(1 + slot * pages_each, 1 + (slot + 1) * pages_each))
            for slot, prompt in enumerate(prompts)
        ]
        for sequence in self.sequences:
            params = SamplingParams(temperature=1.0, seed=sequence.slot)
            executor.admit(sequence.slot, _sampler_row(executor, params))

    def prefill(self, sequence: _Sequence) -> None:
        """Runs a whole prompt, in pieces if it is longer than the largest bucket."""
        for piece in self._pieces(sequence):
            sampled = jax.device_get(self.executor.step(piece).sampled)
        sequence.token, sequence.position = int(sampled.tokens[0]), len(sequence.prompt)

    def decode(self) -> None:
        """One token further for every sequence."""
        rows = [DecodeRow(each.token, each.position, each.slot, each.pages) for each in self.sequences]
        size = self.executor.buckets.for_decode(len(rows))
        batch = decode_batch(rows, self.executor.layout, size=size, num_slots=self.executor.num_slots)
        sampled = jax.device_get(self.executor.step(batch).sampled)
        for sequence, token in zip(self.sequences, sampled.tokens, strict=False):
            sequence.token, sequence.position = int(token), sequence.position + 1

    def prefill_loads(self, compiled: Mapping[str, Program]) -> list[Load]:
        """What one call of `prefill` asks of memory."""
        return [
            Load(compiled[f"prefill_{len(piece.tokens)}"], int(piece.length), 1, int(piece.start + piece.length))
            for piece in self._pieces(self.sequences[0])
        ]

    def decode_load(self, compiled: Mapping[str, Program], *, ahead: int) -> Load:
        """What the call of `decode` after `ahead` more of them asks of memory."""
        count = len(self.sequences)
        program = compiled[f"decode_{self.executor.buckets.for_decode(count)}"]
        return Load(program, count, count, sum(each.position + 1 + ahead for each in self.sequences))

    def _pieces(self, sequence: _Sequence) -> list[Any]:
        largest, pieces = self.executor.buckets.prefill[-1], []
        for start in range(0, len(sequence.prompt), largest):
            ids = sequence.prompt[start : start + largest]
            size, is_last = self.executor.buckets.for_prefill(len(ids)), start + largest >= len(sequence.prompt)
            where = {"start": start, "slot": sequence.slot, "pages": sequence.pages}
            pieces.append(prefill_batch(ids, self.executor.layout, size=size, is_last=is_last, **where))
        return pieces


def _compile(executor: Executor) -> dict[str, Program]:
    """Every program that serving can need, by kind and bucket."""
    jobs = executor.warm_up(_sampler_row(executor, SamplingParams()))
    for job in tqdm(jobs, desc="compiling", unit="program", disable=None):
        job()
    return {f"{kind}_{size}": programs.inspect(each) for (kind, size), each in sorted(executor.programs.items())}


def _measure(session: _Session, compiled: Mapping[str, Program]) -> list[_Measured]:
    """Everything runs once before it is timed; then come the timed calls, then the recorded ones."""
    for sequence in session.sequences:
        session.prefill(sequence)
    first = session.sequences[0]
    prefill = _time_and_record(
        session,
        ("prefill", lambda: session.prefill(first), PREFILLS),
        tokens=len(first.prompt),
        loads=lambda: session.prefill_loads(compiled),
    )
    for _ in range(WARM_STEPS):
        session.decode()
    # The context grows by a token a step: its mean is that of the step in the middle.
    decode = _time_and_record(
        session,
        ("decode", session.decode, _STEPS.value),
        tokens=len(session.sequences),
        loads=lambda: [session.decode_load(compiled, ahead=_STEPS.value // 2)],
    )
    return [prefill, decode]


def _time_and_record(
    session: _Session, work: tuple[str, Callable[[], None], int], *, tokens: int, loads: Callable[[], list[Load]]
) -> _Measured:
    """`work` is (name, call, how often). `loads` is asked just before the recorded calls."""
    name, call, count = work
    before, seconds = _expert_bytes(session.executor), []
    for _ in range(count):
        begin = time.perf_counter()
        call()
        seconds.append(time.perf_counter() - begin)
    after = _expert_bytes(session.executor)
    expert_bytes = (after - before) // count if before is not None and after is not None else None
    num_bytes = stage_bytes(loads(), expert_bytes=expert_bytes)
    recording = trace.record(name, call, num_steps=count)
    return _Measured(name, tokens, statistics.median(seconds), recording, trace.read_steps(recording), num_bytes)


def _profile(measured: _Measured, modules: Mapping[str, Program], limit_gbps: float) -> Profile:
    charged = mean_op_seconds(measured.steps, modules)
    return Profile(
        name=measured.name,
        tokens=measured.tokens,
        seconds=stage_seconds(charged, modules),
        num_bytes=measured.num_bytes,
        roofline_gbps=limit_gbps,
        untraced_s=measured.untraced_s,
        slowest=slowest(charged, modules, count=_SLOWEST.value),
    )


def _sampler_row(executor: Executor, params: SamplingParams) -> Any:
    seed = params.seed or 0
    return sampler_row(params, executor.config.vocab_size, prompt_ids=(), stop_ids=(), seed=seed)


def _expert_bytes(executor: Executor) -> int | None:
    return executor.expert_stats().expert_bytes if executor.expert_stats else None


def _setting(plan: Plan) -> dict[str, Any]:
    """What the figures hold for."""
    return {
        "model": MODEL.value,
        "device": plan.device.platform,
        "executor": plan.executor,
        "isa": plan.isa,
        "num_threads": plan.num_threads,
        "prompt_len": _PROMPT_LEN.value,
        "batch": _BATCH.value,
        "steps": _STEPS.value,
    }


def _make_folder(out: Path) -> Path:
    """Makes the folder, and finds out now whether it can be written, not after the measurement."""
    try:
        out.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=out):
            pass
    except OSError as error:
        raise ValueError(f"--out {out} cannot be written: {error.strerror}") from None
    return out


def _write_programs(out: Path, compiled: Mapping[str, Program]) -> None:
    folder = _make_folder(out / "programs")
    for name, program in compiled.items():
        write_atomically(folder / f"{name}.hlo.txt", program.text)
        write_atomically(folder / f"{name}.json", json.dumps(program.summary(), indent=2) + "\n")
    print(f"{programs.table(compiled)}\n")


def _write_trace(out: Path, measured: _Measured, modules: Mapping[str, Program]) -> None:
    """The profiler's own file where TensorBoard looks for it, and one in the source's words for ui.perfetto.dev."""
    folder = _make_folder(out / "trace" / "plugins" / "profile" / measured.name)
    write_atomically(folder / "host.xplane.pb", measured.recording)
    write_atomically(out / "trace" / f"{measured.name}.json.gz", timeline.to_json_gz(measured.steps, modules))


def _write_report(out: Path, profiles: Sequence[Profile], setting: dict[str, Any]) -> None:
    summary = setting | {"profiles": {profile.name: profile.summary() for profile in profiles}}
    text = "\n\n".join([*map(report.table, profiles), report.footnote(profiles[0].roofline_gbps)])
    write_atomically(out / "stages.txt", text + "\n")
    write_atomically(out / "stages.json", json.dumps(summary, indent=2) + "\n")
    print(text)
    _write_picture(out, profiles, setting)
    print(f"\nwritten to {out}: programs/, trace/, stages.txt, stages.json")
    print_json(summary)


def _write_picture(out: Path, profiles: Sequence[Profile], setting: dict[str, Any]) -> None:
    try:
        from hmoe_jax.perf import picture  # noqa: PLC0415 (matplotlib is optional: see the `plot` extra)
    except ModuleNotFoundError as error:
        print(f"\nno picture: {error.name} is not installed (pip install 'hmoe-jax[plot]')")
        return
    where = f"{setting['executor']} on {setting['device']}, {setting['num_threads']} threads, {setting['isa']}"
    title = f"{Path(setting['model']).name}: {where}, {setting['batch']} sequence(s)"
    write_atomically(out / "stages.png", picture.draw(profiles, title=title))


if __name__ == "__main__":
    run_main(main)
