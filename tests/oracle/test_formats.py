"""Every published format through both executors, against the plain model in FP32 on the same files.

The formats themselves are tied to other implementations in `tests/quant`.
"""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.kernels.codecs import needs_codec
from tests.oracle import bounds
from tests.oracle.compare import assert_choices_explained, assert_logits_close
from tests.oracle.executors import Trace, Traced
from tests.oracle.parity import load_truth
from tests.oracle.plain import Plain
from tests.tiny import FORMAT_CONFIGS, random_ids, write_tiny

NUM_TOKENS, PIECE, NUM_DECODED = 37, 16, 6


@pytest.fixture(scope="module", params=FORMAT_CONFIGS)
def name(request: pytest.FixtureRequest) -> str:
    return request.param


@pytest.fixture(scope="module")
def folder(name: str, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_tiny(tmp_path_factory.mktemp("formats") / name, name)


@pytest.fixture(scope="module")
def truth(folder: Path) -> Plain:
    return load_truth(folder)


@pytest.mark.parametrize(("executor", "dtype"), [("graph", "float32"), ("fused", "bfloat16")])
def test_prefill_and_decode_are_as_near_as_arithmetic_allows(
    name: str, folder: Path, truth: Plain, executor: str, dtype: str
) -> None:
    if executor == "fused":
        needs_codec(*codecs_of(truth))
    tokens = random_ids(name, NUM_TOKENS)
    with Traced(
        folder, num_sequences=1, piece=PIECE, max_tokens=NUM_TOKENS + NUM_DECODED, executor=executor, dtype=dtype
    ) as traced:
        whole = traced.prefill(tokens)
        (continued,) = traced.greedy([tokens], NUM_DECODED)
    for trace in (whole, continued):
        assert_near(trace, truth, bound=bounds.relative_error(truth.config, dtype, num_tokens=NUM_TOKENS + NUM_DECODED))


def codecs_of(truth: Plain) -> set[str]:
    modules = ("model.layers.0.mlp.gate_proj", "model.layers.1.mlp.experts.0.gate_proj")
    stored = [truth.config.stored(module) for module in modules]
    return {"bf16" if entry is None else entry.codec for entry in stored}


def assert_near(trace: Trace, truth: Plain, *, bound: float) -> None:
    """Given the same experts; those chosen otherwise have to be near ties."""
    logits, routing = truth.run(trace.tokens, forced=trace.experts)
    assert_choices_explained(truth.config, routing, trace.experts, bound=bound)
    assert_logits_close(trace.logits, logits, bound=bound)
