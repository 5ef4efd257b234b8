"""The `fused` executor: one XLA program per step, experts in native kernels on the CPU, called from inside it.

Expert weights never become arrays: the kernels read them through an `ExpertStore`. On a GPU the program waits for the
CPU in every layer, and the CPU for the program.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterator

from hmoe_jax.architectures.deepseek_v3 import RoutedExperts
from hmoe_jax.architectures.deepseek_v3_checkpoint import describe_experts
from hmoe_jax.checkpoint.index import Checkpoint
from hmoe_jax.checkpoint.progress import byte_progress
from hmoe_jax.config import ModelConfig
from hmoe_jax.core import CheckpointError
from hmoe_jax.exec import host_memory
from hmoe_jax.exec.backend import ExpertBackend
from hmoe_jax.exec.load import checks_mapped_scales, read_matrix, stored_bytes
from hmoe_jax.experts.lane import ExpertLane
from hmoe_jax.experts.store import ExpertStore, ExpertTensor, PlannedResidency, StoreShape
from hmoe_jax.kernels.moe_experts import moe_experts
from hmoe_jax.kernels.pool import ThreadPool
from hmoe_jax.quant.formats import FORMATS

logger = logging.getLogger(__name__)

NUM_PARTS = 2
"""A lane has a slot for each of so many parts of a batch."""


def maps_experts(residency: PlannedResidency, pool: ThreadPool) -> bool:
    """Whether experts stay in the mapped files, where they are read when they are first chosen."""
    return residency == "mmap" or (residency == "auto" and pool.num_nodes == 1)


def load_experts(
    config: ModelConfig,
    checkpoint: Checkpoint,
    *,
    pool: ThreadPool,
    residency: PlannedResidency = "auto",
    has_lane: bool = False,
    advance: Callable[[int], None],
) -> ExpertBackend:
    """All experts, where `residency` says, with a lane if `has_lane`. The backend's `close` closes the store, not the
    pool.

    `advance` is told what is read now: all bytes for an arena, of mapped experts the scales that are checked. An arena
    needs its own size of memory and one matrix of the largest tensor beside it; raises `ValueError` with the numbers,
    before anything is read, where there is less. What shall be "pinned" is an arena until `pin_experts`.
    """
    specs = list(describe_experts(config))
    is_mapped = maps_experts(residency, pool)
    checks_scales = not is_mapped or checks_mapped_scales(config, checkpoint)
    num_bytes = stored_bytes(checkpoint, [spec.projection for spec in specs])
    if not is_mapped and num_bytes > host_memory.available_bytes():
        raise ValueError(
            f"residency {residency!r} needs {num_bytes:,} bytes of host memory for the routed experts, but "
            f"{host_memory.available_bytes():,} are available: residency 'mmap' reads them from the files"
        )

    def tensors() -> Iterator[ExpertTensor]:
        for spec in specs:
            weight, scale = read_matrix(checkpoint, spec.projection, checks_scales=checks_scales)
            yield ExpertTensor(spec.layer, spec.expert, spec.matrix, weight, scale)
            read = spec.projection if not is_mapped else spec.projection.scale if checks_scales else ()
            advance(stored_bytes(checkpoint, read))

    shape = StoreShape(config.num_moe_layers, config.num_experts, config.hidden_size, config.expert_ffn)
    codec = _codec(config, checkpoint)
    store = ExpertStore(tensors(), shape=shape, codec=codec, pool=pool, residency="mmap" if is_mapped else "arena")

    def bind(operand: tuple[()]) -> RoutedExperts:
        return lambda layer, hidden, ids, weights: moe_experts(hidden, ids, weights, layer=layer, store=store.id)

    try:
        lane = ExpertLane(store, num_slots=NUM_PARTS) if has_lane else None
    except BaseException:
        store.close()
        raise

    def close() -> None:
        if lane is not None:
            lane.close()
        store.close()

    return ExpertBackend(operand=(), bind=bind, store=store, close=close, lane=lane)


def pin_experts(store: ExpertStore) -> None:
    """What cannot be pinned stays as it is, which is said once, with the reason."""
    with byte_progress(store.num_bytes, label="pinning") as advance:
        try:
            store.pin(advance=advance)
        except ValueError as refusal:
            logger.warning("experts are not pinned (%s): copies to a GPU take longer", refusal)


def _codec(config: ModelConfig, checkpoint: Checkpoint) -> str:
    """The one codec of all experts. Their tensors are known to fit it, but plain ones may also be FP32."""
    specs = [spec.projection for spec in describe_experts(config)]
    stored = {(spec.codec, checkpoint.entries[spec.weight.name].dtype) for spec in specs}
    if len(stored) > 1 or stored == {("bf16", "F32")}:
        raise CheckpointError(
            "routed experts have no native kernel (executor 'graph' takes them)",
            file=str(checkpoint.folder),
            expected=f"one of {', '.join(FORMATS)}, the same for all",
            actual=", ".join(sorted(f"{codec} as {dtype}" for codec, dtype in stored)),
        )
    return stored.pop()[0]
