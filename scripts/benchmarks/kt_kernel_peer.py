"""kt-kernel, the best known CPU MoE kernels that can be installed, as another side of the comparison."""

from __future__ import annotations

import importlib.util
import multiprocessing
from importlib import metadata
from typing import Any

import numpy as np

from benchmarks.cases import Batch, Layer
from benchmarks.kt_worker import METHODS, serve

NAME = "kt-kernel"
VERSION = "0.7"
"""Of the interface that `kt_worker` was written for."""


def check_installed() -> None:
    """Raises `ValueError` with the command that installs it."""
    command = f"pip install '{NAME}=={VERSION}.*'"
    if importlib.util.find_spec("kt_kernel") is None:
        raise ValueError(f"--peer={NAME} is not installed, and this script installs nothing by itself: {command}")
    installed = metadata.version(NAME)
    if not installed.startswith(f"{VERSION}."):
        raise ValueError(f"--peer={NAME}: expected version {VERSION}.*, got {installed}: {command}")


def version() -> str:
    return f"{NAME} {metadata.version(NAME)}"


def can_run(format_name: str) -> bool:
    return format_name in METHODS


class KtKernel:
    """One format and number of threads, in a child process. Raises `ChildProcessError` when the child ends early."""

    by = NAME

    def __init__(self, format_name: str, layer: Layer, *, threads: int):
        context = multiprocessing.get_context("spawn")
        self._pipe, theirs = context.Pipe()
        arguments = (theirs, format_name, layer.shape, layer.top_k, threads)
        self._child = context.Process(target=serve, args=arguments, daemon=True)
        self._child.start()
        theirs.close()
        self._receive()

    def visit(self, batch: Batch, *, seconds: float) -> list[float]:
        self._pipe.send((batch, seconds))
        return list(self._receive())

    def output(self, batch: Batch) -> np.ndarray:
        self._pipe.send((batch, None))
        return np.asarray(self._receive())

    def close(self) -> None:
        self._pipe.close()
        self._child.join()

    def _receive(self) -> Any:
        try:
            return self._pipe.recv()
        except EOFError:
            self._child.join()
            status = self._child.exitcode
            raise ChildProcessError(f"{NAME} ended with status {status}; see above what it said") from None
