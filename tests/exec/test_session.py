from __future__ import annotations

import pytest

from hmoe_jax.engine import Engine
from hmoe_jax.exec.session import Session
from tests.serving import MAX_LEN, NUM_PAGES, NUM_SLOTS, PREFILL_LEN


def test_every_sequence_is_driven_in_pieces_and_steps(engine: Engine) -> None:
    session = Session(engine._executor, prompt_len=PREFILL_LEN + 5, num_steps=3)
    assert len(session.sequences) == NUM_SLOTS
    pages = [page for sequence in session.sequences for page in sequence.pages]
    assert sorted(pages) == list(range(1, NUM_SLOTS + 1))
    for sequence in session.sequences:
        assert [int(piece.length) for piece in session.pieces(sequence)] == [PREFILL_LEN, 5]
        session.prefill(sequence)
    for _ in range(3):
        session.decode()
    assert {sequence.position for sequence in session.sequences} == {PREFILL_LEN + 8}
    assert len({sequence.token for sequence in session.sequences}) > 1


@pytest.mark.parametrize(
    ("prompt_len", "message"),
    [
        (MAX_LEN - 1, f"make {MAX_LEN + 1} tokens, but the longest sequence has {MAX_LEN}: lower one of them"),
        (100, f"need 16 pages of cache, but there are {NUM_PAGES}: lower the batch"),
    ],
)
def test_a_session_that_does_not_fit_is_refused(engine: Engine, prompt_len: int, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        Session(engine._executor, prompt_len=prompt_len, num_steps=2)
