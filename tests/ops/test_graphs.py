"""What test_gpu.py checks graphs with, with a graph that calls the function again for one of CUDA."""

from __future__ import annotations

from collections.abc import Callable
from types import SimpleNamespace

import pytest
import torch
from torch import Tensor

from lightvlm_ext import ops
from tests.ops.graphs import Static, replay_and_run
from tests.ops.small_cases import CASES, Call, make

HERE = torch.device("cpu")
DTYPE = torch.bfloat16


def capture(function: Callable[[], list[Tensor]]) -> tuple[list[Tensor], Callable[[], object]]:
    found = function()

    def replay() -> None:
        for old, new in zip(found, function(), strict=True):
            old.copy_(new)

    return found, replay


@pytest.mark.parametrize("name", CASES)
def test_replays_on_other_values_agree(name: str) -> None:
    first, second = make(name, DTYPE, seed=0), make(name, DTYPE, seed=1)
    before = first.copy().tensors()
    pairs = replay_and_run(first, second, ops, HERE, capture)
    assert pairs
    assert all(torch.equal(found, wanted) for found, wanted in pairs)
    assert all(torch.equal(a, b) for a, b in zip(first.tensors(), before, strict=True))


def test_a_replay_of_the_old_values_is_found_out() -> None:
    """As of an op that reads a size on the host, or keeps a copy of its input."""
    kept: dict[int, Tensor] = {}

    def stale(x: Tensor) -> Tensor:
        return kept.setdefault(x.data_ptr(), x.clone()) * 2

    def other() -> Call:
        return Call("stale", (torch.rand(3),))

    pairs = replay_and_run(other(), other(), SimpleNamespace(stale=stale), HERE, capture)
    assert not all(torch.equal(found, wanted) for found, wanted in pairs)


def test_static_arguments_keep_their_addresses() -> None:
    static = Static(make("compact_kv_", DTYPE, seed=0), HERE)
    before = [tensor.data_ptr() for tensor in static.call.tensors()]
    second = make("compact_kv_", DTYPE, seed=1)
    static.fill(second)
    assert [tensor.data_ptr() for tensor in static.call.tensors()] == before
    assert all(torch.equal(a, b) for a, b in zip(static.call.tensors(), second.tensors(), strict=True))
