"""compact_kv_: every tier against lists of rows; layouts, index sets, errors, and what must not change."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from ops.backends import BACKENDS, CPU, NATIVE, REFERENCE, Backend

import lightvlm_ext
from lightvlm_ext import _library, ops

ROOT = Path(__file__).resolve().parents[2]
every_backend = pytest.mark.parametrize("backend", BACKENDS, ids=str)
native_backend = pytest.mark.parametrize("backend", NATIVE, ids=str)
device_backend = pytest.mark.parametrize("backend", [b for b in NATIVE if b.is_device], ids=str)

LAYOUTS = ("tokens", "heads", "interleaved", "padded", "reversed")
INDEX_KINDS = ("random", "all", "none", "first", "last", "alternating", "runs")
DTYPES = (
    torch.float32,
    torch.float16,
    torch.bfloat16,
    torch.float64,
    torch.uint8,
    torch.int64,
    torch.bool,
    torch.complex128,
)


def to_bytes(tensor: torch.Tensor) -> torch.Tensor:
    """Comparable also where floats are NaN."""
    return tensor.contiguous().flatten().view(torch.uint8)


class Buffer:
    """A tensor of random bytes, as a view of a larger buffer, so that writes outside the view show."""

    def __init__(self, storage: tuple[int, ...], view: str, dtype: torch.dtype) -> None:
        elements = torch.Size(storage).numel()
        limit = 2 if dtype == torch.bool else 256
        self.whole = torch.randint(0, limit, (elements * dtype.itemsize,), dtype=torch.uint8).view(dtype)
        self.tensor = eval(f"whole{view}", {"whole": self.whole.reshape(storage)})
        inside = torch.as_strided(
            torch.arange(elements), self.tensor.shape, self.tensor.stride(), self.tensor.storage_offset()
        )
        self.outside = torch.ones(elements, dtype=torch.bool)
        self.outside[inside.flatten()] = False
        self.before = self.tensor.clone()
        self.whole_before = self.whole.clone()

    def check_outside(self) -> None:
        assert torch.equal(to_bytes(self.whole[self.outside]), to_bytes(self.whole_before[self.outside]))

    def check_unchanged(self) -> None:
        assert torch.equal(to_bytes(self.whole), to_bytes(self.whole_before))

    def check_moved(self, index: torch.Tensor, count: torch.Tensor, token_dim: int = 1) -> None:
        after, before = self.tensor.transpose(1, token_dim), self.before.transpose(1, token_dim)
        for b in range(index.shape[0]):
            if index.dim() == 2:
                kept = index[b, : count[b]].long()
                assert torch.equal(to_bytes(after[b, : len(kept)]), to_bytes(before[b][kept]))
                continue
            for h in range(index.shape[1]):
                kept = index[b, h, : count[b, h]].long()
                assert torch.equal(to_bytes(after[b, : len(kept), h]), to_bytes(before[b, :, h][kept]))
        self.check_outside()


def make_cache(layout: str, batch: int, tokens: int, heads: int, width: int, dtype: torch.dtype) -> Buffer:
    """(batch, tokens, heads, width), laid out in one way or another."""
    storage, view = {
        "tokens": ((batch, tokens, heads, width), ""),
        "heads": ((batch, heads, tokens, width), ".transpose(1, 2)"),
        "interleaved": ((batch, tokens, heads, 2, width), "[..., 1, :]"),
        "padded": ((batch + 2, tokens + 2, heads + 2, width + 2), "[1:-1, 1:-1, 1:-1, 1:-1]"),
        "reversed": ((width, heads, tokens, batch), ".permute(3, 2, 1, 0)"),
    }[layout]
    return Buffer(storage, view, dtype)


def kept_rows(kind: str, tokens: int) -> torch.Tensor:
    if kind == "random":
        return (torch.rand(tokens) < 0.35).nonzero().flatten()
    if kind == "all":
        return torch.arange(tokens)
    if kind == "none":
        return torch.arange(0)
    if kind == "first":
        return torch.arange(tokens // 2)
    if kind == "last":
        return torch.arange(tokens - tokens // 3, tokens)
    if kind == "alternating":
        return torch.arange(1, tokens, 2)
    return ((torch.arange(tokens) // 5) % 2 == 1).nonzero().flatten()


def make_index(
    kind: str, shape: tuple[int, ...], tokens: int, spare: int = 3
) -> tuple[torch.Tensor, torch.Tensor]:
    """Index (*shape, M) and count (*shape); what stands past count is poison."""
    rows = [kept_rows(kind, tokens) for _ in range(torch.Size(shape).numel())]
    slots = max((len(row) for row in rows), default=0) + spare
    index = torch.full((len(rows), slots), 2**31 - 1, dtype=torch.int32)
    index[:, 1::2] = -(2**31)
    for i, row in enumerate(rows):
        index[i, : len(row)] = row.int()
    count = torch.tensor([len(row) for row in rows], dtype=torch.int32)
    return index.reshape(*shape, slots), count.reshape(shape)


@st.composite
def cases(draw: st.DrawFn) -> dict[str, object]:
    return {
        "batch": draw(st.integers(1, 3)),
        "tokens": draw(st.sampled_from([0, 1, 2, 15, 16, 17, 63, 64, 65, 130])),
        "heads": draw(st.integers(1, 4)),
        "width": draw(st.sampled_from([0, 1, 3, 4, 8, 10, 33])),
        "dtype": draw(st.sampled_from(DTYPES)),
        "key_layout": draw(st.sampled_from(LAYOUTS)),
        "value_layout": draw(st.sampled_from(LAYOUTS)),
        "kind": draw(st.sampled_from(INDEX_KINDS)),
        "per_head": draw(st.booleans()),
        "seed": draw(st.integers(0, 2**31)),
    }


@every_backend
@given(case=cases())
def test_matches_lists_of_rows(backend: Backend, case: dict[str, object]) -> None:
    torch.manual_seed(case["seed"])
    shape = case["batch"], case["tokens"], case["heads"], case["width"], case["dtype"]
    key, value = make_cache(case["key_layout"], *shape), make_cache(case["value_layout"], *shape)
    rows = (case["batch"], case["heads"]) if case["per_head"] else (case["batch"],)
    index, count = make_index(case["kind"], rows, case["tokens"])
    index_before, count_before = index.clone(), count.clone()
    assert backend.compact_kv_(key.tensor, value.tensor, index, count) is None
    key.check_moved(index, count)
    value.check_moved(index, count)
    assert torch.equal(index, index_before)
    assert torch.equal(count, count_before)


@native_backend
@pytest.mark.parametrize("tokens", [255, 256, 257, 1023, 1024, 1025, 3000])
@pytest.mark.parametrize("kind", INDEX_KINDS)
def test_long_caches(backend: Backend, tokens: int, kind: str) -> None:
    for layout, heads, width in (("tokens", 2, 64), ("heads", 3, 16)):
        key = make_cache(layout, 1, tokens, heads, width, torch.bfloat16)
        value = make_cache(layout, 1, tokens, heads, width, torch.bfloat16)
        index, count = make_index(kind, (1,), tokens)
        backend.compact_kv_(key.tensor, value.tensor, index, count)
        key.check_moved(index, count)
        value.check_moved(index, count)


@native_backend
def test_many_chains(backend: Backend) -> None:
    """More blocks than a device takes at once: the kernel's smaller ring."""
    key = make_cache("heads", 2, 150, 170, 3, torch.bfloat16)
    value = make_cache("heads", 2, 150, 170, 16, torch.bfloat16)
    index, count = make_index("random", (2, 170), 150)
    backend.compact_kv_(key.tensor, value.tensor, index, count)
    key.check_moved(index, count)
    value.check_moved(index, count)


@native_backend
@pytest.mark.parametrize("prefix", [2047, 2048, 2049, 4096, 4500])
def test_long_prefixes_that_stay(backend: Backend, prefix: int) -> None:
    key, value = (make_cache("tokens", 1, 5000, 1, 8, torch.float16) for _ in range(2))
    moving = torch.arange(prefix + 3, 5000, 2)
    index = torch.cat([torch.arange(prefix), moving]).int()[None]
    for length in (index.shape[1], prefix):
        count = torch.tensor([length], dtype=torch.int32)
        backend.compact_kv_(key.tensor, value.tensor, index, count)
        key.check_moved(index, count)
        value.check_moved(index, count)
        key.before, value.before = key.tensor.clone(), value.tensor.clone()


@device_backend
def test_bad_entries_in_prefixes_that_seem_to_stay_are_found(backend: Backend) -> None:
    lightvlm_ext.device_errors()
    for wrong, message in ((7, "ascending"), (-1, "outside"), (2900, "outside")):
        key, value = (make_cache("tokens", 1, 2900, 1, 2, torch.float32) for _ in range(2))
        index = torch.arange(2900, dtype=torch.int32)[None].clone()
        index[0, 1000] = wrong
        backend.compact_kv_(key.tensor, value.tensor, index, torch.tensor([2900], dtype=torch.int32))
        assert message in "".join(lightvlm_ext.device_errors())
        key.check_unchanged()


def test_large_moves_past_the_caches() -> None:
    """From 16 MiB on the CPU twin stores past its caches where rows lie on whole lines."""
    whole = torch.randint(0, 2**62, (2, 1, 30000, 128)).view(torch.bfloat16)
    for view in (whole, whole.view(2, 1, 4, 30000, 128).transpose(2, 3), whole[..., 1:-1]):
        index, count = make_index("random", (1,), 30000)
        kept = index[0, : count[0]].long()
        key, value = (
            v if v.dim() == 4 else v[:, :, None] for v in view.clone(memory_format=torch.preserve_format)
        )
        expected = key[:, kept], value[:, kept]
        ops.compact_kv_(key, value, index, count)
        assert torch.equal(to_bytes(key[:, : len(kept)]), to_bytes(expected[0]))
        assert torch.equal(to_bytes(value[:, : len(kept)]), to_bytes(expected[1]))


@every_backend
def test_layers_move_together(backend: Backend) -> None:
    layers = [
        (7, 2, 8, torch.float32),
        (130, 4, 16, torch.bfloat16),
        (0, 1, 4, torch.uint8),
        (65, 3, 5, torch.float64),
    ]
    keys = [make_cache("tokens", 2, n, h, d, t) for n, h, d, t in layers]
    values = [make_cache("heads", 2, n, h, 2 * d, t) for n, h, d, t in layers]
    chosen = [
        make_index("random", (2, h) if i % 2 else (2,), n, spare=i) for i, (n, h, _, _) in enumerate(layers)
    ]
    backend.compact_kv_(
        [k.tensor for k in keys],
        tuple(v.tensor for v in values),
        [index for index, _ in chosen],
        [count for _, count in chosen],
    )
    for key, value, (index, count) in zip(keys, values, chosen, strict=True):
        key.check_moved(index, count)
        value.check_moved(index, count)


@native_backend
def test_more_layers_than_one_launch_holds(backend: Backend) -> None:
    for layers in (1, 16, 17, 56, 57, 128, 129, 200):
        keys = [make_cache("tokens", 1, 9, 1, 4, torch.float32) for _ in range(layers)]
        values = [make_cache("tokens", 1, 9, 1, 4, torch.float32) for _ in range(layers)]
        chosen = [make_index("random", (1,), 9) for _ in range(layers)]
        index, count = zip(*chosen, strict=True)
        backend.compact_kv_([k.tensor for k in keys], [v.tensor for v in values], index, count)
        for cache in (keys, values):
            for buffer, (i, c) in zip(cache, chosen, strict=True):
                buffer.check_moved(i, c)


@every_backend
def test_no_layers_and_no_rows(backend: Backend) -> None:
    backend.compact_kv_([], [], [], [])
    empty = torch.empty(0, 4, 2, 8)
    none = torch.empty(0, 0, dtype=torch.int32)
    backend.compact_kv_(
        empty, empty, none, none[:, 0] if none.shape[1] else torch.empty(0, dtype=torch.int32)
    )
    key, value = torch.randn(2, 4, 1, 3), torch.randn(2, 4, 1, 3)
    before = key.clone()
    backend.compact_kv_(key, value, torch.empty(2, 0, dtype=torch.int32), torch.zeros(2, dtype=torch.int32))
    assert torch.equal(key, before)


@every_backend
def test_rows_that_stay_are_not_touched(backend: Backend) -> None:
    """Keeping everything leaves every byte, also past count of a row that keeps its first tokens."""
    for kind in ("all", "first", "none"):
        key = make_cache("tokens", 2, 70, 2, 9, torch.float16)
        value = make_cache("heads", 2, 70, 2, 9, torch.float16)
        index, count = make_index(kind, (2,), 70)
        backend.compact_kv_(key.tensor, value.tensor, index, count)
        key.check_unchanged()
        value.check_unchanged()


@every_backend
@pytest.mark.parametrize("per_head", [False, True])
def test_extras_move_alike(backend: Backend, per_head: bool) -> None:
    batch, tokens, heads = 2, 50, 3
    key = make_cache("tokens", batch, tokens, heads, 8, torch.float16)
    value = make_cache("tokens", batch, tokens, heads, 8, torch.float16)
    by_head = [
        Buffer((batch, heads, tokens), "", torch.float32),
        Buffer((batch, heads, tokens, 5), "", torch.uint8),
        Buffer((batch, heads, tokens, 2, 3), "[..., 0, :2]", torch.uint8),
        Buffer((tokens, heads, batch), ".permute(2, 1, 0)", torch.int64),
    ]
    by_token = [
        Buffer((batch, tokens), "", torch.float32),
        Buffer((batch, tokens, 3), "", torch.int64),
        Buffer((3, tokens, batch, 2, 2), ".permute(2, 1, 4, 0, 3)", torch.int16),
    ]
    with_heads_last = [Buffer((batch, tokens, heads, 2), "", torch.bfloat16)]
    extras = by_head + with_heads_last + ([] if per_head else by_token)
    index, count = make_index("random", (batch, heads) if per_head else (batch,), tokens)
    backend.compact_kv_(key.tensor, value.tensor, index, count, extras=[e.tensor for e in extras])
    key.check_moved(index, count)
    value.check_moved(index, count)
    for extra in extras:
        extra.check_moved(index, count, token_dim=2 if extra in by_head else 1)


@every_backend
def test_extras_of_layers(backend: Backend) -> None:
    keys = [make_cache("tokens", 1, 20, 2, 4, torch.float32) for _ in range(3)]
    values = [make_cache("tokens", 1, 20, 2, 4, torch.float32) for _ in range(3)]
    scores = [Buffer((1, 20), "", torch.float32) for _ in range(3)]
    positions = Buffer((1, 20, 3), "", torch.int32)
    chosen = [make_index("random", (1,), 20) for _ in range(3)]
    index, count = (list(part) for part in zip(*chosen, strict=True))
    extras = [scores[0].tensor, (), [scores[2].tensor, positions.tensor]]
    backend.compact_kv_([k.tensor for k in keys], [v.tensor for v in values], index, count, extras=extras)
    for buffer, layer in ((scores[0], 0), (scores[2], 2), (positions, 2)):
        buffer.check_moved(*chosen[layer])
    scores[1].check_unchanged()


@every_backend
def test_shapes_that_two_readings_fit(backend: Backend) -> None:
    """Tokens as many as heads: an index per head reads (B, Hkv, N), one for all heads (B, N, ...)."""
    key, value = torch.randn(1, 3, 3, 2), torch.randn(1, 3, 3, 2)
    extra = torch.arange(9).reshape(1, 3, 3)
    backend.compact_kv_(
        key.clone(), value.clone(), torch.tensor([[2]], dtype=torch.int32), torch.tensor([1], dtype=torch.int32),
        extras=[extra],
    )  # fmt: skip
    assert extra[0, 0].tolist() == [6, 7, 8]
    extra = torch.arange(9).reshape(1, 3, 3)
    index = torch.tensor([[[2], [1], [0]]], dtype=torch.int32)
    backend.compact_kv_(key, value, index, torch.ones(1, 3, dtype=torch.int32), extras=[extra])
    assert extra[0, :, 0].tolist() == [2, 4, 6]


@every_backend
def test_strided_indexes(backend: Backend) -> None:
    key = make_cache("tokens", 2, 40, 3, 4, torch.float32)
    value = make_cache("tokens", 2, 40, 3, 4, torch.float32)
    index, count = make_index("random", (2, 3), 40)
    wide = torch.stack([index, index], dim=3)[..., 1]
    backend.compact_kv_(key.tensor, value.tensor, wide, count.T.contiguous().T)
    key.check_moved(index, count)
    # One row of indexes for the whole batch.
    key = make_cache("tokens", 2, 40, 3, 4, torch.float32)
    value = make_cache("tokens", 2, 40, 3, 4, torch.float32)
    index, count = make_index("random", (1,), 40)
    backend.compact_kv_(key.tensor, value.tensor, index.expand(2, -1), count.expand(2))
    key.check_moved(index.repeat(2, 1), count.repeat(2))


@every_backend
def test_views_of_one_buffer_may_interleave(backend: Backend) -> None:
    both = Buffer((2, 33, 2, 2, 6), "", torch.float16)
    index, count = make_index("random", (2,), 33)
    backend.compact_kv_(both.tensor[:, :, 0], both.tensor[:, :, 1], index, count)
    both.check_moved(index, count)
    layers = Buffer((2, 33, 4, 3, 8), "", torch.float16)
    views = layers.tensor.unbind(2)
    index, count = make_index("random", (2, 3), 33)
    backend.compact_kv_(views[:2], views[2:], [index, index], [count, count])
    for layer in range(4):
        for b in range(2):
            for h in range(3):
                kept = index[b, h, : count[b, h]].long()
                moved = layers.tensor[b, : len(kept), layer, h]
                assert torch.equal(to_bytes(moved), to_bytes(layers.before[b, kept, layer, h]))


def index_of(*rows: list[int]) -> tuple[torch.Tensor, torch.Tensor]:
    return torch.tensor(rows, dtype=torch.int32), torch.tensor([len(r) for r in rows], dtype=torch.int32)


@every_backend
def test_shared_memory_is_refused(backend: Backend) -> None:
    index, count = index_of([1, 3])
    buffer = torch.arange(400.0)
    before = buffer.clone()
    a = buffer[:80].view(1, 10, 2, 4)
    cases = [
        (a, a),
        (a, buffer[79:159].view(1, 10, 2, 4)),
        (
            buffer.as_strided((1, 10, 2, 4), (400, 16, 8, 1)),
            buffer.as_strided((1, 10, 2, 4), (400, 16, 8, 1), 7),
        ),
        (torch.zeros(1, 10, 2, 4), buffer[:8].view(1, 1, 2, 4).expand(1, 10, 2, 4)),
        (torch.zeros(1, 10, 2, 4), buffer.as_strided((1, 10, 2, 4), (400, 4, 4, 1))),
        (torch.zeros(1, 10, 2, 4), buffer.as_strided((1, 10, 2, 4), (400, 8, 3, 1))),
    ]
    for key, value in cases:
        with pytest.raises(ValueError, match=r"(key|value)_cache.*share memory"):
            backend.compact_kv_(key, value, index, count)
    with pytest.raises(ValueError, match="share memory"):
        backend.compact_kv_(a, torch.zeros_like(a), index, count, extras=[a[..., 0]])
    with pytest.raises(ValueError, match="share memory"):
        backend.compact_kv_([a, a + 1], [a + 2, a], [index] * 2, [count] * 2)
    indices = torch.arange(10, dtype=torch.int32).view(1, 10)
    with pytest.raises(ValueError, match="share memory"):
        backend.compact_kv_(a + 1, a + 2, indices, torch.tensor([10], dtype=torch.int32), extras=[indices])
    assert torch.equal(buffer, before)
    # Just not overlapping.
    backend.compact_kv_(a, buffer[80:160].view(1, 10, 2, 4), index, count)
    striped = (
        buffer.as_strided((1, 10, 2, 4), (400, 16, 8, 1)),
        buffer.as_strided((1, 10, 2, 4), (400, 16, 8, 1), 4),
    )
    backend.compact_kv_(*striped, index, count)


@given(data=st.data())
def test_overlap_is_found_exactly(data: st.DataObject) -> None:
    """The solver against a list of all addresses (the reference)."""
    dims = st.lists(st.integers(0, 12), min_size=4, max_size=4)
    buffer = torch.zeros(600, dtype=torch.uint8)
    views = []
    for name in ("key", "value"):
        size = (
            (1, data.draw(st.integers(1, 4)), 2, data.draw(st.integers(1, 3)))
            if not views
            else views[0].shape
        )
        dtype = data.draw(st.sampled_from([torch.uint8, torch.int16]), label=name)
        view = buffer.view(dtype).as_strided(size, data.draw(dims), data.draw(st.integers(0, 40)))
        views.append(view)
    index, count = torch.zeros(1, 1, dtype=torch.int32), torch.zeros(1, dtype=torch.int32)

    def refused(backend: Backend) -> bool:
        try:
            backend.compact_kv_(*views, index, count)
        except ValueError:
            return True
        return False

    assert refused(CPU) == refused(REFERENCE)


BAD_VALUES = [
    ([1, 1], "index.*ascending"),
    ([3, 2], "index.*ascending"),
    ([0, 5, 4, 7], "index.*ascending"),
    ([-1, 2], "index.*outside"),
    ([1, 6, 8], "index.*outside"),
    ([2**31 - 1], "index.*outside"),
]
RAISING = pytest.mark.parametrize("backend", [REFERENCE, CPU], ids=str)


@RAISING
@pytest.mark.parametrize(("row", "message"), BAD_VALUES)
@pytest.mark.parametrize("per_head", [False, True])
def test_bad_index_raises_before_anything_moves(
    backend: Backend, row: list[int], message: str, per_head: bool
) -> None:
    """The bad row is the last one of the last layer."""
    keys = [make_cache("tokens", 2, 8, 2, 3, torch.float32) for _ in range(2)]
    values = [make_cache("heads", 2, 8, 2, 3, torch.float32) for _ in range(2)]
    index, count = make_index("last", (2, 2) if per_head else (2,), 8, spare=6)
    bad_index, bad_count = index.clone(), count.clone()
    bad_index.view(-1, index.shape[-1])[-1, : len(row)] = torch.tensor(row)
    bad_count.view(-1)[-1] = len(row)
    arguments = [k.tensor for k in keys], [v.tensor for v in values], [index, bad_index], [count, bad_count]
    with pytest.raises(ValueError, match=message):
        backend.compact_kv_(*arguments)
    for buffer in (*keys, *values):
        buffer.check_unchanged()


@RAISING
@pytest.mark.parametrize("wrong", [-1, 5, 2**31 - 1])
def test_bad_count_raises(backend: Backend, wrong: int) -> None:
    key, value = (
        make_cache("tokens", 2, 8, 2, 3, torch.float32),
        make_cache("tokens", 2, 8, 2, 3, torch.float32),
    )
    index = torch.arange(4, 8, dtype=torch.int32).repeat(2, 1)
    with pytest.raises(ValueError, match="count"):
        backend.compact_kv_(key.tensor, value.tensor, index, torch.tensor([4, wrong], dtype=torch.int32))
    key.check_unchanged()
    with pytest.raises(ValueError, match="index"):
        backend.compact_kv_(
            key.tensor[:, :0], value.tensor[:, :0], index, torch.tensor([0, 1], dtype=torch.int32)
        )


def test_the_place_of_a_bad_index_is_named() -> None:
    caches = [torch.zeros(3, 9, 2, 4) for _ in range(4)]
    index = torch.arange(5, dtype=torch.int32).expand(3, 2, 5).clone()
    count = torch.full((3, 2), 5, dtype=torch.int32)
    bad = index.clone()
    bad[2, 1, 3] = 2
    with pytest.raises(ValueError, match=r"layer 1, row 2, head 1, position 3, got 2; 9 tokens, 5 slots"):
        ops.compact_kv_(caches[:2], caches[2:], [index, bad], [count, count])


@device_backend
def test_bad_values_do_not_move_on_a_device(backend: Backend, monkeypatch: pytest.MonkeyPatch) -> None:
    lightvlm_ext.device_errors()

    def run(*rows: list[int], tokens: int = 10, slots: int = 5) -> list[list[float]]:
        index = torch.full((len(rows), slots), -1, dtype=torch.int32)
        for b, row in enumerate(rows):
            index[b, : len(row)] = torch.tensor(row)
        key = torch.arange(float(tokens)).repeat(len(rows), 1).reshape(-1, tokens, 1, 1)
        value = key + 100
        backend.compact_kv_(key, value, index, torch.tensor([len(r) for r in rows], dtype=torch.int32))
        assert torch.equal(value, key + 100)
        return key[..., 0, 0].tolist()

    # The slot of an offending entry stays as it is, the others of its row and the other rows move.
    assert [row[:3] for row in run([2, -4, 6], [7, 8])] == [[2, 1, 6], [7, 8, 2]]
    assert run([2, 6, 12])[0][:3] == [2, 6, 2]
    assert all("index" in e and "outside" in e for e in lightvlm_ext.device_errors())
    # 3 comes after 5, and row 4 may have been overwritten when its turn comes.
    assert run([5, 3, 9, 4, 8])[0][:5] == [5, 1, 9, 3, 8]
    assert "ascending" in "".join(lightvlm_ext.device_errors())
    # A count that is out of range moves nothing of its row.
    key, value = torch.arange(6.0).repeat(3, 1).reshape(3, 6, 1, 1), torch.zeros(3, 6, 1, 1)
    index = torch.tensor([[4, 5]] * 3, dtype=torch.int32)
    backend.compact_kv_(key, value, index, torch.tensor([3, 1, -1], dtype=torch.int32))
    assert key[..., 0, 0].tolist() == [[0, 1, 2, 3, 4, 5], [4, 1, 2, 3, 4, 5], [0, 1, 2, 3, 4, 5]]
    assert "count" in "".join(lightvlm_ext.device_errors())
    monkeypatch.setenv("LIGHTVLM_CHECK", "1")
    with pytest.raises(ValueError, match="count"):
        backend.compact_kv_(key, value, index, torch.tensor([3, 1, 1], dtype=torch.int32))
    assert lightvlm_ext.device_errors() == []


K, V = torch.zeros(2, 6, 3, 4), torch.zeros(2, 6, 3, 4)
I, C = index_of([1, 2], [3, 4])  # noqa: E741
BAD_ARGUMENTS = [
    ((None, V, I, C), TypeError, "key_cache: got NoneType"),
    ((K, [V], I, C), TypeError, "value_cache: got list"),
    ((K[0], V, I, C), ValueError, r"key_cache: has shape \(6, 3, 4\), must be \(B, N, Hkv, D\)"),
    ((K, V[:, :5], I, C), ValueError, r"value_cache: has shape .*, must be \(2, 6, 3, D\)"),
    ((K, V, I.long(), C), TypeError, "index: has dtype int64, must be int32"),
    ((K, V, I[:1], C), ValueError, r"index: has shape \(1, 2\), must be \(2, M\)"),
    ((K, V, I[0], C), ValueError, r"index: has shape \(2,\), must be \(2, M\)"),
    ((K, V, I, C.long()), TypeError, "count: has dtype int64"),
    ((K, V, I, C[:1]), ValueError, r"count: has shape \(1,\), must be \(2,\)"),
    ((K, V, I[:, None], C), ValueError, r"index: has shape \(2, 1, 2\), must be \(2, 3, M\)"),
    ((K, V, I[:, None].expand(2, 3, 2), C), ValueError, r"count: has shape \(2,\), must be \(2, 3\)"),
    (([K], V, [I], [C]), TypeError, "value_cache: got Tensor"),
    (([K], [V, V], [I], [C]), ValueError, "value_cache: has 2 entries, must have 1"),
    (([K], [V], [I], []), ValueError, "count: has 0 entries, must have 1"),
    (([K, K + 1], [V, V + 1], [I, I[:1]], [C, C]), ValueError, r"index\[1\]: has shape"),
    (([K, None], [V, V + 1], [I, I], [C, C]), TypeError, r"key_cache\[1\]: got NoneType"),
]
BAD_EXTRAS = [
    (torch.zeros(2, 6), I, TypeError, "extras: got Tensor"),
    ([None], I, TypeError, r"extras\[0\]: got NoneType"),
    ([torch.zeros(2, 5)], I, ValueError, r"extras\[0\]: has shape \(2, 5\), must be \(2, 6, ...\)"),
    ([torch.zeros(2, 6), torch.zeros(6)], I, ValueError, r"extras\[1\]"),
    ([torch.zeros(2, 6, 5)], I[:, None].expand(2, 3, 2), ValueError, "with an index per head"),
]


@every_backend
@pytest.mark.parametrize(("arguments", "error", "message"), BAD_ARGUMENTS)
def test_bad_arguments(
    backend: Backend, arguments: tuple[object, ...], error: type[Exception], message: str
) -> None:
    with pytest.raises(error, match=message):
        backend.compact_kv_(*arguments)


@every_backend
@pytest.mark.parametrize(("extras", "index", "error", "message"), BAD_EXTRAS)
def test_bad_extras(
    backend: Backend, extras: object, index: torch.Tensor, error: type[Exception], message: str
) -> None:
    count = torch.ones(index.shape[:-1], dtype=torch.int32)
    with pytest.raises(error, match=message):
        backend.compact_kv_(K, V, index, count, extras=extras)
    with pytest.raises(ValueError, match="extras: has 2 entries, must have one for each of the 1 layers"):
        backend.compact_kv_([K], [V], [I], [C], extras=[[], []])


@native_backend
def test_raw_op_calls_are_checked(backend: Backend) -> None:
    """What memory safety needs is checked again in C++."""
    op = backend.raw("compact_kv")
    good = ([K, V], [0, 0], [1, 1], [I], [C], None)
    op(*good)
    bad = [
        (0, [K, V[:, :5]]), (0, [K, V[:1]]), (0, [K, torch.zeros(2)]), (1, [0]), (1, [0, 1]), (1, [0, -1]),
        (2, [1, 0]), (2, [1, 3]), (3, [I.long()]), (3, [I[0]]), (3, []), (4, [C[:1]]), (4, [C.float()]),
        (3, [torch.stack([I, I], dim=2)[..., 0]]), (3, [I[:, None]]), (0, [K, K]),
    ]  # fmt: skip
    for position, value in bad:
        arguments = list(good)
        arguments[position] = value
        with pytest.raises((ValueError, RuntimeError)):
            op(*arguments)


def test_result_does_not_depend_on_threads() -> None:
    threads = torch.get_num_threads()
    start = torch.randint(0, 256, (2, 1, 3000, 3, 256), dtype=torch.uint8)
    index, count = make_index("random", (1,), 3000)
    results = []
    try:
        for number in (1, 2, 3, 5):
            torch.set_num_threads(number)
            caches = start.clone()
            ops.compact_kv_(caches[0], caches[1], index, count)
            results.append(caches)
    finally:
        torch.set_num_threads(threads)
    for caches in results[1:]:
        assert torch.equal(caches, results[0])


def test_opcheck() -> None:
    _library.load()
    both = torch.randn(2, 9, 2, 2, 4)
    index, count = make_index("random", (2,), 9)
    arguments = (
        [both[:, :, 0], both[:, :, 1], torch.randn(2, 9)],
        [0, 0, 0],
        [1, 1, 1],
        [index],
        [count],
        None,
    )
    torch.library.opcheck(torch.ops.lightvlm.compact_kv.default, arguments)
    layers = [torch.randn(1, 2, 9, 4).transpose(1, 2) for _ in range(4)]
    index, count = make_index("random", (1, 2), 9)
    arguments = (layers, [0, 0, 1, 1], [1] * 4, [index, index], [count, count], None)
    torch.library.opcheck(torch.ops.lightvlm.compact_kv.default, arguments)


def test_fake_tensors_and_compile() -> None:
    def step(
        key: torch.Tensor, value: torch.Tensor, index: torch.Tensor, count: torch.Tensor
    ) -> torch.Tensor:
        ops.compact_kv_(key, value, index, count)
        return key[:, :2] + value[:, :2]

    index, count = index_of([1, 4], [0, 2])
    key, value = torch.randn(2, 5, 1, 3), torch.randn(2, 5, 1, 3)
    expected = step(key.clone(), value.clone(), index, count)
    compiled = torch.compile(step, backend="eager", fullgraph=True)
    assert torch.equal(compiled(key, value, index, count), expected)


MEMORY_PROGRAM = """
import torch
from lightvlm_ext import ops

def peak():
    with open("/proc/self/status") as status:
        return next(int(line.split()[1]) for line in status if line.startswith("VmHWM"))

layers, tokens = 4, 16384
storage = torch.zeros(layers, 2, 1, 4, tokens, 128, dtype=torch.bfloat16)  # 128 MiB
keys = [storage[i, 0].transpose(1, 2) for i in range(layers)]
values = [storage[i, 1].transpose(1, 2) for i in range(layers)]
kept = (torch.rand(tokens) < 0.35).nonzero().flatten().int()[None]
count = torch.tensor([kept.shape[1]], dtype=torch.int32)
few = [t[:, :64] for t in keys], [t[:, :64] for t in values]
zero = torch.zeros(1, 1, dtype=torch.int32)
ops.compact_kv_(*few, [zero] * layers, [zero[0] + 1] * layers)   # loads the library, starts the threads
storage.add_(1)                                               # every page is there
before = peak()
for _ in range(3):
    ops.compact_kv_(keys, values, [kept] * layers, [count] * layers)
print(peak() - before)
"""


def test_peak_memory_hardly_grows() -> None:
    """128 MiB of caches compacted; the peak resident size grows by less than 1 MB."""
    done = subprocess.run([sys.executable, "-c", MEMORY_PROGRAM], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert int(done.stdout) * 1024 < 1_000_000
