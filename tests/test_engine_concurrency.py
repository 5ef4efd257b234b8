"""Requests that come, wait, share and go: through `add_request`, `step` and `abort`, on the graph executor."""

from __future__ import annotations

import random
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import pytest

from hmoe_jax.core import QueueFullError
from hmoe_jax.engine import Engine
from hmoe_jax.exec.plan import PAGE_SIZE
from hmoe_jax.outputs import RequestOutput
from tests.serving import NUM_SLOTS, drawn, greedy, prompt, tokens


def run(engine: Engine) -> dict[str, RequestOutput]:
    """The last output of every request."""
    last = {}
    for _ in range(5000):
        last |= {output.request_id: output for output in engine.step()}
        if not engine.has_unfinished_requests:
            return last
    raise AssertionError("somebody starves")


def alone(engine: Engine, ids: list[int], params: Any) -> list[int]:
    return tokens(engine.generate([ids], params, use_tqdm=False))[0]


def test_steps_return_what_has_changed_and_the_last_output_is_whole(engine: Engine) -> None:
    engine.add_request("a", prompt(5), greedy(3))
    engine.add_request("b", prompt(6), greedy(1))
    seen: dict[str, list[int]] = {"a": [], "b": []}
    while engine.has_unfinished_requests:
        for output in engine.step():
            seen[output.request_id].append(len(output.outputs[0].token_ids))
    assert seen == {"a": [1, 2, 3], "b": [1]}
    assert engine.step() == []


def test_random_companions_change_no_token(engine: Engine) -> None:
    draw = random.Random(5)
    params = drawn(40, seed=3, temperature=1.2, repetition_penalty=1.2)
    want = alone(engine, prompt(50), params)
    engine.add_request("mine", prompt(50), params)
    mine, number = None, 0
    while mine is None or not mine.finished:
        if draw.random() < 0.4:
            number += 1
            engine.add_request(str(number), prompt(draw.randrange(1, 120), seed=number), drawn(9, seed=number))
        if number and draw.random() < 0.2:
            engine.abort(str(draw.randrange(number)))
        for output in engine.step():
            mine = output if output.request_id == "mine" else mine
    run(engine)
    assert tokens([mine]) == [want]


def test_requests_with_a_common_beginning_find_it_and_get_the_same_tokens(engine: Engine) -> None:
    system = prompt(3 * PAGE_SIZE + 10, seed=31)
    params = greedy(4, logprobs=3)
    engine.add_request("cold", {"prompt_token_ids": [*system, 5], "cache_salt": "of nobody else"}, params)
    cold = run(engine)["cold"]
    engine.generate([[*system, 9]], greedy(1), use_tqdm=False)
    warm = engine.generate([[*system, 5]], params, use_tqdm=False)[0]
    assert (cold.metrics.num_cached_tokens, warm.metrics.num_cached_tokens) == (0, 3 * PAGE_SIZE)
    assert tokens([warm]) == tokens([cold])
    assert warm.outputs[0].logprobs == cold.outputs[0].logprobs


def test_sequences_of_one_request_compute_its_prompt_once(engine: Engine) -> None:
    before = engine.metrics()
    engine.generate([prompt(2 * PAGE_SIZE + 3, seed=77)], drawn(3, seed=1, n=4), use_tqdm=False)
    after = engine.metrics()
    assert after.num_cached_tokens - before.num_cached_tokens == 3 * 2 * PAGE_SIZE
    assert after.num_prompt_tokens - before.num_prompt_tokens == 2 * PAGE_SIZE + 4 * 3


def test_pages_run_out_and_everybody_gets_the_same_tokens(engine: Engine) -> None:
    # 11 pages: three sequences begin with 2 each, and grow to 5.
    ids = [prompt(70 + i, seed=40 + i) for i in range(3)]
    params = [drawn(240, seed=i, frequency_penalty=0.3) for i in range(3)]
    want = [alone(engine, *each) for each in zip(ids, params, strict=True)]
    before = engine.metrics().num_preemptions
    outputs = engine.generate(ids, params, use_tqdm=False)
    assert tokens(outputs) == want
    assert engine.metrics().num_preemptions > before
    assert outputs[0].metrics.num_preemptions == 0


def test_a_preempted_request_keeps_its_routes_and_prompt_logprobs_once(engine: Engine) -> None:
    ids = [prompt(70, seed=60), prompt(70, seed=61)]
    params = [greedy(245), greedy(200, prompt_logprobs=1, return_routed_experts=True, logprobs=1)]
    (want,) = engine.generate([ids[1]], params[1], use_tqdm=False)
    blocker = [prompt(300, seed=62)], greedy(20)
    engine.add_request("first", ids[0], params[0])
    engine.add_request("second", ids[1], params[1])
    engine.add_request("third", blocker[0][0], blocker[1])
    got = run(engine)["second"]
    assert tokens([got]) == tokens([want])
    assert got.outputs[0].routed_experts.shape == want.outputs[0].routed_experts.shape
    assert (got.outputs[0].routed_experts == want.outputs[0].routed_experts).all()
    assert len(got.prompt_logprobs) == len(want.prompt_logprobs) == 70


def test_priorities_go_first(engine: Engine) -> None:
    for i in range(NUM_SLOTS):
        engine.add_request(f"running{i}", prompt(2, seed=i), greedy(60))
    while engine.metrics().num_running < NUM_SLOTS:
        engine.step()
    engine.add_request("late", prompt(3), greedy(2))
    engine.add_request("urgent", prompt(3), greedy(2), priority=-1)
    outputs = run(engine)
    assert outputs["urgent"].metrics.queue_s < outputs["late"].metrics.queue_s


def test_a_request_ends_at_its_deadline(engine: Engine) -> None:
    engine.add_request("late", prompt(3), greedy(300), timeout_s=0.0)
    engine.add_request("fine", prompt(3), greedy(3), timeout_s=float("inf"))
    outputs = run(engine)
    assert (outputs["late"].outputs[0].finish_reason, outputs["late"].outputs[0].token_ids) == ("timeout", ())
    assert outputs["fine"].outputs[0].finish_reason == "length"


def test_an_aborted_request_says_so_and_its_id_can_be_used_again(engine: Engine) -> None:
    engine.add_request("a", prompt(5), greedy(50))
    engine.step()
    engine.abort("a")
    engine.abort(["a", "unknown"])
    output = run(engine)["a"]
    assert (output.outputs[0].finish_reason, output.finished, output.error) == ("abort", True, None)
    engine.add_request("a", prompt(5), greedy(1))
    assert run(engine)["a"].outputs[0].finish_reason == "length"


def test_what_is_refused_leaves_nothing_behind(engine: Engine) -> None:
    engine.add_request("a", prompt(5), greedy(3))
    for arguments, message in [
        (("a", prompt(5)), "request_id 'a' is in use"),
        (("b", []), "the prompt is empty"),
        (("b", {"prompt_token_ids": prompt(5), "cache_salt": ""}), "cache_salt must be a printable text"),
        (("b", {"prompt_token_ids": prompt(5), "cache_salt": "\ud800"}), "cache_salt must be a printable text"),
    ]:
        with pytest.raises(ValueError, match=message):
            engine.add_request(*arguments)
    with pytest.raises(ValueError, match="timeout_s must not be negative, got -1"):
        engine.add_request("b", prompt(5), timeout_s=-1)
    assert set(run(engine)) == {"a"}


def test_a_full_queue_refuses_and_generate_waits_for_room(engine: Engine, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(engine._loop.server, "_max_waiting", 2)
    for i in range(2):
        engine.add_request(str(i), prompt(3), greedy(2))
    with pytest.raises(QueueFullError, match="2 sequences wait, max_num_waiting is 2"):
        engine.add_request("2", prompt(3), greedy(2))
    assert len(engine.generate([prompt(3)] * 9, greedy(2), use_tqdm=False)) == 9
    assert engine.metrics().num_refused >= 1
    run(engine)


def test_metrics_count_what_was_served(engine: Engine) -> None:
    before = engine.metrics()
    engine.generate([prompt(20, seed=90 + i) for i in range(4)], greedy(6), use_tqdm=False)
    after = engine.metrics()

    def grown(name: str) -> Any:
        return getattr(after, name) - getattr(before, name)

    assert (grown("num_requests"), grown("num_prompt_tokens"), grown("num_generated_tokens")) == (4, 80, 24)
    assert after.num_finished["length"] - before.num_finished.get("length", 0) == 4
    assert [getattr(after, name).num - getattr(before, name).num for name in ("ttft", "itl", "tpot", "e2e")] == [
        4,
        20,
        4,
        4,
    ]
    config = engine.config
    num_routed = grown("routing_counts")
    assert num_routed.shape == (config.num_moe_layers, config.num_experts)
    assert (num_routed.sum(axis=1) == (80 + 20) * config.top_k).all()
    assert (after.num_running, after.num_waiting, after.num_free_pages) == (0, 0, after.num_pages)
    assert 1 <= after.tokens_per_step <= NUM_SLOTS
    assert after.queue.num - before.queue.num == 4
    assert after.num_kept_pages <= after.num_free_pages
    assert after.ttft.quantile_s(0.5) <= after.e2e.quantile_s(0.5)


def test_a_generate_in_another_thread_is_served_while_the_engine_drains(served_folder: Any) -> None:
    options = {"max_model_len": 40, "warm_up": False, "compilation_cache": None, "use_tqdm": False}
    engine = Engine(served_folder, **options)
    engine.generate([prompt(3)], greedy(2), use_tqdm=False)  # compiles
    with ThreadPoolExecutor(1) as threads:
        generated = threads.submit(engine.generate, [prompt(3)], greedy(30), use_tqdm=False)
        while not engine.metrics().num_running:
            time.sleep(0.001)
        engine.close(drains=True)
        assert len(tokens(generated.result())[0]) == 30


@pytest.mark.parametrize("priority", [True, float("nan")], ids=repr)
def test_a_priority_is_an_integer(engine: Engine, priority: Any) -> None:
    with pytest.raises((ValueError, TypeError), match="priority"):
        engine.add_request("b", prompt(5), priority=priority)


def test_an_empty_id_is_an_id(engine: Engine) -> None:
    engine.add_request("", prompt(5), greedy(2))
    assert set(run(engine)) == {""}


def test_a_request_that_another_thread_finishes_is_returned_once(engine: Engine) -> None:
    engine.add_request("a", prompt(5), greedy(2))
    outputs, take = [], engine._loop.server.take_changed

    def slow() -> list[Any]:
        changed = take()
        engine._loop.step_if_open()  # as another thread's `generate` does
        return changed

    engine._loop.server.take_changed = slow
    try:
        while engine.has_unfinished_requests:
            outputs += engine.step()
        outputs += engine.step()
    finally:
        del engine._loop.server.take_changed
    assert [output.finished for output in outputs] == [True]


def test_closing_with_a_drain_serves_what_was_accepted(served_folder: Any) -> None:
    engine = Engine(served_folder, max_model_len=40, warm_up=False, compilation_cache=None, use_tqdm=False)
    engine.add_request("a", prompt(3), greedy(4))
    closing = threading.Thread(target=engine.close, kwargs={"drains": True})
    closing.start()
    closing.join()
    (output,) = engine.step()
    assert len(output.outputs[0].token_ids) == 4
    with pytest.raises(ValueError, match="the engine is closed"):
        engine.add_request("b", prompt(3), greedy(4))
