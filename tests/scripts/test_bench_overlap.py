"""`bench_overlap.py`, on a size too small to time."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from tests.scripts.run import finish


def test_both_ways_are_timed_and_set_beside_the_ideal(model: str, cache: Path, tmp_path: Path) -> None:
    sizes = ["--batch=2", "--context=40", "--rounds=2"]
    status, stdout, stderr = finish(
        "bench_overlap", f"--model={model}", *sizes, "--json", f"--out={tmp_path}", cache=cache
    )
    assert status == 0, stderr
    (measured,) = json.loads(stdout.splitlines()[-1])["overlap"]
    assert (measured["batch"], measured["context"], measured["num_rounds"]) == (2, 40, 2)
    one, two = measured["one"], measured["two"]
    assert 0 < one["experts_s"] < one["seconds"]
    assert 0 < two["experts_s"] < two["seconds"]
    assert measured["loop_s"] == pytest.approx(measured["loop_one"]["seconds"] - one["seconds"])
    assert 0 < measured["loop_two"]["experts_s"] < measured["loop_two"]["seconds"]
    assert measured["speedup"] == pytest.approx(one["seconds"] / two["seconds"])
    assert 1 <= measured["ideal"] <= 2
    assert "| 2 | 40 |" in (tmp_path / "table.md").read_text()


def test_halves_need_an_even_batch(cache: Path, tmp_path: Path) -> None:
    status, _, stderr = finish("bench_overlap", "--batch=3", f"--out={tmp_path}", cache=cache)
    assert (status, stderr.splitlines()[-1]) == (1, "bench_overlap.py: --batch must be even, got [3]")
