"""Which formats the native kernels are tested in: all of the table."""

from __future__ import annotations

import numpy as np
import pytest

from hmoe_jax.kernels import _native
from hmoe_jax.quant.formats import FORMATS

CODECS = tuple(FORMATS)


def needs_codec(*codecs: str) -> None:
    """Skips a test of formats that the native module does not know; `test_decode` fails for each of them."""
    for codec in codecs:
        if not has_codec(codec):
            pytest.skip(f"the native module does not know codec {codec}")


def has_codec(codec: str) -> bool:
    try:
        _native.decode(codec, "scalar", np.zeros(0, np.uint8))
    except ValueError:
        return False
    return True
