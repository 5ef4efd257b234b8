"""Continues a prompt, streaming the text to the terminal, and ends with a line of figures."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

from absl import flags
from flags import MODEL, engine_options
from mains import print_json, read_text, run_main

from hmoe_jax.engine import Engine, default_sampling_params
from hmoe_jax.experts.store import StoreStats
from hmoe_jax.outputs import RequestOutput
from hmoe_jax.prompts import Prompt
from hmoe_jax.sampling_params import SamplingParams

_PROMPT = flags.DEFINE_string("prompt", None, "The text to continue.")
_PROMPT_FILE = flags.DEFINE_string("prompt_file", None, "A UTF-8 file with the text to continue.")
_CHAT = flags.DEFINE_bool("chat", False, "Put the prompt into the checkpoint's chat template, as the user's message.")
_MAX_TOKENS = flags.DEFINE_integer("max_tokens", 128, "Most tokens to generate.")
_TEMPERATURE = flags.DEFINE_float("temperature", None, "0 takes the most probable token; default the checkpoint's.")
_TOP_P = flags.DEFINE_float("top_p", None, "Sample from the best tokens that hold this much; default the checkpoint's.")
_TOP_K = flags.DEFINE_integer("top_k", None, "Sample from this many tokens, 0 for all; default the checkpoint's.")
_SEED = flags.DEFINE_integer("seed", 0, "Seed of the sampling.")
_STOP = flags.DEFINE_multi_string("stop", [], "End before this text (may be repeated).")
_IGNORE_EOS = flags.DEFINE_bool("ignore_eos", False, "Go on after an end-of-text token.")


def main() -> None:
    if (_PROMPT.value is None) == (_PROMPT_FILE.value is None):
        raise ValueError("give either --prompt or --prompt_file")
    prompt = _PROMPT.value if _PROMPT.value is not None else read_text(_PROMPT_FILE.value)
    params = default_sampling_params(Path(MODEL.value), **_wishes())  # a bad flag is refused before anything is loaded
    with Engine(MODEL.value, max_num_seqs=1, warm_up=False, **engine_options()) as engine:
        tokens = _chat_ids(engine, prompt) if _CHAT.value else prompt
        # Compiles the two programs that this prompt needs, and brings the weights into memory, before the clock starts.
        engine.generate([tokens], dataclasses.replace(params, max_tokens=2, ignore_eos=True, stop=None), use_tqdm=False)
        before = engine.expert_stats()
        output = _print_stream(engine, tokens, prompt, params)
        figures = _figures(output, before, engine.expert_stats())
        isa = f", {engine.plan.isa}" if engine.plan.executor == "fused" else ""
        where = f"{engine.plan.executor} on {engine.plan.device.platform}{isa}"
        print(f"\n[{where}] {_line(figures)}")
        print_json({"text": output.outputs[0].text, "finish_reason": output.outputs[0].finish_reason, **figures})


def _wishes() -> dict[str, Any]:
    """The sampling flags that were given."""
    wishes = {"temperature": _TEMPERATURE.value, "top_p": _TOP_P.value, "top_k": _TOP_K.value}
    fixed = {
        "max_tokens": _MAX_TOKENS.value,
        "seed": _SEED.value,
        "stop": _STOP.value,
        "ignore_eos": _IGNORE_EOS.value,
    }
    return {name: value for name, value in wishes.items() if value is not None} | fixed


def _chat_ids(engine: Engine, prompt: str) -> list[int]:
    assert engine.tokenizer is not None
    text = engine.chat_template.render([{"role": "user", "content": prompt}])
    return engine.tokenizer.encode(text, add_special_tokens=False)


def _print_stream(engine: Engine, tokens: Prompt, prompt: str, params: SamplingParams) -> RequestOutput:
    """Prints the prompt and each new piece of text as it comes; returns the finished output."""
    print(prompt, end="", flush=True)
    shown = 0
    for output in engine.stream(tokens, params):
        text = output.outputs[0].text
        print(text[shown:], end="", flush=True)
        shown = len(text)
    return output


def _figures(output: RequestOutput, before: StoreStats | None, after: StoreStats | None) -> dict[str, Any]:
    metrics = output.metrics
    assert metrics is not None
    expert_gbps = None
    if before is not None and after is not None:
        read = StoreStats(0, after.expert_bytes - before.expert_bytes, after.seconds - before.seconds)
        expert_gbps = read.gbps
    return {
        "prompt_tokens": metrics.num_prompt_tokens,
        "generated_tokens": metrics.num_generated_tokens,
        "prompt_tok_per_s": metrics.prompt_tok_per_s,
        "decode_tok_per_s": metrics.decode_tok_per_s,
        "expert_gbps": expert_gbps,
    }


def _line(figures: dict[str, Any]) -> str:
    experts = f", experts {figures['expert_gbps']:.1f} GB/s" if figures["expert_gbps"] is not None else ""
    return (
        f"prompt {figures['prompt_tokens']} tokens at {figures['prompt_tok_per_s']:.0f} tok/s, "
        f"decode {figures['generated_tokens']} tokens at {figures['decode_tok_per_s']:.0f} tok/s{experts}"
    )


if __name__ == "__main__":
    run_main(main)
