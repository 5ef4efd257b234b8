"""Histograms whose quantiles are right to a bucket, and counts of what was routed."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from hmoe_jax.meters import BOUNDS_S, BUCKETS_PER_DECADE, EngineMetrics, Histogram, Meters, _Durations

BUCKET = 10 ** (1 / BUCKETS_PER_DECADE)


def histogram(*seconds: float) -> Histogram:
    durations = _Durations()
    for each in seconds:
        durations.add(each)
    return durations.snapshot()


def test_nothing_observed_is_zero() -> None:
    assert (histogram().num, histogram().mean_s, histogram().quantile_s(0.5)) == (0, 0.0, 0.0)


@given(st.lists(st.floats(BOUNDS_S[1], BOUNDS_S[-1]), min_size=1), st.floats(0.01, 1))
def test_a_quantile_is_within_a_bucket_of_the_true_one(seconds: list[float], q: float) -> None:
    true = float(np.quantile(seconds, q, method="inverted_cdf"))
    assert true / BUCKET <= histogram(*seconds).quantile_s(q) * BUCKET**0.5 <= true * BUCKET**2
    assert histogram(*seconds).mean_s == pytest.approx(np.mean(seconds))


def test_what_is_longer_or_shorter_than_all_buckets_is_counted() -> None:
    extreme = histogram(0.0, 1e9)
    assert extreme.num == 2
    assert extreme.quantile_s(0.0) <= BOUNDS_S[0]
    assert extreme.quantile_s(1.0) >= BOUNDS_S[-2]


def test_a_quantile_is_a_part() -> None:
    with pytest.raises(ValueError, match=r"q must be in \[0, 1\], got 99"):
        histogram(1.0).quantile_s(99)


def metrics(**times: float) -> EngineMetrics:
    queue = ("running", "waiting", "pages", "free_pages", "kept_pages", "preemptions", "wanted_tokens", "cached_tokens")
    return EngineMetrics(**{f"num_{name}": 0 for name in queue}, **Meters(1, 1).snapshot() | times)


@pytest.mark.parametrize(
    ("busy_s", "waited_s", "efficiency"),
    [(0.0, 0.0, 0.0), (6.0, 6.0, 0.0), (3.0, 3.1, 0.0), (9.0, 4.0, 5 / 6), (5.0, 1.0, 0.8), (4.0, 0.0, 1.0)],
    ids=["nothing beside", "in turns", "in turns, waking takes time", "experts busier", "device busier", "hidden"],
)
def test_overlap_is_how_much_of_one_side_is_hidden_behind_the_other(
    busy_s: float, waited_s: float, efficiency: float
) -> None:
    observed = metrics(decode_s=10.0, experts_busy_s=busy_s, experts_waited_s=waited_s)
    assert observed.overlap_efficiency == pytest.approx(efficiency)


def test_padding_is_routed_nowhere() -> None:
    meters = Meters(2, 3)
    meters.prefilled(2, np.array([[[0, 2], [2, 1]], [[1, 1], [-1, -1]]], np.int32))
    meters.decoded(0.5, np.array([[[0, -1]], [[2, 2]]], np.int32))
    snapshot = meters.snapshot()
    np.testing.assert_array_equal(snapshot["routing_counts"], [[2, 1, 2], [0, 2, 2]])
    assert (snapshot["num_prompt_tokens"], snapshot["num_decode_steps"], snapshot["decode_s"]) == (2, 1, 0.5)
