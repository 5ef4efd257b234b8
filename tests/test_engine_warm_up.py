"""After warm-up nothing compiles: a request never waits for XLA."""

from __future__ import annotations

import jax
import jax.numpy as jnp

from hmoe_jax.engine import Engine
from tests.serving import LETTERS, NUM_SLOTS, drawn, greedy, prompt


def test_compilations_are_seen(compilations: list[str]) -> None:
    """Else the other test would hold for any engine."""
    before = len(compilations)
    jax.jit(lambda x: jnp.sin(x) + 1)(jnp.ones(3)).block_until_ready()
    assert len(compilations) > before


def test_after_warm_up_nothing_compiles(engine: Engine, compilations: list[str]) -> None:
    before = len(compilations)
    engine.generate("text", use_tqdm=False)
    engine.chat([{"role": "user", "content": "hi"}], greedy(3, stop="x"), use_tqdm=False)
    list(engine.stream(prompt(300), greedy(30)))
    for batch in range(1, NUM_SLOTS + 3):
        engine.generate([prompt(7 * i + 1) for i in range(batch)], drawn(3, seed=1), use_tqdm=False)
    for params in (
        greedy(3, prompt_logprobs=20, logprobs=20),
        drawn(3, seed=1, prompt_logprobs=0, n=9),
        drawn(3, seed=1, top_k=3, top_p=0.5, min_p=0.1, temperature=2.0),
        drawn(3, seed=1, presence_penalty=1.0, frequency_penalty=1.0, repetition_penalty=1.5),
        greedy(3, logit_bias=LETTERS, min_tokens=2, stop_token_ids=[4], return_routed_experts=True),
    ):
        engine.generate([prompt(5), prompt(70)], params, use_tqdm=False)
    stream = engine.stream(prompt(40), greedy(5))
    next(stream)
    stream.close()
    assert compilations[before:] == []
