"""Where a step's time goes: compiled programs, a trace, and a table of stages against the memory's measured limit."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import jax
from absl import flags
from flags import MODEL, engine_options
from mains import make_folder, print_json, run_main, write_atomically
from tqdm import tqdm

from hmoe_jax.config import read_config
from hmoe_jax.exec import profile
from hmoe_jax.exec.open import open_executor
from hmoe_jax.exec.plan import EngineOptions, Plan
from hmoe_jax.exec.profile import Measured
from hmoe_jax.exec.programs import Executor
from hmoe_jax.exec.session import Session
from hmoe_jax.perf import programs, report, roofline, timeline
from hmoe_jax.perf.programs import Program
from hmoe_jax.perf.report import Profile

_OUT = flags.DEFINE_string("out", "out/profile", "Folder for the results; made if it is missing.")
_STEPS = flags.DEFINE_integer("steps", 32, "Decode steps to time, and again to trace.", lower_bound=1)
_PROMPT_LEN = flags.DEFINE_integer("prompt_len", 128, "Tokens of each prompt.", lower_bound=1)
_BATCH = flags.DEFINE_integer("batch", 1, "Sequences that decode together.", lower_bound=1)
_SLOWEST = flags.DEFINE_integer("slowest", 8, "How many of the slowest operations to list.", lower_bound=0)


def main() -> None:
    read_config(MODEL.value)  # Refuses a wrong --model before the folder is made.
    out = make_folder(Path(_OUT.value))
    # A cached program keeps the scopes of the source that it was compiled from, not of today's.
    jax.config.update("jax_enable_compilation_cache", False)
    options = EngineOptions(**engine_options(), max_num_seqs=_BATCH.value)
    executor, plan = open_executor(MODEL.value, options)
    try:
        num_steps = profile.WARM_STEPS + 2 * _STEPS.value  # to warm up, to time, to trace
        session = Session(executor, prompt_len=_PROMPT_LEN.value, num_steps=num_steps)
        compiled = _compile(executor)
        _write_programs(out, compiled)
        measured = profile.measure(session, compiled, num_steps=_STEPS.value)
    finally:
        executor.close()
    limit = roofline.read_gbps(plan.device, num_threads=plan.num_threads, isa=plan.isa)
    modules = {program.module.name: program for program in compiled.values()}
    for each in measured:
        _write_trace(out, each, modules)
    profiles = [profile.profile(each, modules, limit_gbps=limit, num_slowest=_SLOWEST.value) for each in measured]
    _write_report(out, profiles, _setting(plan))


def _compile(executor: Executor) -> dict[str, Program]:
    """Every program that serving can need, by kind and bucket."""
    jobs = executor.warm_up()
    for job in tqdm(jobs, desc="compiling", unit="program", disable=None):
        job()
    return {f"{kind}_{size}": programs.inspect(each) for (kind, size), each in sorted(executor.programs.items())}


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


def _write_programs(out: Path, compiled: Mapping[str, Program]) -> None:
    folder = make_folder(out / "programs")
    for name, program in compiled.items():
        write_atomically(folder / f"{name}.hlo.txt", program.text)
        write_atomically(folder / f"{name}.json", json.dumps(program.summary(), indent=2) + "\n")
    print(f"{programs.table(compiled)}\n")


def _write_trace(out: Path, measured: Measured, modules: Mapping[str, Program]) -> None:
    """The profiler's own file where TensorBoard looks for it, and one in the source's words for ui.perfetto.dev."""
    folder = make_folder(out / "trace" / "plugins" / "profile" / measured.name)
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
