from __future__ import annotations

import pytest

from tests.perf.test_report import profile

pytest.importorskip("matplotlib")

from hmoe_jax.perf import picture
from hmoe_jax.perf.scopes import OTHER, STAGES


def test_a_picture_is_a_png_that_grows_with_the_profiles() -> None:
    one, two = (picture.draw([profile()] * count, title="tiny") for count in (1, 2))
    assert one.startswith(b"\x89PNG")
    assert _height(two) > 1.5 * _height(one)


def test_every_stage_has_a_colour_of_its_own() -> None:
    assert len({picture.COLORS[stage] for stage in (*STAGES, OTHER)}) == len(STAGES) + 1


def _height(png: bytes) -> int:
    """From the header chunk."""
    return int.from_bytes(png[20:24], "big")
