"""Rates of machines: this one's as measured, accelerators' by their data sheets."""

from __future__ import annotations

import json
import logging
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import jax

from hmoe_jax.core import cache_home
from hmoe_jax.kernels.pool import cpu_name
from hmoe_jax.perf.cost import Rates

logger = logging.getLogger(__name__)

DISPATCH_S = 20e-6
"""Starting one program from Python, where nobody has measured it."""

PRODUCTS_PER_WEIGHT = 2
"""A weight with a scale per group of columns is two BF16 numbers to a GPU (`kernels/grouped/products.py`)."""

BYTES_PER_BYTE = 9
"""Device memory's traffic for a byte of FP8 that is unpacked: it is read, and two BF16 numbers are written and read."""

BYTES_PER_SCORE, FLOPS_PER_SCORE = 24, 640
"""Device memory's traffic for a score of one query, key and head, where XLA attends, and the products that belong to it
(heads of 192 and 128)."""

FLOPS_PER_LATENT_SCORE = 2176
"""The same where a decoded token attends to latents (576 and 512 wide), which no kernel of ours does on a GPU."""

SERVER_GBPS, SERVER_TFLOPS = 200.0, 2.0
"""Host memory and products of a two-socket server, roughly, where nobody has measured them."""

UNMEASURED_CPU = Rates(
    name="any CPU",
    expert_gbps=20.0,
    expert_tflops=0.5,
    link_gbps=10.0,
    device_gbps=15.0,
    decode_linear_tflops=0.2,
    decode_attention_tflops=0.3,
    linear_tflops=0.3,
    grouped_tflops=0.1,
    attention_tflops=0.1,
    unpack_gbps=2.0,
    dispatch_s=5e-5,
    contention=1.2,
)
"""The CPU platform's, roughly, by those of a two-core machine."""


@dataclass(frozen=True)
class Gpu:
    """From the vendor's data sheet: GB, GB/s, dense BF16 TFLOP/s with FP32 sums. `link_gbps`: what large pinned copies
    reach of PCIe (55 of 64 on 16 lanes of generation 5)."""

    memory_gb: float
    memory_gbps: float
    bf16_tflops: float
    link_gbps: float


GPUS = {
    "rtx4090": Gpu(24.0, 1008.0, 165.0, 25.0),
    "rtx5090": Gpu(32.0, 1792.0, 209.0, 55.0),
    "rtxpro6000": Gpu(96.0, 1792.0, 252.0, 55.0),
    "h100": Gpu(80.0, 3350.0, 989.0, 55.0),
    "h200": Gpu(141.0, 4800.0, 989.0, 55.0),
}


SMALLEST_GPU = "rtx4090"


def sheet_rates(
    name: str,
    *,
    num_gpus: int = 1,
    dram_gbps: float = SERVER_GBPS,
    link_gbps: float | None = None,
    cpu_tflops: float = SERVER_TFLOPS,
    has_kernels: bool = False,
) -> Rates:
    """Limits that no program holds for long. Raises `KeyError` for a GPU that is not in `GPUS`.

    `has_kernels`: as calibration would choose, if our kernels for attention and block-scaled FP8 reach what others' do;
    else XLA attends and multiplies.
    """
    gpu = GPUS[name]
    by_xla = {
        "linear_tflops": gpu.bf16_tflops / PRODUCTS_PER_WEIGHT,
        "grouped_tflops": gpu.bf16_tflops / PRODUCTS_PER_WEIGHT,
        "unpack_gbps": gpu.memory_gbps / BYTES_PER_BYTE,
        "attention_tflops": gpu.memory_gbps / 1e3 / BYTES_PER_SCORE * FLOPS_PER_SCORE,
    }
    by_kernels = {
        "linear_tflops": gpu.bf16_tflops,
        "grouped_tflops": gpu.bf16_tflops,
        "unpack_gbps": gpu.memory_gbps,
        "attention_tflops": gpu.bf16_tflops,
        "variant": "kernel",
        "attention": "flash",
    }
    programs: dict[str, Any] = by_kernels if has_kernels else by_xla
    return Rates(
        name=name,
        expert_gbps=dram_gbps,
        expert_tflops=cpu_tflops,
        link_gbps=link_gbps or gpu.link_gbps,
        device_gbps=gpu.memory_gbps,
        decode_linear_tflops=gpu.bf16_tflops,
        decode_attention_tflops=min(gpu.memory_gbps / 1e3 / BYTES_PER_SCORE * FLOPS_PER_LATENT_SCORE, gpu.bf16_tflops),
        dispatch_s=DISPATCH_S,
        num_devices=num_gpus,
        **programs,
    )


def machine_name(device: jax.Device) -> str:
    """This machine's, as seen from a device: rates that were measured under another name are another machine's."""
    return cpu_name() if device.platform == "cpu" else f"{cpu_name()}, {device.device_kind}"


def expected_rates(device: jax.Device) -> Rates:
    """What `scripts/calibrate.py` measured here, else those of its kind of device; of one device."""
    try:
        measured = load_rates()
    except RuntimeError:  # no home directory
        pass
    except ValueError as error:
        if rates_file().exists():
            logger.warning("%s", error)
    else:
        if measured.name == machine_name(device):
            return measured
    if device.platform == "cpu":
        return UNMEASURED_CPU
    kind = str(device.device_kind).lower().replace(" ", "")
    known = next((name for name in GPUS if name in kind), None)
    if known is None:
        known = SMALLEST_GPU
        logger.warning("the rates of %s are unknown, those of %s are taken: run scripts/calibrate.py", kind, known)
    return replace(sheet_rates(known), name=f"data sheet of {known}")


def rates_file() -> Path:
    """Beside the compiled programs: `~/.cache/hmoe_jax/machine.json`, or below `$XDG_CACHE_HOME`."""
    return cache_home() / "machine.json"


def save_rates(rates: Rates) -> Path:
    path = rates_file()
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(asdict(rates), indent=2) + "\n", encoding="utf-8")
    return path


def load_rates() -> Rates:
    """Raises `ValueError` if nobody has measured this machine, or the file is not what `save_rates` writes."""
    path = rates_file()
    try:
        return Rates(**json.loads(path.read_text(encoding="utf-8")))
    except FileNotFoundError:
        raise ValueError(f"{path} does not exist: run scripts/calibrate.py first") from None
    except (OSError, TypeError, json.JSONDecodeError) as error:
        raise ValueError(f"{path}: {error}: run scripts/calibrate.py again") from None
