"""compact_paged_kv_: what is wrong raises, or leaves its sequence alone, before anything moves."""

from __future__ import annotations

import re

import pytest
import torch
from ops.backends import BACKENDS, CPU, NATIVE, REFERENCE, Backend

import lightvlm_ext
from tests.ops.paging import SHARED_TABLE, SHARED_USERS, C, I, K, T, V, int32, raw_arguments

every_backend = pytest.mark.parametrize("backend", BACKENDS, ids=str)
native_backend = pytest.mark.parametrize("backend", NATIVE, ids=str)
device_backend = pytest.mark.parametrize("backend", [b for b in NATIVE if b.is_device], ids=str)
raising_backend = pytest.mark.parametrize("backend", [REFERENCE, CPU], ids=str)


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
