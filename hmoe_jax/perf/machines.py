"""Accelerators by their data sheets, and this machine by its measured rates."""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass
from pathlib import Path

from hmoe_jax.exec.cache import default_cache_dir
from hmoe_jax.perf.cost import Rates

DISPATCH_S = 20e-6
"""Starting one program from Python, where nobody has measured it."""

PRODUCTS_PER_WEIGHT = 2
"""A weight with a scale per group of columns is two BF16 numbers to a GPU (`kernels/grouped/products.py`)."""

BYTES_PER_BYTE = 9
"""Device memory's traffic for a byte of FP8 that is unpacked: it is read, and two BF16 numbers are written and read."""


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
}


def sheet_rates(name: str, *, num_gpus: int, dram_gbps: float, link_gbps: float | None) -> Rates:
    gpu = GPUS[name]
    return Rates(
        name=name,
        expert_gbps=dram_gbps,
        link_gbps=link_gbps or gpu.link_gbps,
        device_gbps=gpu.memory_gbps,
        linear_tflops=gpu.bf16_tflops,
        grouped_tflops=gpu.bf16_tflops / PRODUCTS_PER_WEIGHT,
        attention_tflops=gpu.bf16_tflops,
        unpack_gbps=gpu.memory_gbps / BYTES_PER_BYTE,
        dispatch_s=DISPATCH_S,
        num_devices=num_gpus,
    )


def rates_file() -> Path:
    """Beside the compiled programs: `~/.cache/hmoe_jax/machine.json`, or below `$XDG_CACHE_HOME`."""
    return default_cache_dir().parent / "machine.json"


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
    except (TypeError, json.JSONDecodeError) as error:
        raise ValueError(f"{path}: {error}: run scripts/calibrate.py again") from None
