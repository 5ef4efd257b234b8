"""The independent implementation: `transformers`' DeepSeek-V3 on PyTorch, CPU.

It reads the same files with other libraries and shares no mathematics with `hmoe_jax`. FP8 weights are expanded in
FP32, so a FP32 run is the exact mathematics of the stored weights, up to FP32 rounding: the truth that everything is
compared with.
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, nullcontext
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors.torch import load_file
from transformers import DeepseekV3Config, DeepseekV3ForCausalLM

from hmoe_jax.config import read_config
from tests.oracle.routing import Routing

FP8_BLOCK = 128


def load_hf(folder: Path, dtype: torch.dtype) -> DeepseekV3ForCausalLM:
    """The folder's model in `dtype`; the routing bias stays FP32, as `transformers` itself would keep it.

    Raises `ValueError` unless every parameter gets a value and every tensor but those of MTP layers is used.
    """
    fields = json.loads((folder / "config.json").read_text())
    config = DeepseekV3Config(**{name: value for name, value in fields.items() if name not in _NOT_PASSED})
    model = DeepseekV3ForCausalLM(config).eval()
    model.set_attn_implementation("eager")
    state = _state(_dequantised(_read_tensors(folder)), config)
    expected = model.state_dict()
    if missing := sorted(expected.keys() ^ state.keys()):
        raise ValueError(f"{folder}: tensors and parameters differ in {len(missing)}, first {missing[0]}")
    model.load_state_dict(state, strict=True)
    model.to(dtype)
    for name, buffer in model.named_buffers():
        if name.endswith("e_score_correction_bias"):
            buffer.data = state[name].float()
    return model


class HfTruth:
    """The oracle in FP32, in the form that parity compares with."""

    def __init__(self, folder: Path):
        self.config = read_config(folder)
        self._model = load_hf(folder, torch.float32)

    def run(
        self, token_ids: Sequence[int] | np.ndarray, *, forced: np.ndarray | None = None
    ) -> tuple[np.ndarray, Routing]:
        """Logits `[t, v]` and routing, with the experts `forced [m, t, k]` imposed if given."""
        with forced_routing(self._model, forced) if forced is not None else nullcontext():
            return hf_logits(self._model, token_ids), hf_routing(self._model, token_ids)


@torch.inference_mode()
def hf_logits(model: DeepseekV3ForCausalLM, token_ids: Sequence[int] | np.ndarray) -> np.ndarray:
    """Logits `[t, v]` in FP32 after each of the tokens."""
    return model(input_ids=torch.tensor([list(token_ids)])).logits[0].float().numpy()


@torch.inference_mode()
def hf_greedy(
    model: DeepseekV3ForCausalLM, prompt_ids: Sequence[int] | np.ndarray, n: int
) -> tuple[np.ndarray, np.ndarray]:
    """The `n` most likely tokens one after the other, and the logits `[n, v]` each was chosen from."""
    tokens, rows = [], []
    output = model(input_ids=torch.tensor([list(prompt_ids)]), use_cache=True)
    for _ in range(n):
        rows.append(output.logits[0, -1].float().numpy())
        tokens.append(int(rows[-1].argmax()))
        output = model(input_ids=torch.tensor([tokens[-1:]]), past_key_values=output.past_key_values, use_cache=True)
    return np.array(tokens, np.int32), np.stack(rows)


def hf_routing(model: DeepseekV3ForCausalLM, token_ids: Sequence[int] | np.ndarray) -> Routing:
    """The routing of a pass over `token_ids`."""
    seen: list[tuple[torch.Tensor, torch.Tensor]] = []
    hooks = [
        gate.register_forward_hook(lambda gate, inputs, output: seen.append((output[2], _choice(gate, output[0]))))
        for gate in _gates(model)
    ]
    try:
        hf_logits(model, token_ids)
    finally:
        for hook in hooks:
            hook.remove()
    ids = torch.stack([ids for ids, _ in seen]).numpy().astype(np.int32)
    choice = torch.stack([choice for _, choice in seen]).numpy()
    return Routing(model.config.n_group or 1, ids, choice)


@contextmanager
def forced_routing(model: DeepseekV3ForCausalLM, ids: np.ndarray) -> Iterator[None]:
    """Passes inside the block send tokens to the experts `ids [m, t, k]`; gates are recomputed for these.

    With the choice taken out of the comparison, what differs is arithmetic alone, and a bound on it can be tight.
    """

    def imposed(layer_ids: np.ndarray) -> Callable[..., tuple]:
        def hook(gate: Any, inputs: tuple, output: tuple) -> tuple:
            logits, chosen = output[0], torch.tensor(layer_ids).long()
            weights = logits.sigmoid().gather(1, chosen)
            if gate.norm_topk_prob:
                weights = weights / (weights.sum(dim=-1, keepdim=True) + 1e-20)
            return logits, weights * gate.routed_scaling_factor, chosen

        return hook

    hooks = [gate.register_forward_hook(imposed(layer_ids)) for gate, layer_ids in zip(_gates(model), ids, strict=True)]
    try:
        yield
    finally:
        for hook in hooks:
            hook.remove()


_NOT_PASSED = ("architectures", "quantization_config", "num_nextn_predict_layers", "torch_dtype", "dtype")
"""The weights are expanded here, MTP layers are not built, and the precision is `load_hf`'s argument."""


def _choice(gate: Any, logits: torch.Tensor) -> torch.Tensor:
    return logits.sigmoid() + gate.e_score_correction_bias


def _gates(model: DeepseekV3ForCausalLM) -> list[Any]:
    return [layer.mlp.gate for layer in model.model.layers if hasattr(layer.mlp, "gate")]


def _read_tensors(folder: Path) -> dict[str, torch.Tensor]:
    tensors: dict[str, torch.Tensor] = {}
    for file in sorted(folder.glob("*.safetensors")):
        tensors |= load_file(file)
    return tensors


def _dequantised(tensors: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """All tensors in FP32: a block-FP8 pair becomes the product of each code and the scale of its block."""
    plain = {}
    for name, tensor in tensors.items():
        if name.endswith("_scale_inv"):
            continue
        plain[name] = tensor.float()
        if tensor.dtype == torch.float8_e4m3fn:
            rows, columns = tensor.shape
            scale = tensors[f"{name}_scale_inv"]
            row_block, column_block = torch.arange(rows) // FP8_BLOCK, torch.arange(columns) // FP8_BLOCK
            plain[name] *= scale[row_block][:, column_block]
    return plain


def _state(tensors: dict[str, torch.Tensor], config: DeepseekV3Config) -> dict[str, torch.Tensor]:
    """The tensors under `transformers`' names: routed experts stacked, gate above up; a tied head filled in."""
    state: dict[str, torch.Tensor] = {}
    experts: dict[str, dict[int, dict[str, torch.Tensor]]] = {}
    for name, tensor in tensors.items():
        layer = re.match(r"model\.layers\.(\d+)\.", name)
        if layer and int(layer[1]) >= config.num_hidden_layers:
            continue
        if expert := re.fullmatch(r"(.*\.experts)\.(\d+)\.(gate|up|down)_proj\.weight", name):
            experts.setdefault(expert[1], {}).setdefault(int(expert[2]), {})[expert[3]] = tensor
        else:
            state[name] = tensor
    for prefix, by_index in experts.items():
        stack = [by_index[index] for index in range(config.n_routed_experts)]
        state[f"{prefix}.gate_up_proj"] = torch.stack([torch.cat([e["gate"], e["up"]]) for e in stack])
        state[f"{prefix}.down_proj"] = torch.stack([e["down"] for e in stack])
    if config.tie_word_embeddings:
        state["lm_head.weight"] = state["model.embed_tokens.weight"]
    return state
