import gc
import resource
import threading
import weakref
from contextlib import contextmanager
from pathlib import Path

import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest

from hmoe_jax.experts.store import ExpertStore, ExpertTensor, StoreShape
from hmoe_jax.kernels import _native
from hmoe_jax.kernels.moe_experts import moe_experts
from hmoe_jax.kernels.pool import ThreadPool
from hmoe_jax.quant.formats import FORMATS
from tests.kernels.bounds import assert_within
from tests.kernels.codecs import CODECS, needs_codec
from tests.kernels.expert_case import Batch, Experts, random_matrix, shape_for
from tests.quant.cases import LAYOUTS

SHAPE = StoreShape(num_layers=2, num_experts=2, hidden=136, ffn=24)


@pytest.fixture
def pool():
    with ThreadPool() as pool:
        yield pool


def replaced(experts: Experts, index: int, **changes: object) -> list[ExpertTensor]:
    tensors = list(experts.tensors)
    tensors[index] = tensors[index]._replace(**changes)
    return tensors


@pytest.mark.parametrize(
    ("changes", "sentence"),
    [
        (
            {"weight": np.zeros((24, 135), ml_dtypes.float8_e4m3fn)},
            r"gate: expected shape \(24, 136\), got \(24, 135\)",
        ),
        ({"weight": np.zeros((24, 136), np.uint8)}, "layer 0, expert 0, gate: expected dtype float8_e4m3fn, got uint8"),
        ({"weight": np.zeros((136, 24), ml_dtypes.float8_e4m3fn).T}, "gate: expected a row-major array without gaps"),
        (
            {"scale": np.zeros((2, 1), np.float32)},
            r"gate scale: expected shape \(1, 2\) or \(24, 2\), got \(2, 1\)",
        ),
        (
            {"scale": np.zeros((2, 24), np.float32).T},
            "layer 0, expert 0, gate scale: expected a row-major array without gaps",
        ),
        ({"scale": np.zeros((1, 2), np.float64)}, "gate scale: expected dtype float32, got float64"),
        ({"scale": None}, "layer 0, expert 0, gate: fp8_block needs scales, got None"),
        ({"layer": 2}, "layer: expected 0 <= layer < 2, got 2"),
        ({"expert": -1}, "expert: expected 0 <= expert < 2, got -1"),
        ({"expert": 1}, "layer 0, expert 1, gate: was added before"),
    ],
)
def test_a_tensor_that_does_not_fit_is_named(pool, changes, sentence):
    tensors = replaced(Experts.random(SHAPE, "fp8_block"), 0, **changes)
    with pytest.raises(ValueError, match=sentence):
        ExpertStore(tensors, shape=SHAPE, codec="fp8_block", pool=pool)


def test_a_missing_tensor_is_named(pool):
    tensors = [t for t in Experts.random(SHAPE, "bf16").tensors if (t.layer, t.expert, t.matrix) != (1, 0, "down")]
    with pytest.raises(ValueError, match="1 of 12 matrices are missing, the first is layer 1, expert 0, down"):
        ExpertStore(tensors, shape=SHAPE, codec="bf16", pool=pool)


def test_sizes_must_be_positive(pool):
    with pytest.raises(ValueError, match="ffn: expected a positive number, got 0"):
        ExpertStore([], shape=StoreShape(1, 1, 1, 0), codec="bf16", pool=pool)


def test_an_unknown_codec_is_named(pool):
    with pytest.raises(ValueError, match="codec 'int3' is unknown: expected one of bf16, fp8_block"):
        ExpertStore([], shape=SHAPE, codec="int3", pool=pool)


@pytest.mark.parametrize("codec", [codec for codec, layout in FORMATS.items() if layout.cols_multiple > 1])
def test_sizes_that_groups_do_not_divide_are_refused(pool, codec):
    multiple = FORMATS[codec].cols_multiple
    shape = StoreShape(num_layers=1, num_experts=1, hidden=256, ffn=24)
    with pytest.raises(ValueError, match=f"{codec} needs columns that {multiple} divides, got 24"):
        ExpertStore([], shape=shape, codec=codec, pool=pool)
    needs_codec(codec)
    nothing = np.zeros(0, np.uint8)
    refused = pytest.raises(ValueError, match=f"down: codec {codec}: expected a multiple of {multiple} columns, got 24")
    with native_store(pool, codec, shape) as native, refused:
        native.add(0, 0, "down", nothing, nothing)


@contextmanager
def native_store(pool, codec, shape):
    """Past the checks of the Python class."""
    store = _native.ExpertStore(
        pool.native,
        codec,
        num_layers=shape.num_layers,
        num_experts=shape.num_experts,
        hidden=shape.hidden,
        ffn=shape.ffn,
    )
    yield store
    store.close()


@pytest.mark.parametrize("codec", CODECS)
def test_truncated_bytes_are_refused(pool, codec):
    needs_codec(codec)
    shape = shape_for(codec, SHAPE)
    (tensor, *_) = Experts.random(shape, codec).tensors
    weight = tensor.weight.reshape(-1).view(np.uint8)
    scale = None if tensor.scale is None else tensor.scale.reshape(-1).view(np.uint8)
    options = {} if scale is None or tensor.scale.dtype == np.float32 else {"scale_dtype": tensor.scale.dtype.name}
    with native_store(pool, codec, shape) as native:
        for wrong in (weight[:-1], weight[:0], np.concatenate([weight, weight[:1]])):
            with pytest.raises(ValueError, match=f"gate: expected {weight.size} bytes of weights .*got {wrong.size}"):
                native.add(0, 0, "gate", wrong, scale, **options)
        if scale is not None:
            for wrong in (scale[:-1], scale[:0], np.concatenate([scale, scale[:1]])):
                with pytest.raises(ValueError, match=f"gate: expected .* scales .*in codec {codec}, got {wrong.size} "):
                    native.add(0, 0, "gate", weight, wrong, **options)
        native.add(0, 0, "gate", weight, scale, **options)


def test_scales_of_a_type_that_the_codec_does_not_have_are_refused(pool):
    needs_codec("fp8_channel", "mxfp4")
    with native_store(pool, "fp8_block", SHAPE) as native:
        weight, scale = np.zeros(24 * 136, np.uint8), np.zeros(2 * 2, np.uint8)
        with pytest.raises(ValueError, match="gate: codec fp8_block has no scales of type bfloat16"):
            native.add(0, 0, "gate", weight, scale, scale_dtype="bfloat16")
        with pytest.raises(ValueError, match="scale dtype 'float64' is unknown: expected float32, bfloat16 or uint8"):
            native.add(0, 0, "gate", weight, scale, scale_dtype="float64")


@pytest.mark.parametrize("codec", CODECS)
def test_weights_and_scales_may_lie_at_odd_addresses(pool, codec):
    needs_codec(codec)
    shape = shape_for(codec, SHAPE)
    experts, batch = Experts.random(shape, codec), Batch.random(shape, 20, slots=2)

    def shifted(array: np.ndarray | None) -> np.ndarray | None:
        if array is None:
            return None
        memory = np.empty(array.nbytes + 1, np.uint8)
        memory[1:] = array.reshape(-1).view(np.uint8)
        return memory[1:].view(array.dtype).reshape(array.shape)

    odd = [t._replace(weight=shifted(t.weight), scale=shifted(t.scale)) for t in experts.tensors]
    with experts.store(pool) as aligned, ExpertStore(odd, shape=shape, codec=codec, pool=pool) as unaligned:
        expected = moe_experts(*batch.operands, layer=1, store=aligned.id)
        np.testing.assert_array_equal(moe_experts(*batch.operands, layer=1, store=unaligned.id), expected)


@pytest.mark.parametrize(("codec", "block", "scale_dtype"), LAYOUTS, ids=str)
def test_every_layout_of_scales_is_read(pool, codec, block, scale_dtype):
    needs_codec(codec)
    shape = shape_for(codec, SHAPE)
    rng = np.random.default_rng(0)
    experts = Experts.random(shape, codec)
    tensors = tuple(
        ExpertTensor(
            *tensor[:3],
            *random_matrix(rng, shape.matrix(tensor.matrix), codec, block=block, scale_dtype=scale_dtype),
        )
        for tensor in experts.tensors
    )
    experts, batch = Experts(shape, codec, tensors), Batch.random(shape, 9, slots=2)
    with experts.store(pool) as store:
        assert_within(moe_experts(*batch.operands, layer=1, store=store.id), experts.exact(1, batch))


@pytest.mark.parametrize("residency", ["mmap", "arena"])
def test_ten_thousand_stores_leave_nothing_behind(pool, residency):
    shape = StoreShape(num_layers=1, num_experts=1, hidden=8, ffn=8)
    tensors = Experts.random(shape, "fp8_block").tensors

    def cycle(times: int) -> None:
        for _ in range(times):
            ExpertStore(tensors, shape=shape, codec="fp8_block", pool=pool, residency=residency).close()

    def growth(times: int) -> int:
        before = resident_bytes()
        cycle(times)
        return resident_bytes() - before

    cycle(1000)  # what grows once has grown
    # A store with three matrices is some hundred bytes: of 10,000 that leak not a quarter would go unnoticed. A leak
    # shows every time, what the allocator keeps for itself does not.
    assert min(growth(10_000), growth(10_000)) < 2**20


def resident_bytes() -> int:
    gc.collect()
    pages = int(Path("/proc/self/statm").read_text().split()[1])
    return pages * resource.getpagesize()


def test_a_store_reads_mapped_files_and_keeps_them_mapped(pool, tmp_path):
    experts, batch = Experts.random(SHAPE, "bf16"), Batch.random(SHAPE, 3, slots=2)
    (tmp_path / "weights").write_bytes(b"".join(t.weight.tobytes() for t in experts.tensors))
    mapped = np.memmap(tmp_path / "weights", np.uint8, mode="r")
    pieces = np.split(mapped, len(experts.tensors))
    tensors = [
        t._replace(weight=np.asarray(piece).view(t.weight.dtype).reshape(t.weight.shape))
        for t, piece in zip(experts.tensors, pieces, strict=True)
    ]
    store = ExpertStore(tensors, shape=SHAPE, codec="bf16", pool=pool)
    file = weakref.ref(mapped)
    del mapped, pieces, tensors
    gc.collect()
    assert file() is not None
    with experts.store(pool) as plain, store:
        expected = moe_experts(*batch.operands, layer=0, store=plain.id)
        np.testing.assert_array_equal(moe_experts(*batch.operands, layer=0, store=store.id), expected)
    gc.collect()
    assert file() is None


@pytest.mark.parametrize("topology", ["0-1;0-1", "0;1;0;1"])
@pytest.mark.parametrize("codec", ["bf16", "fp8_block"])
def test_weights_split_over_numa_nodes_give_the_same_bits(topology, codec):
    experts, batch = Experts.random(SHAPE, codec), Batch.random(SHAPE, 5, slots=2)
    with ThreadPool(1) as one, experts.store(one) as store:
        assert store.residency == "mmap"
        expected = moe_experts(*batch.operands, layer=1, store=store.id)
    with ThreadPool(topology=topology) as pool, experts.store(pool) as split:
        assert (pool.num_threads, pool.num_nodes) == (4, 1 + topology.count(";"))
        assert split.residency == "arena"
        np.testing.assert_array_equal(moe_experts(*batch.operands, layer=1, store=split.id), expected)


def test_an_arena_lets_each_array_go_before_it_takes_the_next(pool):
    experts, batch = Experts.random(SHAPE, "fp8_block"), Batch.random(SHAPE, 3, slots=2)
    alive: list[weakref.ref] = []

    def one_at_a_time():
        for tensor in experts.tensors:
            weight = tensor.weight.copy()
            assert not any(array() is not None for array in alive)
            alive.append(weakref.ref(weight))
            yield tensor._replace(weight=weight)
            del weight

    with (
        ExpertStore(one_at_a_time(), shape=SHAPE, codec="fp8_block", pool=pool, residency="arena") as copied,
        experts.store(pool) as plain,
    ):
        assert (copied.residency, plain.residency) == ("arena", "mmap")
        expected = moe_experts(*batch.operands, layer=0, store=plain.id)
        np.testing.assert_array_equal(moe_experts(*batch.operands, layer=0, store=copied.id), expected)


def test_a_refused_placement_is_a_sentence_and_not_an_error(pool):
    experts = Experts.random(SHAPE, "bf16")
    with ExpertStore(experts.tensors, shape=SHAPE, codec="bf16", pool=pool, residency="arena") as store:
        assert store.placement_refusal is None or "not bound to NUMA nodes: mbind" in store.placement_refusal


def test_a_store_outlives_its_pools_owner():
    experts, batch = Experts.random(SHAPE, "bf16"), Batch.random(SHAPE, 1, slots=1)
    with ThreadPool() as pool:
        store = experts.store(pool)
    assert np.isfinite(moe_experts(*batch.operands, layer=jnp.int32(0), store=store.id)).all()
    store.close()
    store.close()


def test_two_threads_may_close_a_store_at_once(pool):
    experts = Experts.random(SHAPE, "bf16")
    for _ in range(50):
        store, start = experts.store(pool), threading.Barrier(2)

        def close(store: ExpertStore = store, start: threading.Barrier = start) -> None:
            start.wait()
            store.close()

        closers = [threading.Thread(target=close) for _ in range(2)]
        for closer in closers:
            closer.start()
        for closer in closers:
            closer.join()


def test_a_store_may_be_closed_by_what_its_arrays_run_when_they_go(pool):
    tensors = [t._replace(weight=t.weight.copy()) for t in Experts.random(SHAPE, "bf16").tensors]
    store = ExpertStore(tensors, shape=SHAPE, codec="bf16", pool=pool)
    ends = [weakref.finalize(tensor.weight, store.close) for tensor in tensors]
    del tensors
    store.close()
    gc.collect()
    assert not any(end.alive for end in ends)


def test_a_closed_store_says_so_by_number(pool):
    store = Experts.random(SHAPE, "bf16").store(pool)
    store.close()
    with pytest.raises(ValueError, match=f"expert store {store.id} is closed"):
        store.native.freeze()


def test_a_store_on_a_closed_pool_is_refused():
    with ThreadPool() as pool:
        pass
    with pytest.raises(ValueError, match=f"thread pool {pool.id} is closed"):
        Experts.random(SHAPE, "bf16").store(pool)


def test_an_arena_takes_its_own_size_of_memory_and_gives_it_back(pool: ThreadPool, tmp_path: Path) -> None:
    """From tensors in a mapped file, whose pages are the system's."""
    shape = StoreShape(num_layers=2, num_experts=8, hidden=1024, ffn=1024)
    file = np.memmap(tmp_path / "experts", np.uint16, mode="w+", shape=(2, 8, 3, 1024, 1024))
    tensors = (
        ExpertTensor(layer, expert, matrix, file[layer, expert, i].view(ml_dtypes.bfloat16))
        for layer in range(2)
        for expert in range(8)
        for i, matrix in enumerate(("gate", "up", "down"))
    )
    before = own_bytes()
    with ExpertStore(tensors, shape=shape, codec="bf16", pool=pool, residency="arena") as store:
        assert store.num_bytes == file.nbytes
        assert 0.9 * file.nbytes < own_bytes() - before < 1.2 * file.nbytes
    assert own_bytes() - before < 0.2 * file.nbytes


def own_bytes() -> int:
    """Of this process's memory, what is no file's."""
    (line,) = [line for line in Path("/proc/self/status").read_text().splitlines() if line.startswith("RssAnon:")]
    return int(line.split()[1]) * 1024
