"""A prefill that goes on by itself, on a thread of its own, while its owner does something else."""

from __future__ import annotations

import threading
from concurrent.futures import Future, wait
from typing import Any

from hmoe_jax.exec.quantum import Quanta


class PrefillThread:
    """Advances quanta without a pause, unless it is told to, until they are done or it is closed.

    A daemon: a process that ends without closing it does not wait for a prompt.
    """

    def __init__(self, quanta: Quanta):
        self._quanta = quanta
        self._may_run = threading.Event()
        self._may_run.set()
        self._is_closed = False
        self._value: Future[Any] = Future()
        self._thread = threading.Thread(target=self._run, name="hmoe-prefill", daemon=True)
        self._thread.start()

    def set_running(self, runs: bool) -> None:
        """Pauses before the next quantum, or goes on."""
        if runs:
            self._may_run.set()
        else:
            self._may_run.clear()

    def is_done(self, timeout_s: float) -> bool:
        """Whether all is computed, or has failed, within so long."""
        return self._value.done() or not wait([self._value], timeout=timeout_s).not_done

    def result(self) -> Any:
        """The value of the quanta. Raises what they raised."""
        return self._value.result()

    def close(self) -> None:
        """Cancels what is left, and waits until nothing of it runs."""
        self._is_closed = True
        self._may_run.set()
        self._thread.join()

    def _run(self) -> None:
        try:
            self._value.set_result(self._computed())
        except BaseException as error:
            self._value.set_exception(error)

    def _computed(self) -> Any:
        try:
            while True:
                self._may_run.wait()
                if self._is_closed:
                    return None
                next(self._quanta)
        except StopIteration as end:
            return end.value
        finally:
            self._quanta.close()
