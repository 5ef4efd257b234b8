"""Fixtures: a pool for every instruction set, and every format, that the kernels know."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from hmoe_jax.kernels import _native
from hmoe_jax.kernels.pool import ThreadPool, available_isas, resolve_num_threads
from tests.kernels.codecs import CODECS, needs_codec


@pytest.fixture(params=_native.all_isa_names())
def isa(request: pytest.FixtureRequest) -> str:
    if request.param not in available_isas():
        pytest.skip(f"this machine does not offer {request.param}, only {', '.join(available_isas())}")
    return request.param


@pytest.fixture
def pool(isa: str) -> Iterator[ThreadPool]:
    with ThreadPool(resolve_num_threads("auto"), isa=isa) as pool:
        yield pool


@pytest.fixture(params=CODECS)
def codec(request: pytest.FixtureRequest) -> str:
    needs_codec(request.param)
    return request.param
