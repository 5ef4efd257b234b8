"""`soak.py` for a few seconds, with so few pages that requests are preempted."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from tests.scripts.run import finish

IN_GAPS = ["--executor=overlap", "--expert_cpus=1", "--prefill_executor=stream", "--max_decode_slowdown=9"]


@pytest.mark.parametrize("executor", [[], IN_GAPS], ids=["fused", "prompts in gaps"])
def test_traffic_leaves_nothing_behind_and_every_answer_is_right(
    model: str, cache: Path, tmp_path: Path, executor: list[str]
) -> None:
    sizes = ["--seconds=8", "--known=10", "--max_num_seqs=4", "--outstanding=9", "--kv_cache_bytes=30000"]
    args = [f"--model={model}", *executor, *sizes, "--max_growth=0.2", f"--out={tmp_path}", "--json"]
    status, stdout, stderr = finish("soak", *args, cache=cache)
    assert status == 0, stderr
    result = json.loads(stdout.splitlines()[-1])
    assert result["wrong"] == 0
    assert result["ends"]["length"] > 5
    assert result["ends"]["abort"] > 0
    assert result["prefix_hit_rate"] > 0
    assert result["preemptions"] > 0
    assert (result["copied_bytes"] > 0) == (executor == IN_GAPS)
    assert result["pages"][0] == result["pages"][1]
