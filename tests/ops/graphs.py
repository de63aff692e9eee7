"""A CUDA graph of one call, replayed on the values of another."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from tests.ops.moving import Transfer
from tests.ops.small_cases import Call

Capture = Callable[[Callable[[], list[Tensor]]], tuple[list[Tensor], Callable[[], object]]]
"""Captures a function: (what it returned, the replay). A replay writes to the same tensors again."""


def capture_cuda(function: Callable[[], list[Tensor]]) -> tuple[list[Tensor], Callable[[], object]]:
    """With torch.cuda.CUDAGraph, after a warm-up on another stream, and with synchronisation an error in both."""
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    before = torch.cuda.get_sync_debug_mode()
    torch.cuda.set_sync_debug_mode("error")
    try:
        with torch.cuda.stream(stream):
            function()
    finally:
        torch.cuda.set_sync_debug_mode(before)
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        found = function()
    return found, graph.replay


class Static:
    """Arguments of a call at fixed addresses on a device."""

    def __init__(self, call: Call, device: torch.device) -> None:
        self.call: Call = Transfer(device).there(call.copy())

    def fill(self, call: Call) -> None:
        """Gives them the values of another call of the same shapes."""
        for here, given in zip(self.call.tensors(), call.tensors(), strict=True):
            here.copy_(given)


def replay_and_run(
    first: Call, second: Call, backend: Any, device: torch.device, capture: Capture
) -> list[tuple[Tensor, Tensor]]:
    """Captures `first` and replays it on the values of `second`, then of `first`; pairs of what the replay left and
    what a plain call gives."""
    static = Static(first, device)
    found, replay = capture(lambda: static.call.on(backend))
    pairs: list[tuple[Tensor, Tensor]] = []
    for call in (second, first):
        static.fill(call)
        replay()
        wanted = Static(call, device).call.on(backend)
        pairs += [(a.clone().cpu(), b.cpu()) for a, b in zip(found, wanted, strict=True)]
    return pairs
