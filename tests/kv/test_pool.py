"""Pages: each is free, held, or kept for whoever asks for its tokens again; none is lost or handed out twice."""

from __future__ import annotations

from collections import Counter

import pytest
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, precondition, rule

from hmoe_jax.kv.pages import SCRATCH_PAGE
from hmoe_jax.kv.pool import PagePool

NUM_PAGES = 11
KEYS = [bytes([i]) for i in range(6)]


def test_the_scratch_page_is_never_handed_out() -> None:
    assert sorted(PagePool(6).take(5)) == [1, 2, 3, 4, 5]


def test_freed_pages_are_reused_before_fresh_ones() -> None:
    pool = PagePool(10)
    first = pool.take(4)
    pool.give_back(first[1:3])
    assert set(pool.take(2)) == set(first[1:3])


def test_taking_too_much_takes_nothing() -> None:
    pool = PagePool(4)
    with pytest.raises(ValueError, match="4 pages wanted, 3 free"):
        pool.take(4)
    assert pool.num_free == 3


@pytest.mark.parametrize("page", [SCRATCH_PAGE, 2, 99])
def test_a_page_that_is_not_in_use_cannot_be_given_back_or_named(page: int) -> None:
    pool = PagePool(4)
    assert pool.take(1) == [1]
    with pytest.raises(ValueError, match=f"page {page} is not in use"):
        pool.give_back([page])
    with pytest.raises(ValueError, match=f"page {page} is not in use"):
        pool.name(page, KEYS[0])


def test_a_page_cannot_be_given_back_twice() -> None:
    pool = PagePool(4)
    pages = pool.take(2)
    pool.give_back(pages)
    with pytest.raises(ValueError, match="is not in use"):
        pool.give_back(pages)
    assert pool.num_free == 3


def test_a_free_page_cannot_be_held() -> None:
    with pytest.raises(ValueError, match="page 2 is free"):
        PagePool(4).hold([2])


def test_named_pages_are_kept_and_found_from_the_first_key_on() -> None:
    pool = PagePool(6)
    pages = pool.take(3)
    for page, key in zip(pages, KEYS, strict=False):
        pool.name(page, key)
    assert pool.find(KEYS) == pages
    assert pool.find(KEYS[1:]) == pages[1:]
    assert pool.find([KEYS[5], *KEYS]) == []
    pool.give_back(pages)
    assert (pool.num_free, pool.num_kept) == (5, 3)
    pool.hold(pool.find(KEYS))
    assert (pool.num_free, pool.num_kept) == (2, 0)


def test_a_page_with_several_holders_is_kept_when_the_last_lets_go() -> None:
    pool = PagePool(4)
    (page,) = pool.take(1)
    pool.name(page, KEYS[0])
    pool.hold([page])
    pool.give_back([page])
    assert pool.num_kept == 0
    pool.give_back([page])
    assert pool.num_kept == 1


def test_kept_pages_go_last_and_the_least_recently_used_first_from_the_end_of_its_chain() -> None:
    pool = PagePool(6)
    old, new = pool.take(2), pool.take(2)
    for page, key in zip([*old, *new], KEYS, strict=False):
        pool.name(page, key)
    pool.give_back(old)
    pool.give_back(new)
    pool.hold(old[:1])
    pool.give_back(old[:1])
    taken = pool.take(5)
    assert taken == [5, old[1], new[1], new[0], old[0]]
    assert pool.find(KEYS) == []


def test_of_two_pages_with_the_same_tokens_one_is_found_and_the_other_freed() -> None:
    pool = PagePool(4)
    first, second = pool.take(2)
    pool.name(first, KEYS[0])
    pool.name(second, KEYS[0])
    pool.give_back([first, second])
    assert pool.find(KEYS) == [first]
    assert pool.num_kept == 1


def test_a_lost_cache_has_nothing_to_find() -> None:
    pool = PagePool(4)
    kept, held = pool.take(2)
    pool.name(kept, KEYS[0])
    pool.name(held, KEYS[1])
    pool.give_back([kept])
    pool.forget_keys()
    assert pool.find(KEYS[:1]) == pool.find(KEYS[1:]) == []
    pool.give_back([held])
    assert (pool.num_free, pool.num_kept) == (3, 0)


@pytest.mark.parametrize("spoil", ["free", "holders"])
def test_the_integrity_check_sees_a_page_that_is_lost_or_shared(spoil: str) -> None:
    pool = PagePool(4)
    (page,) = pool.take(1)
    pool.check(Counter([page]))
    if spoil == "free":
        pool._free.append(page)
        with pytest.raises(AssertionError, match="pages lost or shared"):
            pool.check(Counter([page]))
    with pytest.raises(AssertionError):
        pool.check(Counter())


class PoolMachine(RuleBasedStateMachine):
    """Takes, names, finds, holds and gives back at random. The model: what each holder has, and which key names which
    tokens, where the tokens of a page are the number of its taking."""

    def __init__(self) -> None:
        super().__init__()
        self.pool = PagePool(NUM_PAGES)
        self.held: list[list[int]] = []
        self.content: dict[int, int] = {}  # by page
        self.named: dict[bytes, int] = {}  # contents by key
        self.num_taken = 0

    @rule(count=st.integers(0, 6))
    def take(self, count: int) -> None:
        if count > self.pool.num_free:
            with pytest.raises(ValueError, match=f"{count} pages wanted, {self.pool.num_free} free"):
                self.pool.take(count)
            return
        self.held.append(self.pool.take(count))
        for page in self.held[-1]:
            self.num_taken += 1
            self.content[page] = self.num_taken

    @precondition(lambda self: any(self.held))
    @rule(data=st.data(), key=st.sampled_from(KEYS))
    def name(self, data: st.DataObject, key: bytes) -> None:
        page = data.draw(st.sampled_from(sorted({page for pages in self.held for page in pages})))
        was_found, has_name = self.pool.find([key]), any(self.pool.find([each]) == [page] for each in KEYS)
        self.pool.name(page, key)
        if not was_found and not has_name:
            self.named[key] = self.content[page]

    @rule(key=st.sampled_from(KEYS))
    def find(self, key: bytes) -> None:
        pages = self.pool.find([key])
        if pages:
            assert self.content[pages[0]] == self.named[key]
            self.pool.hold(pages)
            self.held.append(pages)

    @precondition(lambda self: self.held)
    @rule(data=st.data())
    def give_back(self, data: st.DataObject) -> None:
        self.pool.give_back(self.held.pop(data.draw(st.integers(0, len(self.held) - 1))))

    @rule()
    def forget(self) -> None:
        self.pool.forget_keys()

    @invariant()
    def no_page_is_lost_or_shared_by_those_who_did_not_find_it(self) -> None:
        holders = Counter(page for pages in self.held for page in pages)
        self.pool.check(holders)
        assert set(holders) <= set(range(1, NUM_PAGES))
        assert self.pool.num_free == NUM_PAGES - 1 - len(holders)


TestPagePool = PoolMachine.TestCase
