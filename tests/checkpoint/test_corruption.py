"""Damage to a real folder: the load gives the identical model or a `CheckpointError`, nothing else."""

from pathlib import Path
from tempfile import TemporaryDirectory

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from hmoe_jax.checkpoint.index import open_checkpoint
from hmoe_jax.checkpoint.integrity import should_verify, verify, write_sums
from hmoe_jax.checkpoint.specs import check_tensors
from hmoe_jax.core import CheckpointError

from .crafted import SHARD_NAMES, SHARDS, SPECS, entry, folder_content, pack, write_folder

repeatable = settings(max_examples=100, derandomize=True, database=None, deadline=None)
INDEX_NAME = "model.safetensors.index.json"


def with_sums(content):
    with TemporaryDirectory() as folder:
        write_sums(write_folder(Path(folder), content))
        return content | {"SHA256SUMS": (Path(folder) / "SHA256SUMS").read_bytes()}


BARE = folder_content()  # without sums
SUMMED = with_sums(BARE)
MODEL = {
    name: (array.dtype, array.shape, array.tobytes()) for tensors in SHARDS.values() for name, array in tensors.items()
}


def load(content):
    """The whole load, as an engine does it: each tensor's dtype, shape and bytes, and the config's bytes."""
    with TemporaryDirectory() as name:
        folder = write_folder(Path(name), content)
        if should_verify(folder, "auto"):
            verify(folder)
        with open_checkpoint(folder) as checkpoint:
            check_tensors(checkpoint, SPECS)
            arrays = {name: checkpoint.array(name) for name in checkpoint.entries}
            model = {name: (array.dtype, array.shape, array.tobytes()) for name, array in arrays.items()}
        return model, (folder / "config.json").read_bytes()


def is_refused(content) -> bool:
    """Whether the load is refused; if it is not, asserts that it gives the identical model."""
    try:
        loaded = load(content)
    except CheckpointError:
        return True
    assert loaded == (MODEL, BARE["config.json"])
    return False


def header_bytes(shard: bytes) -> int:
    return 8 + int.from_bytes(shard[:8], "little")


def visible_bytes(name: str) -> int:
    """How much of a file is checked without sums: all of the index, the header of a shard, nothing else."""
    if name in SHARD_NAMES:
        return header_bytes(BARE[name])
    return len(BARE[name]) if name == INDEX_NAME else 0


@st.composite
def splices(draw, content, lengths):
    """`content` with a range of one file replaced, by bytes of some file or random ones, more or fewer."""
    name = draw(st.sampled_from([name for name, length in lengths.items() if length]))
    begin = draw(st.integers(0, lengths[name]))
    end = draw(st.integers(begin, lengths[name]))
    source = content[draw(st.sampled_from(sorted(content)))]
    source_begin = draw(st.integers(0, len(source)))
    copied = source[source_begin : source_begin + draw(st.integers(0, 64) | st.just(end - begin))]
    inserted = draw(st.just(copied) | st.binary(max_size=16))
    return content | {name: content[name][:begin] + inserted + content[name][end:]}


def flipped(content, name, bit):
    data = bytearray(content[name])
    data[bit // 8] ^= 1 << bit % 8
    return content | {name: bytes(data)}


def test_the_undamaged_folder_loads_with_and_without_sums():
    assert not is_refused(BARE)
    assert not is_refused(SUMMED)


@pytest.mark.parametrize("name", sorted(SUMMED))
@repeatable
@given(st.data())
def test_with_sums_a_flipped_bit_anywhere_is_refused(name, data):
    bit = data.draw(st.integers(0, 8 * len(SUMMED[name]) - 1))
    assert is_refused(flipped(SUMMED, name, bit))


@repeatable
@given(splices(SUMMED, {name: len(data) for name, data in SUMMED.items()}))
def test_with_sums_a_splice_anywhere_is_refused_or_harmless(content):
    is_refused(content)


@pytest.mark.parametrize("name", SHARD_NAMES)
@repeatable
@given(st.data())
def test_without_sums_a_flipped_bit_of_a_header_is_refused_unless_in_the_metadata(name, data):
    bit = data.draw(st.integers(0, 8 * visible_bytes(name) - 1))
    metadata = BARE[name].index(b'"format"'), BARE[name].index(b'"pt"') + len(b'"pt"')
    assert is_refused(flipped(BARE, name, bit)) or metadata[0] <= bit // 8 < metadata[1]


@repeatable
@given(st.integers(0, 8 * len(BARE[INDEX_NAME]) - 1))
def test_without_sums_a_flipped_bit_of_the_index_is_refused_or_harmless(bit):
    is_refused(flipped(BARE, INDEX_NAME, bit))


@repeatable
@given(splices(BARE, {name: visible_bytes(name) for name in BARE}))
def test_without_sums_a_splice_of_headers_or_index_is_refused_or_harmless(content):
    is_refused(content)


@pytest.mark.parametrize("name", SHARD_NAMES)
@repeatable
@given(st.data())
def test_without_sums_every_truncated_or_extended_shard_is_refused(name, data):
    shard = BARE[name]
    cut = shard[: data.draw(st.integers(0, len(shard) - 1))]
    grown = shard + data.draw(st.binary(min_size=1, max_size=64))
    assert is_refused(BARE | {name: cut})
    assert is_refused(BARE | {name: grown})


def test_without_sums_a_flipped_data_bit_cannot_be_seen():
    """Why `integrity` exists: every bit pattern is a number."""
    name = SHARD_NAMES[0]
    loaded, _ = load(flipped(BARE, name, 8 * len(BARE[name]) - 1))
    assert loaded != MODEL
    assert is_refused(flipped(SUMMED, name, 8 * len(BARE[name]) - 1))


@pytest.mark.parametrize(
    ("was", "becomes", "problem"),
    [
        (b'"shape":[7,3]', b'"shape":[3,7]', r"q_a\.weight': wrong shape: expected \[7, 3\], got \[3, 7\]"),
        (b'"F8_E4M3"', b'"F8_E5M2"', r"q_a\.weight': wrong dtype: expected F8_E4M3, got F8_E5M2"),
        (b'"F32"', b'"U32"', r"weight_scale_inv': wrong dtype: expected F32, got U32"),
    ],
)
def test_a_valid_header_that_means_something_else_is_refused_by_the_specs(was, becomes, problem):
    name = SHARD_NAMES[1]
    assert BARE[name].count(was) == 1
    with pytest.raises(CheckpointError, match=problem):
        load(BARE | {name: BARE[name].replace(was, becomes)})


def test_a_renamed_tensor_of_a_single_file_is_refused_by_the_specs():
    """No index contradicts a single file; the model does."""
    tensors = {name: entry("U8", [1], [i, i + 1]) for i, name in enumerate(SPECS)}
    tensors["model.norm.weighs"] = tensors.pop("model.norm.weight")
    with pytest.raises(CheckpointError, match=r"1 \(model.norm.weight\) missing and 1 \(model.norm.weighs\) unknown"):
        load({"model.safetensors": pack(tensors, bytes(len(tensors))), "config.json": b"{}"})
