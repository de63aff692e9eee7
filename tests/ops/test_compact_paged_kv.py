"""compact_paged_kv_: every tier against a dense model; layouts, tables, shared pages, what comes free, errors."""

from __future__ import annotations

import re

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from ops.backends import BACKENDS, CPU, NATIVE, REFERENCE, Backend

import lightvlm_ext
from lightvlm_ext import _library, ops

every_backend = pytest.mark.parametrize("backend", BACKENDS, ids=str)
native_backend = pytest.mark.parametrize("backend", NATIVE, ids=str)
device_backend = pytest.mark.parametrize("backend", [b for b in NATIVE if b.is_device], ids=str)
raising_backend = pytest.mark.parametrize("backend", [REFERENCE, CPU], ids=str)

LAYOUTS = ("tokens", "heads", "interleaved", "padded")
INDEX_KINDS = ("random", "all", "none", "first", "last", "alternating", "prefix")
DTYPES = (torch.float32, torch.bfloat16, torch.float64, torch.uint8, torch.int16, torch.complex128)


def int32(*values: object) -> torch.Tensor:
    return torch.tensor(*values, dtype=torch.int32)


def to_bytes(tensor: torch.Tensor) -> torch.Tensor:
    """Comparable also where floats are NaN."""
    return tensor.contiguous().flatten().view(torch.uint8)


def make_pages(
    layout: str, pages: int, size: int, heads: int, width: int, dtype: torch.dtype
) -> torch.Tensor:
    """(pages, size, heads, width) of random bytes, laid out in one way or another."""
    storage = {
        "tokens": (pages, size, heads, width),
        "heads": (pages, heads, size, width),
        "interleaved": (pages, 2, size, heads, width),
        "padded": (pages + 2, size + 1, heads + 1, width + 1),
    }[layout]
    elements = torch.Size(storage).numel()
    whole = (
        torch.randint(0, 256, (elements * dtype.itemsize,), dtype=torch.uint8).view(dtype).reshape(storage)
    )
    return {
        "tokens": whole,
        "heads": whole.transpose(1, 2),
        "interleaved": whole[:, 1] if whole.dim() == 5 else whole,
        "padded": whole[1:-1, 1:, 1:, 1:],
    }[layout]


class Sequences:
    """Sequences of some lengths in the pages of one table, and a page or two that nobody uses."""

    def __init__(self, lens: list[int], size: int, spare_blocks: int = 1) -> None:
        self.size = size
        self.lens = int32(lens)
        self.used = [-(-n // size) for n in lens]
        self.pages = sum(self.used) + 2
        order = torch.randperm(self.pages).tolist()
        blocks = max(self.used, default=0) + spare_blocks
        # What stands past a sequence's pages is poison.
        self.table = torch.full((len(lens), blocks), -(2**31), dtype=torch.int32)
        for b, n in enumerate(self.used):
            self.table[b, :n] = int32([order.pop() for _ in range(n)])

    def dense(self, pages: torch.Tensor, b: int) -> torch.Tensor:
        """Sequence b as (tokens, ...)."""
        n = int(self.lens[b])
        return pages[self.table[b, : self.used[b]].long()].flatten(0, 1)[:n]

    def keep(self, kind: str, heads: int | None, spare: int = 3) -> tuple[torch.Tensor, torch.Tensor]:
        """Index (B, M) and count (B,), or one for each head; what stands past count is poison."""
        kept = [kept_tokens(kind, int(n)) for n in self.lens for _ in range(heads or 1)]
        index = torch.full(
            (len(kept), max((len(k) for k in kept), default=0) + spare), 2**31 - 1, dtype=torch.int32
        )
        for row, tokens in zip(index, kept, strict=True):
            row[: len(tokens)] = tokens.int()
        count = int32([len(k) for k in kept])
        if heads is None:
            return index, count
        return index.reshape(len(self.used), heads, index.shape[1]), count.reshape(len(self.used), heads)

    def check(
        self, before: torch.Tensor, after: torch.Tensor, index: torch.Tensor, count: torch.Tensor
    ) -> None:
        """Kept tokens stand in front, and no other page than theirs was touched."""
        touched = set()
        for b in range(len(self.used)):
            heads = range(index.shape[1]) if index.dim() == 3 else [None]
            for h in heads:
                at = (b,) if h is None else (b, h)
                kept = index[at][: int(count[at])].long()
                old, new = self.dense(before, b), self.dense(after, b)
                if h is not None:
                    old, new = old[:, h], new[:, h]
                assert torch.equal(to_bytes(new[: len(kept)]), to_bytes(old[kept]))
                touched |= set(self.table[b, : -(-len(kept) // self.size)].tolist())
        others = [page for page in range(self.pages) if page not in touched]
        assert torch.equal(to_bytes(after[others]), to_bytes(before[others]))

    def check_freed(self, found: ops.PagedCompaction, counts: list[torch.Tensor]) -> None:
        batch = len(self.used)
        most = torch.stack([c.reshape(batch, -1).amax(1) for c in counts]).amax(0) if batch else int32([])
        left = [-(-int(n) // self.size) for n in most]
        freed = [p for b, n in enumerate(left) for p in self.table[b, n : self.used[b]].tolist()]
        assert found.row_pages.tolist() == left
        assert found.freed_count.tolist() == [len(freed)]
        assert found.freed.tolist() == freed + [-1] * (self.table.numel() - len(freed))
        assert found.freed_pages() == freed
        assert {t.dtype for t in found} == {torch.int32}


def kept_tokens(kind: str, tokens: int) -> torch.Tensor:
    every = torch.arange(tokens)
    return {
        "random": every[torch.rand(tokens) < 0.35],
        "all": every,
        "none": every[:0],
        "first": every[: tokens // 2],
        "last": every[tokens - tokens // 3 :],
        "alternating": every[1::2],
        "prefix": torch.cat([every[: tokens // 2], every[tokens // 2 + 2 :: 3]]),
    }[kind]


@st.composite
def cases(draw: st.DrawFn) -> dict[str, object]:
    return {
        "lens": draw(
            st.lists(st.sampled_from([0, 1, 2, 15, 16, 17, 40, 63, 65, 130]), min_size=0, max_size=3)
        ),
        "size": draw(st.sampled_from([1, 2, 3, 7, 16, 32, 200])),
        "heads": draw(st.integers(1, 3)),
        "width": draw(st.sampled_from([0, 1, 3, 4, 8, 33])),
        "dtype": draw(st.sampled_from(DTYPES)),
        "key_layout": draw(st.sampled_from(LAYOUTS)),
        "value_layout": draw(st.sampled_from(LAYOUTS)),
        "kind": draw(st.sampled_from(INDEX_KINDS)),
        "per_head": draw(st.booleans()),
        "with_refcount": draw(st.booleans()),
        "seed": draw(st.integers(0, 2**31)),
    }


@every_backend
@given(case=cases())
def test_matches_a_dense_model(backend: Backend, case: dict[str, object]) -> None:
    torch.manual_seed(case["seed"])
    own = Sequences(case["lens"], case["size"])
    shape = own.pages, case["size"], case["heads"], case["width"], case["dtype"]
    key, value = make_pages(case["key_layout"], *shape), make_pages(case["value_layout"], *shape)
    before = key.clone(), value.clone()
    index, count = own.keep(case["kind"], case["heads"] if case["per_head"] else None)
    inputs = own.table.clone(), index.clone(), count.clone()
    refcount = torch.ones(own.pages, dtype=torch.int32) if case["with_refcount"] else None
    found = backend.compact_paged_kv_(key, value, own.table, index, count, lens=own.lens, refcount=refcount)
    own.check(before[0], key, index, count)
    own.check(before[1], value, index, count)
    own.check_freed(found, [count])
    assert all(torch.equal(a, b) for a, b in zip(inputs, (own.table, index, count), strict=True))


@native_backend
@pytest.mark.parametrize("size", [16, 48, 256])
@pytest.mark.parametrize("kind", INDEX_KINDS)
def test_long_sequences(backend: Backend, size: int, kind: str) -> None:
    for layout, heads, width in (("tokens", 2, 64), ("heads", 3, 16)):
        own = Sequences([3000, 1025], size)
        key, value = (make_pages(layout, own.pages, size, heads, width, torch.bfloat16) for _ in range(2))
        before = key.clone(), value.clone()
        index, count = own.keep(kind, None)
        found = backend.compact_paged_kv_(key, value, own.table, index, count, lens=own.lens)
        own.check(before[0], key, index, count)
        own.check(before[1], value, index, count)
        own.check_freed(found, [count])


@native_backend
def test_many_chains(backend: Backend) -> None:
    """More blocks than a device takes at once: the kernel's smaller ring."""
    own = Sequences([90, 150], 16)
    key, value = (make_pages("heads", own.pages, 16, 90, width, torch.float16) for width in (3, 16))
    before = key.clone(), value.clone()
    index, count = own.keep("random", 90)
    backend.compact_paged_kv_(key, value, own.table, index, count, lens=own.lens)
    own.check(before[0], key, index, count)
    own.check(before[1], value, index, count)


def test_large_moves_past_the_caches() -> None:
    """From 16 MiB on the CPU twin stores past its caches where rows lie on whole lines."""
    own = Sequences([30000], 64)
    key, value = (
        torch.randint(0, 2**62, (own.pages, 64, 128)).view(torch.bfloat16)[:, :, None] for _ in range(2)
    )
    before = key.clone(), value.clone()
    index, count = own.keep("random", None)
    ops.compact_paged_kv_(key, value, own.table, index, count, lens=own.lens)
    own.check(before[0], key, index, count)
    own.check(before[1], value, index, count)


@every_backend
@pytest.mark.parametrize("per_head", [False, True])
@pytest.mark.parametrize("same", [False, True])
def test_layers_under_one_table(backend: Backend, per_head: bool, same: bool) -> None:
    """A page comes free where the tail of every layer and head is empty."""
    own = Sequences([70, 20, 0], 8)
    kinds = [(2, 8, torch.float32), (2, 4, torch.bfloat16), (2, 5, torch.uint8)]
    keys = [make_pages("tokens", own.pages, 8, *kind) for kind in kinds]
    values = [make_pages("heads", own.pages, 8, *kind) for kind in kinds]
    before = [t.clone() for t in keys], [t.clone() for t in values]
    chosen = [own.keep(kind, 2 if per_head else None) for kind in ("random", "first", "last")]
    if same:
        chosen = [chosen[0]] * 3
        index, count = chosen[0]
    else:
        index, count = ([c[i] for c in chosen] for i in range(2))
    found = backend.compact_paged_kv_(keys, tuple(values), own.table, index, count, lens=own.lens)
    for old, new in zip(before, (keys, values), strict=True):
        for layer in range(3):
            own.check(old[layer], new[layer], *chosen[layer])
    own.check_freed(found, [c for _, c in chosen])


@every_backend
@pytest.mark.parametrize("same", [False, True])
def test_tables_of_their_own(backend: Backend, same: bool) -> None:
    sizes = [16, 16, 16] if same else [16, 5, 64]
    lens = [[40, 33]] * 3 if same else [[40, 33], [7, 0], [100, 65]]
    layers = [Sequences(n, size, spare_blocks=i) for i, (n, size) in enumerate(zip(lens, sizes, strict=True))]
    keys = [make_pages("tokens", own.pages, own.size, 2, 8, torch.float32) for own in layers]
    values = [make_pages("tokens", own.pages, own.size, 2, 3, torch.float32) for own in layers]
    before = [t.clone() for t in keys], [t.clone() for t in values]
    chosen = [own.keep("random", None) for own in layers]
    if same:
        chosen = [chosen[0]] * 3
    index, count = chosen[0] if same else ([c[i] for c in chosen] for i in range(2))
    lengths = layers[0].lens if same else [own.lens for own in layers]
    found = backend.compact_paged_kv_(keys, values, [o.table for o in layers], index, count, lens=lengths)
    assert len(found) == 3
    for layer, own in enumerate(layers):
        own.check(before[0][layer], keys[layer], *chosen[layer])
        own.check(before[1][layer], values[layer], *chosen[layer])
        own.check_freed(found[layer], [chosen[layer][1]])


@native_backend
@pytest.mark.parametrize("one_table", [True, False])
def test_more_layers_than_one_launch_holds(backend: Backend, one_table: bool) -> None:
    for layers in (16, 17, 124, 130):
        owns = [Sequences([9], 4)] * layers if one_table else [Sequences([9], 4) for _ in range(layers)]
        keys = [make_pages("tokens", 5, 4, 1, 4, torch.float32) for _ in range(layers)]
        values = [make_pages("tokens", 5, 4, 1, 4, torch.float32) for _ in range(layers)]
        before = [t.clone() for t in keys]
        chosen = [own.keep("random", None) for own in owns]
        index, count = ([c[i] for c in chosen] for i in range(2))
        tables = owns[0].table if one_table else [own.table for own in owns]
        if one_table and layers > 124:
            with pytest.raises(
                ValueError, match="index: has 130 entries, at most 124 may share one block table"
            ):
                backend.compact_paged_kv_(keys, values, tables, index, count, lens=owns[0].lens)
            chosen = [chosen[0]] * layers
            index, count = chosen[0]
        found = backend.compact_paged_kv_(keys, values, tables, index, count, lens=owns[0].lens)
        for own, old, new, kept in zip(owns, before, keys, chosen, strict=True):
            own.check(old, new, *kept)
        if one_table:
            owns[0].check_freed(found, [c for _, c in chosen])
        else:
            for own, freed, kept in zip(owns, found, chosen, strict=True):
                own.check_freed(freed, [kept[1]])


@every_backend
@pytest.mark.parametrize("per_head", [False, True])
def test_extras_move_alike(backend: Backend, per_head: bool) -> None:
    own = Sequences([50, 21], 8)
    key, value = (make_pages("tokens", own.pages, 8, 3, 4, torch.float16) for _ in range(2))
    extras = [torch.rand(own.pages, 8, 3), torch.randint(0, 9, (own.pages, 3, 8, 5)).transpose(1, 2)]
    if not per_head:
        extras += [torch.rand(own.pages, 8), torch.randint(0, 9, (4, own.pages, 8)).permute(1, 2, 0)]
    before = [extra.clone() for extra in extras]
    index, count = own.keep("random", 3 if per_head else None)
    backend.compact_paged_kv_(key, value, own.table, index, count, lens=own.lens, extras=extras)
    for old, new in zip(before, extras, strict=True):
        own.check(old, new, index, count)
    # Of layers: a tensor, a list, or nothing.
    keys, values = [key, key + 1, key + 2], [value, value + 1, value + 2]
    before = [extra.clone() for extra in extras]
    backend.compact_paged_kv_(
        keys, values, own.table, index, count, lens=own.lens, extras=[extras[0], (), extras[1:]]
    )
    for old, new in zip(before, extras, strict=True):
        own.check(old, new, index, count)


@every_backend
def test_defaults_and_strides_of_the_arguments(backend: Backend) -> None:
    """Without lens a sequence has as many tokens as its blocks hold; the small tensors may be views."""
    own = Sequences([24, 24], 8, spare_blocks=0)
    key, value = (make_pages("tokens", own.pages, 8, 2, 4, torch.float32) for _ in range(2))
    before = key.clone()
    index, count = own.keep("last", None)
    table = torch.stack([own.table, own.table], 2)[..., 1]
    found = backend.compact_paged_kv_(key, value, table, index.T.contiguous().T, count)
    own.check(before, key, index, count)
    own.check_freed(found, [count])


@every_backend
def test_one_page_a_sequence_is_compact_kv(backend: Backend) -> None:
    dense = torch.randn(2, 3, 40, 2, 8)
    paged = dense.clone()
    own = Sequences([40, 40, 40], 40, spare_blocks=0)
    index, count = own.keep("random", None)
    backend.compact_kv_(dense[0], dense[1], index, count)
    found = backend.compact_paged_kv_(paged[0], paged[1], int32([[0], [1], [2]]), index, count)
    for b in range(3):
        assert torch.equal(paged[:, b, : count[b]], dense[:, b, : count[b]])
    assert found.row_pages.tolist() == [1, 1, 1]


@every_backend
def test_nothing_to_move(backend: Backend) -> None:
    assert backend.compact_paged_kv_([], [], [], [], []) == []
    none = torch.empty(0, 3, dtype=torch.int32)
    pages = torch.randn(4, 2, 1, 3)
    found = backend.compact_paged_kv_(pages, pages + 1, none, none, torch.empty(0, dtype=torch.int32))
    assert [t.tolist() for t in found] == [[], [], [0]]
    empty = torch.randn(4, 2, 0, 3)
    index = int32([[1, 2]])
    found = backend.compact_paged_kv_(empty, empty.clone(), int32([[3, 0, 2]]), index, int32([2]))
    assert [t.tolist() for t in found] == [[1], [0, 2, -1], [2]]


# Two sequences of 12 tokens on pages of 4: they share page 5, their first.
SHARED_TABLE = [[5, 1, 2], [5, 3, 0]]
SHARED_USERS = [1, 1, 1, 1, 0, 2]


@every_backend
def test_shared_pages_may_be_kept(backend: Backend) -> None:
    key = torch.arange(24.0).reshape(6, 4, 1, 1)
    value = key + 100
    index = int32([[0, 1, 2, 3, 5, 9], [0, 1, 2, -1, -1, -1]])
    found = backend.compact_paged_kv_(
        key, value, int32(SHARED_TABLE), index, int32([6, 3]), refcount=int32(SHARED_USERS)
    )
    assert key[5].flatten().tolist() == [20, 21, 22, 23]
    assert key[1].flatten().tolist() == [5, 9, 6, 7]
    assert torch.equal(value, key + 100)
    assert [t.tolist() for t in found] == [[2, 1], [2, 3, 0, -1, -1, -1], [3]]


@raising_backend
@pytest.mark.parametrize("with_refcount", [True, False])
def test_shared_pages_are_not_written(backend: Backend, with_refcount: bool) -> None:
    """Here also without refcount: the page stands in two rows."""
    key, value = torch.randn(6, 4, 1, 2), torch.randn(6, 4, 1, 2)
    before = key.clone(), value.clone()
    index = int32([[0, 5, 9], [0, 1, 2]])
    refcount = int32(SHARED_USERS) if with_refcount else None
    with pytest.raises(ValueError, match=r"block_table: .*row.* would write into .*page.* others share"):
        backend.compact_paged_kv_(key, value, int32(SHARED_TABLE), index, int32([3, 3]), refcount=refcount)
    assert torch.equal(key, before[0])
    assert torch.equal(value, before[1])
    if with_refcount:  # of someone outside this call
        alone = int32([[5, 1, 2]])
        with pytest.raises(ValueError, match="others share"):
            backend.compact_paged_kv_(key, value, alone, index[:1], int32([3]), refcount=int32(SHARED_USERS))
    twice = int32([[1, 1, 2]])
    with pytest.raises(ValueError, match="others share"):
        backend.compact_paged_kv_(key, value, twice, index[:1], int32([3]))
    assert torch.equal(key, before[0])


BAD_VALUES = [
    ({"index": [1, 1]}, "index.*ascending", "ascending"),
    ({"index": [3, 2]}, "index.*ascending", "ascending"),
    ({"index": [-1, 2]}, "index.*outside", "outside"),
    ({"index": [2, 9]}, "index.*outside", "outside"),
    ({"count": 4}, "count", "count"),
    ({"count": -1}, "count", "count"),
    ({"lens": 13}, "lens", "lens"),
    ({"lens": -1}, "lens", "lens"),
    ({"page": -1}, "block_table.*outside", "block_table.*outside"),
    ({"page": 9}, "block_table.*outside", "block_table.*outside"),
    ({"refcount": 2}, "others share", "others share"),
]


def bad_call(backend: Backend, wrong: dict[str, object]) -> tuple[torch.Tensor, torch.Tensor, object]:
    """Two sequences of 9 and 12 tokens on pages of 4; something about the first is wrong."""
    table, lens, refcount = int32([[4, 6, 8], [1, 0, 3]]), int32([9, 12]), torch.ones(9, dtype=torch.int32)
    index, count = int32([[2, 5, 8], [1, 6, 11]]), int32([3, 3])
    if "index" in wrong:
        index[0, :2] = int32(wrong["index"])
        count[0] = 2
    count[0] = wrong.get("count", count[0])
    lens[0] = wrong.get("lens", lens[0])
    table[0, 1] = wrong.get("page", table[0, 1])
    refcount[4] = wrong.get("refcount", 1)
    key = torch.arange(36.0).reshape(9, 4, 1, 1)
    value = key.clone()
    try:
        found = backend.compact_paged_kv_(key, value, table, index, count, lens=lens, refcount=refcount)
    except ValueError as error:
        return key, value, error
    return key, value, found


@raising_backend
@pytest.mark.parametrize(("wrong", "message", "_"), BAD_VALUES)
def test_bad_values_raise_before_anything_moves(
    backend: Backend, wrong: dict[str, object], message: str, _: str
) -> None:
    key, value, error = bad_call(backend, wrong)
    with pytest.raises(ValueError, match=message):
        raise error if isinstance(error, Exception) else AssertionError("did not raise")
    assert torch.equal(key.flatten(), torch.arange(36.0))
    assert torch.equal(value, key)


@device_backend
@pytest.mark.parametrize(("wrong", "_", "message"), BAD_VALUES)
def test_bad_values_leave_their_row_alone_on_a_device(
    backend: Backend, wrong: dict[str, object], _: str, message: str
) -> None:
    lightvlm_ext.device_errors()
    key, value, found = bad_call(backend, wrong)

    assert re.search(message, "; ".join(lightvlm_ext.device_errors()))
    expected = torch.arange(36.0).reshape(9, 4)
    expected[1, :3] = torch.tensor([5.0, 2.0, 15.0])  # tokens 1, 6, 11 of the other sequence
    assert torch.equal(key.flatten(), expected.flatten())
    assert torch.equal(value, key)
    # It keeps its pages; those of a length that is wrong are unknown.
    assert found.row_pages.tolist() == [0 if "lens" in wrong else 3, 1]
    assert found.freed_pages() == [0, 3]


@device_backend
def test_check_mode_raises(backend: Backend, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("LIGHTVLM_CHECK", "1")
    _, _, error = bad_call(backend, {"refcount": 2})
    assert isinstance(error, ValueError)
    assert "others share" in str(error)
    assert lightvlm_ext.device_errors() == []


@device_backend
def test_a_bad_head_keeps_the_pages_of_its_row(backend: Backend) -> None:
    lightvlm_ext.device_errors()
    key = torch.arange(24.0).reshape(6, 2, 2, 1)
    value = key.clone()
    index = int32([[[1, 4], [4, 1]]])
    found = backend.compact_paged_kv_(key, value, int32([[0, 2, 4]]), index, int32([[2, 2]]))
    assert "ascending" in "".join(lightvlm_ext.device_errors())
    assert key[0].flatten().tolist() == [2, 1, 16, 3]
    assert [t.tolist() for t in found] == [[3], [-1, -1, -1], [0]]


K, V = torch.zeros(6, 4, 3, 8), torch.zeros(6, 4, 3, 8)
T, I, C = int32([[0, 1], [2, 3]]), int32([[1, 2], [3, 4]]), int32([2, 2])  # noqa: E741
BAD_ARGUMENTS = [
    ((None, V, T, I, C), {}, TypeError, "key_pages: got NoneType"),
    ((K, [V], T, I, C), {}, TypeError, "value_pages: got list"),
    (
        (K[0], V, T, I, C),
        {},
        ValueError,
        r"key_pages: has shape \(4, 3, 8\), must be \(P, page_size, Hkv, D\)",
    ),
    ((K[:, :0], V, T, I, C), {}, ValueError, "key_pages: .* a page must hold a token"),
    ((K, V[:5], T, I, C), {}, ValueError, r"value_pages: has shape .*, must be \(6, 4, 3, D\)"),
    ((K, V, T.long(), I, C), {}, TypeError, "block_table: has dtype int64, must be int32"),
    ((K, V, T[0], I, C), {}, ValueError, r"block_table: has shape \(2,\), must be \(B, max_blocks\)"),
    ((K, V, [T], I, C), {}, TypeError, "block_table: got list"),
    ((K, V, T, I[:1], C), {}, ValueError, r"index: has shape \(1, 2\), must be \(2, M\)"),
    ((K, V, T, I.long(), C), {}, TypeError, "index: has dtype int64"),
    ((K, V, T, I[:, None], C[:, None]), {}, ValueError, r"index: has shape \(2, 1, 2\), must be \(2, 3, M\)"),
    ((K, V, T, I, C[:1]), {}, ValueError, r"count: has shape \(1,\), must be \(2,\)"),
    ((K, V, T, I, C), {"lens": C[:1]}, ValueError, r"lens: has shape \(1,\), must be \(2,\)"),
    ((K, V, T, I, C), {"lens": [C]}, TypeError, "lens: got a list, must be a torch.Tensor"),
    ((K, V, T, I, C), {"refcount": C}, ValueError, r"refcount: has shape \(2,\), must be \(6,\)"),
    ((K, V, T, I, C), {"extras": [K[:5]]}, ValueError, r"extras\[0\]: has shape .*, must be \(6, 4, ...\)"),
    ((K, V, T, I, C), {"extras": [None]}, TypeError, r"extras\[0\]: got NoneType"),
    (([K], [V], [T, T], I, C), {}, ValueError, "block_table: has 2 entries, must have 1 as key_pages"),
    (([K], [V, V], T, I, C), {}, ValueError, "value_pages: has 2 entries, must have 1 as key_pages"),
    (([K], [V], T, [I], C), {}, TypeError, "count: got Tensor"),
    (
        ([K, K[:5]], [V, V], T, I, C),
        {},
        ValueError,
        r"key_pages\[1\]: has shape \(5, 4, 3, 8\), must be \(6, 4",
    ),
    (([K], [V], T, I, C), {"extras": [[], []]}, ValueError, "extras: has 2 entries, must have one for each"),
    ((K, K, T, I, C), {}, ValueError, "share memory"),
    ((K, V, T, I, C), {"extras": [V[..., 0]]}, ValueError, "share memory"),
]


@every_backend
@pytest.mark.parametrize(("arguments", "options", "error", "message"), BAD_ARGUMENTS)
def test_bad_arguments(
    backend: Backend,
    arguments: tuple[object, ...],
    options: dict[str, object],
    error: type[Exception],
    message: str,
) -> None:
    with pytest.raises(error, match=message):
        backend.compact_paged_kv_(*arguments, **options)


def raw_arguments() -> list[object]:
    found = (
        torch.empty(2, dtype=torch.int32),
        torch.empty(4, dtype=torch.int32),
        torch.zeros(1, dtype=torch.int32),
    )
    outputs = [[t] for t in found]
    return [[K, V], [0, 0], [I], [C], [0], [T], [C + 5], [torch.ones(6).int()], *outputs, None]


@native_backend
def test_raw_op_calls_are_checked(backend: Backend) -> None:
    """What memory safety needs is checked again in C++."""
    op = backend.raw("compact_paged_kv")
    op(*raw_arguments())
    bad = [
        (0, [K, V[:5]]), (0, [K, V[:, :3]]), (0, [K, K]), (0, [K, torch.zeros(6)]), (1, [0]), (1, [0, 1]),
        (1, [0, -1]), (2, [I.long()]), (2, [I[0]]), (2, []), (2, [I[:1]]), (2, [torch.stack([I, I], 2)[..., 0]]),
        (2, [I[:, None]]), (3, [C.float()]), (3, [C[:1]]), (4, [1]), (4, [-1]), (4, []), (5, []), (5, [T[0]]),
        (5, [T.T]), (5, [T, T]), (6, [C[:1]]), (6, []), (7, [torch.ones(5).int()]), (8, [C[:1].clone()]),
        (9, [torch.empty(3, dtype=torch.int32)]), (10, [torch.zeros(2, dtype=torch.int32)]), (8, [C]),
    ]  # fmt: skip
    for position, value in bad:
        arguments = raw_arguments()
        arguments[position] = value
        with pytest.raises((ValueError, RuntimeError)):
            op(*arguments)


def test_result_does_not_depend_on_threads() -> None:
    own = Sequences([3000, 700], 32)
    start = torch.randint(0, 256, (2, own.pages, 32, 3, 256), dtype=torch.uint8)
    index, count = own.keep("random", None)
    threads = torch.get_num_threads()
    results = []
    try:
        for number in (1, 2, 3, 5):
            torch.set_num_threads(number)
            pages = start.clone()
            ops.compact_paged_kv_(pages[0], pages[1], own.table, index, count, lens=own.lens)
            results.append(pages)
    finally:
        torch.set_num_threads(threads)
    for pages in results[1:]:
        assert torch.equal(pages, results[0])


def test_opcheck() -> None:
    _library.load()
    for lens in (C + 5, None):
        arguments = raw_arguments()
        arguments[0] = [torch.randn(6, 4, 3, 8), torch.randn(6, 3, 4, 2).transpose(1, 2)]
        arguments[6] = [lens]
        torch.library.opcheck(torch.ops.lightvlm.compact_paged_kv.default, tuple(arguments))


def test_fake_tensors_and_compile() -> None:
    def step(
        key: torch.Tensor, value: torch.Tensor, count: torch.Tensor
    ) -> tuple[torch.Tensor, torch.Tensor]:
        found = ops.compact_paged_kv_(key, value, T, I, count)
        return key[0] + value[0], found.freed

    key, value = torch.randn(6, 4, 1, 3), torch.randn(6, 4, 1, 3)
    expected = step(key.clone(), value.clone(), C)
    compiled = torch.compile(step, backend="eager", fullgraph=True)
    for found, wanted in zip(compiled(key, value, C), expected, strict=True):
        assert torch.equal(found, wanted)
