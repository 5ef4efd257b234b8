"""Writes `tests/golden/formats.npz`: matrices packed and unpacked by the implementations that publish the formats.

    python -m tests.quant.make_golden

Needs what nothing else does: compressed-tensors (0.20.0 wrote the committed file) beside PyTorch and transformers.
"""

from __future__ import annotations

import numpy as np
import torch
from compressed_tensors.compressors import BaseCompressor
from compressed_tensors.quantization import QuantizationArgs, QuantizationScheme
from transformers.integrations.mxfp4 import convert_moe_packed_tensors

from tests.quant.golden import PATH, SCHEMES

ROWS, COLS = 6, 256


def main() -> None:
    arrays: dict[str, np.ndarray] = {}
    for codec, (file_format, args) in SCHEMES.items():
        arrays |= {f"{codec}.{name}": as_numpy(tensor) for name, tensor in packed(file_format, args).items()}
    arrays |= {f"mxfp4.{name}": as_numpy(tensor) for name, tensor in mxfp4().items()}
    np.savez_compressed(PATH, **arrays)


def packed(file_format: str, args: dict) -> dict[str, torch.Tensor]:
    """`weight`, `scale` (BF16) and, from the same package, the `values` in FP32."""
    scheme = QuantizationScheme(targets=["Linear"], weights=QuantizationArgs(**args))
    generator = torch.Generator().manual_seed(0)
    group = args.get("group_size") or COLS
    groups = torch.randn(ROWS, COLS // group, group, generator=generator)
    # The largest magnitude negative, so that the lowest code occurs.
    groups *= torch.where(-groups.amin(dim=-1) < groups.amax(dim=-1), -1, 1)[..., None]
    wide = groups.reshape(ROWS, COLS)
    largest = {4: 7.5, 8: 448.0 if args["type"] == "float" else 127.5}[args["num_bits"]]
    scale = (groups.abs().amax(dim=-1) / largest).bfloat16()
    compressor = BaseCompressor.load_from_registry(file_format)
    state = compressor.compress({"weight": wide, "weight_scale": scale.float()}, scheme)
    values = compressor.decompress({**state, "weight_scale": scale.float()}, scheme)["weight"]
    assert values.dtype == torch.float32
    weight = state["weight_packed"] if "weight_packed" in state else state["weight"]
    return {"weight": weight, "scale": scale, "values": values}


def mxfp4() -> dict[str, torch.Tensor]:
    """gpt-oss keeps 32 weights as 16 bytes, and has its matrices transposed in memory."""
    generator = torch.Generator().manual_seed(0)
    blocks = torch.randint(0, 256, (1, ROWS, COLS // 32, 16), dtype=torch.uint8, generator=generator)
    scales = torch.randint(90, 160, (1, ROWS, COLS // 32), dtype=torch.uint8, generator=generator)
    values = convert_moe_packed_tensors(blocks, scales, dtype=torch.float32)
    return {"weight": blocks.reshape(ROWS, COLS // 2), "scale": scales[0], "values": values[0].T.contiguous()}


def as_numpy(tensor: torch.Tensor) -> np.ndarray:
    """NumPy files have no BF16 and no FP8: their bits."""
    bits = {torch.bfloat16: torch.uint16, torch.float8_e4m3fn: torch.uint8}
    return tensor.view(bits.get(tensor.dtype, tensor.dtype)).numpy()


if __name__ == "__main__":
    main()
