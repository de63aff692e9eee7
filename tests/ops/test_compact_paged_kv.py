"""compact_paged_kv_: every tier against a dense model; layouts, tables, shared pages, what comes free."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from ops.backends import BACKENDS, NATIVE, Backend

from lightvlm_ext import _library, ops
from tests.ops.paging import (
    INDEX_KINDS,
    LAYOUTS,
    SHARED_TABLE,
    SHARED_USERS,
    C,
    I,
    Sequences,
    T,
    int32,
    make_pages,
    raw_arguments,
)

every_backend = pytest.mark.parametrize("backend", BACKENDS, ids=str)
native_backend = pytest.mark.parametrize("backend", NATIVE, ids=str)

DTYPES = (torch.float32, torch.bfloat16, torch.float64, torch.uint8, torch.int16, torch.complex128)


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
