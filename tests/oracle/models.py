"""The models that are compared with the independent implementation: the tiny random ones, and the trained one."""

from __future__ import annotations

import json
from pathlib import Path

import ml_dtypes
import numpy as np
from safetensors.numpy import save_file

from hmoe_jax.checkpoint.index import open_checkpoint
from hmoe_jax.config import ModelConfig, parse_config
from hmoe_jax.quant.dequantize import dequantize
from hmoe_jax.tokenizer import Tokenizer
from tests.tiny import CONFIGS, random_ids, write_tiny

EMBEDDED = Path(__file__).parents[2] / "models" / "embedded"
HELD_OUT_TEXT = Path(__file__).parents[1] / "data" / "inaugural_sample.txt"

TRAINED = ("embedded-fp8", "embedded-bf16")
"""The embedded model as it is committed, and with its FP8 matrices expanded and rounded to BF16."""

NAMES = (*CONFIGS, *TRAINED)

SCALE_SUFFIX = "_scale_inv"


def write_model(root: Path, name: str) -> Path:
    """The folder of a model; made below `root` unless it is committed."""
    if name == "embedded-fp8":
        return EMBEDDED
    if name == "embedded-bf16":
        return _expand(root / name)
    return write_tiny(root / name, name, num_shards=3 if name == "deepseek" else 1)


def config_of(name: str) -> ModelConfig:
    fields = dict(CONFIGS.get(name) or _embedded_fields())
    if name == "embedded-bf16":
        del fields["quantization_config"]
    return parse_config(fields)


def token_ids(name: str, length: int, *, seed: int = 0) -> np.ndarray:
    """Random ids for a random model; for the trained one, BOS and a passage of a text that it has never seen."""
    if name not in TRAINED:
        return random_ids(name, length, seed=seed)
    ids = Tokenizer.from_folder(EMBEDDED).encode(HELD_OUT_TEXT.read_text(encoding="utf-8"))
    start = 1 + 100 * seed
    return np.array([ids[0], *ids[start : start + length - 1]], np.int32)


def _expand(folder: Path) -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    fields = _embedded_fields()
    del fields["quantization_config"]
    (folder / "config.json").write_text(json.dumps(fields))
    tensors = {}
    with open_checkpoint(EMBEDDED) as checkpoint:
        for name in checkpoint.entries:
            if name.endswith(SCALE_SUFFIX):
                continue
            tensors[name] = checkpoint.array(name)
            if name + SCALE_SUFFIX in checkpoint.entries:
                scale = checkpoint.array(name + SCALE_SUFFIX)
                wide = dequantize("fp8_block", tensors[name], scale, np.float32)
                tensors[name] = np.asarray(wide).astype(ml_dtypes.bfloat16)
        save_file(tensors, folder / "model.safetensors")
    return folder


def _embedded_fields() -> dict:
    return json.loads((EMBEDDED / "config.json").read_text())
