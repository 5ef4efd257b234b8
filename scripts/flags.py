"""The flags that choose a model and how to run it, for the mains that run one."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from absl import flags

REPOSITORY = Path(__file__).resolve().parents[1]
EMBEDDED_MODEL = REPOSITORY / "models" / "embedded"

MODEL = flags.DEFINE_string("model", str(EMBEDDED_MODEL), "Hugging Face model folder; by default the embedded model.")
_DTYPE = flags.DEFINE_enum("dtype", "auto", ["auto", "bfloat16", "float32"], "Dtype of activations.")
_DEVICE = flags.DEFINE_enum("device", "auto", ["auto", "cpu", "gpu"], "Where attention and sampling run.")
_RESIDENCY = flags.DEFINE_enum(
    "residency", "auto", ["auto", "mmap", "arena", "pinned"], "Where routed experts lie in host memory."
)
_EXECUTOR = flags.DEFINE_enum(
    "executor", "auto", ["auto", "graph", "fused", "overlap"], "Who computes the routed experts."
)
_EXPERT_CPUS = flags.DEFINE_string(
    "expert_cpus", "auto", "CPUs of the native kernels' threads, of each NUMA node, like '0-15;16-31'."
)
_MICROBATCHES = flags.DEFINE_enum(
    "microbatches", "auto", ["auto", "1", "2"], "Parts of a decode batch, with --executor=overlap."
)
_PREFILL = flags.DEFINE_enum(
    "prefill_executor", "auto", ["auto", "step", "stream"], "Prompts: in place, or with experts copied to the device."
)
_PREFILL_DEVICES = flags.DEFINE_integer("prefill_devices", 1, "Devices that prompts are streamed to.", lower_bound=1)
_PREFILL_APART = flags.DEFINE_bool("prefill_apart", False, "Other devices for prompts than the one that decodes.")
_SLOWDOWN = flags.DEFINE_float(
    "max_decode_slowdown", None, "How much longer tokens may take while a prompt is computed; default: the plan's."
)
_NUM_THREADS = flags.DEFINE_string("num_threads", "auto", "Threads of the native kernels: a number, or auto.")
_ISA = flags.DEFINE_string(
    "isa", "auto", "Instruction set of the native kernels: amx, avx512_bf16, avx512, avx2, scalar."
)
_MAX_MODEL_LEN = flags.DEFINE_integer("max_model_len", None, "Longest sequence, prompt included; default the model's.")


def engine_options() -> dict[str, Any]:
    """The flags as fields of `EngineOptions`. Raises `ValueError` for a thread count that is no number."""
    threads = _NUM_THREADS.value
    if threads != "auto" and not threads.isdecimal():
        raise ValueError(f"--num_threads must be a number or auto, got {threads!r}")
    return {
        "dtype": _DTYPE.value,
        "device": _DEVICE.value,
        "executor": _EXECUTOR.value,
        "expert_cpus": _EXPERT_CPUS.value,
        "microbatches": _MICROBATCHES.value if _MICROBATCHES.value == "auto" else int(_MICROBATCHES.value),
        "residency": _RESIDENCY.value,
        "prefill": _PREFILL.value,
        "prefill_devices": _PREFILL_DEVICES.value,
        "prefill_apart": _PREFILL_APART.value,
        "max_decode_slowdown": "auto" if _SLOWDOWN.value is None else _SLOWDOWN.value,
        "num_threads": threads if threads == "auto" else int(threads),
        "isa": _ISA.value,
        "max_model_len": _MAX_MODEL_LEN.value,
    }
