"""A CUDA graph's stand-in on a CPU: the dispatcher's calls while a function runs, made again on the same tensors.

Like a graph, a replay runs nothing of the function's Python, reads its arguments where they lay at capture, and writes
where the captured results lie. Like a capture, recording leaves no trace in memory. And it refuses what a capture
refuses: asking the device for a value, and tensors made of data of the host.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from python.test_host_reads import in_ops
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

REFUSED = {
    "_local_scalar_dense",
    "nonzero",
    "masked_select",
    "is_nonzero",
    "equal",
    "unique",
    "_unique2",
    "lift_fresh",
}
INDEXED = {"index", "index_put", "index_put_"}
READS = ("tolist", "cpu", "numpy")
"""Reads that the dispatcher does not see on a CPU."""


def _tensors(tree: Any) -> list[Tensor]:
    return [leaf for leaf in tree_leaves(tree) if isinstance(leaf, Tensor)]


def _memory(x: Tensor) -> int:
    return x.untyped_storage()._cdata


class Recording(TorchDispatchMode):
    """Takes down what is called, and what it returned in memory of its own."""

    def __init__(self) -> None:
        super().__init__()
        self._calls: list[tuple[Any, Any, Any, list[Tensor]]] = []
        self._made: set[int] = set()
        self._before: dict[int, tuple[Tensor, Tensor]] = {}

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        name = func.overloadpacket.__name__
        by_mask = name in INDEXED and any(x is not None and x.dtype == torch.bool for x in args[1])
        if name in REFUSED or by_mask:
            raise RuntimeError(f"{name} is not permitted while a step is captured")
        given, writes = _tensors((args, kwargs)), func._schema.is_mutable
        for x in given if writes else []:
            self._remember(x)
        out = func(*args, **kwargs)
        results = _tensors(out)
        shared = {_memory(x) for x in given}
        own = results if all(_memory(x) not in shared for x in results) else []
        self._made |= {_memory(x) for x in own}
        if writes or own:  # views need not be made again: they show what is in the memory
            self._calls.append((func, args, kwargs, own))
        return out

    def _remember(self, x: Tensor) -> None:
        if _memory(x) not in self._made | set(self._before):
            whole = x.new_empty(0).set_(x.untyped_storage())
            self._before[_memory(x)] = (whole, whole.clone())

    def undo(self) -> None:
        """Put back what the function wrote."""
        for whole, before in self._before.values():
            whole.copy_(before)

    def replay(self) -> None:
        for func, args, kwargs, results in self._calls:
            out = func(*args, **kwargs)
            for there, here in zip(results, _tensors(out) if results else [], strict=True):
                there.copy_(here)


@contextmanager
def _no_reads() -> Iterator[None]:
    originals = {name: getattr(Tensor, name) for name in READS}

    def refusing(name: str) -> Any:
        def read(self: Tensor, *args: Any, **kwargs: Any) -> Any:
            if in_ops():  # their checks of values happen on CPU tensors alone
                return originals[name](self, *args, **kwargs)
            raise RuntimeError(f"{name} is not permitted while a step is captured")

        return read

    try:
        for name in READS:
            setattr(Tensor, name, refusing(name))
        yield
    finally:
        for name, original in originals.items():
            setattr(Tensor, name, original)


def record(function: Callable[[], Tensor]) -> tuple[Tensor, Callable[[], object]]:
    """Captures a function, as ``DecodeStep`` wants it."""
    recording = Recording()
    try:
        with _no_reads(), recording:
            out = function()
    finally:
        recording.undo()
    return out, recording.replay
