"""The training text: public-domain books as one stream of tokens, with held-out parts that are never trained on."""

from __future__ import annotations

import gzip
import re
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers

BOS, EOS = "<|begin_of_text|>", "<|end_of_text|>"
HELD_OUT_BOOK = "heidi"
HELD_OUT_SHARE = 0.1
"""The end of every other book, likewise held out."""

_ASCII = str.maketrans({"“": '"', "”": '"', "‘": "'", "’": "'", "—": "--", "–": "-", "\ufeff": "", "\r": ""})


@dataclass(frozen=True)
class Corpus:
    """Texts by book name; a book is in either or both."""

    train: dict[str, str]
    held_out: dict[str, str]


def read_corpus(folder: Path) -> Corpus:
    """All `*.txt.gz` of `folder`, split. Raises `FileNotFoundError` if there are none."""
    paths = sorted(folder.glob("*.txt.gz"))
    if not paths:
        raise FileNotFoundError(f"{folder}: no *.txt.gz books here; name their folder with --books")
    train, held_out = {}, {}
    for path in paths:
        name = path.name.removesuffix(".txt.gz")
        text = clean(gzip.decompress(path.read_bytes()).decode("utf-8"))
        if name == HELD_OUT_BOOK:
            held_out[name] = text
            continue
        cut = text.index("\n\n", int(len(text) * (1 - HELD_OUT_SHARE)))
        train[name], held_out[name] = text[:cut], text[cut:]
    return Corpus(train, held_out)


def clean(text: str) -> str:
    """Plain paragraphs: typewriter quotes, no italics marks, hard line breaks undone inside paragraphs."""
    text = text.translate(_ASCII).replace("_", "")
    paragraphs = (re.sub(r"\s+", " ", block).strip() for block in re.split(r"\n\s*\n", text))
    return "\n\n".join(block for block in paragraphs if block)


def train_tokenizer(texts: list[str], vocab_size: int) -> Tokenizer:
    """Byte-level BPE that puts `BOS` in front of every encoded text."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size,
        special_tokens=[BOS, EOS],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(texts, trainer)
    tokenizer.post_processor = processors.Sequence(
        [
            processors.ByteLevel(trim_offsets=False),
            processors.TemplateProcessing(single=f"{BOS} $A", special_tokens=[(BOS, tokenizer.token_to_id(BOS))]),
        ]
    )
    return tokenizer


def encode_stream(tokenizer: Tokenizer, texts: dict[str, str]) -> np.ndarray:
    """All texts after each other as int32, `EOS` after each."""
    eos = tokenizer.token_to_id(EOS)
    encoded = tokenizer.encode_batch(list(texts.values()), add_special_tokens=False)
    return np.concatenate([np.array([*encoding.ids, eos], np.int32) for encoding in encoded])


def random_windows(stream: np.ndarray, rng: np.random.Generator, *, batch: int, length: int, bos: int) -> np.ndarray:
    """`[batch, length + 1]`: windows from anywhere, each begun with BOS as prompts are when the model is used."""
    starts = rng.integers(0, len(stream) - length, batch)
    windows = stream[starts[:, None] + np.arange(length)]
    return np.concatenate([np.full((batch, 1), bos, np.int32), windows], axis=1)


def fixed_windows(stream: np.ndarray, *, count: int, length: int, bos: int) -> np.ndarray:
    """`[count, length + 1]`, evenly spaced: the same held-out tokens at every evaluation."""
    starts = np.linspace(0, len(stream) - length - 1, count).astype(np.int64)
    windows = stream[starts[:, None] + np.arange(length)]
    return np.concatenate([np.full((count, 1), bos, np.int32), windows], axis=1)
