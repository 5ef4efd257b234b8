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
from hmoe_jax.exec.load import read_scales
from hmoe_jax.experts.store import Codec, ExpertStore, ExpertTensor, StoreShape
from hmoe_jax.kernels.moe_experts import moe_experts
from hmoe_jax.kernels.pool import ThreadPool


def load_experts(
    config: ModelConfig, checkpoint: Checkpoint, *, pool: ThreadPool, advance: Callable[[int], None]
) -> ExpertBackend:
    """Maps all experts without copying them. The backend's `close` closes the store, not the pool.

    `advance` is told the bytes of the scales, which are checked: weights are read when they are chosen.
    """

    def tensors() -> Iterator[ExpertTensor]:
        for spec in describe_experts(config):
            weight = checkpoint.array(spec.projection.weight.name)
            scale = spec.projection.scale and read_scales(checkpoint, spec.projection.scale.name)
            yield ExpertTensor(spec.layer, spec.expert, spec.matrix, weight, scale)
            advance(0 if scale is None else scale.nbytes)

    shape = StoreShape(config.num_moe_layers, config.num_experts, config.hidden_size, config.expert_ffn)
    store = ExpertStore(tensors(), shape=shape, codec=_codec(config, checkpoint), pool=pool)

    def bind(operand: tuple[()]) -> RoutedExperts:
        return lambda layer, hidden, ids, weights: moe_experts(hidden, ids, weights, layer=layer, store=store.id)

    return ExpertBackend(operand=(), bind=bind, stats=store.stats, close=store.close)


def _codec(config: ModelConfig, checkpoint: Checkpoint) -> Codec:
    """One codec for all experts, from the dtypes in the headers."""
    codecs: dict[str, Codec] = {"F8_E4M3": "fp8_block", "BF16": "bf16"}
    dtypes = {checkpoint.entries[spec.projection.weight.name].dtype for spec in describe_experts(config)}
    if len(dtypes) > 1 or not dtypes <= codecs.keys():
        raise CheckpointError(
            "routed experts have no native kernel (executor 'graph' takes them)",
            file=str(checkpoint.folder),
            expected=" or ".join(codecs) + ", the same for all",
            actual=", ".join(sorted(dtypes)),
        )
    return codecs[dtypes.pop()]
