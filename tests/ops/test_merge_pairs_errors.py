"""merge_pairs: what it refuses, and how; schema and fake kernel."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch

import lightvlm_ext
from lightvlm_ext import _library, ops
from tests.ops.backends import BACKENDS, CPU, EMULATED, NATIVE, REFERENCE, Backend, load_emulation

every_backend = pytest.mark.parametrize("backend", BACKENDS, ids=str)
X = torch.randn(2, 6, 4)
W = torch.zeros(2, 6, dtype=torch.int32)
BAD_ARGUMENTS: list[tuple[tuple[Any, ...], dict[str, Any], type[Exception], str]] = [
    ((None, W), {}, TypeError, "x: got NoneType"),
    ((X.int(), W), {}, TypeError, "x: has dtype int32, must be float32 or float16 or bfloat16"),
    ((X[0], W), {}, ValueError, r"x: has shape \(6, 4\), must be \(R, N, C\)"),
    ((X, W.long()), {}, TypeError, "window: has dtype int64, must be int32"),
    ((X, W[:, :5]), {}, ValueError, r"window: has shape \(2, 5\), must be \(2, 6\)"),
    ((X, W.to("meta")), {}, ValueError, "window: is on meta, must be on cpu as x"),
    ((X, W), {"merge": None}, TypeError, "merge: got NoneType, must be an int"),
    ((X, W), {"merge": True}, TypeError, "merge: got bool"),
    ((X, W), {"merge": -1}, ValueError, "merge: got -1, must be >= 0"),
    ((X, W), {"merge": 1.5}, ValueError, r"merge: got 1.5, a share must be in \[0, 1\]"),
    ((X, W), {"merge": math.nan}, ValueError, "merge: got nan"),
    ((X, W), {"merge": W.long()}, TypeError, "merge: has dtype int64"),
    ((X, W), {"merge": W[:1, 0]}, ValueError, r"merge: has shape \(1,\), must be \(2,\)"),
    ((X, W), {"merge": W[:1]}, ValueError, r"merge: has shape \(1, 6\), must be \(2, G\)"),
    ((X, W), {"weight": X[..., 0].half()}, TypeError, "weight: has dtype float16"),
    ((X, W), {"weight": X[:, :5, 0]}, ValueError, "weight: has shape"),
    ((X, W), {"metric": X[:1]}, ValueError, r"metric: has shape .*, must be \(2, 6, Cm\)"),
    ((X, W), {"metric": X.int()}, TypeError, "metric: has dtype int32"),
    ((X, W), {"source": W}, TypeError, "source: has dtype int32, must be bool"),
    ((X, W), {"source": W[:1].bool()}, ValueError, "source: has shape"),
    ((X, W), {"protected": W}, TypeError, "protected: has dtype int32, must be bool"),
    ((X, W), {"eps": -1.0}, ValueError, "eps: got -1.0, must be >= 0"),
    ((X, W), {"eps": math.inf}, ValueError, "eps: got inf, must be finite"),
    ((X, W), {"align": "middle"}, ValueError, "align: got 'middle'"),
    ((X, W), {"capacity": -1}, ValueError, "capacity: got -1, must be >= 0"),
]


@every_backend
@pytest.mark.parametrize(("arguments", "options", "error", "message"), BAD_ARGUMENTS)
def test_bad_arguments(
    backend: Backend,
    arguments: tuple[Any, ...],
    options: dict[str, Any],
    error: type[Exception],
    message: str,
) -> None:
    with pytest.raises(error, match=message):
        backend.merge_pairs(*arguments, **{"merge": 1, **options})


def ones_with(bad: float) -> torch.Tensor:
    weight = torch.ones(2, 6)
    weight[1, 4] = bad
    return weight


BAD_VALUES: list[tuple[dict[str, Any], str]] = [
    ({"weight": ones_with(-1e-30)}, "weight"),
    ({"weight": ones_with(-1e-45)}, "weight"),
    ({"weight": ones_with(math.nan)}, "weight"),
    ({"weight": ones_with(math.inf)}, "weight"),
    ({"merge": torch.tensor([1, -1], dtype=torch.int32)}, "merge"),
    ({"merge": torch.tensor([0.5, -0.1])}, "merge"),
    ({"merge": torch.tensor([0.5, 1.1])}, "merge"),
    ({"merge": torch.tensor([[0.5], [math.nan]])}, "merge"),
    ({"merge": torch.empty(2, 0)}, "window"),
    ({"capacity": 3}, "capacity"),
]


@pytest.mark.parametrize("backend", [REFERENCE, CPU], ids=str)
@pytest.mark.parametrize(("options", "message"), BAD_VALUES)
def test_bad_values_raise_on_the_cpu(backend: Backend, options: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        backend.merge_pairs(X, W, **{"merge": 1, **options})


@pytest.mark.parametrize(("options", "message"), BAD_VALUES)
def test_bad_values_set_the_device_word(
    options: dict[str, Any], message: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    lightvlm_ext.device_errors()
    call = {"merge": 1, **options}
    result = EMULATED.merge_pairs(X, W, **call)
    found = lightvlm_ext.device_errors()
    assert [error.split(": ")[2] for error in found] == [message]
    if message == "weight":  # a bad weight is 0
        expected = EMULATED.merge_pairs(X, W, merge=1, weight=ones_with(0.0))
        assert torch.equal(result.x, expected.x)
        assert torch.equal(result.weight, expected.weight)
    elif message == "capacity":  # what is over it vanishes
        expected = EMULATED.merge_pairs(X, W, merge=1)
        assert result.selection.count.tolist() == [3, 3]
        assert torch.equal(result.x, expected.x[:, :3])
        assert torch.equal(result.target, expected.target.where(expected.target < 3, -1))
        assert torch.equal(
            result.selection.inverse, expected.selection.inverse.where(expected.target < 3, -1)
        )
    else:  # such a window has no pairs
        assert result.selection.count[1] == 6
        assert torch.equal(result.x[1], X[1])
    monkeypatch.setenv("LIGHTVLM_CHECK", "1")
    with pytest.raises(ValueError, match=message):
        EMULATED.merge_pairs(X, W, **call)
    assert lightvlm_ext.device_errors() == []


def test_numbers_that_no_window_uses_are_not_read() -> None:
    outside = torch.full((2, 6), -1, dtype=torch.int32)
    lightvlm_ext.device_errors()
    for backend in BACKENDS:
        result = backend.merge_pairs(X, outside, merge=torch.tensor([-1, -1], dtype=torch.int32))
        assert torch.equal(result.x, X)
    assert lightvlm_ext.device_errors() == []


def raw_arguments() -> list[Any]:
    """Of lightvlm::merge_pairs, for (X, W)."""
    integers = [torch.empty(2, 6, dtype=torch.int32) for _ in range(3)]
    count = torch.empty(2, dtype=torch.int32)
    return [
        X, X, W, W.bool(), W.bool(), torch.ones(2, 6), None, 1, -1.0, 0.0, False, torch.empty(2, 6, 4), integers[0],
        count, integers[1], integers[2], torch.empty(2, 6), torch.empty(100, dtype=torch.int64), None,
    ]  # fmt: skip


@pytest.mark.parametrize("backend", NATIVE, ids=str)
def test_raw_op_calls_are_checked(backend: Backend) -> None:
    if backend.is_device:
        load_emulation()
    else:
        _library.load()
    op = getattr(torch.ops, "lightvlm_emulated" if backend.is_device else "lightvlm").merge_pairs
    good = raw_arguments()
    good[3] = good[4] = None
    op(*good)
    bad = [
        (0, X[0]), (0, X.double()), (0, X.transpose(1, 2)), (1, X[:, :5]), (1, X.int()), (2, W.long()), (2, W[:1]),
        (3, W), (3, W[:1].bool()), (4, W), (5, W), (5, X[:, :5, 0]), (6, W.long()), (6, W[:1]), (7, -1), (8, 1.5),
        (9, -1.0), (11, torch.empty(2, 4, 4)), (11, torch.empty(2, 6, 4).half()), (12, torch.empty(2, 6)),
        (13, W[:1, 0]), (14, W[:, :5]), (15, W.long()), (16, torch.empty(2, 5)),
    ]  # fmt: skip
    if backend.is_device:
        bad += [
            (17, None),
            (17, good[17][:10]),
            (17, good[17].int()),
            (17, torch.empty(200).view(torch.int64)[1:]),
        ]
    for position, value in bad:
        arguments = list(good)
        arguments[position] = value
        with pytest.raises((ValueError, RuntimeError)):
            op(*arguments)


def test_opcheck() -> None:
    _library.load()
    for position, value in ((0, X), (6, torch.rand(2, 3)), (1, torch.randn(2, 6, 3).half())):
        arguments = raw_arguments()
        arguments[position] = value
        arguments[17] = None
        torch.library.opcheck(torch.ops.lightvlm.merge_pairs.default, tuple(arguments))


def test_fake_tensors() -> None:
    from torch._subclasses.fake_tensor import FakeTensorMode

    _library.load()
    bf16 = X.bfloat16()
    with FakeTensorMode() as mode:
        x = mode.from_tensor(bf16)
        result = ops.merge_pairs(x, mode.from_tensor(W), merge=0.5, capacity=4)
    assert result.x.shape == (2, 4, 4)
    assert result.x.dtype == torch.bfloat16
    assert [tuple(t.shape) for t in result.selection] == [(2, 4), (2,), (2, 6)]
    assert result.target.shape == (2, 6)
    assert result.weight.dtype == torch.float32
