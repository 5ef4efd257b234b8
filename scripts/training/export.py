"""Writes trained weights as a Hugging Face folder: block FP8 as DeepSeek-V3 publishes it, or plain BF16."""

from __future__ import annotations

import json
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
from safetensors.numpy import save_file
from tokenizers import Tokenizer

from hmoe_jax import quant
from hmoe_jax.architectures.deepseek_v3 import Weights
from hmoe_jax.architectures.deepseek_v3_checkpoint import describe, describe_experts, expected_tensors
from hmoe_jax.checkpoint.index import open_checkpoint
from hmoe_jax.checkpoint.integrity import write_sums
from hmoe_jax.checkpoint.specs import TensorSpec, check_tensors
from hmoe_jax.config import parse_config
from hmoe_jax.nn.linear import Projection
from training.model import ExpertWeights
from training.text import BOS, EOS

_FP8_CONFIG = {
    "activation_scheme": "dynamic",
    "fmt": "e4m3",
    "quant_method": "fp8",
    "weight_block_size": [128, 128],
}


def write_folder(
    folder: Path,
    fields: dict[str, Any],
    weights: Weights,
    experts: ExpertWeights,
    tokenizer: Tokenizer,
    *,
    card: str,
    fp8: bool,
) -> None:
    """Writes config, tensors, tokenizer, defaults and checksums. `fields` is the config without its number format.

    The folder is replaced as a whole, at the end: an engine that has it mapped keeps what it has.
    """
    fields = {**fields, "quantization_config": _FP8_CONFIG} if fp8 else fields
    with replacing(folder) as new:
        _write_json(new / "config.json", fields)
        tensors = dict(_tensors(fields, weights, experts))
        save_file(tensors, new / "model.safetensors", metadata={"format": "pt"})
        (new / "model.safetensors").chmod(0o644)  # the library writes it for its owner alone
        tokenizer.save(str(new / "tokenizer.json"))
        _write_json(
            new / "tokenizer_config.json",
            {
                "tokenizer_class": "PreTrainedTokenizerFast",
                "bos_token": BOS,
                "eos_token": EOS,
                "add_bos_token": True,
                "clean_up_tokenization_spaces": False,
                "model_max_length": fields["max_position_embeddings"],
                "chat_template": CHAT_TEMPLATE,
            },
        )
        _write_json(
            new / "generation_config.json",
            {
                "bos_token_id": fields["bos_token_id"],
                "eos_token_id": fields["eos_token_id"],
                "do_sample": True,
                "temperature": 0.5,
                "top_p": 0.95,
            },
        )
        (new / "README.md").write_text(card, encoding="utf-8")
        write_sums(new)


def read_folder(folder: Path, fields: dict[str, Any]) -> tuple[Weights, ExpertWeights]:
    """The FP32 trees of a folder that `write_folder` wrote in BF16, to go on training. Raises `CheckpointError`."""
    config = parse_config(fields)
    with open_checkpoint(folder) as checkpoint:
        check_tensors(checkpoint, expected_tensors(config))

        def read(spec: TensorSpec) -> np.ndarray:
            return checkpoint.array(spec.name).astype(np.float32)

        shape = (config.num_moe_layers, config.num_experts)
        wide, tall = (config.expert_ffn, config.hidden_size), (config.hidden_size, config.expert_ffn)
        experts = ExpertWeights(np.empty((*shape, *wide)), np.empty((*shape, *wide)), np.empty((*shape, *tall)))
        for spec in describe_experts(config):
            getattr(experts, spec.matrix)[spec.layer, spec.expert] = read(spec.projection.weight)
        as_f32 = partial(jnp.asarray, dtype=jnp.float32)
        return jax.tree.map(as_f32, (jax.tree.map(read, describe(config)), experts))


CHAT_TEMPLATE = (
    "{{ bos_token }}{% for message in messages %}{{ message['content'] }}\n\n{% endfor %}"
    "{% if not add_generation_prompt %}{{ eos_token }}{% endif %}"
)
"""Paragraph after paragraph: the model was trained on prose, not on dialogue, and simply goes on."""


def through_fp8(weights: Weights, experts: ExpertWeights, fields: dict[str, Any]) -> tuple[Weights, ExpertWeights]:
    """The same trees with every value that FP8 storage rounds, rounded; for measuring what it costs."""

    def rounded(matrix: np.ndarray) -> np.ndarray:
        codes, scale = quant.quantize(np.asarray(matrix, np.float32))
        return np.asarray(quant.dequantize(codes, scale, np.float32))

    def projection(spec: Projection, value: Projection) -> Projection:
        return Projection(rounded(value.weight)) if spec.scale is not None else value

    specs = describe(parse_config({**fields, "quantization_config": _FP8_CONFIG}))
    is_projection = lambda node: isinstance(node, Projection)  # noqa: E731 - two words, used on the next line only
    new_weights = jax.tree.map(
        lambda spec, value: projection(spec, value) if is_projection(spec) else value,
        specs,
        weights,
        is_leaf=is_projection,
    )
    new_experts = jax.tree.map(lambda stack: np.stack([[rounded(w) for w in layer] for layer in stack]), experts)
    return new_weights, new_experts


@contextmanager
def replacing(folder: Path) -> Iterator[Path]:
    """A new folder that takes the place of `folder` at the end, if all went well."""
    partial, old = folder.with_name(f"{folder.name}.partial"), folder.with_name(f"{folder.name}.old")
    for leftover in (partial, old):
        shutil.rmtree(leftover, ignore_errors=True)
    partial.mkdir(parents=True)
    yield partial
    if folder.exists():
        folder.rename(old)
    partial.rename(folder)
    shutil.rmtree(old, ignore_errors=True)


def _tensors(fields: dict[str, Any], weights: Weights, experts: ExpertWeights) -> Iterator[tuple[str, np.ndarray]]:
    config = parse_config(fields)
    is_projection = lambda node: isinstance(node, Projection)  # noqa: E731
    specs = jax.tree.leaves(describe(config), is_leaf=is_projection)
    values = jax.tree.leaves(weights, is_leaf=is_projection)
    for spec, value in zip(specs, values, strict=True):
        if is_projection(spec):
            yield from _projection(spec, np.asarray(value.weight, np.float32))
        else:
            keep_f32 = spec.name.endswith("e_score_correction_bias")
            yield spec.name, np.asarray(value, np.float32 if keep_f32 else ml_dtypes.bfloat16)
    stacks = jax.tree.map(np.asarray, experts)
    for spec in describe_experts(config):
        yield from _projection(spec.projection, getattr(stacks, spec.matrix)[spec.layer, spec.expert])


def _projection(spec: Projection, weight: np.ndarray) -> Iterator[tuple[str, np.ndarray]]:
    if spec.scale is None:
        yield spec.weight.name, weight.astype(ml_dtypes.bfloat16)
        return
    codes, scale = quant.quantize(weight)
    yield spec.weight.name, codes
    yield spec.scale.name, scale


def _write_json(path: Path, fields: dict[str, Any]) -> None:
    path.write_text(json.dumps(fields, indent=2) + "\n", encoding="utf-8")
