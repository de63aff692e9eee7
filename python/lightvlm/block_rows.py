"""BlockRows: which pages the batch rows of a layer have; making room in several of them at once, or in none.

The one place where pages get users and lose them, and where a page that others use is copied before it is written.
"""

from __future__ import annotations

import weakref
from collections.abc import Sequence
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from lightvlm_ext import OutOfPages, PagePool

from .host import upload

if TYPE_CHECKING:
    from .pages import KVPages


class BlockRows:
    """The pages of each batch row of one layer, block by block: a block table's half on the host.

    It alone takes users from pages, and gives them; when it is dropped, its pages lose their users.
    """

    def __init__(self, pages: KVPages) -> None:
        self.pages = pages
        self.rows: list[list[int]] = []  # changed in place: the finalizer knows this very list
        self._on_device: Tensor | None = None
        weakref.finalize(self, _give_back, pages.pool, self.rows).atexit = False

    @property
    def ids(self) -> list[int]:
        """Pages of all rows, row by row; one that several rows share, as often."""
        return [page for row in self.rows for page in row]

    @property
    def room(self) -> int:
        """Tokens that the longest row has pages for."""
        return max(map(len, self.rows), default=0) * self.pages.page_size

    def start(self, batch: int) -> None:
        """So many rows without a page."""
        self.release()
        self.rows.extend([] for _ in range(batch))

    def release(self) -> None:
        """Give up all pages, and all rows."""
        _give_back(self.pages.pool, self.rows)
        self._on_device = None

    def keep(self, tokens: Sequence[int]) -> None:
        """Give up the pages behind each row's first ``tokens`` tokens. The device's table may go on naming them."""
        given_up = []
        for row, count in zip(self.rows, tokens, strict=True):
            blocks = self.pages.blocks(count)
            given_up += row[blocks:]
            del row[blocks:]
        self.pages.pool.free(given_up)

    def drop_front(self, blocks: Sequence[int]) -> None:
        """Give up the first ``blocks`` pages of each row."""
        given_up = []
        for row, count in zip(self.rows, blocks, strict=True):
            given_up += row[:count]
            del row[:count]
        self.pages.pool.free(given_up)
        self._on_device = None

    def select(self, rows: Sequence[int]) -> None:
        """Take these rows, in that order; one that is taken several times is shared, not copied."""
        before, chosen = self.ids, [list(self.rows[row]) for row in rows]
        self.pages.pool.share([page for row in chosen for page in row])
        self.pages.pool.free(before)
        self.rows[:] = chosen
        self._on_device = None

    def fork(self) -> BlockRows:
        """Another that shares all pages with this one."""
        other = BlockRows(self.pages)
        self.pages.pool.share(self.ids)
        other.rows.extend(list(row) for row in self.rows)
        other._on_device = self._on_device
        return other

    def table(self) -> Tensor:
        """(B, max_blocks) int32 on the device; what stands past a row's tokens is any page."""
        if self._on_device is None:
            upload_tables([self])
        assert self._on_device is not None
        return self._on_device[:, : max(map(len, self.rows))]

    @property
    def table_bytes(self) -> int:
        """Bytes of the device's table."""
        return self._on_device.nbytes if self._on_device is not None else 0

    @property
    def stale(self) -> bool:
        """Whether the device's table has to be uploaded anew."""
        return self._on_device is None


def upload_tables(several: Sequence[BlockRows]) -> Tensor:
    """Upload block tables at once: (R, max_blocks) int32, theirs one below the other; each keeps its part."""
    rows = [row for blocks in several for row in blocks.rows]
    width = max(map(len, rows), default=0)
    table = upload([row + [0] * (width - len(row)) for row in rows], several[0].pages.device)
    table = table.reshape(len(rows), width)
    for blocks, part in zip(several, table.split([len(blocks.rows) for blocks in several]), strict=True):
        blocks._on_device = part
    return table


_Spot = tuple[BlockRows, list[int], int]  # a block of a row


def _touched(several: Sequence[BlockRows], spans: Sequence[Sequence[tuple[int, int]]]) -> list[_Spot]:
    """The blocks that stand for tokens [begin, end) of each row, those that have no page yet included."""
    return [
        (blocks, row, block)
        for blocks, own in zip(several, spans, strict=True)
        for row, (begin, end) in zip(blocks.rows, own, strict=True)
        if begin < end
        for block in range(begin // blocks.pages.page_size, blocks.pages.blocks(end))
    ]


def _to_replace(pages: KVPages, spots: list[_Spot]) -> list[_Spot]:
    """Of blocks to be written, those whose page has to be another: none yet, or one that others use as well.

    Where nobody else uses a page, the first of several rows that share it may have it.
    """
    writers: dict[int, int] = {}
    for _, row, block in spots:
        if block < len(row):
            writers[row[block]] = writers.get(row[block], 0) + 1
    users = dict(zip(writers, pages.pool.refcount(list(writers)), strict=True))
    found = []
    for spot in spots:
        _, row, block = spot
        page = row[block] if block < len(row) else -1
        if page >= 0 and users[page] == writers[page]:
            users[page] = 0  # the next one takes a copy
        else:
            found.append(spot)
    return found


def make_room(several: Sequence[BlockRows], spans: Sequence[Sequence[tuple[int, int]]]) -> None:
    """Give each row pages of its own for tokens [begin, end), which will be written: new ones behind its last page, and
    copies of those that others use as well, in one copy for all.

    Args:
        several: of the same pages.
        spans: for each of them, [begin, end) of each row, begin at most what it has pages for.

    Raises:
        OutOfPages: too few are free. Nothing has changed then.
    """
    pages = several[0].pages
    replaced = _to_replace(pages, _touched(several, spans))
    if not replaced:
        return
    try:
        fresh = pages.pool.allocate(len(replaced))
    except OutOfPages:
        raise OutOfPages(
            f"pages: {len(replaced)} more are needed, {pages.available} of {pages.pages} are free "
            f"({pages.page_size} tokens of a layer and row each)"
        ) from None
    sources, targets = [], []
    for (blocks, row, block), page in zip(replaced, fresh, strict=True):
        blocks._on_device = None
        if block < len(row):
            sources.append(row[block])
            targets.append(page)
            row[block] = page
        else:
            row.append(page)
    if sources:
        at = upload([sources, targets], pages.device, torch.int64)
        for storage in (pages.key_pages, pages.value_pages):
            storage.index_copy_(0, at[1], storage.index_select(0, at[0]))
        pages.pool.free(sources)


def missing(several: Sequence[BlockRows], spans: Sequence[Sequence[tuple[int, int]]]) -> int:
    """How many pages :func:`make_room` would take."""
    return len(_to_replace(several[0].pages, _touched(several, spans)))


def _give_back(pool: PagePool, rows: list[list[int]]) -> None:
    pool.free([page for row in rows for page in row])
    rows.clear()
