"""Files that are cut off while they are mapped: an error where the system would end the process."""

from __future__ import annotations

from hmoe_jax.checkpoint.index import Checkpoint
from hmoe_jax.core import CheckpointError
from hmoe_jax.kernels._native import MappedGuard


class FileGuard:
    """Guards the mappings of a checkpoint's files, whoever reads them: kernels, copies, and XLA's own programs.

    A page that is gone reads as zeros; from then on `check` raises.
    """

    def __init__(self, checkpoint: Checkpoint):
        self._guards = {path: MappedGuard(mapping) for path, mapping in checkpoint.mappings.items()}

    def check(self) -> None:
        """Raises `CheckpointError` naming the first file that was cut off."""
        for path, guard in self._guards.items():
            if guard.was_hit:
                raise CheckpointError("was cut off while it was mapped: what was read since is wrong", file=str(path))
