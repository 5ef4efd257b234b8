"""Who holds which page of the cache, and which pages hold tokens that somebody may ask for again.

A page is *free*; *held* by one sequence or by several that read the same tokens; or *kept*: nobody's, but findable by
the key of its tokens until its place is needed. Kept pages are given up least recently used first.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Sequence

from hmoe_jax.kv.pages import SCRATCH_PAGE

Key = bytes
"""Names the tokens of a page and all before them (`kv.prefix`)."""


class PagePool:
    """Hands out numbers of pages; integers only."""

    def __init__(self, num_pages: int):
        self._num_pages = num_pages
        self._free = list(range(num_pages - 1, SCRATCH_PAGE, -1))
        self._holders: Counter[int] = Counter()
        self._kept: dict[int, None] = {}  # in the order in which they were let go
        self._page_of: dict[Key, int] = {}
        self._key_of: dict[int, Key] = {}

    @property
    def num_free(self) -> int:
        """Pages that can be taken: free ones and kept ones."""
        return len(self._free) + len(self._kept)

    @property
    def num_kept(self) -> int:
        return len(self._kept)

    def take(self, count: int) -> list[int]:
        """`count` pages for one holder, whose keys are forgotten. Freed pages are handed out before fresh ones, kept
        ones last. Raises `ValueError` if fewer can be taken (ask `num_free` first)."""
        if count > self.num_free:
            raise ValueError(f"{count} pages wanted, {self.num_free} free")
        pages = [self._free.pop() if self._free else self._give_up_oldest() for _ in range(count)]
        self._holders.update(pages)
        return pages

    def give_back(self, pages: Sequence[int]) -> None:
        """One holder less for each. Raises `ValueError` for a page that nobody holds: it would be handed out twice.

        The last of them is given up first: a chain of keys is worth nothing without its beginning.
        """
        for page in reversed(pages):
            if page not in self._holders:
                raise ValueError(f"page {page} is not in use")
            self._holders[page] -= 1
            if self._holders[page]:
                continue
            del self._holders[page]
            if page in self._key_of:
                self._kept[page] = None
            else:
                self._free.append(page)

    def name(self, page: int, key: Key) -> None:
        """A held page is full of tokens that can be found by `key` from now on, unless another page has them."""
        if page not in self._holders:
            raise ValueError(f"page {page} is not in use")
        if key not in self._page_of and page not in self._key_of:
            self._page_of[key], self._key_of[page] = page, key

    def find(self, keys: Iterable[Key]) -> list[int]:
        """The pages of the first keys, up to the first that nobody has. They are not held yet."""
        found: list[int] = []
        for key in keys:
            page = self._page_of.get(key)
            if page is None:
                break
            found.append(page)
        return found

    def hold(self, pages: Iterable[int]) -> None:
        """One holder more for each of these held or kept pages."""
        for page in pages:
            if page not in self._holders and page not in self._kept:
                raise ValueError(f"page {page} is free")
            self._kept.pop(page, None)
            self._holders[page] += 1

    def forget_keys(self) -> None:
        """For a cache whose contents are lost: nothing can be found any more, and what was kept is free."""
        self._page_of.clear()
        self._key_of.clear()
        self._free.extend(self._kept)
        self._kept.clear()

    def check(self, holders: Counter[int]) -> None:
        """Adds up all pages, and compares who holds them. Raises `AssertionError` saying what is wrong."""
        owned = [*self._free, *self._kept, *self._holders]
        assert sorted(owned) == list(range(SCRATCH_PAGE + 1, self._num_pages)), f"pages lost or shared: {sorted(owned)}"
        assert self._holders == holders, f"pages are held {dict(self._holders)} times, but used {dict(holders)} times"
        assert {page: key for key, page in self._page_of.items()} == self._key_of, "keys and pages disagree"
        assert set(self._kept) <= set(self._key_of), "a page is kept that nobody can find"
        assert not set(self._free) & set(self._key_of), "a free page can be found"

    def _give_up_oldest(self) -> int:
        page = next(iter(self._kept))
        del self._kept[page]
        del self._page_of[self._key_of.pop(page)]
        return page
