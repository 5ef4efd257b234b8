"""Keys by which full pages of the cache are found again: what stands in a page depends on all tokens before it."""

from __future__ import annotations

from collections.abc import Sequence
from hashlib import sha256

import numpy as np


def page_keys(token_ids: Sequence[int], *, page_size: int, salt: str = "") -> list[bytes]:
    """One for each full page: sha256 of the key before it and the page's token ids as little-endian int32.

    The first key takes sha256 of the `salt`, so that users with different salts find nothing of each other's.
    """
    ids = np.asarray(token_ids, "<i4")
    keys, key = [], sha256(salt.encode()).digest()
    for end in range(page_size, len(ids) + 1, page_size):
        key = sha256(key + ids[end - page_size : end].tobytes()).digest()
        keys.append(key)
    return keys
