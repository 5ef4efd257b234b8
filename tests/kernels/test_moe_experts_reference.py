from dataclasses import replace

import jax.numpy as jnp
import numpy as np
import pytest

from hmoe_jax.experts.store import StoreShape
from hmoe_jax.kernels.moe_experts_reference import moe_experts_reference
from tests.kernels.bounds import assert_within
from tests.kernels.expert_case import Batch, Experts, shape_for
from tests.quant.exact import CODECS, exact

SHAPE = StoreShape(num_layers=1, num_experts=4, hidden=24, ffn=10)


@pytest.mark.parametrize("codec", CODECS)
def test_equals_a_loop_over_tokens_and_slots_in_double_precision(codec):
    shape = shape_for(codec, SHAPE)
    experts, batch = Experts.random(shape, codec), Batch.random(shape, 5, slots=3)
    stored = {(t.expert, t.matrix): exact(codec, t.weight, t.scale) for t in experts.tensors}
    expected = np.zeros((5, shape.hidden))
    hidden = np.asarray(batch.hidden, np.float64)
    for token, slot in np.ndindex(5, 3):
        expert = int(batch.ids[token, slot])
        if expert >= 0:
            gate, up = (stored[expert, name] @ hidden[token] for name in ("gate", "up"))
            inner = gate / (1 + np.exp(-gate)) * up
            expected[token] += float(batch.weights[token, slot]) * (stored[expert, "down"] @ inner)

    in_fp32 = moe_experts_reference(batch.hidden.astype(jnp.float32), batch.ids, batch.weights, experts.arrays(0))
    # No rounding to BF16 anywhere: FP32 sums of at most 128 terms, on inputs and outputs of size 1.
    np.testing.assert_allclose(in_fp32, expected, atol=2.0**-16)
    in_bf16 = np.asarray(moe_experts_reference(*batch.operands, experts.arrays(0)))
    assert np.abs(in_bf16 - expected).max() > 2.0**-16


@pytest.mark.parametrize("codec", CODECS)
def test_is_within_the_bound_that_kernels_are_tested_with(codec):
    shape = shape_for(codec, StoreShape(num_layers=1, num_experts=3, hidden=200, ffn=136))
    experts, batch = Experts.random(shape, codec), Batch.random(shape, 20, slots=3)
    assert_within(moe_experts_reference(*batch.operands, experts.arrays(0)), experts.exact(0, batch))


def test_a_nan_in_an_expert_reaches_only_the_tokens_that_chose_it():
    experts = Experts.random(SHAPE, "bf16").arrays(0)
    poisoned = replace(experts, down=replace(experts.down, weight=experts.down.weight.at[2, 0, 0].set(jnp.nan)))
    hidden = Batch.random(SHAPE, 2, slots=1).hidden
    out = moe_experts_reference(hidden, jnp.asarray([[1], [2]], jnp.int32), jnp.ones((2, 1)), poisoned)
    assert np.isnan(np.asarray(out)).any(axis=1).tolist() == [False, True]
