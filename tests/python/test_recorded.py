"""The stand-in for a CUDA graph finds out what a graph would get wrong."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from python.recorded import record
from torch import Tensor


def test_a_replay_reads_and_writes_where_the_captured_call_did() -> None:
    x, total = torch.rand(4), torch.zeros(4)

    def step() -> Tensor:
        total[1:].add_(x[1:])
        return (x * 2).view(2, 2) + total.view(2, 2)

    before = x.clone()
    out, replay = record(step)
    assert torch.equal(total, torch.zeros(4))  # as a capture, which runs nothing
    replay()
    first = total.clone()
    assert torch.equal(first[1:], before[1:])
    x.copy_(torch.rand(4))
    replay()
    assert torch.equal(total[1:], first[1:] + x[1:])
    assert torch.equal(out, (x * 2 + total).view(2, 2))


def test_what_the_host_decided_stays_as_it_was() -> None:
    """A step that counts on the host gives old values, as it would on a GPU."""
    places, x = [0], torch.zeros(4)

    def step() -> Tensor:
        x[places[0] : places[0] + 1].add_(1)
        places[0] += 1
        return x.sum()

    _, replay = record(step)
    replay()
    replay()
    assert x.tolist() == [2.0, 0.0, 0.0, 0.0]


@pytest.mark.parametrize(
    "read",
    [
        lambda x: x.sum().item(), lambda x: bool(x[0] > 0), lambda x: x.tolist(), lambda x: x[x > 0], lambda x: x.cpu(),
        lambda x: x.nonzero(), lambda x: x.new_tensor([1.0]), lambda x: torch.as_tensor([1, 2]), lambda x: x.numpy(),
    ],
)  # fmt: skip
def test_what_is_refused(read: Callable[[Tensor], object]) -> None:
    x = torch.rand(3)

    def step() -> Tensor:
        x.add_(1)
        read(x)
        return x

    before = x.clone()
    with pytest.raises(RuntimeError, match="is not permitted while a step is captured"):
        record(step)
    assert torch.equal(x, before)
    assert x.tolist()  # allowed again
