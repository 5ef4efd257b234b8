"""`scripts/profile_graph.py` as a user meets it."""

from __future__ import annotations

import gzip
import json
import signal
import time
from pathlib import Path

import pytest

from tests.scripts.run import finish, start

# A short model compiles few programs.
SMALL = ("--prompt_len=20", "--steps=3", "--max_model_len=32")


@pytest.fixture(scope="module")
def run(model: str, cache: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, str]:
    """(its folder, what it printed)"""
    folder = tmp_path_factory.mktemp("profile") / "made" / "here"
    status, out, err = finish(
        "profile_graph", f"--model={model}", f"--out={folder}", "--batch=2", *SMALL, "--json", cache=cache
    )
    assert status == 0, err
    return folder, out


def test_every_program_has_its_hlo_and_its_analysis(run: tuple[Path, str]) -> None:
    folder = run[0] / "programs"
    names = {path.name.removesuffix(".json") for path in folder.glob("*.json")}
    assert names == {"prefill_32", "prefill_scored_32", "decode_1", "decode_2"}
    for name in names:
        assert (folder / f"{name}.hlo.txt").read_text().startswith(f"HloModule jit_{name}")
        analysis = json.loads((folder / f"{name}.json").read_text())
        assert analysis["cost"]["flops"] > 0
        assert analysis["memory"]["argument_size_in_bytes"] > 0
        assert analysis["custom_calls"]["hmoe_moe_experts"] == {"experts": 1}


def test_the_trace_is_there_for_both_viewers(run: tuple[Path, str]) -> None:
    for kind in ("prefill", "decode"):
        assert (run[0] / "trace" / "plugins" / "profile" / kind / "host.xplane.pb").stat().st_size > 0
        events = json.loads(gzip.decompress((run[0] / "trace" / f"{kind}.json.gz").read_bytes()))["traceEvents"]
        assert {"attention", "router", "experts", "shared", "head"} <= {event["name"] for event in events}


def test_the_stages_of_the_last_line_add_up_to_the_step(run: tuple[Path, str]) -> None:
    folder, out = run
    record = json.loads(out.splitlines()[-1])
    assert record == json.loads((folder / "stages.json").read_text())
    assert record["executor"] == "fused"
    for profile in record["profiles"].values():
        assert sum(row["ms"] for row in profile["stages"].values()) == pytest.approx(profile["step_ms"])
        assert profile["stages"]["experts"]["bytes"] > 0
        assert profile["roofline_gbps"] > 0
    assert record["profiles"]["decode"]["tokens"] == 2


def test_the_table_is_printed_and_kept(run: tuple[Path, str]) -> None:
    folder, out = run
    text = (folder / "stages.txt").read_text()
    assert text in out
    assert "GB/s, the memory's plain read bandwidth measured in this run" in text


def test_there_is_a_picture_or_a_word_why_not(run: tuple[Path, str]) -> None:
    folder, out = run
    assert (folder / "stages.png").exists() != ("no picture: matplotlib is not installed" in out)


def test_nothing_but_whole_files_is_left(run: tuple[Path, str]) -> None:
    kinds = {"".join(path.suffixes) for path in run[0].rglob("*") if path.is_file()}
    assert kinds <= {".hlo.txt", ".json", ".json.gz", ".xplane.pb", ".txt", ".png"}


@pytest.mark.parametrize(
    ("args", "message"),
    [
        (["--model=/nonexistent"], "/nonexistent: no such model folder"),
        (["--out=/proc/nothing"], "--out /proc/nothing cannot be written"),
        (["--prompt_len=30"], "make 39 tokens, but the longest sequence has 32: lower one of them"),
        (["--num_threads=none"], "--num_threads must be a number or auto"),
    ],
)
def test_bad_input_is_one_clear_line_and_nothing_written(
    model: str, cache: Path, tmp_path: Path, args: list[str], message: str
) -> None:
    folder = tmp_path / "out"
    status, out, err = finish(
        "profile_graph", f"--model={model}", f"--out={folder}", *SMALL, "--quiet", *args, cache=cache
    )
    assert status == 1
    assert out == ""
    assert message in err
    assert err.startswith("profile_graph.py: ")
    assert not list(folder.rglob("*"))


def test_ctrl_c_stops_within_a_second_and_without_a_traceback(model: str, cache: Path, tmp_path: Path) -> None:
    process = start("profile_graph", f"--model={model}", f"--out={tmp_path}", *SMALL, cache=cache)
    assert process.stderr is not None
    assert "dtype" in process.stderr.readline()  # the plan is made: loading and compiling come now
    begin = time.monotonic()
    process.send_signal(signal.SIGINT)
    _, err = process.communicate(timeout=60)
    assert time.monotonic() - begin < 1
    assert process.returncode == -signal.SIGINT
    assert "Traceback" not in err
