"""The `fused` executor: one XLA program per step on the CPU platform, experts in native kernels called from inside it.

Expert weights never become arrays: the kernels read the checkpoint's mapped files through an `ExpertStore`.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator

from hmoe_jax.architectures.deepseek_v3 import RoutedExperts
from hmoe_jax.architectures.deepseek_v3_checkpoint import describe_experts
from hmoe_jax.checkpoint.index import Checkpoint
from hmoe_jax.config import ModelConfig
from hmoe_jax.core import CheckpointError
from hmoe_jax.exec.backend import ExpertBackend
from hmoe_jax.exec.load import checks_mapped_scales, read_matrix, stored_bytes
from hmoe_jax.experts.store import ExpertStore, ExpertTensor, StoreShape
from hmoe_jax.kernels.moe_experts import moe_experts
from hmoe_jax.kernels.pool import ThreadPool
from hmoe_jax.quant.formats import FORMATS


def load_experts(
    config: ModelConfig, checkpoint: Checkpoint, *, pool: ThreadPool, advance: Callable[[int], None]
) -> ExpertBackend:
    """Maps all experts without copying them. The backend's `close` closes the store, not the pool.

    `advance` is told the bytes of the scales that are checked: all else is read when it is chosen.
    """
    checks_scales = checks_mapped_scales(config, checkpoint)

    def tensors() -> Iterator[ExpertTensor]:
        for spec in describe_experts(config):
            weight, scale = read_matrix(checkpoint, spec.projection, checks_scales=checks_scales)
            yield ExpertTensor(spec.layer, spec.expert, spec.matrix, weight, scale)
            advance(stored_bytes(checkpoint, spec.projection.scale) if checks_scales else 0)

    shape = StoreShape(config.num_moe_layers, config.num_experts, config.hidden_size, config.expert_ffn)
    store = ExpertStore(tensors(), shape=shape, codec=_codec(config, checkpoint), pool=pool)

    def bind(operand: tuple[()]) -> RoutedExperts:
        return lambda layer, hidden, ids, weights: moe_experts(hidden, ids, weights, layer=layer, store=store.id)

    return ExpertBackend(operand=(), bind=bind, store=store, close=store.close)


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
