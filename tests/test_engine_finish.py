"""Why sequences end, and what may be drawn until then."""

from __future__ import annotations

import pytest

from hmoe_jax.engine import Engine
from hmoe_jax.outputs import CompletionOutput
from hmoe_jax.sampling_params import SamplingParams
from tests.serving import LETTERS, MAX_LEN, drawn, greedy, prompt
from tests.tiny import EOS_ID


def complete(engine: Engine, params: SamplingParams, *, length: int = 6) -> CompletionOutput:
    (output,) = engine.generate([prompt(length)], params, use_tqdm=False)
    return output.outputs[0]


def letters(max_tokens: int, **params: object) -> SamplingParams:
    """Draws that make a text of lower-case letters."""
    return drawn(max_tokens, seed=5, logit_bias=LETTERS, **params)


def test_max_tokens_end_a_sequence(engine: Engine) -> None:
    output = complete(engine, greedy(7))
    assert (output.finish_reason, output.stop_reason, len(output.token_ids)) == ("length", None, 7)


@pytest.mark.parametrize("max_tokens", [50, None])
def test_the_models_length_ends_a_sequence(engine: Engine, max_tokens: int | None) -> None:
    output = complete(engine, greedy(max_tokens), length=MAX_LEN - 3)
    assert (output.finish_reason, output.stop_reason, len(output.token_ids)) == ("length", None, 3)


def test_the_longest_prompt_still_gets_one_token(engine: Engine) -> None:
    assert len(complete(engine, greedy(5), length=MAX_LEN - 1).token_ids) == 1


def test_eos_ends_a_sequence_without_a_stop_reason(engine: Engine) -> None:
    output = complete(engine, greedy(9, ignore_eos=False, logit_bias={EOS_ID: 100.0}))
    assert (output.finish_reason, output.stop_reason, output.token_ids) == ("stop", None, (EOS_ID,))
    assert output.text == ""


def test_eos_after_text_leaves_the_text(engine: Engine) -> None:
    # EOS may not come before the third token, and the bias makes it come then.
    params = letters(9, ignore_eos=False, min_tokens=2)
    params = SamplingParams(**{**vars(params), "logit_bias": LETTERS | {EOS_ID: 100.0}})
    output = complete(engine, params)
    assert output.token_ids[2:] == (EOS_ID,)
    assert len(output.text) == 2
    assert output.text.isalpha()


def test_ignored_eos_is_a_token_like_others(engine: Engine) -> None:
    output = complete(engine, greedy(4, logit_bias={EOS_ID: 100.0}))
    assert (output.finish_reason, output.token_ids) == ("length", (EOS_ID,) * 4)


def test_a_stop_token_is_the_stop_reason_and_its_text_is_left_out(engine: Engine) -> None:
    free = complete(engine, letters(12))
    stop = free.token_ids[4]
    first = free.token_ids.index(stop)
    output = complete(engine, letters(12, stop_token_ids=[270, stop]))
    assert (output.finish_reason, output.stop_reason) == ("stop", stop)
    assert output.token_ids == free.token_ids[: first + 1]
    assert output.text == free.text[:first]


def test_a_stop_tokens_text_can_be_included(engine: Engine) -> None:
    free = complete(engine, letters(12))
    stop = free.token_ids[4]
    output = complete(engine, letters(12, stop_token_ids=[stop], include_stop_str_in_output=True))
    assert output.text == free.text[: free.token_ids.index(stop) + 1]


def test_eos_given_as_a_stop_token_is_the_stop_reason_even_if_eos_is_ignored(engine: Engine) -> None:
    output = complete(engine, greedy(9, logit_bias={EOS_ID: 100.0}, stop_token_ids=[EOS_ID]))
    assert (output.finish_reason, output.stop_reason) == ("stop", EOS_ID)


@pytest.mark.parametrize("include", [False, True])
def test_a_stop_string_ends_the_text_where_it_begins_or_ends(engine: Engine, include: bool) -> None:
    free = complete(engine, letters(30))
    stop = free.text[7:10]
    at = free.text.index(stop)
    output = complete(engine, letters(30, stop=["Zzz", stop], include_stop_str_in_output=include))
    assert (output.finish_reason, output.stop_reason) == ("stop", stop)
    assert output.text == free.text[: at + 3 * include]
    assert output.token_ids == free.token_ids[: at + 3]


def test_no_part_of_a_stop_string_is_ever_streamed(engine: Engine) -> None:
    free = complete(engine, letters(30))
    stop = free.text[7:12]
    pieces = [output.outputs[0].text for output in engine.stream(prompt(6), letters(30, stop=stop))]
    wanted = free.text[: free.text.index(stop)]
    assert pieces[-1] == wanted
    assert all(wanted.startswith(piece) for piece in pieces)


def test_text_held_back_for_a_stop_string_that_does_not_come_is_released(engine: Engine) -> None:
    free = complete(engine, letters(10))
    output = complete(engine, letters(10, stop=free.text[-2:] + "Z"))
    assert (output.finish_reason, output.text) == ("length", free.text)


def test_min_tokens_put_off_stop_strings(engine: Engine) -> None:
    free = complete(engine, letters(30))
    output = complete(engine, letters(30, stop=free.text[2], min_tokens=12))
    again = free.text.find(free.text[2], 12)
    assert output.text == (free.text if again < 0 else free.text[:again])


@pytest.mark.parametrize("params", [greedy(9), drawn(9, seed=1, temperature=2.0)], ids=["greedy", "drawn"])
def test_min_tokens_forbid_eos_and_stop_tokens_to_be_drawn(engine: Engine, params: SamplingParams) -> None:
    stop = 20
    wishes = {"ignore_eos": False, "min_tokens": 5, "stop_token_ids": [stop], "logit_bias": {EOS_ID: 50.0, stop: 49.0}}
    output = complete(engine, SamplingParams(**{**vars(params), **wishes}))
    assert len(output.token_ids) == 6
    assert not {EOS_ID, stop} & set(output.token_ids[:5])
    assert output.token_ids[5] in (EOS_ID, stop)
    assert output.finish_reason == "stop"


def test_min_tokens_leave_an_ignored_eos_alone(engine: Engine) -> None:
    output = complete(engine, greedy(4, min_tokens=4, logit_bias={EOS_ID: 100.0}))
    assert output.token_ids == (EOS_ID,) * 4


def test_a_bias_forces_or_forbids_tokens(engine: Engine) -> None:
    free = complete(engine, greedy(6))
    assert complete(engine, greedy(6, logit_bias={200: 100.0})).token_ids == (200,) * 6
    banned = dict.fromkeys(free.token_ids, -100.0)
    assert not set(complete(engine, greedy(6, logit_bias=banned)).token_ids) & set(free.token_ids)


def test_penalties_make_repeats_rarer(engine: Engine) -> None:
    free = complete(engine, greedy(60)).token_ids
    punished = complete(engine, greedy(60, presence_penalty=2.0, frequency_penalty=2.0)).token_ids
    assert len(set(punished)) > len(set(free))


def test_n_sequences_may_end_at_different_times(engine: Engine) -> None:
    params = drawn(40, seed=2, n=6, ignore_eos=False, stop_token_ids=list(range(2, 40)))
    (output,) = engine.generate([prompt(6)], params, use_tqdm=False)
    assert len({len(each.token_ids) for each in output.outputs}) > 1
    assert all(each.finish_reason == "stop" for each in output.outputs)
    assert all(each.token_ids[-1] == (each.stop_reason or EOS_ID) for each in output.outputs)
