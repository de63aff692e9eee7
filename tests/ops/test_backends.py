"""The tier that takes tensors to a device: with copies on the CPU for the device, so that it is tested anywhere."""

from __future__ import annotations

from types import SimpleNamespace

import pytest
import torch

import lightvlm_ext
from lightvlm_ext import reference
from lightvlm_ext._kv import KVSegment
from tests.ops import conftest, moving
from tests.ops.backends import BACKENDS, CPU, CUDA, EMULATED, NATIVE, DeviceBackend, has_cuda
from tests.ops.moving import Transfer

HERE = torch.device("cpu")
COPIED = [DeviceBackend("copied", HERE, CPU), DeviceBackend("copied and emulated", HERE, EMULATED)]
every_copy = pytest.mark.parametrize("backend", COPIED, ids=str)


def keep_all_but_first(tokens: int, slots: int) -> tuple[torch.Tensor, torch.Tensor]:
    index = torch.arange(1, slots + 1, dtype=torch.int32)[None]
    assert slots < tokens
    return index, torch.tensor([slots], dtype=torch.int32)


def test_tensors_keep_strides_offset_and_shared_memory() -> None:
    buffer = torch.arange(60.0)
    key, value = buffer[1:31].view(5, 6).t(), buffer[31:].as_strided((3, 4), (8, 2))
    transfer = Transfer(HERE)
    sent = transfer.there({"pair": [key, value], "segment": KVSegment(key, value), "other": 3, "none": None})
    there_key, there_value = sent["pair"]
    for here, there in ((key, there_key), (value, there_value)):
        assert torch.equal(here, there)
        assert (here.stride(), here.storage_offset()) == (there.stride(), there.storage_offset())
        assert here.data_ptr() != there.data_ptr()
    assert there_value.data_ptr() - there_key.data_ptr() == value.data_ptr() - key.data_ptr()
    assert sent["segment"].key.data_ptr() == there_key.data_ptr()
    assert (sent["segment"].lens, sent["other"], sent["none"]) == (None, 3, None)
    there_key.zero_()
    assert key.sum() > 0
    transfer.write_back()
    assert key.sum() == 0
    assert value.sum() > 0  # of the same buffer


def test_results_come_back_and_stay_views_of_arguments() -> None:
    x = torch.arange(6.0)
    transfer = Transfer(HERE)
    sent = transfer.there(x)
    sent += 1
    same, other = transfer.back((sent[2:], (sent * 2).view(2, 3).t()))
    transfer.write_back()
    assert same.untyped_storage().data_ptr() == x.untyped_storage().data_ptr()
    assert same.tolist() == [3, 4, 5, 6]
    assert other.tolist() == [[2, 8], [4, 10], [6, 12]]
    assert other.stride() == (1, 3)


def test_of_large_storages_only_what_shows_moves(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(moving, "LARGE", 100)
    buffer = torch.arange(60.0)
    rows = buffer.as_strided((2, 3), (40, 1))
    transfer = Transfer(HERE)
    sent = transfer.there(rows)
    assert torch.equal(sent, rows)
    assert (sent.stride(), sent.untyped_storage().nbytes()) == ((40, 1), 240)
    sent += 100
    buffer[10] = -1
    transfer.write_back()
    assert rows.tolist() == [[100, 101, 102], [140, 141, 142]]
    assert buffer[10] == -1


@every_copy
def test_functions_return_what_the_op_returns(backend: DeviceBackend) -> None:
    scores = torch.rand(2, 33)
    found, wanted = backend.select(scores, keep=7), reference.select(scores, keep=7)
    assert type(found) is type(wanted)
    assert all(torch.equal(a, b) for a, b in zip(found, wanted, strict=True))


@every_copy
def test_writes_in_place_come_back(backend: DeviceBackend) -> None:
    storage = torch.randn(1, 2, 9, 4)
    key, value = storage.transpose(1, 2), torch.randn(1, 9, 2, 4)
    index, count = keep_all_but_first(9, 5)
    wanted = key[:, 1:6].clone(), value[:, 1:6].clone()
    backend.compact_kv_([key], [value], [index], [count])
    assert torch.equal(key[:, :5], wanted[0])
    assert torch.equal(value[:, :5], wanted[1])


@every_copy
def test_errors_come_through_and_nothing_is_touched(backend: DeviceBackend) -> None:
    key = torch.randn(1, 9, 2, 4)
    index, count = keep_all_but_first(9, 5)
    before = key.clone()
    with pytest.raises(ValueError, match="share memory"):
        backend.compact_kv_(key, key, index, count)
    assert torch.equal(key, before)


def test_the_inner_tier_runs() -> None:
    assert not lightvlm_ext.device_errors()
    scores = torch.tensor([[1.0, torch.inf]])
    COPIED[1].select(scores, mass=0.5)
    assert "+inf" in "".join(lightvlm_ext.device_errors())  # a kernel's way to say it
    with pytest.raises(ValueError, match="inf"):
        COPIED[0].select(scores, mass=0.5)


def test_raw_ops_move_too() -> None:
    key, value = torch.randn(1, 9, 2, 4), torch.randn(1, 9, 2, 4)
    index, count = keep_all_but_first(9, 5)
    wanted = key[:, 1:6].clone()
    DeviceBackend("copied", HERE).raw("compact_kv")([key, value], [0, 0], [1, 1], [index], [count], None)
    assert torch.equal(key[:, :5], wanted)


def test_the_gpu_tier_is_there_where_a_gpu_is() -> None:
    assert (CUDA in BACKENDS) == (CUDA in NATIVE) == has_cuda()
    assert CUDA.is_device
    assert CUDA.needs_gpu


def test_its_tests_are_marked() -> None:
    marked: list[object] = []

    def item(value: object) -> SimpleNamespace:
        parameters = SimpleNamespace(params={"backend": value})
        return SimpleNamespace(callspec=parameters, add_marker=lambda mark: marked.append((value, mark)))

    conftest.pytest_collection_modifyitems([item(CUDA), item(EMULATED), item(3), SimpleNamespace()])
    assert marked == [(CUDA, "gpu")]
