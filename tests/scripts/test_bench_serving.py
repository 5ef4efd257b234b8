"""`bench_serving.py`, in small."""

from __future__ import annotations

import json
from pathlib import Path

from tests.scripts.run import finish


def test_agents_find_their_beginnings_and_every_request_is_recorded(model: str, cache: Path, tmp_path: Path) -> None:
    sizes = [
        "--num_prompts=6",
        "--num_agents=2",
        "--input_len=8",
        "--output_len=4",
        "--system_len=70",
        "--max_num_seqs=2",
    ]
    rates = ["--request_rate=inf", "--request_rate=50", "--max_concurrency=3", "--goodput=ttft:100"]
    args = [f"--model={model}", "--dataset=agents", *sizes, *rates, f"--out={tmp_path}", "--json"]
    status, stdout, stderr = finish("bench_serving", *args, cache=cache)
    assert status == 0, stderr
    at_once, later = json.loads(stdout.splitlines()[-1])["runs"]
    for run in (at_once, later):
        assert (run["completed"], run["failed"]) == (6, 0)
        assert run["request_goodput"] == run["request_throughput"]
    assert at_once["prefix_hit_rate"] > 0.3
    recorded = json.loads((tmp_path / "results.json").read_text())["runs"][0]["requests"]
    assert len(recorded) == 6
    assert all(each["output_tokens"] == each["came"][-1][1] for each in recorded)
    assert (tmp_path / "load.png").read_bytes().startswith(b"\x89PNG")
    assert not (tmp_path / "timeline.png").exists()  # the two sides take turns inside one program


def test_what_device_and_experts_do_beside_each_other_is_drawn(model: str, cache: Path, tmp_path: Path) -> None:
    sides = [
        "--executor=overlap",
        "--expert_cpus=1",
        "--microbatches=2",
        "--prefill_executor=stream",
        "--max_num_seqs=2",
    ]
    args = [f"--model={model}", "--num_prompts=4", "--input_len=30", "--output_len=12", f"--out={tmp_path}", "--json"]
    status, stdout, stderr = finish("bench_serving", *args, *sides, cache=cache)
    assert status == 0, stderr
    (run,) = json.loads(stdout.splitlines()[-1])["runs"]
    assert 0 <= run["overlap_efficiency"] <= 1
    assert (tmp_path / "timeline.png").read_bytes().startswith(b"\x89PNG")


def test_a_request_that_the_model_cannot_hold_is_refused(model: str, cache: Path, tmp_path: Path) -> None:
    args = [f"--model={model}", "--input_len=5000", f"--out={tmp_path}"]
    status, _, stderr = finish("bench_serving", *args, cache=cache)
    assert status == 1
    assert "bench_serving.py: a request comes to" in stderr.splitlines()[-1]
