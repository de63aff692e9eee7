"""A CUDA graph's stand-in on a CPU: the calls of the dispatcher while a function runs, made again on the same tensors.

Like a graph, a replay runs no Python of the function, reads arguments where they lay at capture, and writes results where
the captured ones lie. Like a capture, recording runs nothing for good: what it wrote is put back. And it refuses what a
capture refuses: asking the device for a value, and data of the host that a tensor is made of.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_flatten

REFUSED = (
    "_local_scalar_dense", "nonzero", "masked_select", "is_nonzero", "equal", "unique", "_unique2", "lift_fresh", "item",
)  # fmt: skip


def tensors(tree: Any) -> list[Tensor]:
    return [leaf for leaf in tree_flatten(tree)[0] if isinstance(leaf, Tensor)]


def memory(x: Tensor) -> int:
    return x.untyped_storage()._cdata


class Recording(TorchDispatchMode):
    """Takes down what is called, with results."""

    def __init__(self) -> None:
        super().__init__()
        self.calls: list[tuple[Any, Any, Any, list[Tensor]]] = []
        self.before: dict[int, tuple[Tensor, Tensor]] = {}
        self.made: set[int] = set()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        name = func.overloadpacket.__name__
        if name in REFUSED:
            raise RuntimeError(f"{name} is not permitted while a step is recorded")
        given = tensors((args, kwargs))
        if name in ("index", "index_put_", "index_put") and any(
            x is not None and x.dtype == torch.bool for x in args[1]
        ):
            raise RuntimeError(f"{name} by a mask is not permitted while a step is recorded")
        if func._schema.is_mutable:
            for x in given:
                if memory(x) not in self.made and memory(x) not in self.before:
                    whole = x.new_empty(0).set_(x.untyped_storage())
                    self.before[memory(x)] = (whole, whole.clone())
        out = func(*args, **kwargs)
        found = tensors(out)
        aliases = {memory(x) for x in given}
        fresh = [x for x in found if memory(x) not in aliases]
        self.made |= {memory(x) for x in fresh}
        if func._schema.is_mutable or fresh:
            self.calls.append((func, args, kwargs, found if fresh else []))
        return out

    def undo(self) -> None:
        for whole, before in self.before.values():
            whole.copy_(before)

    def replay(self) -> None:
        for func, args, kwargs, results in self.calls:
            for old, new in zip(results, tensors(func(*args, **kwargs)) if results else [func(*args, **kwargs)], strict=False):
                if results:
                    old.copy_(new)


def record(function: Callable[[], Tensor]) -> tuple[Tensor, Callable[[], object]]:
    """A ``Capture`` for ``DecodeStep``."""
    with Recording() as recording:
        out = function()
    recording.undo()
    return out, recording.replay
