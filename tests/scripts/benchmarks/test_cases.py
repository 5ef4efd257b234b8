from __future__ import annotations

import pytest
from benchmarks.cases import Case, Layer, Limits, Result, Sample, speedup

from hmoe_jax.experts.store import StoreShape
from hmoe_jax.quant.formats import FORMATS


def result(*samples: Sample) -> Result:
    return Result(Case("bf16", 1, 4, "avx2"), 8_000_000, 2_000_000, 0, samples)


def test_the_bound_is_the_larger_of_reading_and_multiplying() -> None:
    limits = Limits(read_gbps=10, dot_gmacs=50)
    assert limits.bound_s(num_bytes=10**9, multiply_adds=10**9) == pytest.approx(0.1)
    assert limits.bound_s(num_bytes=10**9, multiply_adds=10**10) == pytest.approx(0.2)
    assert Limits(10, None).bound_s(num_bytes=10**9, multiply_adds=10**12) == pytest.approx(0.1)


def test_figures_are_medians_over_rounds_each_with_its_own_limits() -> None:
    # 8 MB: bounds of 0.8, 0.4 and 0.8 ms, so efficiencies of 0.8, 0.2 and 0.4.
    measured = result(
        Sample(1e-3, 1e-3 / 2, 9, Limits(10, 50)),
        Sample(2e-3, 2e-3 / 2, 9, Limits(20, 50)),
        Sample(2e-3, 2e-3 / 2, 9, Limits(10, 50)),
    )
    assert measured.seconds == 2e-3
    assert measured.gbps == pytest.approx(4)
    assert measured.gmacs == pytest.approx(1)
    assert measured.read_share == pytest.approx(0.4)
    assert measured.dot_share == pytest.approx(0.02)
    assert measured.bound_s == pytest.approx(0.8e-3)
    assert measured.efficiency == pytest.approx(0.4)
    # The fastest call took 0.5 ms, and the best read bandwidth was 20 GB/s.
    assert measured.best_efficiency == pytest.approx(0.8)


def test_a_compute_bound_case_is_measured_by_the_dot_peak() -> None:
    measured = result(Sample(4e-3, 4e-3 / 2, 1, Limits(read_gbps=100, dot_gmacs=1)))
    assert measured.efficiency == measured.dot_share == pytest.approx(0.5)


def test_who_has_no_dot_peak_of_ours_is_measured_by_reads_alone() -> None:
    measured = result(Sample(1e-3, 1e-3 / 2, 1, Limits(10, None)))
    assert measured.dot_share is None
    assert measured.summary()["dot_percent"] is None
    assert measured.efficiency == pytest.approx(0.8)


def test_a_speedup_compares_within_rounds() -> None:
    limits = Limits(10, 50)
    ours = result(*(Sample(s, s, 1, limits) for s in (1e-3, 2e-3, 4e-3)))
    other = result(*(Sample(s, s, 1, limits) for s in (3e-3, 8e-3, 8e-3)))
    assert speedup(ours, other) == pytest.approx(3)


def test_a_batch_counts_each_expert_once_and_each_choice_of_a_token() -> None:
    shape = StoreShape(num_layers=1, num_experts=6, hidden=384, ffn=128)
    batch = Layer(shape, 2, "same").batch(7)
    assert batch.num_active == 2
    assert batch.multiply_adds == 7 * 2 * 3 * 384 * 128
    assert batch.distinct_bytes(FORMATS["bf16"]) == 2 * 3 * 384 * 128 * 2
    assert batch.reuse_bytes(FORMATS["bf16"]) == 5 * 3 * 384 * 128 * 2
