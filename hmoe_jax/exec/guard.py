"""Files that are cut off while they are mapped: an error where the system would end the process."""

from __future__ import annotations

import numpy as np

from hmoe_jax.checkpoint.index import Checkpoint
from hmoe_jax.core import CheckpointError
from hmoe_jax.kernels._native import MappedGuard


class FileGuard:
    """Guards the mappings of a checkpoint's files, whoever reads them: kernels, copies, and XLA's own programs.

    A page that is gone reads as zeros, and so does what is left of a file's last page; `check` then raises.
    """

    def __init__(self, checkpoint: Checkpoint):
        self._files = [
            (path, mapping, MappedGuard(np.frombuffer(mapping, np.uint8)))
            for path, mapping in checkpoint.mappings.items()
        ]

    def check(self) -> None:
        """Raises `CheckpointError` naming the first file that was cut off. Asks the system for the size of each."""
        for path, mapping, guard in self._files:
            if guard.was_hit or mapping.size() < len(mapping):
                raise CheckpointError("was cut off while it was mapped: what was read since is wrong", file=str(path))
