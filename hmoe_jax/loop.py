"""The serving loop: requests of any number of threads through one server, step by step."""

from __future__ import annotations

import threading
from collections.abc import Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor, wait

from hmoe_jax.core import QueueFullError
from hmoe_jax.request import Request
from hmoe_jax.server import ServedExecutor, Server


class ServingLoop:
    """Drives the server, and closes the executor in the end.

    Whoever waits for a request runs the steps, for all requests; a lock keeps it one step at a time.
    """

    def __init__(self, server: Server, executor: ServedExecutor):
        self.server, self._executor = server, executor
        self._lock = threading.Lock()
        self._is_interrupted = False
        self._stepper = ThreadPoolExecutor(1, thread_name_prefix="hmoe-step")
        self._accepts, self._is_closing, self._is_closed = True, False, False

    def add(self, request: Request) -> None:
        """Queues a request, without waiting for a step. Raises what `Server.submit` raises, and `ValueError` if
        closed.
        """
        if not self._accepts:
            raise ValueError("the engine is closed")
        self.server.submit(request)

    def abort(self, requests: Iterable[Request]) -> None:
        """Ends what is left of them: at once, or when the part of a step is over that is being computed.

        May run anywhere, even inside a step, if the garbage collector finds a stream there: then the lock is taken, and
        its holder ends the requests before it computes on.
        """
        self.server.abort(sequence for request in requests for sequence in request.sequences)
        if self._lock.acquire(blocking=False):
            try:
                if not self._is_closed:
                    self.server.tidy()
            finally:
                self._lock.release()

    def step_if_open(self) -> None:
        """One step for all requests, if there are any and the engine is not closed."""
        with self._lock:
            if self.server.has_work and not self._is_closing:
                self._whole_step()

    def run(self, requests: list[Request]) -> Iterator[int]:
        """Serves until all `requests` are done; yields how many of them each step finished.

        Those that the queue has no room for are added when it has. Raises the error of the first that fails. Closing
        the iterator early aborts those that are left.
        """
        self._check_open()
        waiting, open_requests = list(reversed(requests)), requests
        try:
            while open_requests:
                self._add_some(waiting)
                self.step_if_open()
                still_open = [request for request in open_requests if not request.is_finished]
                for request in open_requests:
                    if request.error is not None:
                        raise request.error
                if still_open or any(request.is_aborted for request in open_requests):
                    self._check_open()
                yield len(open_requests) - len(still_open)
                open_requests = still_open
        finally:
            self.abort(open_requests)

    def close(self, *, drains: bool = False) -> None:
        """Refuses new requests, and serves those there are (`drains`) or aborts them. Twice is fine.

        Waits for the step that is under way; a prompt ends after the part that is being computed.
        """
        self._accepts = False
        while drains and self.server.has_work:
            self.step_if_open()
        self._is_closing = True
        with self._lock:
            if self._is_closed:
                return
            self._is_closed = True
            self.server.close()
            self._stepper.shutdown()
            self._executor.close()

    def _add_some(self, waiting: list[Request]) -> None:
        """Moves requests to the queue, from the end of the list, as long as there is room."""
        while waiting and (self.server.has_room(len(waiting[-1].sequences)) or not self._accepts):
            try:
                self.add(waiting[-1])
            except QueueFullError:  # another thread was faster
                return
            waiting.pop()

    def _check_open(self) -> None:
        if self._is_closed:
            raise ValueError("the engine is closed")

    def _whole_step(self) -> None:
        """One step on a thread of its own: Ctrl-C reaches the caller after it, never the middle of it.

        A step donates the device state: cut off before the new one is stored, it would leave the executor without.
        A long one ends early, between two of its parts.
        """
        interrupt, self._is_interrupted = None, False
        step = self._stepper.submit(self.server.step, lambda: self._is_interrupted or self._is_closing)
        while not step.done():
            try:
                wait([step])
            except KeyboardInterrupt as error:
                interrupt, self._is_interrupted = error, True
        if interrupt is not None:
            raise interrupt
        step.result()
