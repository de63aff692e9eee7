"""Numbers on their way to a device and tensors on their way back, without waiting for it."""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from typing import Any, ParamSpec, TypeVar

import torch
from torch import Tensor

Arguments = ParamSpec("Arguments")
Result = TypeVar("Result")


def lasting(function: Callable[Arguments, Result]) -> Callable[Arguments, Result]:
    """Decorator: tensors that the function makes are ordinary ones, also where it is called in inference mode.

    Those made in inference mode could not be written outside it, and a cache lives longer than the call that fills it.
    """

    @functools.wraps(function)
    def wrapped(*args: Arguments.args, **kwargs: Arguments.kwargs) -> Result:
        with torch.inference_mode(False), torch.no_grad():
            return function(*args, **kwargs)

    return wrapped


def upload(values: Any, device: torch.device, dtype: torch.dtype = torch.int32) -> Tensor:
    """A tensor, or nested lists of numbers, on a device.

    A copy from pageable memory makes the host wait for all work before it; one from pinned memory does not.
    """
    on_host = torch.as_tensor(values, dtype=dtype)
    if device.type != "cuda":
        return on_host.to(device)
    return on_host.pin_memory().to(device, non_blocking=True)


def rectangular(rows: Sequence[list[int]], fill: int = 0) -> list[list[int]]:
    """Rows of the same length, at least 1, filled up at their ends."""
    width = max(1, *map(len, rows))
    return [row + [fill] * (width - len(row)) for row in rows]


def download(x: Tensor) -> Tensor:
    """A tensor of a device on the host, copied while the device goes on: what a later upload on the same stream reads,
    but not the host before it has waited. On a CPU it is the tensor itself."""
    if x.device.type == "cpu":
        return x
    if x.device.type != "cuda":
        return x.cpu()
    with torch.inference_mode(False):
        buffer = torch.empty(x.shape, dtype=x.dtype, pin_memory=True)
    return buffer.copy_(x, non_blocking=True)
