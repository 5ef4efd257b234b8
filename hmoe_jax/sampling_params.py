"""What a request asks of sampling and of its output: vLLM's `SamplingParams`, names and meanings."""

from __future__ import annotations

import math
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, no_type_check

GREEDY_BELOW = 1e-5
"""Temperatures under this take the most probable token."""

MAX_LOGPROBS = 20

FP32_MAX = (2 - 2**-23) * 2.0**127
FP32_SMALLEST = 2.0**-126
"""The sampler computes in FP32: what it would round to infinity, or to 0 where that is no value, is refused here."""


@dataclass(frozen=True)
class Range:
    """An interval of finite numbers that a parameter must lie in, printed as in mathematics."""

    low: int | float  # printed as given: whole for integers
    high: int | float = math.inf
    open_low: bool = False

    def __contains__(self, value: int | float) -> bool:
        above = self.low < value if self.open_low else self.low <= value
        # What no float holds is in no range: infinity, or an integer with hundreds of digits.
        return above and value <= min(self.high, sys.float_info.max)

    def __str__(self) -> str:
        return f"{'(' if self.open_low else '['}{self.low}, {self.high}{')' if math.isinf(self.high) else ']'}"


FLOATS = {
    "temperature": Range(0.0, FP32_MAX),
    "top_p": Range(0.0, 1.0, open_low=True),
    "min_p": Range(0.0, 1.0),
    "presence_penalty": Range(-2.0, 2.0),
    "frequency_penalty": Range(-2.0, 2.0),
    "repetition_penalty": Range(FP32_SMALLEST, FP32_MAX),
}
INTS = {
    "n": Range(1),
    "top_k": Range(-1, 2**31 - 1),
    "min_tokens": Range(0, 2**31 - 1),
}
OPTIONAL_INTS = {
    "seed": Range(-(2**63), 2**63 - 1),
    "max_tokens": Range(1),
    "logprobs": Range(0, MAX_LOGPROBS),
    "prompt_logprobs": Range(0, MAX_LOGPROBS),
}
BOOLS = ("ignore_eos", "skip_special_tokens", "include_stop_str_in_output", "return_routed_experts")
TOKEN_ID = Range(0, 2**31 - 1)
BIAS = Range(-100.0, 100.0)


@no_type_check  # for run-time checkers: wrong types get the same ValueError under pytest as elsewhere
@dataclass(frozen=True, kw_only=True)
class SamplingParams:
    """How to sample one request. Raises `ValueError` naming the parameter, its range and the value.

    Ranges are in the tables above. `top_k` 0 or -1 means every token, `max_tokens` None as many as fit,
    `seed` None (or -1) a fresh one. `logprobs` is how many of the most probable tokens to report beside the
    sampled one. Greedy sampling (`is_greedy`) ignores `top_p`, `top_k` and `min_p`, and makes `n` > 1 an
    error.

    After construction numbers have their declared type, `stop` and `stop_token_ids` are tuples (empty for
    None), `top_k` is not -1, `seed` is not -1, and `logit_bias` is a copy of what was given.
    """

    n: int = 1
    temperature: float = 1.0
    top_p: float = 1.0
    top_k: int = 0
    min_p: float = 0.0
    presence_penalty: float = 0.0
    frequency_penalty: float = 0.0
    repetition_penalty: float = 1.0
    seed: int | None = None
    stop: str | Sequence[str] | None = None
    stop_token_ids: Sequence[int] | None = None
    ignore_eos: bool = False
    max_tokens: int | None = 16
    min_tokens: int = 0
    logprobs: int | None = None
    prompt_logprobs: int | None = None
    logit_bias: Mapping[int, float] | None = None
    skip_special_tokens: bool = True
    include_stop_str_in_output: bool = False
    return_routed_experts: bool = False

    def __post_init__(self) -> None:
        checked: dict[str, Any] = {
            **{name: _float(name, getattr(self, name), span) for name, span in FLOATS.items()},
            **{name: _int(name, getattr(self, name), span) for name, span in INTS.items()},
            **{name: _optional_int(name, getattr(self, name), span) for name, span in OPTIONAL_INTS.items()},
            **{name: _bool(name, getattr(self, name)) for name in BOOLS},
            "stop": _stop(self.stop),
            "stop_token_ids": _stop_token_ids(self.stop_token_ids),
            "logit_bias": _logit_bias(self.logit_bias),
        }
        checked["top_k"] = max(checked["top_k"], 0)
        checked["seed"] = None if checked["seed"] == -1 else checked["seed"]
        for name, value in checked.items():
            object.__setattr__(self, name, value)
        self._check_together()

    def _check_together(self) -> None:
        if self.max_tokens is not None and self.min_tokens > self.max_tokens:
            raise ValueError(f"min_tokens must be at most max_tokens={self.max_tokens}, got {self.min_tokens}")
        if self.is_greedy and self.n > 1:
            raise ValueError(
                f"n must be 1 with temperature={self.temperature} (greedy: all would be equal), got {self.n}"
            )

    @classmethod
    def from_generation_config(cls, config: Mapping[str, Any], **overrides: Any) -> SamplingParams:
        """The defaults that a checkpoint recommends in generation_config.json; `overrides` go before them.

        Reads `temperature`, `top_p`, `top_k`, `min_p`, `repetition_penalty` and `max_new_tokens`; null means
        absent. `do_sample` false means temperature 0. EOS ids are the tokenizer's.
        """
        names = ("temperature", "top_p", "top_k", "min_p", "repetition_penalty")
        values = {name: config.get(name) for name in names} | {"max_tokens": config.get("max_new_tokens")}
        if config.get("do_sample") is False:
            values["temperature"] = 0.0
        return cls(**{name: value for name, value in values.items() if value is not None} | overrides)

    @property
    def is_greedy(self) -> bool:
        """Whether the most probable token is always taken."""
        return self.temperature < GREEDY_BELOW


def _float(name: str, value: object, span: Range) -> float:
    if not isinstance(value, int | float) or isinstance(value, bool) or value not in span:
        raise ValueError(f"{name} must be a finite number in {span}, got {value!r}")
    return float(value)


def _int(name: str, value: object, span: Range, kind: str = "an integer") -> int:
    if not isinstance(value, int) or isinstance(value, bool) or value not in span:
        raise ValueError(f"{name} must be {kind} in {span}, got {value!r}")
    return value


def _optional_int(name: str, value: object, span: Range) -> int | None:
    return None if value is None else _int(name, value, span, "None or an integer")


def _bool(name: str, value: object) -> bool:
    if not isinstance(value, bool):
        raise ValueError(f"{name} must be True or False, got {value!r}")
    return value


def _stop(value: object) -> tuple[str, ...]:
    stops = (value,) if isinstance(value, str) else _items("stop", value, "a string, a sequence of strings or None")
    for stop in stops:
        if not isinstance(stop, str) or not stop:
            raise ValueError(f"stop must hold non-empty strings, got {stop!r}")
    return stops


def _stop_token_ids(value: object) -> tuple[int, ...]:
    ids = _items("stop_token_ids", value, "a sequence of token ids or None")
    return tuple(_int("each of stop_token_ids", token_id, TOKEN_ID) for token_id in ids)


def _logit_bias(value: object) -> dict[int, float] | None:
    if value is None:
        return None
    if not isinstance(value, Mapping):
        raise ValueError(f"logit_bias must map token ids to numbers in {BIAS}, or be None, got {value!r}")
    return {
        _int("each key of logit_bias", token_id, TOKEN_ID): _float(f"logit_bias[{token_id!r}]", bias, BIAS)
        for token_id, bias in value.items()
    }


def _items(name: str, value: object, expected: str) -> tuple[Any, ...]:
    if value is None:
        return ()
    if not isinstance(value, Sequence) or isinstance(value, str | bytes):
        raise ValueError(f"{name} must be {expected}, got {value!r}")
    return tuple(value)
