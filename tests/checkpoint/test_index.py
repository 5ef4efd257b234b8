"""One file or indexed shards: index and headers must agree, and no name leads out of the folder."""

import json
import reprlib

import numpy as np
import pytest
from safetensors.numpy import save_file

from hmoe_jax.checkpoint import index
from hmoe_jax.checkpoint.index import open_checkpoint
from hmoe_jax.checkpoint.safetensors import SafetensorsFile
from hmoe_jax.core import CheckpointError

from .crafted import INDEX, SHARD_NAMES, SHARDS, folder_content, pack, write_folder

FIRST, SECOND = SHARD_NAMES
NORM = "model.norm.weight"


@pytest.fixture
def folder(tmp_path):
    return write_folder(tmp_path, folder_content())


def rewrite_index(folder, **weight_map):
    """Sets entries of the weight map; None takes one away."""
    entries = {name: shard for name, shard in (INDEX["weight_map"] | weight_map).items() if shard is not None}
    (folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": entries}))


def rejected(folder) -> CheckpointError:
    with pytest.raises(CheckpointError) as caught:
        open_checkpoint(folder)
    return caught.value


def test_shards_are_one_mapping_of_names_to_views(folder):
    with open_checkpoint(folder) as checkpoint:
        for shard, tensors in SHARDS.items():
            for name, array in tensors.items():
                assert checkpoint.file_of(name) == folder / shard
                assert checkpoint.entries[name].shape == array.shape
                assert checkpoint.array(name).dtype == array.dtype
                assert checkpoint.array(name).tobytes() == array.tobytes()
        assert len(checkpoint.entries) == 4
        assert checkpoint.total_bytes == 2 * 15 + 2 * 3 + 21 + 4


def test_a_single_file_needs_no_index(tmp_path):
    save_file({"a": np.ones(3, np.float32)}, tmp_path / "model.safetensors")
    with open_checkpoint(tmp_path) as checkpoint:
        assert list(checkpoint.entries) == ["a"]


def test_a_single_file_wins_over_an_index_as_in_transformers(folder):
    save_file({"a": np.ones(3, np.float32)}, folder / "model.safetensors")
    assert list(open_checkpoint(folder).entries) == ["a"]


def test_files_that_the_index_does_not_name_are_not_opened(folder):
    (folder / "consolidated.safetensors").write_bytes(b"not a checkpoint")
    assert len(open_checkpoint(folder).entries) == 4


def test_closing_the_checkpoint_closes_its_files_and_keeps_views(folder):
    with open_checkpoint(folder) as checkpoint:
        array = checkpoint.array(NORM)
    assert array.tobytes() == SHARDS[FIRST][NORM].tobytes()
    with pytest.raises(ValueError, match="is closed"):
        checkpoint.array(NORM)


def test_a_rejected_checkpoint_leaves_no_file_open(folder, monkeypatch):
    opened = []

    def open_recorded(path):
        opened.append(SafetensorsFile(path))
        return opened[-1]

    monkeypatch.setattr(index, "SafetensorsFile", open_recorded)
    rewrite_index(folder, **{NORM: None})
    rejected(folder)
    assert len(opened) == 2
    for file in opened:
        with pytest.raises(ValueError, match="is closed"):
            file.array(next(iter(file.entries)))


def test_an_unknown_tensor_is_refused_with_the_folder_named(folder):
    with pytest.raises(CheckpointError, match="tensor 'nothing': no such tensor") as caught:
        open_checkpoint(folder).array("nothing")
    assert (caught.value.file, caught.value.tensor) == (str(folder), "nothing")


def test_a_folder_without_weights_is_refused(tmp_path):
    (tmp_path / "config.json").write_text("{}")
    error = rejected(tmp_path)
    assert (error.problem, error.file, error.actual) == ("no weights", str(tmp_path), "1 other files")
    assert error.expected == "model.safetensors or model.safetensors.index.json"


def test_a_missing_folder_is_refused(tmp_path):
    assert str(rejected(tmp_path / "x")) == f"{tmp_path / 'x'}: cannot be read (No such file or directory)"


def test_a_file_for_a_folder_is_refused(folder):
    assert "config.json: cannot be read (Not a directory)" in str(rejected(folder / "config.json"))


def test_a_checkpoint_of_no_tensors_is_refused(tmp_path):
    (tmp_path / "model.safetensors").write_bytes(pack(b"{}"))
    assert rejected(tmp_path).problem == "no tensors in the checkpoint"
    (tmp_path / "model.safetensors").unlink()
    (tmp_path / "model.safetensors.index.json").write_text('{"weight_map": {}}')
    assert rejected(tmp_path).problem == "no tensors in the checkpoint"


@pytest.mark.parametrize(
    ("text", "problem"),
    [
        ("{}", "wrong weight_map: expected an object, got None"),
        ('{"weight_map": ["a"]}', r"wrong weight_map: expected an object, got \['a'\]"),
        ('{"weight_map": {"a": "x", "a": "y"}}', r"not valid JSON \(duplicate key 'a'\)"),
        ("[1]", "not a JSON object"),
        ('{"weight_map": {"": "a.safetensors"}}', "unusable tensor name"),
    ],
)
def test_a_broken_index_is_refused(folder, text, problem):
    (folder / "model.safetensors.index.json").write_text(text)
    with pytest.raises(CheckpointError, match=rf"model\.safetensors\.index\.json: {problem}"):
        open_checkpoint(folder)


def test_an_index_that_would_fill_the_memory_is_refused(folder):
    with (folder / "model.safetensors.index.json").open("r+b") as file:
        file.truncate(100_000_001)  # sparse: takes no space on disk
    error = rejected(folder)
    assert (error.problem, error.expected) == ("too long", "at most 100000000 bytes")


@pytest.mark.parametrize(
    "shard",
    [
        "../other.safetensors",
        "/other.safetensors",
        "sub/other.safetensors",
        "sub\\other.safetensors",
        "..",
        "",
        "other.bin",
        "other.safetensors\n",
        "\0.safetensors",
        "a" * 300 + ".safetensors",
        7,
        None,
        ["a.safetensors"],
    ],
)
def test_a_shard_name_that_could_leave_the_folder_is_refused(folder, shard):
    fields = {"weight_map": INDEX["weight_map"] | {NORM: shard}}
    (folder / "model.safetensors.index.json").write_text(json.dumps(fields))
    error = rejected(folder)
    assert (error.problem, error.tensor) == ("unusable shard name", NORM)
    assert error.expected == "the name of a .safetensors file in the same folder"
    assert error.actual == reprlib.repr(shard)


def test_missing_shards_are_counted_and_named(folder):
    (folder / SECOND).unlink()
    error = rejected(folder)
    assert error.file.endswith("model.safetensors.index.json")
    assert (error.expected, error.actual) == ("2 shards", f"1 missing, the first {SECOND}")


def test_a_dangling_link_is_a_missing_shard(folder):
    (folder / SECOND).unlink()
    (folder / SECOND).symlink_to("nowhere")
    assert rejected(folder).problem == "shards are missing"


def test_a_broken_shard_is_named(folder):
    (folder / SECOND).write_bytes(b"short")
    assert rejected(folder).file == str(folder / SECOND)


def test_a_listed_tensor_that_no_shard_has_is_refused(folder):
    rewrite_index(folder, extra=FIRST)
    error = rejected(folder)
    assert (error.problem, error.tensor) == ("tensor is in no shard", "extra")
    assert (error.expected, error.actual) == (FIRST, "nothing")


def test_a_tensor_that_the_index_does_not_list_is_refused(folder):
    rewrite_index(folder, **{NORM: None})
    error = rejected(folder)
    assert (error.problem, error.tensor) == ("tensor is not in the index", NORM)
    assert (error.expected, error.actual) == (FIRST, "no entry")


def test_a_tensor_in_another_shard_than_listed_is_refused(folder):
    rewrite_index(folder, **{NORM: SECOND})
    error = rejected(folder)
    assert (error.problem, error.tensor) == ("tensor is in another shard than the index says", NORM)
    assert (error.expected, error.actual) == (SECOND, FIRST)


def test_a_tensor_in_two_shards_is_refused(folder):
    save_file(dict(SHARDS[SECOND]) | {NORM: np.ones(3, np.float32)}, folder / SECOND)
    error = rejected(folder)
    assert (error.problem, error.tensor, error.file) == ("tensor is there twice", NORM, str(folder / SECOND))
    assert error.actual == f"also in {FIRST}"
