"""Writes `tests/golden/`: run `python -m tests.oracle.make_golden` after a change of the models compared."""

from __future__ import annotations

import tempfile
from functools import partial
from pathlib import Path

import numpy as np
import torch

from tests.oracle.compare import top_two_gaps
from tests.oracle.golden import NUM_GREEDY, PROMPT_LENS, Golden, save_golden, text_len
from tests.oracle.hf import hf_greedy, hf_logits, hf_routing, load_hf
from tests.oracle.models import EMBEDDED, NAMES, token_ids, write_model
from tests.oracle.perplexity import oracle_perplexity, save_perplexity


def make_golden(name: str, folder: Path) -> Golden:
    """The results of the independent implementation for the model `name`, written to `folder` before."""
    model = load_hf(folder, torch.float32)
    text = token_ids(name, text_len(name))
    prompts = [token_ids(name, length, seed=length) for length in PROMPT_LENS]
    continued = [hf_greedy(model, prompt, NUM_GREEDY) for prompt in prompts]
    logits = np.stack([logits for _, logits in continued])
    return Golden(
        text=text,
        logits=hf_logits(model, text),
        experts=hf_routing(model, text).ids,
        prompts=np.stack([np.pad(p, (0, max(PROMPT_LENS) - len(p)), constant_values=-1) for p in prompts]),
        greedy=np.stack([tokens for tokens, _ in continued]),
        gaps=top_two_gaps(logits),
        norms=np.linalg.norm(logits, axis=-1),
    )


def main() -> None:
    torch.set_num_threads(1)  # matrices this small lose more to the hand-over than they gain
    for name in NAMES:
        with tempfile.TemporaryDirectory() as folder:
            save_golden(name, make_golden(name, write_model(Path(folder), name)))
    save_perplexity(oracle_perplexity(partial(hf_logits, load_hf(EMBEDDED, torch.float32))))


if __name__ == "__main__":
    main()
