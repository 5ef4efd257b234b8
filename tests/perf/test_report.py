from __future__ import annotations

import json

import pytest

from hmoe_jax.perf import report
from hmoe_jax.perf.report import Profile
from hmoe_jax.perf.stages import BETWEEN, HOST, OpGroup


def profile(roofline_gbps: float = 20.0) -> Profile:
    return Profile(
        name="decode",
        tokens=2,
        seconds={"embed": 0.0, "attention": 1e-3, "experts": 2e-3, BETWEEN: 0.5e-3, HOST: 0.5e-3},
        num_bytes={"attention": 5_000_000, "experts": 30_000_000},
        roofline_gbps=roofline_gbps,
        untraced_s=3.5e-3,
        slowest=[OpGroup("experts", "hmoe_moe_experts", "f32[1,8]", 4, 2e-3)],
    )


def test_bandwidth_and_its_share_of_the_limit() -> None:
    stages = profile().summary()["stages"]
    assert stages["attention"]["gbps"] == pytest.approx(5)
    assert stages["attention"]["roofline_percent"] == pytest.approx(25)
    assert stages["experts"]["roofline_percent"] == pytest.approx(75)
    assert profile().roofline_s("experts") == pytest.approx(1.5e-3)


def test_rows_without_time_are_left_out_and_rows_without_bytes_have_no_bandwidth() -> None:
    stages = profile().summary()["stages"]
    assert list(stages) == ["attention", "experts", BETWEEN, HOST]
    assert list(stages[HOST]) == ["ms"]


def test_the_table_ends_with_the_sum_and_the_slowest() -> None:
    lines = report.table(profile()).splitlines()
    assert "3.500 ms a step, 571 tok/s (under the profiler 4.000 ms)" in lines[0]
    total = next(line for line in lines if line.startswith("sum"))
    assert total.split() == ["sum", "4.000", "100.0%", "35.000", "8.75", "43.8%"]
    assert lines[-1].endswith("4 x hmoe_moe_experts f32[1,8]")


def test_the_summary_is_json() -> None:
    assert json.loads(json.dumps(profile().summary()))["tok_per_s"] == pytest.approx(2 / 3.5e-3)


def test_the_limit_must_be_positive() -> None:
    with pytest.raises(ValueError, match=r"must be above 0 GB/s, got 0\.0"):
        profile(roofline_gbps=0.0)
