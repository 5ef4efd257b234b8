"""Text to token ids and back, on top of the `tokenizers` library."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any

import tokenizers

from hmoe_jax.core import ConfigError
from hmoe_jax.folder import read_json, special_tokens

OTHER_FORMATS = ("tiktoken.model", "spiece.model", "tokenizer.model", "sentencepiece.bpe.model", "vocab.json")
"""Tokenizer files that are recognised, in order to say that they are not read."""


@dataclass(frozen=True)
class Tokenizer:
    """A checkpoint's tokenizer: immutable, and safe to share between threads.

    `eos_ids` end a generated sequence. `first_id` and `last_id` are what `encode` adds where the
    post-processor inside tokenizer.json does not (`add_bos_token` and `add_eos_token` of
    tokenizer_config.json), None for nothing.
    """

    backend: tokenizers.Tokenizer = field(repr=False)  # prints its vocabulary
    bos_id: int | None = None
    eos_ids: tuple[int, ...] = ()
    first_id: int | None = None
    last_id: int | None = None

    @classmethod
    def from_folder(cls, path: Path | str) -> Tokenizer:
        """Reads a checkpoint folder; raises `ConfigError`, naming the file, if one is missing or malformed.

        tokenizer.json is required. Special tokens are those of tokenizer_config.json, then
        special_tokens_map.json. `eos_ids` are those of `eos_ids_of_folder`, then the tokenizer's own EOS.
        """
        folder = Path(path)
        backend = _read_backend(folder)
        config = read_json(folder / "tokenizer_config.json")
        bos_id, eos_id = (_special_id(backend, folder, role) for role in ("bos_token", "eos_token"))
        own_eos_ids = () if eos_id is None else (eos_id,)
        return cls(
            backend=backend,
            bos_id=bos_id,
            eos_ids=tuple(dict.fromkeys((*eos_ids_of_folder(folder), *own_eos_ids))),
            first_id=bos_id if config.get("add_bos_token") is True else None,
            last_id=eos_id if config.get("add_eos_token") is True else None,
        )

    @property
    def vocab_size(self) -> int:
        """Tokens known by name; a model's padded embedding table may have more rows."""
        return self.backend.get_vocab_size(with_added_tokens=True)

    def encode(self, text: str, add_special_tokens: bool = True) -> list[int]:
        """Token ids of `text`; may be empty. Special tokens written out in `text` become their single ids.

        BOS is never added before a text that already starts with it, as one rendered by a chat template does.
        Raises `ValueError` for lone surrogates, which JSON can carry.
        """
        try:
            ids = self.backend.encode(text, add_special_tokens=add_special_tokens).ids
        except TypeError as error:  # "must be str", which it is
            raise ValueError("text must be Unicode that UTF-8 can write: no lone surrogates") from error
        if not add_special_tokens:
            return ids
        if self._backend_adds_bos and ids[:2] == [self.bos_id, self.bos_id]:
            ids = ids[1:]
        first = [] if self.first_id is None or ids[:1] == [self.first_id] else [self.first_id]
        last = [] if self.last_id is None or ids[-1:] == [self.last_id] else [self.last_id]
        return first + ids + last

    def decode(self, ids: Sequence[int], skip_special_tokens: bool = True) -> str:
        """Text of `ids`: bytes that are not UTF-8 become U+FFFD, and ids without a token are left out."""
        return self.backend.decode(ids, skip_special_tokens=skip_special_tokens)

    def token_text(self, token_id: int) -> str:
        """Text of one token as it stands inside a sentence, with its leading space: for logprobs.

        A token that is part of a character reads U+FFFD; an id without a token reads "".
        """
        text = self.decode([token_id], skip_special_tokens=False)
        # Decoders of the SentencePiece kind drop the space that "▁" stands for at the start of a text.
        spaced = (self.backend.id_to_token(token_id) or "").startswith("▁") and not text.startswith(" ")
        return " " + text if spaced else text

    @cached_property
    def special_ids(self) -> frozenset[int]:
        """What `decode` leaves out when it skips special tokens."""
        added = self.backend.get_added_tokens_decoder()
        return frozenset(token_id for token_id, token in added.items() if token.special)

    @cached_property
    def byte_ids(self) -> frozenset[int]:
        """Tokens `<0x00>` to `<0xFF>` where the decoder reads them as bytes (byte fallback); else empty."""
        decoder = self.backend.decoder
        if decoder is None or decoder.decode(["<0x41>"]) != "A":
            return frozenset()
        ids = (self.backend.token_to_id(f"<0x{byte:02X}>") for byte in range(256))
        return frozenset(token_id for token_id in ids if token_id is not None)

    @cached_property
    def _backend_adds_bos(self) -> bool:
        return self.bos_id is not None and self.backend.encode("").ids[:1] == [self.bos_id]


def eos_ids_of_folder(folder: Path | str) -> tuple[int, ...]:
    """The ids that end a text according to generation_config.json and config.json; each once, in that order.

    All of them count: Kimi-K2 names one in each file, and ends its texts with either. Raises `ConfigError`.
    """
    files = [Path(folder) / name for name in ("generation_config.json", "config.json")]
    return tuple(dict.fromkeys(token_id for file in files for token_id in _eos_ids(read_json(file), file)))


def _read_backend(folder: Path) -> tokenizers.Tokenizer:
    file = folder / "tokenizer.json"
    if not file.is_file():
        found = [name for name in OTHER_FORMATS if (folder / name).is_file()]
        hint = f"; {', '.join(found)} is there, but only tokenizer.json is read" if found else ""
        raise ConfigError(f"{folder}: no tokenizer.json{hint}")
    try:
        backend = tokenizers.Tokenizer.from_file(str(file))
    except Exception as error:  # the library raises a bare Exception
        raise ConfigError(f"{file}: not a tokenizer that the tokenizers library can read: {error}") from error
    # Left over from training in many published files: a prompt is never cut or padded in silence.
    backend.no_truncation()
    backend.no_padding()
    return backend


def _special_id(backend: tokenizers.Tokenizer, folder: Path, role: str) -> int | None:
    text = special_tokens(folder).get(role)
    token_id = None if text is None else backend.token_to_id(text)
    if text is not None and token_id is None:
        raise ConfigError(f"{folder}: {role} {text!r} of the tokenizer's config is not a token of tokenizer.json")
    return token_id


def _eos_ids(config: Mapping[str, Any], file: Path) -> tuple[int, ...]:
    value = config.get("eos_token_id")
    if value is None:
        return ()
    ids = value if isinstance(value, list) else [value]
    if not all(type(token_id) is int and token_id >= 0 for token_id in ids):
        raise ConfigError(f"{file}: eos_token_id must be a token id or a list of them, got {value!r}")
    return tuple(ids)
