"""How far two correct implementations may differ: derived from the arithmetic.

A format with p significant bits rounds a value by at most 2^-p of it, and by 2^-(p+1) in the root mean square: 2^-9
for BF16, 2^-25 for FP32. Roundings of different values are independent, so N of them in sequence leave a vector with
a relative error (2-norm of the difference over 2-norm) of about sqrt(N) times that. What follows counts N; two
factors complete it.

**Gain.** A branch (attention, MLP) passes on the error e of its input enlarged, and is then one part of several in
the residual stream; over all layers that leaves about the enlargement once. In attention, a score of deviation s
between two vectors with errors e has the absolute error sqrt(2) s e, which the softmax makes a relative one of the
probabilities; with the values' own e the branch has sqrt(1 + 2 s^2) e. With unit weights s is what YaRN multiplies
the scores by: 1 without it, 1.87 for a factor of 40. (An MLP, a product of two factors one of which passes silu, has
no more than attention at s = 1.) Measured, the root mean square over tokens is 0.8 to 1.0 sqrt(N) at s = 1, and 1.4
sqrt(N) from 1.6 to 1.9.

**Tail.** The sum is a root mean square over tokens; the bound is asked of the worst of hundreds: a factor of 2.

**BF16** (activations; sums are FP32 everywhere and add nothing visible). Stored in BF16 on the way through a layer
are, in attention: normed input, q_a, its norm, q_b, rotated query, kv_a, its norm, rotated key part, expanded key,
expanded value, probabilities, mixed values, sum with the residual (13; the absorbed form has as many); in the MLP:
normed input, inner activation, sum with the residual (3). kv_b is stored rounded where the file is FP32 or
quantised (1), and an FP32 file rounds the other seven matrices on the way to a layer's output (7). Around the layers:
embedding and final norm (2).

**FP32.** A sum of n products in sequence has partial sums that grow like sqrt(i); their roundings add up to 2^-25
sqrt(n / 2) of the result. Blocked sums have less. Both sides round, in different order: 2^-25 sqrt(n). A layer has at
most ten such sums in sequence (q_a, q_b, kv_a, key, scores, value, mix, o; then gate or up, and down). Angles have an
error of their own: `transformers` takes the powers of theta in FP32, which costs about 2^-23 of a frequency, so 2^-23
radians per position; it is no random error, and is added as it is.
"""

from __future__ import annotations

import math

import numpy as np

from hmoe_jax.config import ModelConfig

TAIL = 2.0
BF16_ROUNDING = 2.0**-9
FP32_ROUNDING = 2.0**-25
ANGLE_ERROR = 2.0**-23

SUMS_PER_LAYER = 10


def relative_error(config: ModelConfig, dtype: str, *, num_tokens: int) -> float:
    """The bound on ||ours - oracle|| / ||oracle|| of any token's logits, given the same experts."""
    if dtype == "bfloat16":
        return TAIL * _gain(config) * BF16_ROUNDING * math.sqrt(_bf16_roundings(config))
    width = max(config.hidden_size, config.dense_ffn, config.num_heads * config.v_dim)
    sums = SUMS_PER_LAYER * config.num_layers + 1
    return TAIL * _gain(config) * FP32_ROUNDING * math.sqrt(sums * width) + ANGLE_ERROR * num_tokens


def group_regret(relative_error: float) -> float:
    """How far the oracle may score a used group below an unused one.

    A router's logit is off by the relative error of its input times the logits' spread, which `tiny`'s weights make
    1. A sigmoid is at most 1/4 steep, and two groups are two scores each.
    """
    return relative_error * 4 / 4


def expert_regret(relative_error: float) -> float:
    """The same for two experts, one score each."""
    return relative_error * 2 / 4


def greedy_gap(relative_error: float, logits: np.ndarray) -> np.ndarray:
    """The largest gaps `[...]` between the two best of the oracle's `logits [..., v]` that such an error can turn.

    The two logits are off by (a, b) with |(a, b)| <= ||difference||, so their difference by at most sqrt(2) times that.
    """
    return math.sqrt(2) * relative_error * np.linalg.norm(logits, axis=-1)


def _gain(config: ModelConfig) -> float:
    score_deviation = config.yarn.softmax_scale if config.yarn else 1.0
    return math.sqrt(1 + 2 * score_deviation**2)


def _bf16_roundings(config: ModelConfig) -> int:
    rounds_matrices = 7 if config.dtype == "float32" else 0
    rounds_kv_b = 1 if config.quantization is not None or config.dtype == "float32" else 0
    return config.num_layers * (13 + 3 + rounds_kv_b + rounds_matrices) + 2
