"""compact_kv_: what is wrong raises, or stays where it is, before anything moves."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from ops.backends import BACKENDS, CPU, NATIVE, REFERENCE, Backend

import lightvlm_ext
from lightvlm_ext import ops
from tests.ops.compaction import index_of, make_cache, make_index

every_backend = pytest.mark.parametrize("backend", BACKENDS, ids=str)
native_backend = pytest.mark.parametrize("backend", NATIVE, ids=str)
device_backend = pytest.mark.parametrize("backend", [b for b in NATIVE if b.is_device], ids=str)


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
