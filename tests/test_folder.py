import json

import pytest

from hmoe_jax.core import ConfigError
from hmoe_jax.folder import read_json, special_tokens


def test_an_absent_file_reads_as_empty(tmp_path):
    assert read_json(tmp_path / "none.json") == {}


@pytest.mark.parametrize("content", [b"{", b"", b"\xff\xfe{}", b"[1]", b'"x"'])
def test_a_corrupt_file_is_named(tmp_path, content):
    (tmp_path / "some.json").write_bytes(content)
    with pytest.raises(ConfigError, match=r"some\.json: "):
        read_json(tmp_path / "some.json")


def test_special_tokens_are_text_or_objects_and_flags_are_not_tokens(tmp_path):
    config = {"bos_token": {"content": "<s>", "lstrip": False}, "eos_token": "</s>", "add_bos_token": True}
    (tmp_path / "tokenizer_config.json").write_text(json.dumps(config))
    assert special_tokens(tmp_path) == {"bos_token": "<s>", "eos_token": "</s>"}


def test_the_tokens_map_adds_only_what_the_config_does_not_mention(tmp_path):
    (tmp_path / "tokenizer_config.json").write_text(json.dumps({"bos_token": None, "eos_token": "a"}))
    (tmp_path / "special_tokens_map.json").write_text(
        json.dumps({"bos_token": "x", "eos_token": "b", "pad_token": {"content": "p"}})
    )
    assert special_tokens(tmp_path) == {"eos_token": "a", "pad_token": "p"}
