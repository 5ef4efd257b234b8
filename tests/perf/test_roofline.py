from __future__ import annotations

import jax
import pytest

from hmoe_jax.kernels.pool import ThreadPool
from hmoe_jax.perf import roofline


def test_the_best_of_several_measurements_is_the_limit(monkeypatch: pytest.MonkeyPatch) -> None:
    measured = iter([3.0, 7.0, 5.0])
    monkeypatch.setattr(ThreadPool, "read_gbps", lambda pool: next(measured))
    assert roofline.read_gbps(jax.devices("cpu")[0], num_threads=1, isa="scalar") == 7.0
