"""Safetensors shards written as a stream, and a checkpoint cut after some of its layers without copying it."""

from __future__ import annotations

import json
from collections.abc import Iterable, Iterator
from pathlib import Path

import numpy as np

from hmoe_jax.checkpoint.header import LENGTH_BYTES, NUMPY_DTYPES
from hmoe_jax.checkpoint.index import INDEX_NAME
from synthetic.weights import RandomWeights

ALIGN = 64
"""The header is padded so that the data begins at a cache line (the format promises no alignment)."""


def write_shards(folder: Path, weights: RandomWeights) -> Iterator[int]:
    """One file for embedding and head, one for each layer, and the index. Yields the bytes of each tensor, written."""
    shards = list(weights.shards())
    weight_map: dict[str, str] = {}
    for index, specs in enumerate(shards):
        name = f"model-{index + 1:05d}-of-{len(shards):05d}.safetensors"
        tensors = [(spec.name, weights.dtype(spec), spec.shape, weights.pieces(spec)) for spec in specs]
        yield from _write(folder / name, tensors)
        weight_map |= {spec.name: name for spec in specs}
    _write_index(folder, weight_map)


def cut(folder: Path, into: Path, *, num_layers: int) -> None:
    """Makes `into` the model of the first layers of `folder`, which `write_shards` wrote: shards and text are links."""
    fields = json.loads((folder / "config.json").read_text(encoding="utf-8"))
    if not fields["first_k_dense_replace"] < num_layers <= fields["num_hidden_layers"]:
        raise ValueError(
            f"num_layers must be above the {fields['first_k_dense_replace']} dense ones and at most "
            f"{fields['num_hidden_layers']}, the layers of {folder}, got {num_layers}"
        )
    index = json.loads((folder / INDEX_NAME).read_text(encoding="utf-8"))["weight_map"]
    shards = sorted(set(index.values()))[: 1 + num_layers]
    into.mkdir()
    for name in (*shards, "tokenizer.json", "tokenizer_config.json", "generation_config.json"):
        (into / name).symlink_to((folder / name).resolve())
    _write_index(into, {tensor: shard for tensor, shard in index.items() if shard in shards})
    (into / "config.json").write_text(json.dumps(fields | {"num_hidden_layers": num_layers}, indent=2) + "\n")


def _write(path: Path, tensors: list[tuple[str, str, tuple[int, ...], Iterable[np.ndarray]]]) -> Iterator[int]:
    header, end = {}, 0
    for name, dtype, shape, _ in tensors:
        begin, end = end, end + int(np.prod(shape)) * NUMPY_DTYPES[dtype].itemsize
        header[name] = {"dtype": dtype, "shape": list(shape), "data_offsets": [begin, end]}
    text = json.dumps({"__metadata__": {"format": "pt"}, **header}).encode()
    text += b" " * (-(len(text) + LENGTH_BYTES) % ALIGN)
    with path.open("wb") as file:
        file.write(len(text).to_bytes(LENGTH_BYTES, "little") + text)
        for *_, pieces in tensors:
            yield sum(file.write(np.ascontiguousarray(piece).view(np.uint8).data) for piece in pieces)


def _write_index(folder: Path, weight_map: dict[str, str]) -> None:
    total = sum((folder / shard).stat().st_size for shard in set(weight_map.values()))
    record = {"metadata": {"total_size": total}, "weight_map": weight_map}
    (folder / INDEX_NAME).write_text(json.dumps(record) + "\n", encoding="utf-8")
