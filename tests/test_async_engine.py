"""The engine under asyncio: iterators that end, are dropped, cancelled and closed."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import aclosing
from typing import Any

import pytest

from hmoe_jax.async_engine import AsyncEngine
from hmoe_jax.engine import Engine
from hmoe_jax.outputs import RequestOutput
from tests.serving import NUM_SLOTS, drawn, greedy, prompt, tokens

Run = Callable[[Callable[[AsyncEngine], Awaitable[Any]]], Any]


@pytest.fixture
def serve(engine: Engine, monkeypatch: pytest.MonkeyPatch) -> Run:
    """Runs a function of an `AsyncEngine` in an event loop, and leaves the engine open."""

    def run(use: Callable[[AsyncEngine], Awaitable[Any]]) -> Any:
        async def main() -> Any:
            async with asyncio.timeout(60), AsyncEngine(engine) as served:
                result = await use(served)
                while engine.has_unfinished_requests:  # what was dropped is ended by the thread
                    await asyncio.sleep(0.01)
                return result

        with monkeypatch.context() as patch:
            patch.setattr(engine, "close", lambda *, drains=False: None)
            return asyncio.run(main())

    return run


def fail(*_: object) -> None:
    raise RuntimeError("no row today")


async def last(outputs: AsyncIterator[RequestOutput]) -> RequestOutput:
    async for output in outputs:
        latest = output
    return latest


def test_many_at_once_get_what_each_gets_alone(engine: Engine, serve: Run) -> None:
    prompts = [prompt(3 + 9 * i, seed=i) for i in range(2 * NUM_SLOTS)]
    params = [drawn(5 + i, seed=i) for i in range(2 * NUM_SLOTS)]
    want = tokens(engine.generate(prompts, params, use_tqdm=False))

    async def use(served: AsyncEngine) -> list[RequestOutput]:
        return await asyncio.gather(*(last(served.generate(p, q)) for p, q in zip(prompts, params, strict=True)))

    assert tokens(serve(use)) == want


def test_outputs_grow_and_the_last_one_is_finished(serve: Run) -> None:
    async def use(served: AsyncEngine) -> list[RequestOutput]:
        return [output async for output in served.generate(prompt(4), greedy(6))]

    outputs = serve(use)
    lengths = [len(output.outputs[0].token_ids) for output in outputs]
    assert lengths == sorted(set(lengths))
    assert lengths[-1] == 6
    assert [output.finished for output in outputs] == [False] * (len(outputs) - 1) + [True]


def test_an_iterator_that_is_closed_aborts_its_request(engine: Engine, serve: Run) -> None:
    async def use(served: AsyncEngine) -> None:
        async with aclosing(served.generate(prompt(4), greedy(300))) as outputs:
            async for _ in outputs:
                break

    before = engine.metrics().num_finished.get("abort", 0)
    serve(use)
    assert engine.metrics().num_finished["abort"] == before + 1


def test_a_task_that_is_cancelled_aborts_its_request_and_no_other(engine: Engine, serve: Run) -> None:
    want = tokens(engine.generate([prompt(5)], greedy(30), use_tqdm=False))

    async def use(served: AsyncEngine) -> RequestOutput:
        doomed = asyncio.create_task(last(served.generate(prompt(4), greedy(300))))
        other = asyncio.create_task(last(served.generate(prompt(5), greedy(30))))
        await asyncio.sleep(0.05)
        doomed.cancel()
        with pytest.raises(asyncio.CancelledError):
            await doomed
        return await other

    assert tokens([serve(use)]) == want


def test_an_abort_by_id_ends_the_iterator_with_an_output_that_says_so(serve: Run) -> None:
    async def use(served: AsyncEngine) -> RequestOutput:
        outputs = served.generate(prompt(4), greedy(300), request_id="mine")
        await anext(outputs)
        served.abort("mine")
        return await last(outputs)

    assert serve(use).outputs[0].finish_reason == "abort"


def test_refusals_and_failures_are_raised_where_the_request_is_read(
    engine: Engine, serve: Run, monkeypatch: pytest.MonkeyPatch
) -> None:
    async def use(served: AsyncEngine) -> None:
        with pytest.raises(ValueError, match="the prompt is empty"):
            await last(served.generate([], greedy(3)))
        twice = served.generate(prompt(4), greedy(50), request_id="one")
        await anext(twice)
        with pytest.raises(ValueError, match="request_id 'one' is in use"):
            await last(served.generate(prompt(4), greedy(3), request_id="one"))
        await twice.aclose()
        with monkeypatch.context() as patch:
            patch.setattr(engine._loop.server, "_sampler_row", fail)
            with pytest.raises(RuntimeError, match="no row today"):
                await last(served.generate(prompt(4), greedy(3)))

    serve(use)


def test_an_id_of_somebody_elses_is_refused_and_left_alone(engine: Engine, serve: Run) -> None:
    async def use(served: AsyncEngine) -> None:
        engine.add_request("theirs", prompt(4), greedy(5))
        with pytest.raises(ValueError, match="request_id 'theirs' is in use"):
            await last(served.generate(prompt(4), greedy(3), request_id="theirs"))
        served._wakes.set()

    before = engine.metrics().num_finished.get("length", 0)
    serve(use)
    assert engine.metrics().num_finished["length"] == before + 1


def test_a_thread_that_ends_tells_all_who_wait_and_all_who_come(
    engine: Engine, serve: Run, monkeypatch: pytest.MonkeyPatch
) -> None:
    def step() -> list[RequestOutput]:
        raise RuntimeError("no step today")

    async def use(served: AsyncEngine) -> None:
        with monkeypatch.context() as patch:
            patch.setattr(engine, "step", step)
            for _ in range(2):
                with pytest.raises(RuntimeError, match="no step today"):
                    await last(served.generate(prompt(4), greedy(3)))
        while engine.has_unfinished_requests:
            engine.step()

    serve(use)


def test_closing_aborts_or_drains(served_folder: Any) -> None:
    async def use(drains: bool) -> RequestOutput:
        options = {"max_model_len": 40, "warm_up": False, "compilation_cache": None, "use_tqdm": False}
        served = AsyncEngine(Engine(served_folder, **options))
        reading = asyncio.create_task(last(served.generate(prompt(3), greedy(20))))
        await asyncio.sleep(0)
        await served.close(drains=drains)
        await served.close()
        assert not served._thread.is_alive()
        return await reading

    assert asyncio.run(use(True)).outputs[0].finish_reason == "length"
    assert asyncio.run(use(False)).outputs[0].finish_reason == "abort"
