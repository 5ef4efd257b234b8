"""What an engine refuses: with a sentence that says what to change, before anything runs."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from hmoe_jax.core import ConfigError
from hmoe_jax.engine import Engine
from hmoe_jax.sampling_params import SamplingParams
from tests.serving import MAX_LEN, greedy, prompt


@pytest.fixture(scope="module")
def ids_engine(served_folder: Path) -> Iterator[Engine]:
    """Without a tokenizer. Nothing is compiled, as nothing is run."""
    with Engine(
        served_folder, skip_tokenizer_init=True, max_model_len=40, warm_up=False, compilation_cache=None, use_tqdm=False
    ) as engine:
        yield engine


@pytest.mark.parametrize(
    ("bad", "message"),
    [
        ([], "the prompt is empty"),
        ("", "the prompt is empty"),
        ([5, 271], "token id 271 is outside the vocabulary of 271 tokens"),
        ([5, -1], "token id -1 is outside the vocabulary of 271 tokens"),
        ([5, 2**70], f"token id {2**70} is outside the vocabulary"),
        ([5, True], r"a prompt is text or a list of token ids, got \[5, True\]"),
        ([True, 5], r"a prompt is text or a list of token ids, got \[True, 5\]"),
        (b"text", "a prompt is text or a list of token ids, got b'text'"),
        (prompt(MAX_LEN), f"the prompt has {MAX_LEN} tokens, but max_model_len is {MAX_LEN}"),
        (prompt(2000), f"the prompt has 2000 tokens, but max_model_len is {MAX_LEN}"),
        ("\ud800", "lone surrogates"),
    ],
    ids=[
        "no ids",
        "no text",
        "above",
        "negative",
        "huge",
        "bool",
        "bool first",
        "bytes",
        "too long",
        "far too long",
        "surrogate",
    ],
)
def test_a_bad_prompt_is_refused_also_among_good_ones(engine: Engine, bad: Any, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        engine.generate([prompt(3), bad], greedy(2), use_tqdm=False)
    with pytest.raises(ValueError, match=message):
        list(engine.stream(bad, greedy(2)))


def test_nothing_runs_if_one_prompt_is_refused(engine: Engine, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(engine._executor, "step", lambda *_, **__: pytest.fail("a step was run"))
    with pytest.raises(ValueError, match="the prompt is empty"):
        engine.generate([prompt(3), []], greedy(2), use_tqdm=False)


@pytest.mark.parametrize("count", [0, 1, 3])
def test_params_must_be_as_many_as_prompts(engine: Engine, count: int) -> None:
    with pytest.raises(ValueError, match=f"2 prompts, but {count} sampling_params"):
        engine.generate([prompt(3), prompt(4)], [greedy(2)] * count, use_tqdm=False)


@pytest.mark.parametrize(
    ("params", "message"),
    [
        ({"logit_bias": {3: 1.0, 271: 1.0}}, "logit_bias: token id 271 is outside the vocabulary of 271 tokens"),
        ({"stop_token_ids": [3, 900]}, "stop_token_ids: token id 900 is outside the vocabulary of 271 tokens"),
    ],
)
def test_token_ids_in_params_must_be_in_the_vocabulary(engine: Engine, params: dict, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        engine.generate([prompt(3)], SamplingParams(**params), use_tqdm=False)


def test_an_empty_conversation_is_refused(engine: Engine) -> None:
    with pytest.raises(ValueError, match="messages must not be empty"):
        engine.chat([], greedy(2), use_tqdm=False)


def test_text_needs_a_tokenizer(ids_engine: Engine) -> None:
    for use in (
        lambda: ids_engine.generate("text", greedy(2), use_tqdm=False),
        lambda: ids_engine.generate([prompt(3), "text"], greedy(2), use_tqdm=False),
        lambda: list(ids_engine.stream("text", greedy(2))),
        lambda: ids_engine.chat([{"role": "user", "content": "hi"}], greedy(2), use_tqdm=False),
    ):
        with pytest.raises(ValueError, match=r"need a tokenizer, and skip_tokenizer_init was given: pass token ids"):
            use()


def test_stop_strings_need_a_tokenizer(ids_engine: Engine) -> None:
    with pytest.raises(ValueError, match=r"stop strings need a tokenizer, .*: use stop_token_ids"):
        ids_engine.generate([prompt(3)], greedy(2, stop="x"), use_tqdm=False)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"max_seqs": 3}, "unknown option 'max_seqs': expected one of .*max_num_seqs"),
        ({"max_num_seqs": "8"}, "max_num_seqs must be an integer of at least 1, got '8'"),
        ({"max_num_seqs": 0}, "max_num_seqs must be an integer of at least 1, got 0"),
        ({"max_prefill_tokens": -1}, "max_prefill_tokens must be an integer of at least 1, got -1"),
        ({"max_model_len": True}, "max_model_len must be an integer of at least 1, got True"),
        ({"max_model_len": 641}, "max_model_len 641 exceeds the model's 640 positions"),
        ({"kv_cache_bytes": 1000}, "needs 112,640 bytes of cache, but kv_cache_bytes is 1,000: lower max_model_len"),
        ({"dtype": "float16"}, "dtype must be one of auto, bfloat16, float32, got 'float16'"),
        ({"executor": "magic"}, "executor must be one of auto, graph, fused, overlap, got 'magic'"),
        ({"executor": "fused"}, "dtype 'float32' needs executor 'graph'"),
        ({"device": "tpu"}, "device must be one of auto, cpu, gpu, got 'tpu'"),
        ({"isa": "mmx"}, "isa must be auto or one of .*scalar.*, got 'mmx'"),
        ({"num_threads": 10**6}, "num_threads: expected 1 <= num_threads <= .*, got 1000000"),
        ({"seed": True}, "seed must be an integer of at least 0, got True"),
    ],
    ids=lambda value: next(iter(value)) if isinstance(value, dict) else "",
)
def test_a_bad_option_is_refused_by_name(served_folder: Path, options: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        Engine(served_folder, compilation_cache=None, use_tqdm=False, **{"max_model_len": MAX_LEN, **options})


def test_a_wrong_path_is_named(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="missing: no such model folder"):
        Engine(tmp_path / "missing", compilation_cache=None)
    with pytest.raises(ConfigError, match=r"no config\.json"):
        Engine(tmp_path, compilation_cache=None)


def test_a_broken_tokenizer_closes_what_was_opened(
    served_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    closed = []
    monkeypatch.setattr("hmoe_jax.exec.programs.Executor.close", lambda self: closed.append("executor"))
    with pytest.raises(ConfigError, match=r"no tokenizer\.json"):
        Engine(served_folder, tokenizer=tmp_path, compilation_cache=None, use_tqdm=False)
    assert closed == ["executor"]


def test_a_closed_engine_says_so(served_folder: Path) -> None:
    engine = Engine(served_folder, max_model_len=40, warm_up=False, compilation_cache=None, use_tqdm=False)
    waiting = engine.stream(prompt(3), greedy(2))
    engine.close()
    engine.close()
    for use in (
        lambda: engine.generate([prompt(3)], greedy(2), use_tqdm=False),
        lambda: engine.generate([], use_tqdm=False),
        lambda: next(waiting),
    ):
        with pytest.raises(ValueError, match="the engine is closed"):
            use()
