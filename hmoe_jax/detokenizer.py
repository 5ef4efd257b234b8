"""Text of a sequence while it is being generated: whole characters, and no part of a stop string."""

from __future__ import annotations

from collections.abc import Sequence

from hmoe_jax.sampling_params import SamplingParams
from hmoe_jax.tokenizer import Tokenizer

REPLACEMENT = "\ufffd"
"""What a decoder writes for bytes that are not UTF-8, and so for a character that is not complete yet."""

WINDOW = 4
"""Tokens that surely hold the whole of an open or just finished character, which has at most four bytes."""


class Detokenizer:
    """One sequence's tokens in, releasable text out. Owns changing state: one object per sequence.

    The pieces joined are `tokenizer.decode` of all pushed ids, cut at the first stop string: the one that is
    complete first, and of several that end together the longest. As in vLLM, one that is complete within the
    first `min_tokens` tokens does not count. Stop strings are seen in the text, so not inside skipped special
    tokens.

    Stop *tokens* (EOS, `stop_token_ids`) are the caller's: push such a token only if its text shall be
    released.
    """

    def __init__(self, tokenizer: Tokenizer, params: SamplingParams):
        self.stop_reason: str | None = None
        self._stream = TextStream(tokenizer, skip_special_tokens=params.skip_special_tokens)
        self._stops = tuple(params.stop or ())
        self._min_tokens = params.min_tokens
        self._include_stop = params.include_stop_str_in_output
        self._num_tokens = 0
        self._held = ""  # settled text that may be the start of a stop string
        # Characters of `_held` and what follows that were searched: no stop string may end in them any more.
        self._searched = 0

    def push(self, token_id: int) -> str:
        """Takes the next token and returns the text that is now safe to show, often ""; "" after a stop."""
        if self.stop_reason is not None:
            return ""
        self._num_tokens += 1
        self._held += self._stream.push(token_id)
        if self._stop(self._held + self._stream.tentative):
            return self._held
        release = len(self._held) - _overlap(self._held, self._stops)
        piece, self._held = self._held[:release], self._held[release:]
        self._searched -= release
        return piece

    def finish(self) -> str:
        """Returns the text still held, incomplete characters as U+FFFD; nothing may be pushed after it."""
        if self.stop_reason is not None:
            return ""
        self._held += self._stream.finish()
        self._stop(self._held)
        piece, self._held = self._held, ""
        return piece

    def _stop(self, text: str) -> bool:
        """Searches `text`; on a hit sets `stop_reason` and leaves in `_held` what is released last."""
        may_stop = self._num_tokens > self._min_tokens
        hit = _first_stop(text, self._stops, self._searched) if may_stop else None
        self._searched = max(self._searched, len(text))
        if hit is None:
            return False
        end, self.stop_reason = hit
        self._held = text[: end if self._include_stop else end - len(self.stop_reason)]
        return True


class TextStream:
    """Turns ids into text token by token, so that the pieces joined are `tokenizer.decode` of all ids.

    Decodes only the last tokens, not the whole sequence, and gives out what is new. Their first characters
    may read differently than in the sequence (a decoder drops a space at the start, a character is cut in
    two), but those were given out before and only their number matters. Decoders that rewrite earlier text
    otherwise (CTC) are not handled. A run of byte-fallback tokens is decoded as a whole: it costs its length
    squared.

    `tokenizers.decoders.DecodeStream` is not used: it raises "Invalid prefix" when byte fallback turns a
    finished character into U+FFFD because a later byte of the run is invalid, and it cannot give back what it
    still holds.
    """

    def __init__(self, tokenizer: Tokenizer, *, skip_special_tokens: bool = True):
        self._tokenizer = tokenizer
        self._skip_special_tokens = skip_special_tokens
        self._window: list[int] = []
        self._settled_len = 0  # characters of the window's text that are given out
        self._open = ""  # the rest of the window's text

    @property
    def tentative(self) -> str:
        """Text beyond the pieces given so far that stands if no further token comes; "" inside a character.

        Whole characters of a run of byte-fallback tokens are here until the run ends: one invalid byte later
        in the run would turn all of them into U+FFFD.
        """
        return "" if self._open.endswith(REPLACEMENT) else self._open

    def push(self, token_id: int) -> str:
        """Takes the next token and returns the text that no later token can change."""
        if self._is_silent(token_id):
            return ""
        self._window.append(token_id)
        text = self._decode(self._window)
        if token_id in self._tokenizer.byte_ids:
            self._open = text[self._settled_len :]
            return ""
        # An incomplete character decodes to exactly one U+FFFD, so any before the last one are final.
        settled = text.removesuffix(REPLACEMENT)
        piece, self._open = settled[self._settled_len :], text[len(settled) :]
        self._settled_len = len(settled)
        self._shorten_window()
        return piece

    def finish(self) -> str:
        """Returns the text that was still open; nothing may be pushed after it."""
        piece, self._open = self._open, ""
        return piece

    def _is_silent(self, token_id: int) -> bool:
        """Whether `decode` leaves the id out: the window is to hold tokens that have text."""
        if self._skip_special_tokens and token_id in self._tokenizer.special_ids:
            return True
        return self._tokenizer.backend.id_to_token(token_id) is None

    def _shorten_window(self) -> None:
        window = self._window[-WINDOW:]
        text = self._decode(window)
        if text:  # else a decoder that drops a space at the start would drop the next one too
            self._window, self._settled_len = window, len(text) - len(self._open)

    def _decode(self, ids: list[int]) -> str:
        return self._tokenizer.decode(ids, skip_special_tokens=self._skip_special_tokens)


def _first_stop(text: str, stops: Sequence[str], searched: int) -> tuple[int, str] | None:
    """The stop string that ends first beyond `searched` characters, with its end; the longest of those."""
    starts = ((text.find(stop, max(0, searched + 1 - len(stop))), stop) for stop in stops)
    hits = [(start + len(stop), stop) for start, stop in starts if start >= 0]
    return min(hits, key=lambda hit: (hit[0], -len(hit[1])), default=None)


def _overlap(text: str, stops: Sequence[str]) -> int:
    """Length of the longest end of `text` that a stop string starts with."""
    return max((_overlap_of_one(text, stop) for stop in stops), default=0)


def _overlap_of_one(text: str, stop: str) -> int:
    lengths = range(min(len(text), len(stop) - 1), 0, -1)
    return next((length for length in lengths if text.endswith(stop[:length])), 0)
