"""What the GPU backends ask of the machine."""

from __future__ import annotations

import functools
import importlib
import importlib.util
from types import ModuleType

import torch
from torch import Tensor

from .call import Call

Capability = tuple[int, int]
HALF = (torch.float16, torch.bfloat16)


def no_gpu() -> str | None:
    """Why nothing runs on a GPU here."""
    if torch.version.cuda is None:
        return "torch is built without CUDA"
    return None if torch.cuda.is_available() else "torch finds no GPU"


def on_gpu(tensor: Tensor) -> bool:
    """Whether it is on a CUDA device."""
    return tensor.device.type == "cuda"


@functools.cache
def capability(device: torch.device) -> Capability:
    """Of a CUDA device, read once."""
    return torch.cuda.get_device_capability(device)


def not_for(
    call: Call, oldest: Capability, newest: Capability | None = None, widest: int = 256
) -> str | None:
    """Why a kernel for 16 bit, for GPUs from `oldest` to `newest` and head_dims up to `widest` does not take a call."""
    if not on_gpu(call.query):
        return f"runs on CUDA, and query is on {call.query.device}"
    if call.query.dtype not in HALF:
        return f"takes float16 and bfloat16, not {str(call.query.dtype).removeprefix('torch.')}"
    if call.query.shape[-1] > widest:
        return f"takes head_dim up to {widest}, not {call.query.shape[-1]}"
    found = capability(call.query.device)
    if found < oldest or (newest is not None and found > newest):
        upto = "or newer" if newest is None else f"to {newest[0]}.{newest[1]}"
        return f"is for compute capability {oldest[0]}.{oldest[1]} {upto}, and this GPU has {found[0]}.{found[1]}"
    return None


@functools.cache
def package(name: str, parent: str = "") -> ModuleType | str:
    """The module, or why there is none. It is imported at the first call that could use it.

    parent: a package that must be there first.
    """
    try:
        if importlib.util.find_spec(parent or name) is None or importlib.util.find_spec(name) is None:
            return "is not installed"
    except (ImportError, ValueError):
        return "is not installed"
    try:
        return importlib.import_module(name)
    except Exception as error:  # a package that was built for another torch fails in any way
        return f"does not import: {str(error).splitlines()[0] if str(error) else type(error).__name__}"
