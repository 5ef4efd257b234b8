"""How large a model is, in integers, from its config alone."""

from __future__ import annotations

from dataclasses import asdict, dataclass

from hmoe_jax.config import ModelConfig


@dataclass(frozen=True)
class ParameterCount:
    """Parameters by kind, without scales of quantised matrices and without multi-token-prediction layers.

    `chosen` are those of `routed` that one token uses. A tied head is counted as embedding, once.
    """

    embedding: int
    attention: int
    dense_mlp: int
    shared_experts: int
    routed: int
    routers: int
    norms: int
    head: int
    chosen: int

    @property
    def total(self) -> int:
        return sum(asdict(self).values()) - self.chosen

    @property
    def active(self) -> int:
        """What one token is multiplied with: all but the experts it does not choose, and the embedding.

        Of the embedding it reads a row; one that is also the head is multiplied with.
        """
        looked_up = self.embedding if self.head else 0
        return self.total - self.routed + self.chosen - looked_up


def count_parameters(config: ModelConfig) -> ParameterCount:
    d, layers, moe_layers = config.hidden_size, config.num_layers, config.num_moe_layers
    expert = 3 * d * config.expert_ffn
    table = config.vocab_size * d
    return ParameterCount(
        embedding=table,
        attention=layers * _attention(config),
        dense_mlp=config.num_dense_layers * 3 * d * config.dense_ffn,
        shared_experts=moe_layers * config.num_shared_experts * expert,
        routed=moe_layers * config.num_experts * expert,
        routers=moe_layers * config.num_experts * (d + 1),
        norms=layers * (2 * d + (config.q_rank or 0) + config.kv_rank) + d,
        head=0 if config.tie_embeddings else table,
        chosen=moe_layers * config.top_k * expert,
    )


def cache_bytes_per_token(config: ModelConfig, *, itemsize: int) -> int:
    """What one token leaves in the caches of all layers: a latent and a rotated key part in each."""
    return config.num_layers * config.latent_dim * itemsize


def _attention(config: ModelConfig) -> int:
    """Matrices of one layer's attention."""
    d, heads = config.hidden_size, config.num_heads
    q_width = heads * config.qk_dim
    q = d * q_width if config.q_rank is None else (d + q_width) * config.q_rank
    kv = d * config.latent_dim + config.kv_rank * heads * (config.nope_dim + config.v_dim)
    return q + kv + heads * config.v_dim * d
