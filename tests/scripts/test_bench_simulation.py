"""`bench_simulation.py`, on a size too small to time."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from hmoe_jax.perf.machines import UNMEASURED_CPU
from tests.scripts.run import finish


def test_every_configuration_is_simulated_from_the_rates_that_were_measured(
    model: str, cache: Path, tmp_path: Path
) -> None:
    sizes = ["--batch=2", "--context=16", "--context=40", "--rounds=1", "--seconds=0.1"]
    args = [f"--model={model}", *sizes, f"--out={tmp_path}", "--json"]
    status, stdout, stderr = finish("bench_simulation", *args, cache=cache)
    assert status == 0, stderr
    results = json.loads(stdout.splitlines()[-1])
    assert [(each["context"], each["num_parts"]) for each in results["cases"]] == [(16, 1), (16, 2), (40, 1), (40, 2)]
    for case in results["cases"]:
        assert case["ratio"] == pytest.approx(case["simulated_s"] / case["measured_s"])
        assert case["simulated_s"] > 0
    for name in ("expert_gbps", "device_gbps", "decode_linear_tflops", "decode_attention_tflops"):
        assert results["rates"][name] != getattr(UNMEASURED_CPU, name)
    assert results["rates"]["contention"] >= 1
    assert "| 2 | 40 | 2 |" in (tmp_path / "table.md").read_text()
