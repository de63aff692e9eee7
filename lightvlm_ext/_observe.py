"""Who called which op: for reports and profiles, at no cost while nobody listens."""

from __future__ import annotations

import contextlib
import functools
import time
from collections.abc import Callable, Iterator
from contextvars import ContextVar
from typing import NamedTuple, ParamSpec, TypeVar

import torch

from ._kv import PackedKV

P = ParamSpec("P")
T = TypeVar("T")


class OpCall(NamedTuple):
    """One call of a wrapper in `lightvlm_ext.ops`.

    name: of the op.   device: of its first tensor.   seconds: wall time of the call on the CPU; None
    on CUDA, where the call only enqueues and timing it would synchronise.
    """

    name: str
    device: str
    seconds: float | None


Observer = Callable[[OpCall], None]
# Per thread and asyncio task, so that two runs side by side do not count each other's calls.
_observers: ContextVar[tuple[Observer, ...]] = ContextVar("lightvlm_observers", default=())


@contextlib.contextmanager
def observe(observer: Observer) -> Iterator[None]:
    """Calls `observer` with an OpCall after every op that this context calls."""
    token = _observers.set((*_observers.get(), observer))
    try:
        yield
    finally:
        _observers.reset(token)


def observed(function: Callable[P, T]) -> Callable[P, T]:
    """Makes a wrapper report its calls under its own name."""
    return observed_as(function.__name__)(function)


def observed_as(name: str) -> Callable[[Callable[P, T]], Callable[P, T]]:
    """Makes a wrapper report its calls under an op's name."""

    def decorate(function: Callable[P, T]) -> Callable[P, T]:
        @functools.wraps(function)
        def wrapper(*args: P.args, **kwargs: P.kwargs) -> T:
            if torch.compiler.is_compiling():
                return function(*args, **kwargs)
            observers = _observers.get()
            if not observers:
                return function(*args, **kwargs)
            start = time.perf_counter()
            result = function(*args, **kwargs)
            seconds = time.perf_counter() - start
            device = _device_of(args, kwargs)
            call = OpCall(name, device, seconds if device == "cpu" else None)
            for observer in observers:
                observer(call)
            return result

        return wrapper

    return decorate


def _device_of(args: tuple[object, ...], kwargs: dict[str, object]) -> str:
    for value in (*args, *kwargs.values()):
        first = value[0] if isinstance(value, (list, tuple)) and value else value
        if isinstance(first, PackedKV):
            first = first.key_codes
        if isinstance(first, torch.Tensor):
            return first.device.type
    return "cpu"
