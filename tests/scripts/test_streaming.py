"""`bench_prefill.py`, `bench_grouped.py`, `plan.py`, `calibrate.py` and `gpu_suite.py`, on sizes too small to time."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from planning import paper

from hmoe_jax.kernels.grouped.experts import variants_on
from tests.scripts.run import SCRIPTS, finish
from tests.tiny import write_tiny

MODELS = SCRIPTS.parent / "models"


def test_the_table_counts_what_was_copied(tmp_path: Path) -> None:
    folder, out = write_tiny(tmp_path / "model", "kimi"), tmp_path / "out"
    args = [f"--model={folder}", "--length=40", "--length=600", "--rounds=1", "--json", f"--out={out}"]
    status, stdout, stderr = finish("bench_prefill", *args, "--cpu_devices=2", "--prefill_devices=2", cache=tmp_path)
    assert status == 0, stderr
    result = json.loads(stdout.splitlines()[-1])
    assert result["devices"] == 2
    short, long = result["prefill"]
    assert (short["tokens"], long["tokens"]) == (40, 600)
    # 600 tokens use every one of 12 experts in both MoE layers, each copied once.
    each = long["copied_bytes"] / (2 * 12)
    assert 3 * 136 * 72 < each < 3 * 136 * 72 * 1.2
    assert 0 < long["overlap_efficiency"] <= 1
    assert long["tok_per_s"] == pytest.approx(600 / long["ttft_s"])
    assert {file.name for file in out.iterdir()} == {"table.md", "results.json", "lanes.png"}
    assert (out / "lanes.png").read_bytes().startswith(b"\x89PNG")
    assert "| 600 |" in (out / "table.md").read_text()


def test_a_slower_link_is_the_limit(tmp_path: Path) -> None:
    """Copies take as long as the link that is named, and computation hides behind them."""
    folder = write_tiny(tmp_path / "model", "kimi")
    args = [f"--model={folder}", "--length=600", "--rounds=1", "--json", f"--out={tmp_path / 'out'}"]
    status, stdout, stderr = finish("bench_prefill", *args, "--link_gbps=0.0004", cache=tmp_path)
    assert status == 0, stderr
    (result,) = json.loads(stdout.splitlines()[-1])["prefill"]
    assert result["copy_gbps"] == pytest.approx(0.0004, rel=0.1)
    assert result["copy_s"] > result["compute_s"]
    assert result["overlap_efficiency"] >= 0.85


@pytest.mark.parametrize("num_gpus", [1, 2])
def test_the_plan_stands_beside_the_papers_figures(tmp_path: Path, num_gpus: int) -> None:
    status, stdout, stderr = finish("plan", f"--num_gpus={num_gpus}", "--json", cache=tmp_path)
    assert status == 0, stderr
    assert "654.1 GB of routed experts" in stdout
    assert f"| prefill tok/s, {num_gpus} GPU(s) | {paper.PREFILL_TOK_S[num_gpus]:,g} |" in stdout
    assert "| decode tok/s, INT4 | 28 |" in stdout
    plan = json.loads(stdout.splitlines()[-1])
    assert [each["num_tokens"] for each in plan["prefill"]] == [512, 2048, 8192, 16384, 32768]
    assert plan["prefill"][0]["copy_s"] == pytest.approx(11.89 / num_gpus, rel=0.01)


@pytest.mark.parametrize("model", ["kimi-k2", "kimi-k2-thinking", "deepseek-r1"])
def test_every_known_model_can_be_planned(tmp_path: Path, model: str) -> None:
    status, stdout, stderr = finish("plan", f"--model={model}", "--gpu=h100", "--dram_gbps=500", cache=tmp_path)
    assert status == 0, stderr
    assert "| 32,768 |" in stdout
    assert "paper" not in stdout


def test_a_device_that_is_too_small_is_refused_with_numbers(tmp_path: Path) -> None:
    status, _, stderr = finish("plan", "--gpu=rtx4090", "--length=163840", cache=tmp_path)
    assert status == 1
    assert "streaming needs" in stderr
    assert "bytes are left for it" in stderr


def test_a_machine_that_nobody_measured_is_named(tmp_path: Path) -> None:
    status, _, stderr = finish("plan", "--gpu=measured", cache=tmp_path)
    assert status == 1
    assert "machine.json does not exist: run scripts/calibrate.py first" in stderr


def test_calibration_measures_every_rate(tmp_path: Path) -> None:
    sides = ["--expert_cpus=1", "--experts=8"]
    status, stdout, stderr = finish("calibrate", *sides, "--seconds=0.1", "--json", cache=tmp_path)
    assert status == 0, stderr
    rates = json.loads(stdout.splitlines()[-1])
    variants, best = rates.pop("variants"), rates["variant"]
    assert all(value > 0 for name, value in rates.items() if not isinstance(value, str))
    assert rates["contention"] >= 1
    assert set(variants) == set(variants_on("cpu"))
    assert max(variants, key=lambda variant: variants[variant]["512"]) == best
    assert f"the fastest {best}:" in stdout
    status, stdout, stderr = finish(
        "plan", "--gpu=measured", f"--model={MODELS / 'embedded'}", "--length=900", cache=tmp_path
    )
    assert status == 0, stderr
    assert "| 900 | 1 |" in stdout


def test_every_way_to_multiply_a_group_is_measured(tmp_path: Path) -> None:
    args = ["--hidden=256", "--ffn=128", "--rows=8", "--rows=3", "--calls=1", "--json", f"--out={tmp_path / 'out'}"]
    status, stdout, stderr = finish("bench_grouped", *args, cache=tmp_path)
    assert status == 0, stderr
    results = json.loads(stdout.splitlines()[-1])
    assert set(results["variants"]) == set(variants_on("cpu"))
    assert all(list(rates) == ["3", "8"] for rates in results["variants"].values())
    assert json.loads((tmp_path / "out" / "results.json").read_text()) == results
    assert "| 8 | " in (tmp_path / "out" / "table.md").read_text()


def test_the_gpu_suite_runs_without_a_gpu(tmp_path: Path) -> None:
    status, stdout, stderr = finish("gpu_suite", "--json", f"--out={tmp_path / 'out'}", cache=tmp_path)
    assert status == 0, stdout + stderr
    results = json.loads(stdout.splitlines()[-1])
    checks = [
        "versions",
        "executors",
        "copies",
        "pinned",
        "overlap",
        "grouped",
        "attention",
        "stream",
        "decode",
        "beside",
    ]
    assert list(results) == checks
    assert results["executors"]["graph_f32_error"] == 0.0  # the same device twice
    assert all(results["executors"][f"{name}_error"] < 0.05 for name in ("graph_f32", "stream"))
    assert "driver is not to be had" in results["pinned"].get("skipped", "driver is not to be had")
    assert results["stream"]["200_s"] > 0
    assert all(results["decode"][f"2_{name}_tok_s"] > 0 for name in ("one", "two", "loop_one", "loop_two"))
    assert 0 <= results["beside"]["overlap_efficiency"] <= 1
    assert all(results["grouped"][f"{variant}_16_tflops"] > 0 for variant in variants_on("cpu"))
    assert json.loads((tmp_path / "out" / "results.json").read_text()) == results
    status, _, stderr = finish("gpu_suite", "--only=speed", f"--out={tmp_path / 'out'}", cache=tmp_path)
    assert status == 1
    assert "--only=speed: expected one of versions, executors" in stderr
