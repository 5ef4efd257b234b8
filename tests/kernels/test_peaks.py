"""The measured limits: reads and dot instructions."""

from __future__ import annotations

import pytest

from hmoe_jax.kernels.pool import ThreadPool


def test_the_dot_peak_is_what_a_machine_can_have(pool: ThreadPool) -> None:
    # From a core at 100 MHz that does one multiply-add per cycle to one at 10 GHz with two AMX units.
    assert 0.1 <= pool.dot_gmacs() / pool.num_threads <= 2 * 512 * 10


def test_a_closed_pool_measures_nothing() -> None:
    pool = ThreadPool(1)
    pool.close()
    with pytest.raises(ValueError, match=f"thread pool {pool.id} is closed"):
        pool.dot_gmacs()
    with pytest.raises(ValueError, match=f"thread pool {pool.id} is closed"):
        pool.read_gbps(megabytes=1)
