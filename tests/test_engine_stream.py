"""The engine with streaming prefill, in BF16, beside the one that computes prompts in place."""

from __future__ import annotations

import gc
import threading
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import closing
from dataclasses import replace
from pathlib import Path
from typing import Any

import jax
import numpy as np
import pytest

from hmoe_jax.core import CheckpointError
from hmoe_jax.engine import Engine
from hmoe_jax.exec.quantum import Quantum
from hmoe_jax.exec.score import load_for_scoring
from hmoe_jax.exec.stream import StreamExecutor
from hmoe_jax.outputs import RequestOutput
from hmoe_jax.perf.machines import UNMEASURED_CPU, machine_name, save_rates
from tests.experts.gpu import StandInDriver
from tests.serving import assert_idle, greedy
from tests.tiny import random_ids, write_tiny

MODEL = "deepseek"
OPTIONS = {"max_num_seqs": 2, "max_model_len": 400, "compilation_cache": None, "use_tqdm": False}


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_tiny(tmp_path_factory.mktemp("stream"), MODEL, with_tokenizer=True)


@pytest.fixture(scope="module", params=["with decoding", "apart"])
def streamed(request: pytest.FixtureRequest, folder: Path) -> Iterator[Engine]:
    """Prompts on two devices: on the one that decodes and another, or on two others."""
    apart = request.param == "apart"
    with Engine(folder, prefill="stream", prefill_devices=2, prefill_apart=apart, **OPTIONS) as engine:
        yield engine
        assert_idle(engine)


@pytest.fixture(scope="module")
def apart(folder: Path) -> Iterator[Engine]:
    options = OPTIONS | {"max_num_seqs": 3, "warm_up": False}
    with Engine(folder, prefill="stream", prefill_apart=True, **options) as engine:
        yield engine
        assert_idle(engine)


def ids(length: int, seed: int = 0) -> list[int]:
    return random_ids(MODEL, length, seed=seed).tolist()


def test_decoding_continues_a_streamed_prompt(folder: Path, streamed: Engine, compilations: list[str]) -> None:
    """Same tokens as executor `fused`, until two of them are nearly as probable (within BF16's roundings)."""
    num_compiled = len(compilations)
    prompts, params = [ids(300), ids(9, seed=1), ids(61, seed=2)], greedy(12, logprobs=2)
    actual = streamed.generate(prompts, params, use_tqdm=False)
    assert compilations[num_compiled:] == []
    with Engine(folder, warm_up=False, **OPTIONS) as fused:
        expected = fused.generate(prompts, params, use_tqdm=False)
    same = 0
    for a, b in zip(actual, expected, strict=True):
        for step, (x, y) in enumerate(zip(a.outputs[0].token_ids, b.outputs[0].token_ids, strict=True)):
            if x != y:
                best, second = sorted((each.logprob for each in b.outputs[0].logprobs[step].values()), reverse=True)[:2]
                assert best - second < 0.1
                break
            same += 1
    assert same >= 12


def test_prompts_of_several_passes_are_cut_evenly(folder: Path) -> None:
    with Engine(folder, prefill="stream", max_prefill_tokens=100, warm_up=False, **OPTIONS) as engine:
        assert engine.plan.buckets.prefill == (100,)
        (output,) = engine.generate(
            [ids(250)], greedy(2, prompt_logprobs=0, return_routed_experts=True), use_tqdm=False
        )
        assert len(output.prompt_logprobs) == 250
        assert output.outputs[0].routed_experts.shape[0] == 251


def test_closing_a_stream_of_text_cancels_its_prompt_between_two_quanta(
    streamed: Engine, monkeypatch: pytest.MonkeyPatch
) -> None:
    executor, seen = streamed._executor, []
    assert isinstance(executor, StreamExecutor)
    quanta = executor.quanta

    def watched(*args: object) -> Iterator[Quantum]:
        inner = quanta(*args)
        try:
            while True:
                seen.append(next(inner))
                if len(seen) == 5:
                    streamed.abort("long")  # as another thread may
                yield seen[-1]
        except StopIteration as end:
            return end.value
        finally:
            inner.close()

    with monkeypatch.context() as patch:
        patch.setattr(executor, "quanta", watched)
        streamed.add_request("long", ids(200), greedy(4))
        (cancelled,) = streamed.step()
    assert cancelled.outputs[0].finish_reason == "abort"
    assert len(seen) == 5
    assert_idle(streamed)
    (output,) = streamed.generate([ids(200)], greedy(4), use_tqdm=False)
    assert len(output.outputs[0].token_ids) == 4


def test_prompts_in_the_gaps_of_decode_steps_change_no_token_and_compile_nothing(
    folder: Path, monkeypatch: pytest.MonkeyPatch, compilations: list[str]
) -> None:
    """Gaps of a tiny model are shorter than any part of a prompt: steps may be late."""
    wishes: dict[str, Any] = {"executor": "overlap", "expert_cpus": "1", "max_decode_slowdown": 100.0}
    with Engine(folder, prefill="stream", microbatches=1, **OPTIONS, **wishes) as engine:
        (alone,) = engine.generate([ids(40)], greedy(60), use_tqdm=False)
        server, filled, num_compiled = engine._loop.server, [], len(compilations)
        fill = server._fill

        def note(seconds: float) -> bool:
            filled.append(fill(seconds))
            return filled[-1]

        monkeypatch.setattr(server, "_fill", note)
        monkeypatch.setattr(engine._executor.lane, "is_done", lambda *_: False)  # asks even if the experts were faster
        engine.add_request("decoding", ids(40), greedy(60))
        while "decoding" not in outputs_of_steps(engine, 1):
            pass
        engine.add_request("prompt", ids(350, seed=1), greedy(1))
        last = finish(engine)
        assert last["decoding"].outputs[0].token_ids == alone.outputs[0].token_ids
        assert len(last["prompt"].outputs[0].token_ids) == 1
        assert filled.count(True) > 10
        activity = engine.activity()
        assert len(activity.prompt) >= filled.count(True)
        assert activity.copies
        assert {span.name for span in activity.experts} == {"A"}
        engine.add_request("decoding", ids(40), greedy(60))
        while "decoding" not in outputs_of_steps(engine, 1):
            pass
        engine.add_request("later", [*ids(350, seed=1)[:200], *ids(150, seed=2)], greedy(1))
        found = finish(engine)["later"].metrics
        assert engine.metrics().expert_bytes > 0
        assert engine.metrics().expert_gbps > 0
        assert found is not None
        assert found.num_cached_tokens >= 128
        assert compilations[num_compiled:] == []
        assert_idle(engine)


def while_blocked(engine: Engine, monkeypatch: pytest.MonkeyPatch, then: Callable[[threading.Event], None]) -> None:
    """Blocks the devices of prompts after their first quantum, until `then` has returned or set the event."""
    executor, goes_on = engine._executor, threading.Event()
    assert isinstance(executor, StreamExecutor)
    streamed = executor._streamed

    def blocked(prompt: Any) -> Any:
        quanta = streamed(prompt)
        with closing(quanta):
            yield next(quanta)
            goes_on.wait()
            return (yield from quanta)

    with monkeypatch.context() as patch:
        patch.setattr(executor, "_streamed", blocked)
        try:
            then(goes_on)
        finally:
            goes_on.set()


def outputs_of_steps(engine: Engine, count: int) -> list[str]:
    return [output.request_id for _ in range(count) for output in engine.step()]


def finish(engine: Engine) -> dict[str, RequestOutput]:
    last = {}
    while engine.metrics().num_running or engine.metrics().num_waiting:
        last |= {output.request_id: output for output in engine.step()}
    return last


def test_tokens_come_while_a_prompt_is_computed_on_devices_of_its_own(
    apart: Engine, monkeypatch: pytest.MonkeyPatch
) -> None:
    alone = [apart.generate([ids(n, seed=n)], greedy(30), use_tqdm=False)[0].outputs[0] for n in (40, 200)]
    apart.add_request("decoding", ids(40, seed=40), greedy(30))
    while "decoding" not in outputs_of_steps(apart, 1):
        pass

    def then(goes_on: threading.Event) -> None:
        apart.add_request("prompt", ids(200, seed=200), greedy(30))
        assert set(outputs_of_steps(apart, 20)) == {"decoding"}

    while_blocked(apart, monkeypatch, then)
    last = finish(apart)
    assert [last[name].outputs[0].token_ids for name in ("decoding", "prompt")] == [each.token_ids for each in alone]


def test_a_prompt_elsewhere_is_aborted_and_what_it_looked_at_is_freed(
    apart: Engine, monkeypatch: pytest.MonkeyPatch
) -> None:
    def then(goes_on: threading.Event) -> None:
        apart.add_request("prompt", ids(200), greedy(4))
        assert set(outputs_of_steps(apart, 4)) == {"decoding"}
        threading.Timer(0.2, goes_on.set).start()
        apart.abort("prompt")  # waits for what is under way

    apart.add_request("decoding", ids(9), greedy(30))
    while "decoding" not in outputs_of_steps(apart, 1):
        pass
    while_blocked(apart, monkeypatch, then)
    assert finish(apart)["prompt"].outputs[0].finish_reason == "abort"
    assert not [thread for thread in threading.enumerate() if thread.name.startswith("hmoe-prefill")]


def test_a_prompt_that_fails_elsewhere_harms_nobody(apart: Engine, monkeypatch: pytest.MonkeyPatch) -> None:
    (alone,) = apart.generate([ids(9)], greedy(12), use_tqdm=False)
    executor = apart._executor
    assert isinstance(executor, StreamExecutor)
    streamed = executor._streamed

    def failing(prompt: Any) -> Any:
        if prompt.length < 200:
            return (yield from streamed(prompt))
        yield Quantum("front", 0, 1, 0.0)
        raise RuntimeError("out of luck")

    with monkeypatch.context() as patch:
        apart.add_request("decoding", ids(9), greedy(12))
        while "decoding" not in outputs_of_steps(apart, 1):
            pass
        patch.setattr(executor, "_streamed", failing)
        apart.add_request("prompt", ids(200), greedy(4))
        last = finish(apart)
    assert str(last["prompt"].error) == "out of luck"
    assert last["decoding"].outputs[0].token_ids == alone.outputs[0].token_ids


def test_prompts_elsewhere_read_the_same_experts(apart: Engine) -> None:
    executor = apart._executor
    assert isinstance(executor, StreamExecutor)
    assert executor._device not in executor.stream.devices
    store = executor._backend.store
    assert store is not None
    held = [cell for lane in executor.lanes.values() for cell in vars(lane.source).values()]
    assert store in held


def test_what_cannot_be_streamed_is_refused(folder: Path) -> None:
    with pytest.raises(ValueError, match="prefill_devices 4: 'cpu' has 3 devices beside the one that decodes"):
        Engine(folder, prefill="stream", prefill_devices=4, prefill_apart=True, **OPTIONS)
    with pytest.raises(ValueError, match="prefill_apart needs prefill 'stream'"):
        Engine(folder, prefill="step", prefill_apart=True, **OPTIONS)
    with pytest.raises(ValueError, match="prefill 'stream' needs executor 'fused'"):
        Engine(folder, prefill="stream", executor="graph", **OPTIONS)
    with pytest.raises(ValueError, match="prefill_devices 9: 'cpu' has 4 devices"):
        Engine(folder, prefill="stream", prefill_devices=9, **OPTIONS)
    with pytest.raises(ValueError, match="prefill_devices 2 needs prefill 'stream'"):
        Engine(folder, prefill_devices=2, **OPTIONS)
    with pytest.raises(ValueError, match="link_gbps must be above 0, got 0"):
        Engine(folder, prefill="stream", link_gbps=0, **OPTIONS)
    with pytest.raises(ValueError, match="prefill must be one of auto, step, stream, got 'slp'"):
        Engine(folder, prefill="slp", **OPTIONS)


def test_routes_are_those_of_the_other_executor(folder: Path, streamed: Engine) -> None:
    params = greedy(1, return_routed_experts=True)
    (a,) = streamed.generate([ids(40)], params, use_tqdm=False)
    with Engine(folder, warm_up=False, **OPTIONS) as fused:
        (b,) = fused.generate([ids(40)], params, use_tqdm=False)
    same = np.sort(a.outputs[0].routed_experts) == np.sort(b.outputs[0].routed_experts)
    assert same.mean() > 0.95  # but for near ties


@pytest.mark.parametrize("prefill", ["step", "stream"])
@pytest.mark.parametrize("left", [4096, 0.9999])
def test_a_checkpoint_that_is_cut_off_while_it_is_mapped_is_an_error(tmp_path: Path, prefill: str, left: float) -> None:
    """Nearly all of it, and the last bytes of the last page, of which the system says nothing."""
    folder = write_tiny(tmp_path / "model", MODEL, num_shards=3)
    options = {**OPTIONS, "skip_tokenizer_init": True, "warm_up": False}
    with Engine(folder, prefill=prefill, **options) as engine:
        (before,) = engine.generate([ids(20)], greedy(3), use_tqdm=False)
        assert len(before.outputs[0].token_ids) == 3
        path = folder / "model-00002-of-00003.safetensors"
        with path.open("r+b") as file:
            file.truncate(int(left * path.stat().st_size) if left < 1 else int(left))
        for _ in range(2):
            with pytest.raises(CheckpointError, match=r"model-00002-of-00003.* was cut off while it was mapped"):
                engine.generate([ids(20)], greedy(3), use_tqdm=False)


def test_a_prompt_after_decoding_sees_what_was_decoded(folder: Path) -> None:
    """On two devices, of which decoding writes to the cache of one."""
    tokens = ids(40)
    with (
        load_for_scoring(folder, max_model_len=200) as fused,
        load_for_scoring(folder, max_model_len=200, prefill="stream", prefill_devices=2) as streamed,
    ):
        rows = []
        for scorer in (fused, streamed):
            scorer.logits(tokens[:20])
            for position in range(20, 30):
                scorer.next_logits(tokens[position], position)
            rows.append(scorer.logits(tokens[30:], start=30))
    error = np.linalg.norm(rows[0] - rows[1], axis=-1) / np.linalg.norm(rows[0], axis=-1)
    assert np.median(error) < 0.05  # BF16; a router may turn a near tie


def test_two_engines_stream_side_by_side(folder: Path, streamed: Engine) -> None:
    prompts = [ids(200, seed=7), ids(150, seed=8)]
    alone = [streamed.generate(prompt, greedy(4), use_tqdm=False)[0].outputs[0].token_ids for prompt in prompts]
    with (
        Engine(folder, prefill="stream", prefill_devices=2, warm_up=False, **OPTIONS) as other,
        ThreadPoolExecutor(2) as threads,
    ):
        engines = (streamed, other)
        running = [
            threads.submit(engine.generate, prompt, greedy(4), use_tqdm=False)
            for engine, prompt in zip(engines, prompts, strict=True)
            for _ in range(2)
        ]
        together = [each.result()[0].outputs[0].token_ids for each in running]
    assert together == [alone[0], alone[0], alone[1], alone[1]]


def test_a_pinned_engine_writes_the_same_text(
    folder: Path, streamed: Engine, driver: StandInDriver, caplog: pytest.LogCaptureFixture
) -> None:
    prompt = ids(90, seed=9)
    (expected,) = streamed.generate(prompt, greedy(4), use_tqdm=False)
    with Engine(folder, prefill="stream", residency="pinned", warm_up=False, **OPTIONS) as engine:
        assert driver.pinned_bytes > 0
        (actual,) = engine.generate(prompt, greedy(4), use_tqdm=False)
    gc.collect()  # JAX lets NumPy's memory go then
    assert driver.pinned_bytes == 0
    assert actual.outputs[0].token_ids == expected.outputs[0].token_ids
    assert "not pinned" not in caplog.text


def test_what_cannot_be_pinned_is_used_and_said_once(
    folder: Path, driver: StandInDriver, caplog: pytest.LogCaptureFixture
) -> None:
    driver.fail("cuMemHostRegister_v2")
    with Engine(folder, residency="pinned", warm_up=False, **OPTIONS) as engine:
        (output,) = engine.generate(ids(5), greedy(2), use_tqdm=False)
    assert len(output.outputs[0].token_ids) == 2
    (said,) = [message for message in caplog.messages if "not pinned" in message]
    assert "cuMemHostRegister: out of memory" in said


def test_prompts_are_streamed_from_the_length_that_gains(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, compilations: list[str]
) -> None:
    """On a machine whose CPU multiplies slowly beside its link and its device."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    slow = {
        "expert_gbps": 100.0,
        "expert_tflops": 0.001,
        "link_gbps": 0.05,
        "grouped_tflops": 10.0,
        "unpack_gbps": 100.0,
    }
    save_rates(replace(UNMEASURED_CPU, name=machine_name(jax.devices("cpu")[0]), **slow))
    with Engine(folder, **OPTIONS) as engine:
        stream = engine.plan.stream
        assert stream is not None
        assert 20 < stream.least_tokens < 300
        executor, streamed_lengths = engine._executor, []
        assert isinstance(executor, StreamExecutor)
        streamed = executor._streamed

        def note(prompt: Any) -> Any:
            streamed_lengths.append(prompt.length)
            return streamed(prompt)

        monkeypatch.setattr(executor, "_streamed", note)
        num_compiled = len(compilations)
        prompts = [ids(length) for length in (5, stream.least_tokens - 1, stream.least_tokens, 350)]
        params = greedy(2, prompt_logprobs=0)
        outputs = [engine.generate(prompt, params, use_tqdm=False)[0] for prompt in prompts]
        assert compilations[num_compiled:] == []
    assert streamed_lengths == [stream.least_tokens, 350]
    assert [len(output.prompt_logprobs) for output in outputs] == [len(prompt) for prompt in prompts]
