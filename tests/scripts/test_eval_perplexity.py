"""`scripts/eval_perplexity.py` as a user meets it."""

from __future__ import annotations

import json
import math
from pathlib import Path

from tests.scripts.run import finish


def test_prints_perplexity_of_every_token_of_the_text(model: str, cache: Path, tmp_path: Path) -> None:
    text = tmp_path / "text"
    text.write_text("abcabc" * 20)
    status, out, err = finish(
        "eval_perplexity", f"--model={model}", f"--text={text}", "--window=50", "--json", cache=cache
    )
    assert status == 0, err
    record = json.loads(out.splitlines()[-1])
    assert record["num_tokens"] == 120  # one per byte: each predicted once, the first of a window from BOS
    assert math.isclose(record["perplexity"], math.exp(record["nats"] / 120))


def test_a_text_that_is_not_utf8_is_refused(model: str, cache: Path, tmp_path: Path) -> None:
    text = tmp_path / "text"
    text.write_bytes(b"\xff\xfe")
    status, _, err = finish("eval_perplexity", f"--model={model}", f"--text={text}", cache=cache)
    assert status == 1
    assert "not UTF-8" in err
