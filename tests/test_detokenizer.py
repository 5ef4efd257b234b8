from itertools import takewhile

import pytest
import tokenizers
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import decoders, models, normalizers, pre_tokenizers, trainers

from hmoe_jax.detokenizer import WINDOW, Detokenizer, TextStream
from hmoe_jax.sampling_params import SamplingParams
from hmoe_jax.tokenizer import Tokenizer

CORPUS = [
    "the cat sat on the mat, the end",
    "日本語の文章 中文字符 中文",
    "😀😀 😀👍 e\u0301e\u0301 ñ",
    "a b  c\n\n",
] * 3
SPECIAL = ["<s>", "</s>", "<unk>"]


def byte_level() -> Tokenizer:
    backend = tokenizers.Tokenizer(models.BPE())
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=340,
        special_tokens=SPECIAL,
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    backend.train_from_iterator(CORPUS, trainer)
    return Tokenizer(backend)


def byte_fallback() -> Tokenizer:
    """The SentencePiece kind: "▁" for a space, one dropped at the start, bytes for what has no token."""
    pieces = ["▁", *"abcehnst中文.", "▁t", "th", "▁th", "he", "▁▁"]
    texts = [*SPECIAL, *(f"<0x{byte:02X}>" for byte in range(256)), *pieces]
    merges = [("▁", "t"), ("t", "h"), ("▁t", "h"), ("h", "e"), ("▁", "▁")]
    model = models.BPE({text: i for i, text in enumerate(texts)}, merges, unk_token="<unk>", byte_fallback=True)
    backend = tokenizers.Tokenizer(model)
    backend.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
    backend.decoder = decoders.Sequence(
        [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    )
    backend.add_special_tokens(SPECIAL)
    return Tokenizer(backend)


@pytest.fixture(scope="module", params=[byte_level, byte_fallback], ids=lambda build: build.__name__)
def tokenizer(request):
    return request.param()


TEXTS = st.text(
    st.sampled_from("abcthe .\n  ▁éñ中文字日本\u0301\u200d😀👍👩🇩\ufffd\x00") | st.characters(codec="utf-8"),
    max_size=24,
)


# Anything a model could emit: texts and arbitrary ids, special ones and ids without a token included.
OUTPUTS = st.lists(st.lists(st.integers(0, 345), max_size=12) | TEXTS, max_size=4)
# Stop strings that often occur: parts of the text by start and length; and arbitrary ones.
STOPS = st.lists(st.tuples(st.integers(0, 40), st.integers(1, 5)) | TEXTS, max_size=3)
MIN_TOKENS = st.sampled_from([0, 0, 0, 1, 3, 7])


def output_ids(tokenizer: Tokenizer, output: list[list[int] | str]) -> list[int]:
    parts = [tokenizer.encode(part) if isinstance(part, str) else part for part in output]
    return [token_id for part in parts for token_id in part]


def stop_strings(text: str, stops: list[tuple[int, int] | str]) -> list[str]:
    strings = [stop[:4] if isinstance(stop, str) else text[stop[0] : sum(stop)] for stop in stops]
    return [string for string in strings if string]


def push_all(detokenizer: Detokenizer, ids: list[int]) -> list[str]:
    return [*(detokenizer.push(token_id) for token_id in ids), detokenizer.finish()]


def visible(tokenizer: Tokenizer, ids: list[int], *, skip: bool) -> str:
    """The slow truth of what a reader may see: text of all ids, less a character that is still open."""
    ids = [i for i in ids if tokenizer.backend.id_to_token(i) and not (skip and i in tokenizer.special_ids)]
    text = tokenizer.decode(ids, skip)
    if not text.endswith("\ufffd"):
        return text
    run = len(list(takewhile(tokenizer.byte_ids.__contains__, reversed(ids))))
    return tokenizer.decode(ids[: len(ids) - run], skip) if run else text.removesuffix("\ufffd")


def expected_text(tokenizer: Tokenizer, ids: list[int], params: SamplingParams) -> tuple[str, str | None]:
    """The slow truth of stop strings: decode every prefix of the sequence, try every end, from the front."""
    skip = params.skip_special_tokens
    texts = [visible(tokenizer, ids[:count], skip=skip) for count in range(1, len(ids) + 1)]
    searched = 0
    for count, text in [*enumerate(texts, start=1), (len(ids), tokenizer.decode(ids, skip))]:
        for end in range(searched + 1, len(text) + 1) if count > params.min_tokens else ():
            if stops := [stop for stop in params.stop if text[:end].endswith(stop)]:
                stop = max(stops, key=len)
                return text[: end if params.include_stop_str_in_output else end - len(stop)], stop
        searched = max(searched, len(text))
    return tokenizer.decode(ids, skip), None


@settings(deadline=None)
@given(output=OUTPUTS, skip=st.booleans())
def test_pieces_joined_are_the_decoded_text(tokenizer, output, skip):
    ids = output_ids(tokenizer, output)
    pieces = push_all(Detokenizer(tokenizer, SamplingParams(skip_special_tokens=skip)), ids)
    assert "".join(pieces) == tokenizer.decode(ids, skip)


@settings(deadline=None, max_examples=300)
@given(output=OUTPUTS, stops=STOPS, flags=st.tuples(st.booleans(), st.booleans()), min_tokens=MIN_TOKENS)
def test_pieces_joined_are_the_decoded_text_cut_at_the_stop_string(tokenizer, output, stops, flags, min_tokens):
    ids, (skip, include) = output_ids(tokenizer, output), flags
    params = SamplingParams(
        stop=stop_strings(tokenizer.decode(ids, skip), stops),
        skip_special_tokens=skip,
        include_stop_str_in_output=include,
        min_tokens=min_tokens,
    )
    detokenizer = Detokenizer(tokenizer, params)
    joined = "".join(push_all(detokenizer, ids))
    assert (joined, detokenizer.stop_reason) == expected_text(tokenizer, ids, params)


@settings(deadline=None)
@given(output=OUTPUTS)
def test_text_is_given_as_soon_as_no_later_token_can_change_it(tokenizer, output):
    ids = output_ids(tokenizer, output)
    stream, given_text = TextStream(tokenizer), ""
    for count, token_id in enumerate(ids, start=1):
        given_text += stream.push(token_id)
        assert given_text + stream.tentative == visible(tokenizer, ids[:count], skip=True)


@settings(deadline=None)
@given(text=TEXTS)
def test_no_piece_splits_a_character(tokenizer, text):
    text = text.replace("\ufffd", "")
    ids = tokenizer.encode(text, add_special_tokens=False)
    assert not any("\ufffd" in piece for piece in push_all(Detokenizer(tokenizer, SamplingParams()), ids))


@settings(deadline=None)
@given(text=TEXTS, stops=STOPS)
def test_a_stop_string_never_leaks(tokenizer, text, stops):
    strings = stop_strings(text, stops)
    joined = "".join(push_all(Detokenizer(tokenizer, SamplingParams(stop=strings)), tokenizer.encode(text)))
    assert not any(string in joined for string in strings)


def pieces_of(tokenizer: Tokenizer, text: str, **params) -> tuple[list[str], str | None]:
    detokenizer = Detokenizer(tokenizer, SamplingParams(**params))
    return push_all(detokenizer, tokenizer.encode(text)), detokenizer.stop_reason


def test_a_possible_start_of_a_stop_string_is_held_until_it_is_settled(tokenizer):
    pieces, reason = pieces_of(tokenizer, "a..b", stop="...")
    assert ([piece for piece in pieces if piece], reason) == (["a", "..b"], None)


def test_what_is_held_at_the_end_is_released(tokenizer):
    pieces, reason = pieces_of(tokenizer, "a..", stop="...")
    assert ("".join(pieces), pieces[-1], reason) == ("a..", "..", None)


@pytest.mark.parametrize(("include", "expected"), [(False, "a"), (True, "ath")])
def test_text_is_cut_before_or_after_the_stop_string(tokenizer, include, expected):
    pieces, reason = pieces_of(tokenizer, "athe cat", stop=["cat", "th"], include_stop_str_in_output=include)
    assert ("".join(pieces), reason) == (expected, "th")


def test_the_longest_of_the_stop_strings_that_end_together_counts(tokenizer):
    assert pieces_of(tokenizer, "abc", stop=["c", "bc"])[1] == "bc"


def test_nothing_is_released_after_a_stop(tokenizer):
    detokenizer = Detokenizer(tokenizer, SamplingParams(stop="b"))
    push_all(detokenizer, tokenizer.encode("ab"))
    assert "".join(push_all(detokenizer, tokenizer.encode("cc"))) == ""
    assert detokenizer.stop_reason == "b"


def test_a_stop_string_within_min_tokens_does_not_count(tokenizer):
    ids = [tokenizer.backend.token_to_id(letter) for letter in "abcab"]
    detokenizer = Detokenizer(tokenizer, SamplingParams(stop="b", min_tokens=2))
    assert "".join(push_all(detokenizer, ids)) == "abca"


def test_a_newline_that_is_a_byte_token_stops_at_once():
    tokenizer = byte_fallback()
    detokenizer = Detokenizer(tokenizer, SamplingParams(stop="\n"))
    pieces = [detokenizer.push(tokenizer.backend.token_to_id(text)) for text in ("a", "<0x0A>")]
    assert (pieces, detokenizer.stop_reason) == (["a", ""], "\n")


def test_a_later_invalid_byte_takes_back_nothing_that_was_given():
    tokenizer = byte_fallback()
    ids = [tokenizer.backend.token_to_id(f"<0x{byte:02X}>") for byte in [*"é".encode(), 0xFF]]
    assert push_all(Detokenizer(tokenizer, SamplingParams()), ids) == ["", "", "", "\ufffd" * 3]


def test_the_window_stays_short_even_in_endless_garbage():
    tokenizer = byte_level()
    half = tokenizer.encode("👩")[0]
    stream = TextStream(tokenizer)
    for token_id in [*tokenizer.encode("the 😀 日 a  b\n\n" * 9), *[half] * 50, *tokenizer.special_ids]:
        stream.push(token_id)
        assert len(stream._window) <= WINDOW
