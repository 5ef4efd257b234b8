"""`scripts/generate.py` as a user meets it."""

from __future__ import annotations

import json
import signal
import time
from pathlib import Path

import pytest

from tests.scripts.run import finish, start


def test_streams_the_prompt_and_its_continuation_and_ends_with_figures_and_json(model: str, cache: Path) -> None:
    status, out, err = finish(
        "generate", f"--model={model}", "--prompt=ab", "--max_tokens=5", "--ignore_eos", "--json", cache=cache
    )
    assert status == 0, err
    record = json.loads(out.splitlines()[-1])
    assert out.startswith("ab" + record["text"])
    assert record["generated_tokens"] == 5
    assert record["finish_reason"] == "length"
    assert "tok/s" in out.splitlines()[-2]
    assert "GB/s" in out.splitlines()[-2]
    assert "isa: " in err


def test_same_seed_same_text(model: str, cache: Path) -> None:
    args = (f"--model={model}", "--prompt=ab", "--max_tokens=8", "--temperature=2", "--seed=5", "--json")
    texts = [json.loads(finish("generate", *args, cache=cache)[1].splitlines()[-1])["text"] for _ in range(2)]
    assert texts[0] == texts[1]


@pytest.mark.parametrize(
    ("args", "message"),
    [
        (["--prompt="], "the prompt is empty"),
        ([], "give either --prompt or --prompt_file"),
        (["--prompt=a", "--prompt_file=b"], "give either --prompt or --prompt_file"),
        (["--prompt_file=/nonexistent/file"], "/nonexistent/file: cannot be read: No such file or directory"),
        (["--prompt=a", "--max_tokens=0"], "max_tokens must be"),
        (["--prompt=a", "--temperature=nan"], "temperature must be a finite number"),
        (["--prompt=a", "--top_p=2"], "top_p must be"),
        (["--prompt=a", "--model=/nonexistent"], "/nonexistent: no such model folder"),
        (["--prompt=a", "--isa=mmx"], "mmx"),
        (["--prompt=a", "--num_threads=none"], "--num_threads must be a number or auto"),
        (["--prompt=a", "--max_model_len=100000"], "max_model_len 100000 exceeds"),
    ],
)
def test_bad_input_is_one_clear_line_and_a_failing_status(
    model: str, cache: Path, args: list[str], message: str
) -> None:
    status, out, err = finish("generate", f"--model={model}", "--quiet", *args, cache=cache)
    assert status == 1
    assert out == ""
    assert message in err
    assert err.startswith("generate.py: ")
    assert "Traceback" not in err


def test_an_unsupported_architecture_is_named_beside_the_supported_ones(tmp_path: Path, cache: Path) -> None:
    (tmp_path / "config.json").write_text('{"architectures": ["LlamaForCausalLM"]}')
    status, _, err = finish("generate", f"--model={tmp_path}", "--prompt=a", cache=cache)
    assert status == 1
    assert "unsupported architecture LlamaForCausalLM; supported: DeepseekV3ForCausalLM" in err


def test_runs_without_avx512_and_says_what_it_runs_on(model: str, cache: Path) -> None:
    status, out, err = finish(
        "generate", f"--model={model}", "--prompt=ab", "--max_tokens=2", "--isa=scalar", cache=cache
    )
    assert status == 0, err
    assert "[fused on cpu, scalar]" in out


def test_ctrl_c_stops_within_a_second_and_without_a_traceback(model: str, cache: Path) -> None:
    process = start("generate", f"--model={model}", "--prompt=ab", "--max_tokens=240", "--ignore_eos", cache=cache)
    assert process.stdout is not None
    process.stdout.read(3)  # generating
    begin = time.monotonic()
    process.send_signal(signal.SIGINT)
    _, err = process.communicate(timeout=60)
    assert time.monotonic() - begin < 1
    assert process.returncode == -signal.SIGINT
    assert "Traceback" not in err


def test_ctrl_c_while_loading_stops_without_a_traceback(model: str, cache: Path) -> None:
    process = start("generate", f"--model={model}", "--prompt=ab", cache=cache)
    assert process.stderr is not None
    assert "dtype" in process.stderr.readline()  # the plan is made: verifying, loading and compiling come now
    process.send_signal(signal.SIGINT)
    _, err = process.communicate(timeout=60)
    assert process.returncode == -signal.SIGINT
    assert "Traceback" not in err


def test_an_unwritable_cache_is_a_warning_with_the_reason(model: str, tmp_path: Path) -> None:
    blocker = tmp_path / "file"
    blocker.write_text("")
    status, _, err = finish("generate", f"--model={model}", "--prompt=ab", "--max_tokens=1", cache=blocker)
    assert status == 0
    assert "cannot be written (Not a directory)" in err
