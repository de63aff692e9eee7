"""compact_kv_: every tier against lists of rows; layouts, index sets, and what must not change."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from ops.backends import BACKENDS, NATIVE, Backend

from lightvlm_ext import _library, ops
from tests.ops.compaction import (
    DTYPES,
    INDEX_KINDS,
    LAYOUTS,
    Buffer,
    index_of,
    make_cache,
    make_index,
    to_bytes,
)

ROOT = Path(__file__).resolve().parents[2]
every_backend = pytest.mark.parametrize("backend", BACKENDS, ids=str)
native_backend = pytest.mark.parametrize("backend", NATIVE, ids=str)


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
