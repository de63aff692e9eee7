"""What only a GPU shows: graphs, streams, synchronisation. The ops' own tests run there too, as the tier `cuda`."""

from __future__ import annotations

import pytest
import torch

import lightvlm_ext
from lightvlm_ext import ops
from tests.ops.backends import CPU
from tests.ops.graphs import Static, capture_cuda, replay_and_run
from tests.ops.small_cases import CASES, make

pytestmark = pytest.mark.gpu
every_case = pytest.mark.parametrize("name", CASES)
DTYPE = torch.bfloat16


@pytest.fixture
def device() -> torch.device:
    lightvlm_ext.device_errors()
    return torch.device("cuda", 0)


@every_case
def test_a_graph_follows_its_inputs_and_counts(name: str, device: torch.device) -> None:
    first, second = make(name, DTYPE, seed=0), make(name, DTYPE, seed=1)
    pairs = replay_and_run(first, second, ops, device, capture_cuda)
    assert all(torch.equal(found, wanted) for found, wanted in pairs)
    assert lightvlm_ext.device_errors() == []


@every_case
def test_a_call_does_not_wait_for_the_device(name: str, device: torch.device) -> None:
    call = Static(make(name, DTYPE, seed=0), device).call
    call.on(ops)
    torch.cuda.set_sync_debug_mode("error")
    try:
        call.on(ops)
    finally:
        torch.cuda.set_sync_debug_mode("default")


@every_case
def test_a_call_runs_on_the_current_stream(name: str, device: torch.device) -> None:
    """Its inputs are made on a stream that is late; a kernel elsewhere would read what was there before."""
    first, second = make(name, DTYPE, seed=0), make(name, DTYPE, seed=1)
    wanted = Static(second, device).call.on(ops)
    late, given = Static(first, device), Static(second, device).call
    late.call.on(ops)
    late.fill(first)
    torch.cuda.synchronize()
    stream = torch.cuda.Stream()
    with torch.cuda.stream(stream):
        torch.cuda._sleep(20_000_000)
        late.fill(given)
        found = late.call.on(ops)
    stream.synchronize()
    assert all(torch.equal(a, b) for a, b in zip(found, wanted, strict=True))


def test_another_device_is_refused_by_name() -> None:
    scores = torch.rand(1, 8)
    with pytest.raises(ValueError, match="forced"):
        ops.select(scores.cuda(), keep=2, forced=torch.zeros(1, 8, dtype=torch.bool))
    assert CPU.select(scores, keep=2).index.shape == (1, 2)
