"""Which backend runs a call: the first of the table that can, or the one that was asked for."""

from __future__ import annotations

import contextlib
import os
from collections.abc import Iterator
from contextvars import ContextVar
from dataclasses import dataclass
from typing import Protocol

from torch import Tensor

from .call import Call
from .cpu_flash import CpuFlash
from .cudnn import Cudnn
from .decode import Decode
from .flash_attn_2 import FlashAttn2
from .flash_attn_3 import FlashAttn3
from .flash_attn_4 import FlashAttn4
from .flex import Flex
from .tiled import Tiled
from .torch_flash import TorchFlash

VARIABLE = "LIGHTVLM_ATTENTION"


class Backend(Protocol):
    """One way to run a call.

    name: as use_backend() and LIGHTVLM_ATTENTION take it.   about: what it is.
    gpu_only: whether it takes no tensor of a CPU.
    appends: whether run() itself writes the new tokens of a cache call (Call.new).
    rotates: whether it rotates them and the query, too.
    """

    name: str
    about: str
    gpu_only: bool
    appends: bool
    rotates: bool

    def missing(self) -> str | None:
        """Why it can run nothing on this machine, to be read after the backend's name; None if it can."""

    def why_not(self, call: Call) -> str | None:
        """None if it can run the call, else the reason, to be read after the backend's name."""

    def run(self, call: Call) -> tuple[Tensor, Tensor]:
        """out as query, and lse (B, Hq, Sq), packed (Hq, total_q): fp32, natural logarithm, -inf where a row sees no
        key."""


TABLE: tuple[Backend, ...] = (
    FlashAttn3(),
    FlashAttn4(),
    FlashAttn2(),
    Decode(),
    TorchFlash(),
    CpuFlash(),
    Cudnn(),
    Flex(),
    Tiled(),
)
"""In the order in which they are tried. torch's FlashAttention would read a cache as packed sequences, whose keys it
does not split among blocks."""
_ON_CPU = tuple(backend for backend in TABLE if not backend.gpu_only)

_asked: ContextVar[str | None] = ContextVar("lightvlm_attention", default=None)


@dataclass(frozen=True)
class BackendInfo:
    """A line of backends().   missing: why it can run nothing here, None if it can."""

    name: str
    about: str
    missing: str | None


def backends() -> tuple[BackendInfo, ...]:
    """All backends in the order in which they are tried, and which of them can run here."""
    return tuple(BackendInfo(backend.name, backend.about, backend.missing()) for backend in TABLE)


@contextlib.contextmanager
def use_backend(name: str) -> Iterator[None]:
    """Every call in this context (and thread, or asyncio task) runs on this backend, or raises.

    It is looked at when the call runs, also inside a compiled function. Before the environment variable
    LIGHTVLM_ATTENTION, which does the same for a whole process.

    Raises:
        ValueError: no backend has the name.
    """
    token = _asked.set(_known(name, "name"))
    try:
        yield
    finally:
        _asked.reset(token)


def choose(call: Call) -> Backend:
    """The backend that runs the call.

    Raises:
        ValueError: none can (the message names each and its reason), or not the one that was asked for.
    """
    asked = _asked.get()
    if asked is None:
        variable = os.environ.get(VARIABLE)
        asked = _known(variable, VARIABLE) if variable else None
    if asked is not None:
        candidates: tuple[Backend, ...] = tuple(one for one in TABLE if one.name == asked)
    else:
        candidates = _ON_CPU if call.query.is_cpu else TABLE
    for backend in candidates:
        if backend.why_not(call) is None:
            return backend
    lines = [f"  {one.name}: {one.why_not(call) or 'could, but was not asked for'}" for one in TABLE]
    who = "no attention backend can" if asked is None else f"{asked}, the attention backend asked for, cannot"
    raise ValueError(f"{who} run this call ({_describe(call)}):\n" + "\n".join(lines))


def _known(name: str, argument: str) -> str:
    names = [backend.name for backend in TABLE]
    if name not in names:
        raise ValueError(f"{argument}: got {name!r}, must be one of {', '.join(names)}")
    return name


def _describe(call: Call) -> str:
    layout = "packed" if call.packed else "dense" if call.dense else "cache"
    query, key = (f"{name} {tuple(x.shape)}" for name, x in (("query", call.query), ("key", call.key)))
    window = f"window ({call.left}, {call.right})"
    shape = f"{window}, softcap {call.softcap:g}, {'with' if call.alibi is not None else 'no'} ALiBi"
    return f"{layout}, {call.query.device}, {str(call.query.dtype).removeprefix('torch.')}, {query}, {key}, {shape}"
