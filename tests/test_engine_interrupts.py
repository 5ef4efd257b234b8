"""Requests that do not end by themselves: closed streams, Ctrl-C, failing steps, closed engines.

That nothing is held afterwards is checked by the fixture `engine`, after every test.
"""

from __future__ import annotations

import gc
import signal
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import jax
import numpy as np
import pytest

from hmoe_jax.engine import Engine
from tests.serving import NUM_SLOTS, assert_idle, drawn, greedy, prompt, tokens
from tests.tiny import write_tiny

REQUEST = ([prompt(40)], drawn(8, seed=21))


Inject = Callable[[int, Callable[[], object]], None]


@pytest.fixture(autouse=True)
def listening_to_ctrl_c() -> Iterator[None]:
    """A shell starts background jobs with SIGINT ignored, and Python leaves it so."""
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    yield
    signal.signal(signal.SIGINT, before)


@pytest.fixture
def in_step(engine: Engine, monkeypatch: pytest.MonkeyPatch) -> Inject:
    """Calls a function in the middle of step number n of the test (from 0): when the state of before is gone."""
    find, num_steps = engine._executor._program, 0

    def install(number: int, action: Callable[[], object]) -> None:
        def program(*args: Any) -> Any:
            nonlocal num_steps
            num_steps += 1
            result = find(*args)
            return result if num_steps - 1 != number else lambda *operands: (result(*operands), action())[0]

        monkeypatch.setattr(engine._executor, "_program", program)

    return install


@pytest.fixture
def before_step(engine: Engine, monkeypatch: pytest.MonkeyPatch) -> Inject:
    """Calls a function before step number n of the test (from 0)."""
    run, num_steps = engine._executor._run_program, 0

    def install(number: int, action: Callable[[], object]) -> None:
        def patched(*args: Any) -> Any:
            nonlocal num_steps
            num_steps += 1
            if num_steps - 1 == number:
                action()
            return run(*args)

        monkeypatch.setattr(engine._executor, "_run_program", patched)

    return install


def press_ctrl_c() -> None:
    """What a terminal does."""
    signal.pthread_kill(threading.main_thread().ident, signal.SIGINT)


def fail() -> None:
    raise RuntimeError("out of luck")


def test_closing_a_stream_aborts_its_request(engine: Engine) -> None:
    stream = engine.stream(prompt(6), greedy(50))
    next(stream)
    assert engine._scheduler.num_free_slots == NUM_SLOTS - 1
    stream.close()
    assert_idle(engine)


def test_a_stream_can_be_dropped_inside_a_long_prompt(engine: Engine) -> None:
    stream = engine.stream(prompt(100), drawn(5, seed=1, n=3))
    next(stream)
    del stream
    assert_idle(engine)


def test_a_stream_that_is_never_read_holds_nothing(engine: Engine) -> None:
    stream = engine.stream(prompt(6), greedy(5))
    assert_idle(engine)
    stream.close()


def test_a_stream_that_still_waits_for_a_slot_can_be_closed(engine: Engine) -> None:
    streams = [engine.stream(prompt(6, seed=i), greedy(50)) for i in range(NUM_SLOTS + 1)]
    while engine._scheduler.num_free_slots:
        for stream in streams:
            next(stream)
    assert engine.metrics().num_waiting == 1
    streams.pop().close()
    for stream in streams:
        stream.close()


def test_closing_one_stream_does_not_touch_another(engine: Engine) -> None:
    want = tokens(engine.generate(*REQUEST, use_tqdm=False))
    other, mine = engine.stream(prompt(50), greedy(50)), engine.stream(REQUEST[0][0], REQUEST[1])
    next(mine)
    next(other)
    next(mine)
    other.close()
    assert tokens([list(mine)[-1]]) == want


@pytest.mark.parametrize("number", [0, 1, 5])
def test_ctrl_c_in_generate_leaves_the_engine_as_it_was(engine: Engine, in_step: Inject, number: int) -> None:
    want = tokens(engine.generate(*REQUEST, use_tqdm=False))
    in_step(number, press_ctrl_c)
    with pytest.raises(KeyboardInterrupt):
        engine.generate([prompt(33), prompt(4)] * 8, greedy(30), use_tqdm=False)
    assert_idle(engine)
    assert tokens(engine.generate(*REQUEST, use_tqdm=False)) == want


def test_ctrl_c_of_one_request_does_not_touch_another(engine: Engine, in_step: Inject) -> None:
    want = tokens(engine.generate(*REQUEST, use_tqdm=False))
    other = engine.stream(REQUEST[0][0], REQUEST[1])
    next(other)
    # By then each step computes a token for both.
    in_step(4, press_ctrl_c)
    with pytest.raises(KeyboardInterrupt):
        engine.generate([prompt(6)], greedy(30), use_tqdm=False)
    assert tokens([list(other)[-1]]) == want


@pytest.mark.parametrize("number", [0, 1, 2, 5])
def test_a_step_that_fails_once_is_run_again_and_costs_nobody_a_token(
    engine: Engine, before_step: Inject, number: int, caplog: pytest.LogCaptureFixture
) -> None:
    requests = ([prompt(33), prompt(4)], drawn(9, seed=3, repetition_penalty=1.3))
    want = tokens(engine.generate(*requests, use_tqdm=False))
    before_step(number, fail)
    assert tokens(engine.generate(*requests, use_tqdm=False)) == want
    assert "failed and is run again: out of luck" in caplog.text


def test_jax_may_forget_its_programs_and_serving_compiles_none_again(engine: Engine, before_step: Inject) -> None:
    # In a long-lived process other programs push them out of JAX's caches. That nothing compiles, the fixture checks.
    before_step(1, fail)
    jax.clear_caches()
    engine.generate([prompt(33)], greedy(9), use_tqdm=False)
    engine.generate(*REQUEST, use_tqdm=False)


@pytest.mark.parametrize("name", ["plain", "mscales"])
def test_closing_an_engine_frees_its_arrays_and_ends_its_thread(tmp_path: Path, name: str) -> None:
    def held() -> tuple[int, int]:
        gc.collect()
        threads = [thread for thread in threading.enumerate() if thread.name.startswith("hmoe-step")]
        return sum(array.nbytes for array in jax.live_arrays()), len(threads)

    before = held()
    with cold_engine(write_tiny(tmp_path, name), skip_tokenizer_init=True) as engine:
        engine._loop._stepper.submit(lambda: None).result()
        assert min(np.subtract(held(), before)) > 0
    assert held() == before


def test_an_engine_closed_under_a_stream_ends_it(served_folder: Path) -> None:
    engine = cold_engine(served_folder)
    engine._loop.server.step = lambda _: None  # nothing to compile for
    stream = engine.stream(prompt(3), greedy(9))
    next(stream)
    engine.close()
    with pytest.raises(ValueError, match="the engine is closed"):
        next(stream)
    stream.close()


def cold_engine(folder: Path, **options: Any) -> Engine:
    """Opens in a moment, as nothing is compiled."""
    wishes = {"max_model_len": 40, "max_num_seqs": 2, "warm_up": False, "compilation_cache": None, "use_tqdm": False}
    return Engine(folder, **wishes, **options)


def test_a_stream_that_the_garbage_collector_finds_inside_a_step_is_aborted_after_it(
    engine: Engine, before_step: Inject
) -> None:
    want = tokens(engine.generate(*REQUEST, use_tqdm=False))
    stream = engine.stream(prompt(3), greedy(9))
    next(stream)
    cycle: list[object] = [stream]
    cycle.append(cycle)
    del stream, cycle
    before_step(0, gc.collect)
    assert tokens(engine.generate(*REQUEST, use_tqdm=False)) == want


@pytest.mark.parametrize("number", [0, 2, 6])
def test_a_program_that_fails_in_the_middle_costs_nobody_a_token(engine: Engine, in_step: Inject, number: int) -> None:
    want = tokens(engine.generate(*REQUEST, use_tqdm=False))
    in_step(number, fail)
    assert tokens(engine.generate(*REQUEST, use_tqdm=False)) == want


def test_ctrl_c_in_a_step_that_fails_leaves_a_usable_engine(engine: Engine, in_step: Inject) -> None:
    want = tokens(engine.generate(*REQUEST, use_tqdm=False))

    def fail() -> None:
        signal.raise_signal(signal.SIGINT)
        raise RuntimeError("the device is on fire")

    in_step(2, fail)
    with pytest.raises((KeyboardInterrupt, RuntimeError)):
        engine.generate(*REQUEST, use_tqdm=False)
    assert tokens(engine.generate(*REQUEST, use_tqdm=False)) == want
