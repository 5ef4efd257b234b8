"""Rotary embedding against complex arithmetic, and YaRN against the paper's formula written out pair by pair."""

from __future__ import annotations

import math

import jax.numpy as jnp
import numpy as np
import pytest

from hmoe_jax.config import ModelConfig, YarnConfig
from hmoe_jax.nn.rope import inverse_frequencies, rotary_angles, rotate
from tests.nn.configs import tiny

YARNS = {
    "deepseek": YarnConfig(factor=40.0, original_max_len=4096, mscale=1.0, mscale_all_dim=1.0),
    "kimi": YarnConfig(32.0, 4096, beta_fast=1.0, beta_slow=1.0, mscale=1.0, mscale_all_dim=1.0),
    "narrow": YarnConfig(factor=4.0, original_max_len=16, beta_fast=2.0, beta_slow=1.0, mscale=0.7, mscale_all_dim=1.2),
    "fraction": YarnConfig(factor=10.0, original_max_len=512, beta_fast=20.0, beta_slow=1.5, truncate=False),
    "no width": YarnConfig(8.0, 512, beta_fast=2.0, beta_slow=2.0, truncate=False),
    "shrinking": YarnConfig(factor=0.5, original_max_len=64),
}


def yarn_frequencies(config: ModelConfig, yarn: YarnConfig) -> list[float]:
    """arXiv 2309.00071, section 3.2, pair by pair: kept if it turns beta_fast times, stretched below beta_slow."""

    def bound(turns: float) -> float:
        wavelength = yarn.original_max_len / (2 * math.pi * turns)
        return config.rope_dim * math.log(wavelength) / (2 * math.log(config.rope_theta))

    low, high = bound(yarn.beta_fast), bound(yarn.beta_slow)
    if yarn.truncate:
        low, high = math.floor(low), math.ceil(high)
    low, high = max(low, 0), min(high, config.rope_dim - 1)
    frequencies = []
    for pair in range(config.rope_dim // 2):
        frequency = config.rope_theta ** (-2 * pair / config.rope_dim)
        step = 1.0 if pair > low else 0.0
        stretched = step if low == high else min(max((pair - low) / (high - low), 0.0), 1.0)
        frequencies.append(frequency * (1 - stretched) + frequency / yarn.factor * stretched)
    return frequencies


@pytest.mark.parametrize("name", YARNS)
@pytest.mark.parametrize(("rope_dim", "theta"), [(64, 10000.0), (64, 50000.0), (10, 777.0)])
def test_yarn_frequencies_are_the_papers(name: str, rope_dim: int, theta: float) -> None:
    config = tiny("plain", rope_dim=rope_dim, rope_theta=theta, yarn=YARNS[name])
    np.testing.assert_allclose(inverse_frequencies(config), yarn_frequencies(config, YARNS[name]), rtol=2.0**-23)


def test_plain_frequencies_are_powers_of_theta() -> None:
    config = tiny("plain", rope_dim=6, rope_theta=10000.0)
    np.testing.assert_allclose(inverse_frequencies(config), [1, 10000 ** (-1 / 3), 10000 ** (-2 / 3)], rtol=2.0**-23)


def test_equal_betas_make_a_step_and_nothing_else() -> None:
    # Kimi-K2's own numbers. Both bounds are 19.16..., so pairs up to 19 are kept, those from 20 on are stretched.
    config = tiny("plain", rope_dim=64, rope_theta=50000.0, yarn=YARNS["kimi"])
    plain = inverse_frequencies(tiny("plain", rope_dim=64, rope_theta=50000.0))
    ratio = plain / inverse_frequencies(config)
    np.testing.assert_allclose(ratio[:20], 1, rtol=2.0**-22)
    np.testing.assert_allclose(ratio[20:], 32, rtol=2.0**-22)


@pytest.mark.parametrize(
    ("yarn", "rotary", "softmax"),
    [
        (YARNS["deepseek"], 1.0, (0.1 * math.log(40) + 1) ** 2),
        (YARNS["narrow"], (0.07 * math.log(4) + 1) / (0.12 * math.log(4) + 1), (0.12 * math.log(4) + 1) ** 2),
        (YARNS["fraction"], 0.1 * math.log(10) + 1, 1.0),
        (YarnConfig(factor=10.0, original_max_len=64, mscale=1.0), 0.1 * math.log(10) + 1, 1.0),
        (YarnConfig(factor=10.0, original_max_len=64, attention_factor=1.3), 1.3, 1.0),
        (YARNS["shrinking"], 1.0, 1.0),
    ],
)
def test_mscales_go_to_the_rotation_and_to_the_softmax(yarn: YarnConfig, rotary: float, softmax: float) -> None:
    assert yarn.rotary_scale == pytest.approx(rotary, rel=1e-12)
    assert yarn.softmax_scale == pytest.approx(softmax, rel=1e-12)
    config = tiny("plain", yarn=yarn)
    cos, sin = rotary_angles(config, jnp.array([0, 5]))
    np.testing.assert_allclose(np.asarray(cos**2 + sin**2), rotary**2, rtol=2.0**-20)
    assert config.softmax_scale == pytest.approx(config.qk_dim**-0.5 * softmax, rel=1e-12)


@pytest.mark.parametrize("interleave", [True, False])
@pytest.mark.parametrize("heads", [(), (3,)])
def test_rotate_turns_each_pair_in_the_complex_plane(interleave: bool, heads: tuple[int, ...]) -> None:
    config, positions = tiny("plain", rope_dim=10), np.array([0, 1, 7, 200])
    x = np.random.default_rng(0).standard_normal((4, *heads, 10)).astype(np.float32)
    got = np.asarray(rotate(jnp.asarray(x), *rotary_angles(config, jnp.asarray(positions)), interleave=interleave))
    first, second = (slice(0, None, 2), slice(1, None, 2)) if interleave else (slice(0, 5), slice(5, 10))
    turn = np.exp(1j * positions[:, None] * inverse_frequencies(config).astype(np.float64))
    turned = (x[..., first] + 1j * x[..., second]) * turn.reshape(4, *(1,) * len(heads), 5)
    # 200 radians have a rounding of 2^-17 (half a step of 2^-16).
    np.testing.assert_allclose(got[..., first], turned.real, atol=2.0**-15)
    np.testing.assert_allclose(got[..., second], turned.imag, atol=2.0**-15)


def test_scores_depend_on_the_distance_only() -> None:
    config = tiny("deepseek")
    q, k = np.random.default_rng(1).standard_normal((2, 1, config.rope_dim)).astype(np.float32)

    def score(query_position: int, key_position: int) -> float:
        q_at, k_at = (
            rotate(jnp.asarray(x), *rotary_angles(config, jnp.array([position])), interleave=True)
            for x, position in ((q, query_position), (k, key_position))
        )
        return float((q_at * k_at).sum())

    assert score(11, 4) == pytest.approx(score(107, 100), abs=2.0**-14)


def test_result_has_the_dtype_and_the_pair_order_of_the_input() -> None:
    config = tiny("plain")
    x = jnp.asarray(np.random.default_rng(2).standard_normal((1, 2, config.rope_dim)), jnp.bfloat16)
    at_zero = rotate(x, *rotary_angles(config, jnp.array([0])), interleave=True)
    assert at_zero.dtype == jnp.bfloat16
    np.testing.assert_array_equal(np.asarray(at_zero), np.asarray(x))
