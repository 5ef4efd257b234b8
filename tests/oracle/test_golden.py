"""Every executor against the stored results of the independent implementation. Needs no PyTorch."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest

from tests.oracle import bounds
from tests.oracle.compare import assert_choices_explained, assert_greedy_explained, assert_logits_close
from tests.oracle.golden import NUM_GREEDY, load_golden
from tests.oracle.models import NAMES
from tests.oracle.parity import MAX_TOKENS, QUICK_CASES, Case, measure
from tests.oracle.perplexity import check_perplexity, load_perplexity, measure_perplexity
from tests.oracle.plain import Plain


@pytest.mark.parametrize("name", NAMES)
def test_plain_forward_gives_the_golden_logits_and_experts(name: str, truth_of: Callable[[str], Plain]) -> None:
    golden, truth = load_golden(name), truth_of(name)
    bound = bounds.relative_error(truth.config, "float32", num_tokens=len(golden.text))
    _, routing = truth.run(golden.text)
    assert_choices_explained(truth.config, routing, golden.experts, bound=bound)
    assert_logits_close(truth.run(golden.text, forced=golden.experts)[0], golden.logits, bound=bound)


@pytest.mark.parametrize("name", NAMES)
def test_plain_forward_continues_the_golden_prompts(name: str, truth_of: Callable[[str], Plain]) -> None:
    golden, truth = load_golden(name), truth_of(name)
    bound = bounds.relative_error(truth.config, "float32", num_tokens=MAX_TOKENS)
    continued = [np.concatenate(pair) for pair in zip(golden.prompt_ids, golden.greedy, strict=True)]
    best = np.stack([truth.run(tokens[:-1])[0][-NUM_GREEDY:].argmax(axis=-1) for tokens in continued])
    assert_greedy_explained(best, golden.greedy, golden.gaps, golden.greedy_limits(bound))


def test_perplexity_of_unseen_text_is_the_oracles() -> None:
    check_perplexity(measure_perplexity(), load_perplexity())


@pytest.mark.parametrize("case", QUICK_CASES, ids=lambda case: f"{case.name}-{case.executor}-{case.dtype}")
def test_executor_agrees_with_the_golden_results(
    case: Case, folder_of: Callable[[str], Path], truth_of: Callable[[str], Plain]
) -> None:
    measure(case, folder_of(case.name), load_golden(case.name), truth_of(case.name))
