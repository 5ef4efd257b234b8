"""`simulate.py`: decoding beside a prompt on machines by their data sheets."""

from __future__ import annotations

import json
from pathlib import Path

from tests.scripts.run import finish


def test_short_quanta_fit_beside_decoding_and_long_ones_do_not(tmp_path: Path) -> None:
    args = ["--gpu=rtx5090", "--batch=1", "--json"]
    rows = []
    for quantum in ([], ["--quantum_ms=0.3"]):
        status, stdout, stderr = finish("simulate", *args, *quantum, cache=tmp_path)
        assert status == 0, stderr
        rows.append(json.loads(stdout.splitlines()[-1])["rows"])
    long, short = rows
    assert [(row["num_gpus"], row["num_parts"]) for row in long] == [(1, 1), (2, 1)]
    assert all(row["slowdown"] <= 0.151 for row in (*long, *short))
    assert short[0]["gain"] > 0.5 > long[0]["gain"]
    assert all(row["gain"] > 0.5 for row in long[1:])
