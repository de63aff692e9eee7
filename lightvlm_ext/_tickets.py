"""Zeroed counters for kernels whose last block does the rest.

Such a kernel counts its blocks in an int32 that it leaves at zero, so nobody has to zero it again. Calls that
may run at the same time must not share one: there is a buffer for each stream, and a piece of its own for each
call that a CUDA graph captures, since a graph may be replayed on any stream.
"""

from __future__ import annotations

import threading

import torch

from . import _library

_LEAST = 1 << 12
_ARENA = 1 << 18
_lock = threading.Lock()
_of_stream: dict[tuple[torch.device, int], torch.Tensor] = {}
# What captured calls take their pieces from: zeroed before any capture, never freed.
_arenas: dict[torch.device, torch.Tensor] = {}
_taken: dict[torch.device, int] = {}


def tickets(device: torch.device, count: int) -> torch.Tensor | None:
    """At least `count` zeros, int32, for a call on the current stream; None for the CPU twins, which need none."""
    on_gpu = device.type == "cuda"
    if not on_gpu and not _library.is_emulated():
        return None
    if on_gpu and torch.cuda.is_current_stream_capturing():
        return _captured(device, count)
    key = (device, torch.cuda.current_stream(device).cuda_stream if on_gpu else 0)
    held = _of_stream.get(key)
    if held is None or held.numel() < count:
        with _lock:
            if on_gpu and device not in _arenas:
                _arenas[device] = torch.zeros(_ARENA, dtype=torch.int32, device=device)
            held = torch.zeros(max(count, _LEAST), dtype=torch.int32, device=device)
            _of_stream[key] = held
    return held


def _captured(device: torch.device, count: int) -> torch.Tensor:
    with _lock:
        first = _taken.get(device, 0)
        if device in _arenas and first + count <= _ARENA:
            _taken[device] = first + count
            return _arenas[device][first : first + count]
    # Never called before the capture, or captured very often: the graph zeroes them itself.
    return torch.zeros(count, dtype=torch.int32, device=device)
