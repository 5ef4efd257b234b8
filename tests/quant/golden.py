"""Matrices as the implementations that publish the formats pack and unpack them; see `make_golden`."""

from __future__ import annotations

from pathlib import Path

import ml_dtypes
import numpy as np

from hmoe_jax.quant.formats import FORMATS

PATH = Path(__file__).parent.parent / "golden" / "formats.npz"

_INT4 = {"num_bits": 4, "type": "int", "strategy": "group", "symmetric": True}
SCHEMES = {
    **{f"int4_group{size}": ("pack-quantized", {**_INT4, "group_size": size}) for size in (32, 64, 128)},
    "fp8_channel": ("float-quantized", {"num_bits": 8, "type": "float", "strategy": "channel", "symmetric": True}),
    "int8_channel": ("int-quantized", {"num_bits": 8, "type": "int", "strategy": "channel", "symmetric": True}),
}
"""By codec, the format and the arguments of compressed-tensors."""

GOLDEN_CODECS = (*SCHEMES, "mxfp4")


def load_golden(codec: str) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """(stored weight, grid of scales, values in FP32)."""
    with np.load(PATH) as arrays:
        weight, scale, values = (arrays[f"{codec}.{name}"] for name in ("weight", "scale", "values"))
    scale = scale if codec == "mxfp4" else scale.view(ml_dtypes.bfloat16)
    return weight.view(FORMATS[codec].encoding.dtype), scale, values
