"""The model that whole steps and prompts are measured on."""

from __future__ import annotations

import shutil
import tempfile
from functools import cached_property
from pathlib import Path

from synthetic.fields import Size
from synthetic.folder import write_model

from hmoe_jax.exec import host_memory

PLACES = (Path("/dev/shm"), Path(tempfile.gettempdir()))
"""The checkpoint is written to the roomier of them, and copied into an arena: a layer needs its bytes twice."""

MAX_LEN = 36864
MOST_LAYERS = 3
LAYER_BYTES = 12e9


class DeepSeekLayers:
    """One dense layer, and as many with 256 experts as host memory holds twice: written when they are first asked for,
    removed by `close`."""

    @cached_property
    def folder(self) -> Path:
        """Raises `ValueError` where there is room for none."""
        place = max((each for each in PLACES if each.is_dir()), key=lambda each: shutil.disk_usage(each).free)
        room = min(host_memory.available_bytes() * 0.45, shutil.disk_usage(place).free * 0.9)
        layers = min(MOST_LAYERS, int(room / LAYER_BYTES))
        if layers < 1:
            raise ValueError(
                f"a layer of DeepSeek-V3 needs {LAYER_BYTES / 1e9:g} GB twice, but only {room / 1e9:.3g} fit"
            )
        folder = Path(tempfile.mkdtemp(dir=place)) / "model"
        write_model(folder, Size(num_moe_layers=layers, num_experts=256, max_len=MAX_LEN), seed=0, skew=0.5)
        return folder

    def close(self) -> None:
        if "folder" in vars(self):
            shutil.rmtree(self.folder.parent)
