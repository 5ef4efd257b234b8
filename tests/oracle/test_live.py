"""The independent implementation itself, where it is installed: against golden files and the plain model."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from pathlib import Path

import jax.numpy as jnp
import numpy as np
import pytest

from tests.oracle import bounds
from tests.oracle.compare import assert_choices_explained, assert_greedy_explained, assert_logits_close, top_two_gaps
from tests.oracle.golden import NUM_GREEDY, load_golden
from tests.oracle.models import EMBEDDED, NAMES
from tests.oracle.parity import MAX_TOKENS
from tests.oracle.perplexity import load_perplexity, oracle_perplexity
from tests.oracle.plain import Plain

torch = pytest.importorskip("torch", reason="the live oracle needs PyTorch: pip install hmoe-jax[oracle]")
pytest.importorskip("transformers", reason="the live oracle needs transformers: pip install hmoe-jax[oracle]")

from tests.oracle import hf  # noqa: E402 - imports both

torch.set_num_threads(1)  # matrices this small lose more to the hand-over than they gain


@pytest.fixture(scope="module", params=NAMES)
def name(request: pytest.FixtureRequest) -> str:
    return request.param


@pytest.fixture(scope="module")
def live(name: str, folder_of: Callable[[str], Path]) -> hf.DeepseekV3ForCausalLM:
    return hf.load_hf(folder_of(name), torch.float32)


def test_golden_files_are_what_the_oracle_says(
    name: str, live: hf.DeepseekV3ForCausalLM, truth_of: Callable[[str], Plain]
) -> None:
    golden, config = load_golden(name), truth_of(name).config
    bound = bounds.relative_error(config, "float32", num_tokens=MAX_TOKENS)
    assert_logits_close(hf.hf_logits(live, golden.text), golden.logits, bound=bound)
    assert_choices_explained(config, hf.hf_routing(live, golden.text), golden.experts, bound=bound)
    # A continuation is greedy if each token is the best after those before it: one pass instead of one per token.
    continued = [np.concatenate(pair) for pair in zip(golden.prompt_ids, golden.greedy, strict=True)]
    logits = np.stack([hf.hf_logits(live, tokens[:-1])[-NUM_GREEDY:] for tokens in continued])
    limits = golden.greedy_limits(bound)
    assert_greedy_explained(logits.argmax(axis=-1), golden.greedy, golden.gaps, limits)
    assert (np.abs(top_two_gaps(logits) - golden.gaps) <= limits).all()


def test_stored_perplexity_is_what_the_oracle_says() -> None:
    live = hf.load_hf(EMBEDDED, torch.float32)
    stored = load_perplexity()
    assert oracle_perplexity(partial(hf.hf_logits, live)).nats == pytest.approx(stored.nats, rel=1e-6)


def test_cached_decode_of_the_oracle_is_its_whole_pass(
    name: str, live: hf.DeepseekV3ForCausalLM, truth_of: Callable[[str], Plain]
) -> None:
    golden = load_golden(name)
    bound = bounds.relative_error(truth_of(name).config, "float32", num_tokens=MAX_TOKENS)
    tokens, logits = hf.hf_greedy(live, golden.prompt_ids[3], 4)
    assert_greedy_explained(
        tokens[None], golden.greedy[3:4, :4], golden.gaps[3:4, :4], golden.greedy_limits(bound)[3:4, :4]
    )
    np.testing.assert_allclose(np.linalg.norm(logits, axis=-1), golden.norms[3, :4], rtol=bound)


def test_plain_bfloat16_agrees_with_the_oracle_on_the_same_experts(
    name: str, live: hf.DeepseekV3ForCausalLM, folder_of: Callable[[str], Path]
) -> None:
    golden = load_golden(name)
    plain = Plain(folder_of(name), jnp.bfloat16, max_tokens=len(golden.text))
    bound = bounds.relative_error(plain.config, "bfloat16", num_tokens=len(golden.text))
    logits, routing = plain.run(golden.text)
    with hf.forced_routing(live, routing.ids):
        assert_choices_explained(plain.config, hf.hf_routing(live, golden.text), routing.ids, bound=bound)
        assert_logits_close(logits, hf.hf_logits(live, golden.text), bound=bound)
