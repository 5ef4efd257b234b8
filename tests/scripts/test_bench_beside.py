"""`bench_beside.py`, on a size too small to time."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from tests.scripts.run import finish


def test_a_prompt_is_timed_alone_and_beside_decoding(model: str, cache: Path, tmp_path: Path) -> None:
    sizes = ["--batch=2", "--context=9", "--prompt_len=40", "--rounds=1", "--steps=2"]
    status, stdout, stderr = finish(
        "bench_beside", f"--model={model}", *sizes, "--json", f"--out={tmp_path}", cache=cache
    )
    assert status == 0, stderr
    (measured,) = json.loads(stdout.splitlines()[-1])["beside"]
    assert (measured["batch"], measured["context"], measured["prompt_len"]) == (2, 9, 40)
    assert 0 < measured["experts_share"] < 1
    assert 0 < measured["ideal_gain"] < 1
    (record,) = json.loads((tmp_path / "results.json").read_text())["beside"]
    (one,) = record["rounds"]
    assert len(one["alone_s"]) == 4
    assert len(one["beside_s"]) == len(one["traffic"]) > 0
    assert sum(one["beside_s"]) == pytest.approx(one["prompt_beside_s"], rel=0.2)
    assert sum(look["copied_gbps"] for look in one["traffic"]) > 0
    in_turns_s = len(one["beside_s"]) * sum(one["alone_s"]) / 4 + one["prompt_alone_s"]
    assert measured["gain"] == pytest.approx(in_turns_s / one["prompt_beside_s"] - 1)
    assert "| 2 | 9 | 40 |" in (tmp_path / "table.md").read_text()
    assert (tmp_path / "traffic.png").read_bytes().startswith(b"\x89PNG")
