"""The engine for asyncio: a thread of its own runs the steps, every request is an asynchronous iterator."""

from __future__ import annotations

import asyncio
import itertools
import threading
from collections.abc import AsyncIterator

from hmoe_jax.engine import Engine
from hmoe_jax.meters import EngineMetrics
from hmoe_jax.outputs import RequestOutput
from hmoe_jax.prompts import Prompt
from hmoe_jax.sampling_params import SamplingParams


class AsyncEngine:
    """Serves an `Engine`'s requests in the background. An asynchronous context manager, which closes the engine.

    Its methods may be called from any event loop. The thread sleeps while there is nothing to compute. The engine's own
    `generate` and `stream` still work from other threads; `step` is this object's.
    """

    def __init__(self, engine: Engine):
        self.engine = engine
        self._ids = itertools.count()
        self._streams: dict[str, _Stream] = {}
        self._wakes, self._is_closing = threading.Event(), False
        self._error: Exception | None = None
        self._thread = threading.Thread(target=self._run, name="hmoe-async", daemon=True)
        self._thread.start()

    async def generate(
        self,
        prompt: Prompt,
        sampling_params: SamplingParams | None = None,
        *,
        request_id: str | None = None,
        priority: int = 0,
        timeout_s: float | int | None = None,
    ) -> AsyncIterator[RequestOutput]:
        """The output so far whenever there is more of it; the last one is finished. One that comes while its reader is
        busy takes the place of the one before it.

        Arguments and errors are those of `Engine.add_request`; an error that ends the request is raised. Closing the
        iterator, or cancelling the task that reads it, aborts the request.
        """
        request_id = request_id if request_id is not None else f"async-{next(self._ids)}"
        if request_id in self._streams:
            raise ValueError(f"request_id {request_id!r} is in use")
        stream, is_added = _Stream(asyncio.get_running_loop()), False
        self._streams[request_id] = stream
        try:
            if self._error is not None:  # not earlier: from now on the thread tells the stream when it ends
                raise self._error.with_traceback(None)
            self.engine.add_request(request_id, prompt, sampling_params, priority=priority, timeout_s=timeout_s)
            finished, is_added = False, True
            self._wakes.set()
            while not finished:
                output = await stream.next()
                if output.error is not None:
                    raise output.error
                finished = output.finished
                yield output
        finally:
            del self._streams[request_id]
            if is_added:
                self.abort(request_id)

    def abort(self, request_id: str) -> None:
        """Ends a request: its iterator gets a last output. Does nothing for an id that is not in use."""
        self.engine.abort(request_id)
        self._wakes.set()

    def metrics(self) -> EngineMetrics:
        return self.engine.metrics()

    async def close(self, *, drains: bool = False) -> None:
        """Closes the engine as `Engine.close` does, and ends the thread. Twice is fine."""
        await asyncio.to_thread(self._close, drains)

    async def __aenter__(self) -> AsyncEngine:
        return self

    async def __aexit__(self, *exception: object) -> None:
        await self.close()

    def _close(self, drains: bool) -> None:
        self.engine.close(drains=drains)
        self._is_closing = True
        self._wakes.set()
        self._thread.join()

    def _run(self) -> None:
        try:
            while not self._is_closing:
                self._wakes.wait()
                self._wakes.clear()
                while self.engine.has_unfinished_requests and self._deliver():
                    pass
            self._deliver()  # what closing has aborted meanwhile
        except Exception as error:  # ours, not a request's: nobody shall wait for a thread that is gone
            self._error = error
            for stream in list(self._streams.values()):
                stream.put(error)

    def _deliver(self) -> bool:
        """One step, and its outputs to those who read them. False if there will be no other."""
        for output in self.engine.step():
            stream = self._streams.get(output.request_id)
            if stream is not None and not stream.put(output):
                self.engine.abort(output.request_id)
        return not self._is_closing


class _Stream:
    """The latest output of one request, or why there will be none, on its way to an event loop."""

    def __init__(self, loop: asyncio.AbstractEventLoop):
        self._loop, self._has_come = loop, asyncio.Event()
        self._latest: RequestOutput | Exception | None = None

    def put(self, latest: RequestOutput | Exception) -> bool:
        """From any thread. False if nobody can read it any more."""
        self._latest = latest
        try:
            self._loop.call_soon_threadsafe(self._has_come.set)
        except RuntimeError:  # the loop is closed
            return False
        return True

    async def next(self) -> RequestOutput:
        while self._latest is None:
            self._has_come.clear()
            if self._latest is None:
                await self._has_come.wait()
        latest, self._latest = self._latest, None
        if isinstance(latest, Exception):
            raise latest
        return latest
