"""What an engine keeps in memory while it serves."""

from __future__ import annotations

from pathlib import Path

import pytest
from synthetic.fields import Size
from synthetic.folder import write_model

from hmoe_jax.engine import Engine
from hmoe_jax.perf.cost import expert_bytes
from tests.serving import greedy

SIZE = Size(num_moe_layers=6, num_experts=32, is_narrow=True, codec="bf16", max_len=512)
"""1.2 GB of experts, beside which everything else is small."""


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("memory") / "model"
    write_model(folder, SIZE, seed=0, skew=0.5)
    return folder


def anonymous_bytes() -> int:
    status = dict(line.split(":", 1) for line in Path("/proc/self/status").read_text().splitlines())
    return int(status["RssAnon"].split()[0]) * 1024


@pytest.mark.parametrize("is_apart", [False, True], ids=["in gaps", "apart"])
def test_one_copy_of_the_experts_serves_decoding_and_a_prompt_beside_it(folder: Path, is_apart: bool) -> None:
    options = {"residency": "arena", "max_num_seqs": 2, "max_model_len": 256, "max_decode_slowdown": 100.0}
    options |= {"prefill": "stream", "warm_up": False, "compilation_cache": None}
    how = {"executor": "fused", "prefill_apart": True} if is_apart else {"executor": "overlap", "expert_cpus": "1"}
    before = anonymous_bytes()
    with Engine(folder, **options, **how) as engine:
        experts = engine.config.num_moe_layers * engine.config.num_experts * expert_bytes(engine.config)
        engine.add_request("decoding", {"prompt_token_ids": [5, 6, 7]}, greedy(30))
        while not any(output.request_id == "decoding" for output in engine.step()):
            pass
        engine.add_request("prompt", {"prompt_token_ids": list(range(100, 228))}, greedy(2))
        most, ended = 0, set[str]()
        while len(ended) < 2:
            ended |= {output.request_id for output in engine.step() if output.finished}
            most = max(most, anonymous_bytes() - before)
    assert experts > 10**9
    assert experts < most < 1.6 * experts
