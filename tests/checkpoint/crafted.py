"""Checkpoints for the tests: safetensors files from hand-made bytes, and one small real model folder."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path

import ml_dtypes
import numpy as np
from safetensors.numpy import save

from hmoe_jax.checkpoint.specs import TensorSpec


def pack(header: object, data: bytes = b"") -> bytes:
    """A safetensors file; `header` is an object for JSON, or the bytes that stand in its place."""
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    return len(text).to_bytes(8, "little") + text + data


def entry(dtype: object = "F32", shape: object = (2,), data_offsets: object = (0, 8)) -> dict[str, object]:
    return {"dtype": dtype, "shape": shape, "data_offsets": data_offsets}


# No two tensors have the same shape and dtype, so that the specs tell them apart.
SHARDS: Mapping[str, Mapping[str, np.ndarray]] = {
    "model-00001-of-00002.safetensors": {
        "model.embed_tokens.weight": np.arange(15, dtype=np.float32).reshape(5, 3).astype(ml_dtypes.bfloat16),
        "model.norm.weight": np.array([1.0, -0.0, 3.5], ml_dtypes.bfloat16),
    },
    "model-00002-of-00002.safetensors": {
        "model.layers.0.q_a.weight": np.arange(21, dtype=np.uint8).reshape(7, 3).view(ml_dtypes.float8_e4m3fn),
        "model.layers.0.q_a.weight_scale_inv": np.array([[0.5]], np.float32),
    },
}
SHARD_NAMES = tuple(SHARDS)
INDEX = {
    "metadata": {"total_size": 61},
    "weight_map": {name: shard for shard, tensors in SHARDS.items() for name in tensors},
}
STORED_DTYPES = {"bfloat16": "BF16", "float8_e4m3fn": "F8_E4M3", "float32": "F32"}
SPECS = {
    name: TensorSpec(name, array.shape, (STORED_DTYPES[array.dtype.name],))
    for tensors in SHARDS.values()
    for name, array in tensors.items()
}


def folder_content() -> dict[str, bytes]:
    """File name to bytes: two shards written by the safetensors library, their index and a config."""
    content = {shard: save(dict(tensors), {"format": "pt"}) for shard, tensors in SHARDS.items()}
    content["model.safetensors.index.json"] = json.dumps(INDEX, indent=2).encode()
    content["config.json"] = json.dumps({"model_type": "tiny", "hidden_size": 3}).encode()
    return content


def write_folder(folder: Path, content: Mapping[str, bytes]) -> Path:
    for name, data in content.items():
        (folder / name).write_bytes(data)
    return folder
