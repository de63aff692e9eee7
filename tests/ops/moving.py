"""Takes the tensors of a call to another device and brings what was written there back.

A tensor moves with its whole storage and keeps offset, shape and strides. So views of one buffer stay views of one
buffer, padding between rows stays where it was, and an unaligned pointer stays unaligned: what an op sees on the
device is what the test made. Of a storage of more than LARGE bytes only what tensors show is copied, the rest being
memory that nothing was meant to touch.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor

LARGE = 1 << 30


def map_tensors(function: Callable[[Tensor], Tensor], value: Any) -> Any:
    """`value` with each tensor in its lists, tuples, mappings and dataclasses replaced by function(tensor)."""
    if isinstance(value, Tensor):
        return function(value)
    if isinstance(value, tuple) and hasattr(value, "_fields"):
        return type(value)(*(map_tensors(function, one) for one in value))
    if isinstance(value, list | tuple):
        return type(value)(map_tensors(function, one) for one in value)
    if isinstance(value, Mapping):
        return {name: map_tensors(function, one) for name, one in value.items()}
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        fields = {field.name: getattr(value, field.name) for field in dataclasses.fields(value)}
        return dataclasses.replace(value, **map_tensors(function, fields))
    return value


class Transfer:
    """The storages of one call, here and on `device`. Tensors that are not on the CPU stay where they are."""

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self._pairs: list[tuple[torch.UntypedStorage, torch.UntypedStorage]] = []
        self._views: list[tuple[Tensor, Tensor]] = []  # of large storages
        self._there: dict[int, torch.UntypedStorage] = {}  # by address of torch's storage object
        self._here: dict[int, torch.UntypedStorage] = {}

    def there(self, value: Any) -> Any:
        """`value` with its tensors on the device."""
        return map_tensors(self._send, value)

    def write_back(self) -> None:
        """Gives the tensors here the content that theirs have there."""
        for here, there in self._pairs:
            if here.nbytes() <= LARGE:
                here.copy_(there)
        for view, moved in self._views:
            view.copy_(moved)

    def back(self, value: Any) -> Any:
        """`value`, which a call returned, with its tensors here; one that shares memory with an argument still does."""
        return map_tensors(self._fetch, value)

    def _send(self, tensor: Tensor) -> Tensor:
        if tensor.device.type != "cpu":
            return tensor
        here = tensor.untyped_storage()
        there = self._there.get(here._cdata)
        if there is None:
            there = torch.UntypedStorage(here.nbytes(), device=self._device)
            if here.nbytes() <= LARGE:
                there.copy_(here)
            self._pairs.append((here, there))
            self._there[here._cdata] = there
            self._here[there._cdata] = here
        moved = _view(tensor, there)
        if here.nbytes() > LARGE:
            moved.copy_(tensor)
            self._views.append((tensor, moved))
        return moved

    def _fetch(self, tensor: Tensor) -> Tensor:
        there = tensor.untyped_storage()
        here = self._here.get(there._cdata)
        if here is None:
            here = torch.UntypedStorage(there.nbytes(), device="cpu")
            here.copy_(there)
            self._pairs.append((here, there))
            self._here[there._cdata] = here
        return _view(tensor, here)


def _view(tensor: Tensor, storage: torch.UntypedStorage) -> Tensor:
    """A tensor of the same dtype, offset, shape and strides on another storage."""
    empty = torch.empty(0, dtype=tensor.dtype, device=storage.device)
    return empty.set_(storage, tensor.storage_offset(), tensor.size(), tensor.stride())
