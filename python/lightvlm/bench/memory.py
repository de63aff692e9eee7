"""How much memory a call or an object needs, and whether an error means that there was too little."""

from __future__ import annotations

import ctypes
import gc
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

_STATUS = Path("/proc/self/status")


def memory_growth(call: Callable[[], object], device: torch.device) -> int | None:
    """Bytes by which a second call raises the peak of memory in use; None where the system does not tell."""
    call()
    if device.type == "cuda":
        torch.cuda.synchronize(device)
        torch.cuda.reset_peak_memory_stats(device)
        before = torch.cuda.max_memory_allocated(device)
        call()
        torch.cuda.synchronize(device)
        return torch.cuda.max_memory_allocated(device) - before
    try:
        reset_peak(device)
        before = _status("VmHWM")
        call()
        return _status("VmHWM") - before
    except (OSError, StopIteration):
        return None


def reset_peak(device: torch.device) -> None:
    """Let the peak of memory in use begin anew.

    Raises:
        OSError: the system does not let a process do that.
    """
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)
    else:
        Path("/proc/self/clear_refs").write_text("5")


def in_use(device: torch.device) -> int | None:
    """Bytes in use now: what torch's allocator holds on a GPU, the process's resident size on a CPU."""
    gc.collect()
    if device.type == "cuda":
        torch.cuda.synchronize(device)
        return torch.cuda.memory_allocated(device)
    try:
        ctypes.CDLL(None).malloc_trim(0)  # what was freed but not given back is not in use
        return _status("VmRSS")
    except (OSError, AttributeError, StopIteration):
        return None


def peak(device: torch.device) -> int | None:
    """The most that was in use since :func:`reset_peak`; None where the system does not tell."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)
        return torch.cuda.max_memory_allocated(device)
    try:
        return _status("VmHWM")
    except (OSError, StopIteration):
        return None


def available(device: torch.device) -> int:
    """Bytes that can still be had."""
    if device.type == "cuda":
        torch.cuda.empty_cache()
        return torch.cuda.mem_get_info(device)[0]
    lines = Path("/proc/meminfo").read_text().splitlines()
    return int(next(line for line in lines if line.startswith("MemAvailable")).split()[1]) * 1024


def storage_bytes(root: object) -> int:
    """Bytes of the storages behind all tensors that an object of ours or of transformers holds, each counted once.

    A view counts with all that it keeps alive.
    """
    storages: dict[int, int] = {}
    seen: set[int] = set()
    left: list[Any] = [root]
    while left:
        one = left.pop()
        if id(one) in seen:
            continue
        seen.add(id(one))
        if isinstance(one, Tensor):
            storage = one.untyped_storage()
            storages[storage.data_ptr()] = storage.nbytes()
        elif isinstance(one, dict):
            left += one.values()
        elif isinstance(one, list | tuple):
            left += one
        elif type(one).__module__.partition(".")[0] in ("lightvlm", "lightvlm_ext", "transformers"):
            left += vars(one).values() if hasattr(one, "__dict__") else ()
    return sum(storages.values())


def is_out_of_memory(error: BaseException) -> bool:
    """Whether the device or the host had too little memory."""
    if isinstance(error, torch.OutOfMemoryError | MemoryError):
        return True
    return isinstance(error, RuntimeError) and "not enough memory" in str(error)


def _status(name: str) -> int:
    line = next(line for line in _STATUS.read_text().splitlines() if line.startswith(name))
    return int(line.split()[1]) * 1024
