"""Numbers of the host on their way to a device, without waiting for it."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor


def upload(values: Any, device: torch.device, dtype: torch.dtype = torch.int32) -> Tensor:
    """A tensor, or nested lists of numbers, on a device.

    A copy from pageable memory makes the host wait for all work before it; one from pinned memory does not.
    """
    on_host = torch.as_tensor(values, dtype=dtype)
    if device.type != "cuda":
        return on_host.to(device)
    return on_host.pin_memory().to(device, non_blocking=True)
