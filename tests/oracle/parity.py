"""Measures one executor on one model against the stored results of the independent implementation."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Literal, Protocol

import jax.numpy as jnp
import numpy as np

from hmoe_jax.config import ModelConfig
from tests.oracle import bounds
from tests.oracle.compare import (
    assert_choices_explained,
    assert_greedy_explained,
    assert_logits_close,
    kl_divergences,
    relative_errors,
)
from tests.oracle.executors import Trace, Traced
from tests.oracle.golden import NUM_GREEDY, PROMPT_LENS, Golden
from tests.oracle.models import NAMES, TRAINED, config_of
from tests.oracle.plain import Plain
from tests.oracle.routing import Routing, same_experts

MAX_TOKENS = max(PROMPT_LENS) + NUM_GREEDY
PIECE = 32
"""Tokens of a prefill: less than the text, so that a second piece meets a cache, and more than every prompt."""

MAX_MEAN_KL = 1e-3


@dataclass(frozen=True)
class Case:
    """A model, an executor, and the precision it computes in."""

    name: str
    executor: Literal["graph", "fused"]
    dtype: Literal["float32", "bfloat16"]

    @property
    def is_possible(self) -> bool:
        """`fused` has kernels for BF16 activations and for BF16 or FP8 files."""
        return self.executor == "graph" or (self.dtype == "bfloat16" and config_of(self.name).dtype == "bfloat16")


ALL_CASES = [
    case
    for name in NAMES
    for case in (Case(name, "graph", "float32"), Case(name, "graph", "bfloat16"), Case(name, "fused", "bfloat16"))
    if case.is_possible
]

QUICK_CASES = [
    *(case for case in ALL_CASES if case.dtype == "float32" and case.name not in TRAINED),
    Case("embedded-fp8", "fused", "bfloat16"),
    Case("deepseek", "fused", "bfloat16"),
    Case("halves", "fused", "bfloat16"),
]
"""Every branch of the mathematics, and the native kernels on FP8 and on BF16 files. Compiling takes the time, so the
rest is for `tests/oracle/table.py`."""


@dataclass(frozen=True)
class Parity:
    """One line of the table. `error` and `kl` are given the same experts, `free_kl` with the oracle's own.

    `equal` counts greedy tokens before a prompt's first difference, of `greedy`; `rerouted` counts tokens whose experts
    differ in some layer, of `routed`.
    """

    case: Case
    error: float
    bound: float
    kl: float
    free_kl: float
    rerouted: int
    routed: int
    equal: int
    greedy: int


class Truth(Protocol):
    """A reference in FP32: `Plain`, which needs no PyTorch, or the oracle itself (`hf.HfTruth`)."""

    @property
    def config(self) -> ModelConfig: ...

    def run(self, token_ids: np.ndarray, *, forced: np.ndarray | None = None) -> tuple[np.ndarray, Routing]:
        """Logits `[t, v]` and routing, with the experts `forced [m, t, k]` imposed if given."""
        ...


def load_truth(folder: Path) -> Plain:
    """The plain model in FP32, for sequences as long as parity needs."""
    return Plain(folder, jnp.float32, max_tokens=MAX_TOKENS)


def measure(case: Case, folder: Path, golden: Golden, truth: Truth) -> Parity:
    """Runs the text and the greedy continuations, and asserts that all is as near to the oracle as arithmetic allows.

    Experts that differ from the oracle's must be near ties by the oracle's scores; with these experts imposed on it,
    the oracle's logits must be near ours at every token of the text and of every continuation. In FP32, and for a
    trained model, the continuations must also be the stored ones, up to a near tie of the two best tokens, and the KL
    divergence small with the oracle's own experts too. (A random model's experts have nothing in common: there, one
    expert chosen otherwise is another text.)
    """
    with Traced(
        folder,
        num_sequences=len(PROMPT_LENS),
        piece=PIECE,
        max_tokens=MAX_TOKENS,
        executor=case.executor,
        dtype=case.dtype,
    ) as traced:
        text = traced.prefill(golden.text)
        continued = traced.greedy(golden.prompt_ids, NUM_GREEDY)
    bound = bounds.relative_error(truth.config, case.dtype, num_tokens=MAX_TOKENS)
    for trace in continued:
        _check(trace, truth, bound=bound)
    oracle = _check(text, truth, bound=bound)
    kl = kl_divergences(oracle, text.logits).mean()
    assert kl < MAX_MEAN_KL, f"mean KL divergence {kl:.2e} nats, at most {MAX_MEAN_KL:.0e}"
    tokens = np.stack([trace.logits[-NUM_GREEDY:].argmax(axis=-1) for trace in continued])
    # Over all tokens: one chosen otherwise among the few of the text would decide the mean.
    free = [kl_divergences(truth.run(trace.tokens)[0], trace.logits) for trace in (text, *continued)]
    free_kl = np.concatenate(free).mean()
    if case.dtype == "float32" or case.name in TRAINED:
        assert_greedy_explained(tokens, golden.greedy, golden.gaps, golden.greedy_limits(bound))
        assert free_kl < MAX_MEAN_KL, f"mean KL divergence with free routing {free_kl:.2e}, at most {MAX_MEAN_KL:.0e}"
    rerouted = ~same_experts(text.experts, golden.experts).all(axis=0)
    return Parity(
        case,
        error=float(relative_errors(text.logits, oracle).max()),
        bound=bound,
        kl=float(kl),
        free_kl=float(free_kl),
        rerouted=int(rerouted.sum()),
        routed=len(golden.text),
        equal=int(np.cumprod(tokens == golden.greedy, axis=1).sum()),
        greedy=tokens.size,
    )


def _check(trace: Trace, truth: Truth, *, bound: float) -> np.ndarray:
    """The oracle's logits for the trace's tokens and experts, which have to be near the trace's."""
    logits, routing = truth.run(trace.tokens, forced=trace.experts)
    assert_choices_explained(truth.config, routing, trace.experts, bound=bound)
    assert_logits_close(trace.logits, logits, bound=bound)
    return logits
