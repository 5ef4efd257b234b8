"""`scripts/bench_kernels.py` as a user meets it."""

from __future__ import annotations

import importlib.util
import json
import statistics
from importlib import metadata
from pathlib import Path

import pytest
from benchmarks import kt_kernel_peer
from benchmarks.cases import Layer

from hmoe_jax.experts.store import StoreShape
from hmoe_jax.kernels.pool import available_isas
from tests.scripts.run import finish

TINY = (
    "--experts=6", "--top_k=2", "--hidden=200", "--ffn=136", "--read_mb=8", "--visit_s=0.005", "--rounds=2",
    "--tokens=3,1", "--threads=1",
)  # fmt: skip


@pytest.fixture(scope="module")
def run(cache: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, str]:
    """(its folder, what it printed)"""
    folder = tmp_path_factory.mktemp("bench") / "made" / "here"
    args = (*TINY, "--formats=bf16,fp8_block", "--isas=auto,scalar", "--naive", f"--out={folder}", "--json")
    status, out, err = finish("bench_kernels", *args, cache=cache)
    assert status == 0, err
    return folder, out


def test_every_case_is_in_the_record(run: tuple[Path, str]) -> None:
    folder, out = run
    record = json.loads(out.splitlines()[-1])
    assert record == json.loads((folder / "results.json").read_text())
    cases = [(r["format"], r["by"], r["threads"], r["tokens"]) for r in record["results"]]
    best = available_isas()[0]
    sides = {"bf16": [best, "scalar"], "fp8_block": [best, "scalar", "naive"]}
    assert cases == [(f, by, 1, tokens) for f, who in sides.items() for tokens in (1, 3) for by in who]
    assert record["routing"] == "skewed"
    assert "--hidden=200" in record["command"]


def test_efficiency_is_bound_over_time(run: tuple[Path, str]) -> None:
    for result in json.loads((run[0] / "results.json").read_text())["results"]:
        rounds = zip(
            result["us_of_rounds"], result["read_gbps_of_rounds"], result["dot_gmacs_of_rounds"], strict=True
        )  # fmt: skip
        bounds = [
            max(result["bytes"] / read, result["multiply_adds"] / dot if dot else 0) / 1e3 / us
            for us, read, dot in rounds
        ]
        assert len(bounds) == 2
        assert result["best_us"] <= min(result["us_of_rounds"])
        assert result["efficiency"] == pytest.approx(statistics.median(bounds))
        assert result["gbps"] == pytest.approx(result["bytes"] / result["us"] / 1e3)
        assert result["gflops"] == pytest.approx(2 * result["multiply_adds"] / result["us"] / 1e3)
        assert result["multiply_adds"] == result["tokens"] * 2 * 3 * 200 * 136
        assert (result["dot_percent"] is None) == (result["by"] == "naive")


def test_the_naive_loop_is_compared_with_the_fastest_of_ours(run: tuple[Path, str]) -> None:
    record = json.loads((run[0] / "results.json").read_text())
    assert [(s["format"], s["tokens"], s["over"]) for s in record["speedups"]] == [
        ("fp8_block", 1, "naive"), ("fp8_block", 3, "naive"),
    ]  # fmt: skip
    for speedup in record["speedups"]:
        same = [r for r in record["results"] if (r["format"], r["tokens"]) == ("fp8_block", speedup["tokens"])]
        assert speedup["by"] == min((r for r in same if r["by"] != "naive"), key=lambda r: r["us"])["by"]


def test_the_overhead_of_an_empty_call_is_told(run: tuple[Path, str]) -> None:
    (overhead,) = json.loads((run[0] / "results.json").read_text())["overheads"]
    assert overhead["threads"] == 1
    assert overhead["dispatch_us"] > overhead["call_us"] > 0


def test_the_table_is_printed_and_kept_and_marks_what_a_cache_may_have_held(run: tuple[Path, str]) -> None:
    folder, out = run
    text = (folder / "table.md").read_text()
    assert text in out
    assert "*: the same weights came back too soon" in text
    rows = [line for line in text.splitlines() if line.startswith("| ")]
    assert all(line.count("|") in (5, 9, 13) for line in rows)


def test_there_is_a_picture_or_a_word_why_not(run: tuple[Path, str]) -> None:
    folder, out = run
    path = folder / "roofline.png"
    assert path.exists() != ("no picture: matplotlib is not installed" in out)
    assert not path.exists() or path.read_bytes().startswith(b"\x89PNG")


@pytest.mark.parametrize(
    ("args", "message"),
    [
        (["--formats=fp7"], "--formats: this build knows bf16, fp8_block"),
        (["--isas=mmx"], "--isas: this machine offers "),
        (["--threads=0"], "--threads: expected positive numbers, got '0'"),
        (["--threads=100000"], "the CPUs of this process, got 100000"),
        (["--tokens=1,many"], "--tokens: expected positive numbers, got 'many'"),
        (["--top_k=7"], "top-k: expected 1 <= top-k <= 6, the number of experts, got 7"),
        (["--formats=bf16", "--naive"], "--naive is for format fp8_block, which is not in --formats=bf16"),
        (["--experts=1000000000"], "GB are available"),
        (["--out=/proc/nothing"], "--out /proc/nothing cannot be written"),
    ],
)
def test_bad_input_is_one_clear_line(cache: Path, tmp_path: Path, args: list[str], message: str) -> None:
    status, out, err = finish("bench_kernels", *TINY, f"--out={tmp_path / 'out'}", *args, cache=cache)
    assert status == 1
    assert out == ""
    assert message in err
    assert err.startswith("bench_kernels.py: ")
    assert not list(tmp_path.rglob("*.*"))


def test_a_peer_that_is_missing_or_of_another_version_names_the_command(monkeypatch: pytest.MonkeyPatch) -> None:
    command = "pip install 'kt-kernel==0.7.*'"
    monkeypatch.setattr(importlib.util, "find_spec", lambda _: None)
    with pytest.raises(ValueError, match="--peer=kt-kernel is not installed, and this script") as missing:
        kt_kernel_peer.check_installed()
    assert command in str(missing.value)
    monkeypatch.setattr(importlib.util, "find_spec", lambda _: object())
    monkeypatch.setattr(metadata, "version", lambda _: "0.8.1")
    with pytest.raises(ValueError, match=r"expected version 0\.7\.\*, got 0\.8\.1") as other:
        kt_kernel_peer.check_installed()
    assert command in str(other.value)


def test_a_peer_that_dies_is_an_error_and_no_hang() -> None:
    layer = Layer(StoreShape(num_layers=1, num_experts=2, hidden=128, ffn=128), 1, "same")
    with pytest.raises(ChildProcessError, match="kt-kernel ended with status 1; see above what it said"):
        kt_kernel_peer.KtKernel("no such format", layer, threads=1)


@pytest.mark.skipif(importlib.util.find_spec("kt_kernel") is None, reason="kt-kernel is not installed")
def test_the_peer_computes_the_same_and_is_in_the_comparison(cache: Path, tmp_path: Path) -> None:
    args = (*TINY, "--hidden=512", "--ffn=512", "--peer=kt-kernel", f"--out={tmp_path}")
    status, _, err = finish("bench_kernels", *args, cache=cache)
    assert status == 0, err
    record = json.loads((tmp_path / "results.json").read_text())
    assert {"bf16", "fp8_block"} <= {s["format"] for s in record["speedups"] if s["over"] == "kt-kernel"}
    assert record["peer"].startswith("kt-kernel 0.7.")
