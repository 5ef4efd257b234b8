"""A synthetic model as a folder that every script takes."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

from flags import EMBEDDED_MODEL, REPOSITORY
from tqdm import tqdm
from training.export import replacing

from hmoe_jax.checkpoint.index import open_checkpoint
from hmoe_jax.config import parse_config
from hmoe_jax.exec.load import check_checkpoint
from synthetic.fields import Size, synthetic_fields
from synthetic.shards import write_shards
from synthetic.weights import RandomWeights


def write_model(out: Path, size: Size, *, seed: int, skew: float) -> int:
    """Writes the folder, or replaces it, and checks it. Returns the bytes of its tensors."""
    fields = synthetic_fields(REPOSITORY / "models" / "deepseek-v3", size)
    config = parse_config(fields)
    weights = RandomWeights(config, seed=seed, skew=skew)
    with replacing(out) as folder:
        (folder / "config.json").write_text(json.dumps(fields, indent=2) + "\n", encoding="utf-8")
        for name in ("tokenizer.json", "tokenizer_config.json", "generation_config.json"):
            shutil.copyfile(EMBEDDED_MODEL / name, folder / name)
        with tqdm(desc="writing", unit="B", unit_scale=True, disable=None) as bar:
            for num_bytes in write_shards(folder, weights):
                bar.update(num_bytes)
        with open_checkpoint(folder) as checkpoint:
            check_checkpoint(config, checkpoint)
            return checkpoint.total_bytes
