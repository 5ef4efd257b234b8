"""How far two correct implementations may differ: derived from the arithmetic, before anything was measured.

A number format with p significant bits rounds each value by at most 2^-p of it, and by 2^-(p+1) or a little less in the
root mean square: 2^-9 for BF16, 2^-25 for FP32. Roundings of different values are independent, so after N of them in
sequence a vector's relative error (2-norm of the difference over 2-norm) is about sqrt(N) times that. This counts N.

**What the sum leaves out** is in one factor, `SAFETY` = 4 = 2 x 2. The first 2 is gain: a product of two rounded factors
(silu(gate) * up, a gate times an expert's output) carries both errors; silu's relative slope at the values that matter is
between 1 and 2; a softmax turns an absolute error of a score, which grows with the score, into a relative one. The second
2 is the tail: the sum is the mean square over tokens, and the bound is asked of the worst of some hundreds.

**BF16** (activations; sums are FP32 everywhere and add nothing visible). Per layer the values stored in BF16 on the way
are, in attention: normed input, q_a, its norm, q_b, rotated query, kv_a, its norm, rotated key part, expanded key,
expanded value, probabilities, mixed values, sum with the residual (13); in the MLP: normed input, inner activation, sum with
the residual (3). kv_b is stored rounded where the file is FP8 or FP32 (1), an FP32 file rounds the other seven
matrices on the way to a layer's output as well (7). Around the layers: embedding and final norm (2).

**FP32**. A sum of n products in sequence has partial sums that grow like sqrt(i); their roundings add to
2^-25 sqrt(sum i) = 2^-25 n / sqrt(2), which is 2^-25 sqrt(n / 2) of the result. Blocked sums have less. Both sides round, in
different order: twice the variance, 2^-25 sqrt(n). A layer has at most ten such sums in sequence (q_a, q_b, scores,
kv_a, key, value, mix, o; then gate or up, and down). Angles have an error of their own: `transformers` takes the powers of theta in FP32, which costs
about 2^-23 of a frequency, and so 2^-23 radians per position: not random, added as it is.
"""

from __future__ import annotations

import math

import numpy as np

from hmoe_jax.config import ModelConfig

SAFETY = 4.0
BF16_ROUNDING = 2.0**-9
FP32_ROUNDING = 2.0**-25
ANGLE_ERROR = 2.0**-23

SUMS_PER_LAYER = 10


def relative_error(config: ModelConfig, dtype: str, *, num_tokens: int) -> float:
    """The bound on ||ours - oracle|| / ||oracle|| of any token's logits, given the same experts."""
    if dtype == "bfloat16":
        return SAFETY * BF16_ROUNDING * math.sqrt(_bf16_roundings(config))
    width = max(config.hidden_size, config.dense_ffn, config.num_heads * config.v_dim)
    sums = SUMS_PER_LAYER * config.num_layers + 1
    return SAFETY * FP32_ROUNDING * math.sqrt(sums * width) + ANGLE_ERROR * num_tokens


def group_regret(relative_error: float) -> float:
    """How far the oracle may score a used group below an unused one.

    A router's logit is off by the relative error of its input times the logits' spread, which `tiny`'s weights make 1. A
    sigmoid is at most 1/4 steep, and two groups are two scores each.
    """
    return relative_error * 4 / 4


def expert_regret(relative_error: float) -> float:
    """The same for two experts, one score each."""
    return relative_error * 2 / 4


def greedy_gap(relative_error: float, logits: np.ndarray) -> np.ndarray:
    """The largest gaps `[...]` between the oracle's two best `logits [..., v]` that an error of this size can turn round.

    The two logits are off by (a, b) with |(a, b)| <= ||difference||, so their difference by at most sqrt(2) times that.
    """
    return math.sqrt(2) * relative_error * np.linalg.norm(logits, axis=-1)


def _bf16_roundings(config: ModelConfig) -> int:
    rounds_matrices = 7 if config.dtype == "float32" else 0
    rounds_kv_b = 1 if config.fp8 or config.dtype == "float32" else 0
    return config.num_layers * (13 + 3 + rounds_kv_b + rounds_matrices) + 2
