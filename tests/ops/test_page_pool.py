"""PagePool against a model in a few lines of Python, its messages, and its place beside compact_paged_kv_."""

from __future__ import annotations

import threading

import pytest
import torch
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, precondition, rule

from lightvlm_ext import ops
from lightvlm_ext._host import OutOfPages, PagePool


class Model(RuleBasedStateMachine):
    """users[page], and a call either happens in full or not at all."""

    def __init__(self) -> None:
        super().__init__()
        self.users = [0] * 130
        self.pool = PagePool(130)

    def free_pages(self) -> list[int]:
        return [page for page, users in enumerate(self.users) if users == 0]

    @rule(n=st.integers(0, 50))
    def allocate(self, n: int) -> None:
        free = self.free_pages()
        if n > len(free):
            with pytest.raises(OutOfPages):
                self.pool.allocate(n)
            return
        assert self.pool.allocate(n) == free[:n]
        for page in free[:n]:
            self.users[page] = 1

    @rule(ids=st.lists(st.integers(0, 129), max_size=12))
    def free(self, ids: list[int]) -> None:
        if any(ids.count(page) > self.users[page] for page in ids):
            with pytest.raises(ValueError, match="ids"):
                self.pool.free(ids)
            return
        self.pool.free(ids)
        for page in ids:
            self.users[page] -= 1

    @precondition(lambda self: any(self.users))
    @rule(data=st.data())
    def free_some(self, data: st.DataObject) -> None:
        used = [page for page, users in enumerate(self.users) for _ in range(users)]
        self.free(data.draw(st.lists(st.sampled_from(used), max_size=20)))

    @precondition(lambda self: any(self.users))
    @rule(data=st.data())
    def share(self, data: st.DataObject) -> None:
        used = [page for page, users in enumerate(self.users) if users]
        ids = data.draw(st.lists(st.sampled_from(used), max_size=8))
        self.pool.share(ids)
        for page in ids:
            self.users[page] += 1

    @rule(ids=st.lists(st.integers(-2, 131), min_size=1, max_size=5))
    def share_what_is_free(self, ids: list[int]) -> None:
        if all(0 <= page < 130 and self.users[page] for page in ids):
            return
        with pytest.raises(ValueError, match="ids"):
            self.pool.share(ids)

    @precondition(lambda self: any(self.users))
    @rule(data=st.data(), size=st.integers(1, 5))
    def copy_on_write(self, data: st.DataObject, size: int) -> None:
        used = [page for page, users in enumerate(self.users) if users]
        row = data.draw(st.lists(st.sampled_from(used), max_size=10, unique=True))
        begin = data.draw(st.integers(0, len(row) * size))
        end = data.draw(st.integers(begin, len(row) * size))
        touched = [
            page for i, page in enumerate(row) if i * size < end and begin < (i + 1) * size and begin < end
        ]
        shared = [page for page in touched if self.users[page] > 1]
        free = self.free_pages()
        if len(shared) > len(free):
            with pytest.raises(OutOfPages):
                self.pool.copy_on_write(row, begin, end, page_size=size)
            return
        copies = list(zip(shared, free, strict=False))
        assert self.pool.copy_on_write(row, begin, end, page_size=size) == copies
        for old, new in copies:
            self.users[old] -= 1
            self.users[new] = 1

    @precondition(lambda self: all(self.users))
    @rule()
    def reset(self) -> None:
        self.pool.reset()
        self.users = [0] * 130

    @invariant()
    def agrees(self) -> None:
        assert self.pool.refcounts() == self.users
        assert self.pool.available == len(self.free_pages())


Model.TestCase.settings = settings(max_examples=40, stateful_step_count=40)
TestPool = Model.TestCase


@pytest.mark.parametrize("pages", [0, 1, 63, 64, 65, 128, 1000])
def test_every_page_is_given_out_once(pages: int) -> None:
    pool = PagePool(pages)
    assert (pool.pages, pool.available) == (pages, pages)
    assert repr(pool) == f"PagePool(pages={pages}, available={pages})"
    assert pool.allocate(pages) == list(range(pages))
    with pytest.raises(OutOfPages, match=f"got n = 1, but 0 of {pages} pages are free"):
        pool.allocate(1)
    pool.free(range(0, pages, 3))
    assert pool.allocate(len(range(0, pages, 3))) == list(range(0, pages, 3))
    pool.reset()
    assert pool.available == pages
    assert pool.allocate(0) == []


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda pool: PagePool(-1), r"pages: got -1, must be in \[0, 2147483647\]"),
        (lambda pool: PagePool(2**31), "pages: got 2147483648"),
        (lambda pool: pool.allocate(-1), "n: got -1, must be >= 0"),
        (lambda pool: pool.free([0, 10]), r"ids\[1\]: got 10, must be in \[0, 10\)"),
        (lambda pool: pool.free([0, 7]), r"ids\[1\]: got 7, which is a free page"),
        (lambda pool: pool.free([1, 0, 0]), r"ids\[2\]: got 0, .*double free"),
        (lambda pool: pool.share([1, -1]), r"ids\[1\]: got -1"),
        (lambda pool: pool.share([9]), r"ids\[0\]: got 9, which is a free page"),
        (lambda pool: pool.refcount([10]), r"ids\[0\]: got 10"),
        (
            lambda pool: pool.copy_on_write([0, 9], 0, 1, page_size=4),
            r"pages\[1\]: got 9, which is a free page",
        ),
        (
            lambda pool: pool.copy_on_write([0], 0, 5, page_size=4),
            "end: got 5, but 1 pages of 4 tokens end before",
        ),
        (lambda pool: pool.copy_on_write([0], -1, 5, page_size=4), "begin: got -1"),
        (lambda pool: pool.copy_on_write([0], 3, 2, page_size=4), "end: got 2, must be >= begin = 3"),
        (lambda pool: pool.copy_on_write([0], 0, 1, page_size=0), "page_size: got 0, must be >= 1"),
    ],
)
def test_what_is_wrong_is_said_and_nothing_changes(call: object, message: str) -> None:
    pool = PagePool(10)
    pool.allocate(3)
    pool.share([1])
    with pytest.raises(ValueError, match=message):
        call(pool)
    assert pool.refcounts() == [1, 2, 1, *[0] * 7]
    assert pool.available == 7
    with pytest.raises(TypeError):
        pool.allocate("two")
    with pytest.raises(TypeError):
        pool.free([0.5])


def test_copies_are_made_only_where_others_read() -> None:
    pool = PagePool(8)
    row = pool.allocate(4)
    pool.share(row[:3])
    # Tokens 5 .. 9 on pages of 4 lie in blocks 1 and 2.
    assert pool.copy_on_write(row, 5, 10, page_size=4) == [(1, 4), (2, 5)]
    assert pool.refcounts() == [2, 1, 1, 1, 1, 1, 0, 0]
    assert pool.copy_on_write([0, 4, 5, 3], 5, 10, page_size=4) == []
    assert pool.copy_on_write([0, 4, 5, 3], 7, 7, page_size=4) == []
    pool.share([3] * 3)
    pool.allocate(2)
    with pytest.raises(OutOfPages, match="copy_on_write: needs 2 pages, but 0 of 8 are free"):
        pool.copy_on_write([0, 3], 0, 8, page_size=4)
    assert pool.refcount([0, 3]) == [2, 4]


def test_threads_do_not_share_a_page_unasked() -> None:
    pool = PagePool(4000)
    found: list[list[int]] = [[] for _ in range(4)]

    def work(mine: list[int]) -> None:
        for _ in range(200):
            mine += pool.allocate(5)
            pool.free([mine.pop()])

    threads = [threading.Thread(target=work, args=(mine,)) for mine in found]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    together = [page for mine in found for page in mine]
    assert len(together) == len(set(together)) == 3200
    assert pool.available == 800


def int32(values: object) -> torch.Tensor:
    return torch.tensor(values, dtype=torch.int32)


def test_freed_pages_go_back_to_the_pool() -> None:
    """A prefix of two pages that two sequences share, and a round of compaction."""
    pool = PagePool(12)
    prefix = pool.allocate(2)
    pool.share(prefix)
    rows = [prefix + pool.allocate(3), prefix + pool.allocate(3)]
    key = torch.randn(12, 4, 2, 8)
    value = torch.randn(12, 4, 2, 8)
    index = int32([[*range(8), 9, 13, 17], [*range(8), -1, -1, -1]])
    found = ops.compact_paged_kv_(
        key, value, int32(rows), index, int32([11, 8]), refcount=int32(pool.refcounts())
    )
    assert pool.available == 4
    pool.free(found.freed_pages())
    assert pool.available == 9
    rows = [row[:n] for row, n in zip(rows, found.row_pages.tolist(), strict=True)]
    assert pool.refcount(rows[0]) == [2, 2, 1]
    pool.free(rows[0] + rows[1])
    assert pool.available == 12
