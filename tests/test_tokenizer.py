import json

import pytest
import tokenizers
from tokenizers import decoders, models, pre_tokenizers, processors

from hmoe_jax.core import ConfigError
from hmoe_jax.tokenizer import Tokenizer, eos_ids_of_folder

BOS, EOS, END = 0, 1, 2
CONFIG = {"bos_token": "<s>", "eos_token": {"content": "</s>"}}


def byte_level() -> tokenizers.Tokenizer:
    """One token per byte, and three special ones."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    vocab = {text: i for i, text in enumerate(["<s>", "</s>", "<end>", *alphabet])}
    backend = tokenizers.Tokenizer(models.BPE(vocab, []))
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    backend.add_special_tokens(["<s>", "</s>", "<end>"])
    return backend


def sentencepiece_like() -> tokenizers.Tokenizer:
    texts = ["<s>", "</s>", *(f"<0x{byte:02X}>" for byte in range(256)), "▁", "▁a", "a"]
    vocab = {text: i for i, text in enumerate(texts)}
    backend = tokenizers.Tokenizer(models.BPE(vocab, [("▁", "a")], byte_fallback=True))
    backend.pre_tokenizer = pre_tokenizers.Metaspace()
    backend.decoder = decoders.Sequence(
        [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    )
    backend.add_special_tokens(["<s>", "</s>"])
    return backend


def with_bos_template(backend: tokenizers.Tokenizer) -> tokenizers.Tokenizer:
    backend.post_processor = processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", BOS)])
    return backend


@pytest.fixture
def folder(tmp_path):
    byte_level().save(str(tmp_path / "tokenizer.json"))
    return tmp_path


def write(folder, name, data):
    (folder / name).write_text(json.dumps(data))


@pytest.mark.parametrize("text", ["", "hello", " two  spaces\n", "中文 😀 e\u0301", "\x00\ufffd"])
def test_text_survives_a_round_trip(folder, text):
    tokenizer = Tokenizer.from_folder(folder)
    assert tokenizer.decode(tokenizer.encode(text)) == text


def test_text_with_a_lone_surrogate_is_rejected(folder):
    with pytest.raises(ValueError, match="no lone surrogates"):
        Tokenizer.from_folder(folder).encode("a\ud800")


def test_bos_and_eos_are_added_as_the_config_says(folder):
    write(folder, "tokenizer_config.json", CONFIG | {"add_bos_token": True, "add_eos_token": True})
    tokenizer = Tokenizer.from_folder(folder)
    plain = tokenizer.encode("a", add_special_tokens=False)
    assert tokenizer.encode("a") == [BOS, *plain, EOS]
    assert tokenizer.encode("") == [BOS, EOS]


def test_nothing_is_added_where_the_config_says_nothing(folder):
    write(folder, "tokenizer_config.json", CONFIG)
    tokenizer = Tokenizer.from_folder(folder)
    assert tokenizer.encode("a") == tokenizer.encode("a", add_special_tokens=False)


@pytest.mark.parametrize("by_config", [False, True])
@pytest.mark.parametrize("by_template", [False, True])
@pytest.mark.parametrize("text", ["a", "<s>a", "", "<s>"])
def test_bos_is_never_added_twice(folder, by_config, by_template, text):
    backend = with_bos_template(byte_level()) if by_template else byte_level()
    backend.save(str(folder / "tokenizer.json"))
    write(folder, "tokenizer_config.json", CONFIG | {"add_bos_token": by_config})
    ids = Tokenizer.from_folder(folder).encode(text)
    expected = 1 if by_config or by_template or text.startswith("<s>") else 0
    assert ids.count(BOS) == expected
    assert ids[:1] == [BOS] or not expected


def test_a_bos_that_the_user_wrote_twice_is_kept(folder):
    write(folder, "tokenizer_config.json", CONFIG | {"add_bos_token": True})
    assert Tokenizer.from_folder(folder).encode("<s><s>")[:2] == [BOS, BOS]


@pytest.mark.parametrize(
    ("generation", "model", "expected"),
    [
        ({"eos_token_id": [EOS, END]}, {"eos_token_id": EOS}, (EOS, END)),
        ({"eos_token_id": [END, END]}, {"eos_token_id": EOS}, (END, EOS)),
        ({"eos_token_id": END}, {}, (END,)),
        ({}, {"eos_token_id": END}, (END,)),
        ({"eos_token_id": None}, {}, ()),
        (None, None, ()),
    ],
)
def test_eos_ids_are_those_of_all_files_each_once(folder, generation, model, expected):
    write(folder, "tokenizer_config.json", CONFIG)
    for name, data in (("generation_config.json", generation), ("config.json", model)):
        if data is not None:
            write(folder, name, data)
    assert eos_ids_of_folder(folder) == expected
    assert Tokenizer.from_folder(folder).eos_ids == tuple(dict.fromkeys((*expected, EOS)))


def test_a_folder_of_tokenizer_json_alone_has_no_special_ids(folder):
    tokenizer = Tokenizer.from_folder(folder)
    assert (tokenizer.bos_id, tokenizer.eos_ids, tokenizer.vocab_size) == (None, (), 259)


def test_special_tokens_are_skipped_unless_asked_for(folder):
    tokenizer = Tokenizer.from_folder(folder)
    ids = [BOS, *tokenizer.encode("a"), END]
    assert tokenizer.decode(ids) == "a"
    assert tokenizer.decode(ids, skip_special_tokens=False) == "<s>a<end>"
    assert tokenizer.special_ids == {BOS, EOS, END}


def test_saved_truncation_and_padding_do_not_touch_prompts(folder):
    backend = byte_level()
    backend.enable_truncation(3)
    backend.enable_padding(length=64)
    backend.save(str(folder / "tokenizer.json"))
    assert len(Tokenizer.from_folder(folder).encode("x" * 10)) == 10


def test_token_text_shows_specials_partial_characters_and_unknown_ids(folder):
    tokenizer = Tokenizer.from_folder(folder)
    assert [tokenizer.token_text(i) for i in tokenizer.encode("a é")] == ["a", " ", "\ufffd", "\ufffd"]
    assert (tokenizer.token_text(END), tokenizer.token_text(10_000)) == ("<end>", "")


def test_token_text_keeps_the_leading_space_that_decode_drops():
    tokenizer = Tokenizer(sentencepiece_like())
    ids = tokenizer.encode("a a")
    assert tokenizer.decode(ids) == "a a"
    assert [tokenizer.token_text(i) for i in ids] == [" a", " a"]


def test_byte_ids_are_the_byte_fallback_tokens():
    tokenizer = Tokenizer(sentencepiece_like())
    assert len(tokenizer.byte_ids) == 256
    assert set(tokenizer.encode("\n", add_special_tokens=False)) & tokenizer.byte_ids
    assert Tokenizer(byte_level()).byte_ids == frozenset()


def test_a_folder_without_tokenizer_json_says_what_was_found_instead(tmp_path):
    with pytest.raises(ConfigError, match=r"no tokenizer\.json$"):
        Tokenizer.from_folder(tmp_path)
    (tmp_path / "tiktoken.model").touch()
    with pytest.raises(ConfigError, match=r"tiktoken\.model is there, but only tokenizer\.json is read"):
        Tokenizer.from_folder(tmp_path)


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("tokenizer.json", "{", r"tokenizer\.json: not a tokenizer that"),
        ("tokenizer_config.json", "{", r"tokenizer_config\.json: not JSON"),
        ("generation_config.json", "[]", r"generation_config\.json: expected a JSON object, got list"),
        ("config.json", '{"eos_token_id": "x"}', r"config\.json: eos_token_id must be .* got 'x'"),
        ("config.json", '{"eos_token_id": [true]}', r"config\.json: eos_token_id must be .* got \[True\]"),
        (
            "tokenizer_config.json",
            '{"bos_token": "<b>"}',
            r"bos_token '<b>' of the tokenizer's config is not a",
        ),
    ],
)
def test_corrupt_files_are_named(folder, name, content, message):
    (folder / name).write_text(content)
    with pytest.raises(ConfigError, match=message):
        Tokenizer.from_folder(folder)
