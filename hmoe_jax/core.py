"""What every other module may use: the error types."""

from __future__ import annotations


class HmoeError(Exception):
    """Base of every error that this package raises on purpose."""


class ConfigError(HmoeError, ValueError):
    """A model's `config.json` is malformed, or asks for mathematics that is not implemented."""


class CheckpointError(HmoeError, ValueError):
    """A checkpoint's files are not what its config and headers promise.

    `file`, `tensor`, `expected` and `actual` repeat what the message says, for programs ("" where one does not apply).
    """

    def __init__(
        self, problem: str, *, file: str = "", tensor: str = "", expected: object = "", actual: object = ""
    ):
        self.problem, self.file, self.tensor = problem, file, tensor
        self.expected, self.actual = expected, actual
        where = " ".join(part for part in (file, f"tensor '{tensor}'" if tensor else "") if part)
        detail = f": expected {expected}, got {actual}" if expected != "" or actual != "" else ""
        super().__init__(f"{where}: {problem}{detail}" if where else f"{problem}{detail}")
