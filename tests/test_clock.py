"""A clock that never goes back."""

from hmoe_jax.clock import steady


def test_it_stands_still_where_the_other_one_jumps_back() -> None:
    times = iter([5.0, 6.0, 2.0, 3.0, 7.0])
    clock = steady(lambda: next(times))
    assert [clock() for _ in range(4)] == [6.0, 6.0, 6.0, 7.0]
