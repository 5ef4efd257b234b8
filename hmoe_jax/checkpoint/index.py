"""A model folder's weights as one checkpoint: a single safetensors file, or shards joined by an index."""

from __future__ import annotations

import mmap
import reprlib
from collections.abc import Iterable, Mapping, Sequence
from contextlib import ExitStack
from functools import partial
from pathlib import Path
from types import MappingProxyType

import numpy as np

from hmoe_jax.checkpoint.files import file_sizes, is_plain_name, read_file
from hmoe_jax.checkpoint.header import TensorEntry, check_tensor_name
from hmoe_jax.checkpoint.safetensors import SafetensorsFile
from hmoe_jax.core import CheckpointError
from hmoe_jax.strict_json import parse_object

SINGLE_NAME = "model.safetensors"
INDEX_NAME = "model.safetensors.index.json"
SUFFIX = ".safetensors"
MAX_INDEX_BYTES = 100_000_000  # 90,000 tensors at 100 bytes a line are 9 MB


def open_checkpoint(folder: str | Path) -> Checkpoint:
    """Opens every file of the checkpoint in `folder`, and checks headers and index against each other.

    A single file wins over an index beside it, as in `transformers`: so the reference reads the same bytes.
    Raises `CheckpointError`. Looks at no data.
    """
    folder = Path(folder)
    present = file_sizes(folder)
    if SINGLE_NAME in present:
        return Checkpoint(folder, [SafetensorsFile(folder / SINGLE_NAME)])
    if INDEX_NAME in present:
        return _open_shards(folder, present)
    expected, actual = f"{SINGLE_NAME} or {INDEX_NAME}", f"{len(present)} other files"
    raise CheckpointError("no weights", file=str(folder), expected=expected, actual=actual)


class Checkpoint:
    """Owns the open files of a checkpoint; `entries` maps each tensor's name to its dtype, shape and place.

    Raises `CheckpointError` if a tensor is in two files, or if there is none at all.
    """

    def __init__(self, folder: Path, files: Sequence[SafetensorsFile]):
        self.folder = folder
        self._files = tuple(files)
        self._owners = _owners(self._files)
        if not self._owners:
            raise CheckpointError("no tensors in the checkpoint", file=str(folder))
        entries = {name: file.entries[name] for name, file in self._owners.items()}
        self.entries: Mapping[str, TensorEntry] = MappingProxyType(entries)

    @property
    def total_bytes(self) -> int:
        """Bytes of all tensors, without headers."""
        return sum(entry.num_bytes for entry in self.entries.values())

    @property
    def mappings(self) -> dict[Path, mmap.mmap]:
        """All bytes of each file."""
        return {file.path: file.mapping for file in self._files}

    def file_of(self, name: str) -> Path:
        """The file that holds the tensor; `entries[name].begin` counts from its start."""
        return self._owner(name).path

    def array(self, name: str) -> np.ndarray:
        """A read-only, possibly unaligned view of the mapped tensor; see `SafetensorsFile.array`."""
        return self._owner(name).array(name)

    def close(self) -> None:
        """Gives up all mappings; views taken before stay valid."""
        for file in self._files:
            file.close()

    def __enter__(self) -> Checkpoint:
        return self

    def __exit__(self, *exception: object) -> None:
        self.close()

    def _owner(self, name: str) -> SafetensorsFile:
        if name not in self._owners:
            raise CheckpointError("no such tensor", file=str(self.folder), tensor=name)
        return self._owners[name]


def _open_shards(folder: Path, present: Mapping[str, int]) -> Checkpoint:
    index = folder / INDEX_NAME
    shard_of = _read_weight_map(index)
    shards = sorted(set(shard_of.values()))
    missing = [shard for shard in shards if shard not in present]
    if missing:
        expected, actual = f"{len(shards)} shards", f"{len(missing)} missing, the first {missing[0]}"
        raise CheckpointError("shards are missing", file=str(index), expected=expected, actual=actual)
    with ExitStack() as opened:
        files = [opened.enter_context(SafetensorsFile(folder / shard)) for shard in shards]
        checkpoint = Checkpoint(folder, files)
        _check_agreement(shard_of, checkpoint, index=str(index))
        opened.pop_all()
    return checkpoint


def _read_weight_map(index: Path) -> dict[str, str]:
    """Tensor name to shard name. Other fields are not read: headers know better than `total_size`."""
    fields = parse_object(read_file(index, limit_bytes=MAX_INDEX_BYTES), file=str(index))
    error = partial(CheckpointError, file=str(index))
    shard_of = fields.get("weight_map")
    if not isinstance(shard_of, dict):
        raise error("wrong weight_map", expected="an object", actual=reprlib.repr(shard_of))
    for name, shard in shard_of.items():
        check_tensor_name(name, file=str(index))
        if not (isinstance(shard, str) and is_plain_name(shard) and shard.endswith(SUFFIX)):
            expected = f"the name of a {SUFFIX} file in the same folder"
            raise error("unusable shard name", tensor=name, expected=expected, actual=reprlib.repr(shard))
    return shard_of


def _owners(files: Iterable[SafetensorsFile]) -> dict[str, SafetensorsFile]:
    owners: dict[str, SafetensorsFile] = {}
    for file in files:
        for name in file.entries:
            if name in owners:
                expected, actual = "in one file", f"also in {owners[name].path.name}"
                raise CheckpointError(
                    "tensor is there twice",
                    file=str(file.path),
                    tensor=name,
                    expected=expected,
                    actual=actual,
                )
            owners[name] = file
    return owners


def _check_agreement(shard_of: Mapping[str, str], checkpoint: Checkpoint, *, index: str) -> None:
    """Index and shards must say the same: which of the two is wrong, nobody can know."""
    error = partial(CheckpointError, file=index)
    for name in checkpoint.entries:
        shard, listed = checkpoint.file_of(name).name, shard_of.get(name)
        if listed is None:
            raise error("tensor is not in the index", tensor=name, expected=shard, actual="no entry")
        if listed != shard:
            raise error("tensor is in another shard than the index says", tensor=name, expected=listed, actual=shard)
    for name, shard in shard_of.items():
        if name not in checkpoint.entries:
            raise error("tensor is in no shard", tensor=name, expected=shard, actual="nothing")
