"""What is chosen for a model and a machine, with which reason, and which wishes cannot be met."""

from __future__ import annotations

import math
import re
from dataclasses import fields, replace
from pathlib import Path
from typing import Any
from unittest.mock import Mock

import jax
import numpy as np
import pytest

from hmoe_jax.architectures.deepseek_v3_checkpoint import expected_tensors
from hmoe_jax.config import ModelConfig, parse_config, read_config
from hmoe_jax.exec.plan import (
    CHUNK_LEN,
    KV_SHARE,
    PAGE_SIZE,
    EngineOptions,
    Hardware,
    Plan,
    engine_options,
    find_hardware,
    resolve,
)
from hmoe_jax.kernels.pool import available_isas
from hmoe_jax.perf.machines import sheet_rates
from tests.tiny import CONFIGS

GB = 10**9


CPU = Hardware(jax.devices("cpu")[0], 64 * GB)
GPU = Hardware(Mock(spec=jax.Device, platform="gpu", process_index=0), 24 * GB)
H100 = Hardware(GPU.device, 80 * GB, sheet_rates("h100", has_kernels=True))


def config(name: str = "deepseek") -> ModelConfig:
    return parse_config(CONFIGS[name])


def plan(name: str = "deepseek", *, hardware: Hardware = CPU, **wishes: Any) -> Plan:
    return resolve(EngineOptions(**wishes), config(name), hardware)


# --- choices ---


def test_bf16_on_the_cpu_runs_in_native_kernels() -> None:
    chosen = plan("deepseek")
    assert (chosen.executor, chosen.dtype) == ("fused", np.dtype("bfloat16"))
    assert chosen.reasons["executor"] == "fused: routed experts in native kernels, on the CPU platform"
    assert chosen.reasons["dtype"] == "bfloat16, as the checkpoint says"


def test_float32_runs_in_xla() -> None:
    assert plan("float32").reasons["executor"] == "graph, as dtype is float32"
    assert plan("deepseek", dtype="float32").executor == "graph"
    assert plan("float32", dtype="bfloat16").executor == "fused"


def test_machine_choices_are_explained() -> None:
    chosen = plan()
    assert chosen.isa == available_isas()[0]
    assert chosen.num_threads >= 1
    assert chosen.reasons["isa"] == f"{chosen.isa}, the best that this CPU offers"
    assert chosen.reasons["num_threads"] == f"{chosen.num_threads}, the physical cores that this process may use"
    assert chosen.reasons["max_model_len"] == f"{config().max_len}, the model's"


def test_wishes_are_kept_and_need_no_reason() -> None:
    wishes = {
        "dtype": "bfloat16",
        "executor": "graph",
        "isa": "scalar",
        "num_threads": 1,
        "max_model_len": 100,
        "max_num_seqs": 3,
        "max_num_waiting": 5,
        "enable_prefix_caching": False,
        "max_decode_slowdown": 0.2,
    }
    chosen = plan(**wishes)
    assert (chosen.executor, chosen.isa, chosen.num_threads, chosen.layout.max_len) == ("graph", "scalar", 1, 100)
    assert (chosen.max_num_waiting, chosen.enable_prefix_caching, chosen.max_decode_slowdown) == (5, False, 0.2)
    assert set(chosen.reasons) == {"kv_cache"}


def test_an_overlapped_plan_says_which_batches_are_split() -> None:
    wishes = {"executor": "overlap", "expert_cpus": "1", "max_num_seqs": 16}
    by_rates = plan(**wishes)
    assert by_rates.executor == "overlap"
    assert by_rates.reasons["microbatches"].endswith(f"by the rates of {CPU.rates.name}")
    quick = dict.fromkeys(("expert_tflops", "device_gbps", "decode_linear_tflops", "decode_attention_tflops"), 1e6)
    # Each part reads the experts that it chose, and nothing else counts; then both sides take half as long for a half.
    reads = replace(CPU.rates, **quick, dispatch_s=0.0)
    multiplies = replace(reads, expert_gbps=1e6, expert_tflops=1e-3, decode_linear_tflops=1e-3)
    for rates, sizes in ((reads, ()), (multiplies, (4, 16))):
        assert plan(**wishes, hardware=replace(CPU, rates=rates)).split_sizes == sizes
    assert plan(**wishes, microbatches=2).split_sizes == (4, 16)
    assert plan(**wishes, microbatches=1).split_sizes == ()
    assert plan(executor="fused").split_sizes == ()


def test_a_plan_describes_each_reason_in_a_line() -> None:
    chosen = plan()
    lines = chosen.describe()
    assert len(lines) == len(chosen.reasons)
    assert f"isa: {chosen.reasons['isa']}" in lines
    assert all("\n" not in line for line in lines)


@pytest.mark.parametrize(
    ("wishes", "prefill", "decode", "scored"),
    [
        ({}, (32, 128, 512), (1, 4, 8), 128),
        (
            {"max_prefill_tokens": 2048, "max_num_seqs": 64, "max_model_len": 640},
            (32, 128, 512, 640),
            (1, 4, 16, 64),
            128,
        ),
        ({"max_prefill_tokens": 32, "max_num_seqs": 1}, (32,), (1,), 32),
        ({"max_prefill_tokens": 33, "max_num_seqs": 2}, (32, 33), (1, 2), 33),
        ({"max_model_len": 7}, (7,), (1, 4, 8), 7),
        ({"max_prefill_tokens": 1}, (1,), (1, 4, 8), 1),
    ],
    ids=str,
)
def test_buckets_grow_fourfold_up_to_the_limits(
    wishes: dict[str, int], prefill: tuple[int, ...], decode: tuple[int, ...], scored: int
) -> None:
    buckets = plan(**wishes).buckets
    assert (buckets.prefill, buckets.decode, buckets.scored) == (prefill, decode, scored)


# --- the cache ---


def page_bytes(name: str, dtype: str) -> int:
    return config(name).num_layers * PAGE_SIZE * config(name).latent_dim * np.dtype(dtype).itemsize


def test_the_cache_holds_every_sequence_at_full_length_where_memory_allows() -> None:
    layout = plan(max_num_seqs=5, max_model_len=130).layout
    assert layout.num_pages == 1 + 5 * 3
    assert (layout.page_size, layout.chunk_len, layout.max_len) == (PAGE_SIZE, CHUNK_LEN, 130)
    assert (layout.num_layers, layout.latent_dim) == (config().num_layers, config().latent_dim)


def test_the_default_cache_takes_at_most_its_share_of_the_memory() -> None:
    small = Hardware(CPU.device, 100 * page_bytes("deepseek", "uint16"))
    assert plan(hardware=small, max_num_seqs=50).layout.num_pages == 1 + int(100 * KV_SHARE)


@pytest.mark.parametrize(("dtype", "bits"), [("bfloat16", "uint16"), ("float32", "uint32")])
def test_the_budget_is_spent_on_whole_pages(dtype: str, bits: str) -> None:
    each = page_bytes("deepseek", bits)
    layout = plan(dtype=dtype, kv_cache_bytes=13 * each + each - 1, max_num_seqs=9).layout
    assert layout.num_pages == 1 + 13


def test_a_budget_below_one_sequence_names_both_numbers_and_the_remedy() -> None:
    each = page_bytes("deepseek", "uint16")
    assert plan(kv_cache_bytes=3 * each, max_model_len=192).layout.num_pages == 4
    message = f"max_model_len 192 needs {3 * each:,} bytes of cache, but kv_cache_bytes is {3 * each - 1:,}: lower"
    with pytest.raises(ValueError, match=message):
        plan(kv_cache_bytes=3 * each - 1, max_model_len=192)


def test_a_machine_too_small_for_one_sequence_is_named_as_such() -> None:
    with pytest.raises(ValueError, match=r"but 25% of the memory is 250: lower max_model_len"):
        plan(hardware=Hardware(CPU.device, 1000))


# --- wishes that cannot be met ---


@pytest.mark.parametrize(
    ("wishes", "message"),
    [
        ({"max_model_len": 641}, "max_model_len 641 exceeds the model's 640 positions"),
        ({"executor": "fused", "dtype": "float32"}, "executor 'fused' computes in bfloat16; dtype 'float32' needs"),
        ({"isa": "sse9"}, "isa must be auto or one of .*, which this CPU offers, got 'sse9'"),
        ({"executor": "graph", "isa": "sse9"}, "isa must be auto or one of .*, which this CPU offers, got 'sse9'"),
        ({"num_threads": 0}, "num_threads: expected 1 <= num_threads <= .*, got 0"),
        ({"executor": "overlap"}, "executor 'overlap' needs expert_cpus on the CPU platform"),
        ({"executor": "overlap", "expert_cpus": "1", "dtype": "float32"}, "executor 'overlap' computes in bfloat16"),
        ({"executor": "overlap", "expert_cpus": "x"}, "CPU"),
        ({"microbatches": 2}, "microbatches 2 needs executor 'overlap', got 'fused'"),
        ({"microbatches": 3}, "microbatches must be one of auto, 1, 2, got 3"),
    ],
    ids=str,
)
def test_a_wish_that_cannot_be_met_is_refused(wishes: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        plan(**wishes)


@pytest.mark.parametrize("name", ["max_num_seqs", "max_num_waiting", "max_model_len", "kv_cache_bytes"])
@pytest.mark.parametrize("value", [0, -1, True, 1.5, "8"], ids=repr)
def test_sizes_are_positive_integers(name: str, value: object) -> None:
    with pytest.raises(ValueError, match=f"{name} must be an integer of at least 1, got {value!r}"):
        EngineOptions(**{name: value})


@pytest.mark.parametrize("name", ["max_num_seqs", "prefill_devices"])
def test_only_optional_sizes_may_be_none(name: str) -> None:
    assert EngineOptions(max_model_len=None, kv_cache_bytes=None) == EngineOptions()
    with pytest.raises(ValueError, match=f"{name} must be an integer of at least 1, got None"):
        EngineOptions(**{name: None})


@pytest.mark.parametrize("value", [0, -1, True, None, "much", float("nan"), float("inf")], ids=repr)
def test_a_slowdown_is_a_finite_part_of_the_time_between_tokens(value: object) -> None:
    with pytest.raises(ValueError, match=f"max_decode_slowdown must be auto or at least 0.001, got {value!r}"):
        EngineOptions(max_decode_slowdown=value)


def test_prefix_caching_is_on_or_off() -> None:
    with pytest.raises(ValueError, match="enable_prefix_caching must be True or False, got 1"):
        EngineOptions(enable_prefix_caching=1)


@pytest.mark.parametrize("name", ["dtype", "device", "executor", "residency", "prefill"])
@pytest.mark.parametrize("value", ["best", None, 3], ids=repr)
def test_choices_are_listed_where_another_was_made(name: str, value: object) -> None:
    with pytest.raises(ValueError, match=f"{name} must be one of auto, .*, got {value!r}"):
        EngineOptions(**{name: value})


def test_an_unknown_option_is_refused_with_the_known_ones() -> None:
    assert engine_options({"max_num_seqs": 3}) == EngineOptions(max_num_seqs=3)
    known = ", ".join(option.name for option in fields(EngineOptions))
    with pytest.raises(ValueError, match=f"unknown option 'max_seqs': expected one of {known}"):
        engine_options({"max_num_seqs": 3, "max_seqs": 3})


# --- other devices ---


def test_a_missing_device_is_named() -> None:
    if any(device.platform == "gpu" for device in jax.devices()):
        pytest.skip("this machine has a GPU")
    with pytest.raises(ValueError, match="device 'gpu' is not available: "):
        find_hardware("gpu")


def test_the_cpus_memory_is_the_machines() -> None:
    found = find_hardware("cpu")
    assert found.platform == "cpu"
    assert found.memory_bytes > GB


def test_on_a_gpu_that_is_large_enough_all_weights_are_on_it() -> None:
    chosen = plan(hardware=GPU)
    assert (chosen.executor, chosen.device) == ("graph", GPU.device)
    assert chosen.reasons["executor"] == "graph, as all weights fit device 'gpu'"
    assert chosen.residency == "auto"


@pytest.mark.parametrize("wish", ["auto", "graph"])
@pytest.mark.parametrize("hardware", [GPU, CPU], ids=["gpu", "cpu"])
def test_weights_that_cannot_fit_the_device_are_refused_with_both_numbers(wish: str, hardware: Hardware) -> None:
    deepseek = read_config(Path(__file__).parents[2] / "models" / "deepseek-v3")
    options = EngineOptions(executor=wish, dtype="float32")
    message = rf"need 67\d,\d\d\d,\d\d\d,\d\d\d bytes and device .* has {hardware.memory_bytes:,}: use executor"
    with pytest.raises(ValueError, match=message):
        resolve(options, deepseek, hardware)
    resolve(options, deepseek, Hardware(hardware.device, 700 * GB))


@pytest.mark.parametrize("name", CONFIGS)
def test_no_estimate_exceeds_the_weights(name: str) -> None:
    tensors = expected_tensors(config(name)).values()
    sizes = {"F8_E4M3": 1, "F32": 4, "BF16": np.dtype(config(name).dtype.replace("bfloat16", "uint16")).itemsize}
    held = sum(math.prod(tensor.shape) * sizes[tensor.dtypes[0]] for tensor in tensors)
    resolve(EngineOptions(executor="graph", kv_cache_bytes=GB), config(name), Hardware(CPU.device, held))


@pytest.fixture
def gpus(monkeypatch: pytest.MonkeyPatch) -> list[jax.Device]:
    """As if JAX had them."""
    devices = [GPU.device]
    monkeypatch.setattr(jax, "devices", lambda platform: {"gpu": devices}[platform])
    return devices


def test_weights_that_a_gpu_cannot_hold_stay_with_the_cpu(gpus: list[jax.Device]) -> None:
    deepseek = read_config(Path(__file__).parents[2] / "models" / "deepseek-v3")
    chosen = resolve(EngineOptions(max_model_len=4096), deepseek, GPU)
    assert (chosen.executor, chosen.residency) == ("overlap", "pinned")
    assert "overlap: routed experts by the CPU, as all weights need" in chosen.reasons["executor"]
    assert chosen.reasons["residency"] == "pinned, for copies to device 'gpu'"
    mapped = resolve(EngineOptions(max_model_len=4096, residency="mmap"), deepseek, GPU)
    assert mapped.residency == "mmap"


def test_long_prompts_of_a_large_model_are_streamed_to_a_gpu(gpus: list[jax.Device]) -> None:
    deepseek = read_config(Path(__file__).parents[2] / "models" / "deepseek-v3")
    chosen = resolve(EngineOptions(max_model_len=32768), deepseek, H100)
    assert chosen.stream is not None
    least = chosen.stream.least_tokens
    assert 200 < least < 2000
    assert chosen.reasons["prefill"] == f"stream from {least} tokens on, by the rates of h100"
    assert re.search(
        r"32768 tokens should take 1[0-9]\.?\d* s, limited by .* cancelled within \d+ ms", chosen.reasons["stream"]
    )
    assert (chosen.stream.variant, chosen.attention) == ("kernel", "flash")
    assert (chosen.executor, chosen.stream.fills_gaps) == ("overlap", True)
    assert (chosen.max_decode_slowdown, chosen.max_turn_slowdown) == (0.15, 1.0)
    assert "; 1.0 for those computed in place" in chosen.reasons["max_decode_slowdown"]
    in_turns = resolve(EngineOptions(max_model_len=32768, executor="fused"), deepseek, H100)
    assert (in_turns.stream.fills_gaps, in_turns.max_decode_slowdown) == (False, 1.0)
    in_place = [size for size in chosen.buckets.prefill if size < least]
    assert in_place[:3] == [32, 128, 512 if least > 512 else least - 1]
    assert in_place[-1] == least - 1
    assert all(chosen.buckets.for_prefill(length) >= least for length in (least, 5000, 32768))
    assert resolve(EngineOptions(max_model_len=32768, prefill="stream"), deepseek, H100).stream.least_tokens == 1
    assert resolve(EngineOptions(max_model_len=32768, prefill="step"), deepseek, H100).stream is None


def test_a_gpu_without_room_for_groups_computes_prompts_in_place(gpus: list[jax.Device]) -> None:
    deepseek = read_config(Path(__file__).parents[2] / "models" / "deepseek-v3")
    small = replace(GPU, memory_bytes=24 * GB)
    chosen = resolve(EngineOptions(max_model_len=4096), deepseek, small)
    assert chosen.stream is None
    assert chosen.reasons["prefill"].startswith("step: streaming needs ")
    with pytest.raises(ValueError, match=r"bytes are left for it"):
        resolve(EngineOptions(max_model_len=4096, prefill="stream"), deepseek, small)


def test_on_the_cpu_platform_no_prompt_gains_by_being_copied() -> None:
    assert plan().reasons["prefill"] == "step: no prompt is streamed sooner, by the rates of any CPU"
    with pytest.raises(ValueError, match="prefill_devices 2 needs prefill 'stream'"):
        plan(prefill_devices=2)
    with pytest.raises(ValueError, match=r"link_gbps 5\.0 needs prefill 'stream'"):
        plan(link_gbps=5.0)


def test_only_native_kernels_have_a_residency() -> None:
    with pytest.raises(ValueError, match="residency 'arena' needs executor 'fused', got 'graph'"):
        plan(executor="graph", residency="arena")
