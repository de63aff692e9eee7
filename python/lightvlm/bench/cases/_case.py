"""What one row of ``lightvlm bench ops`` is made of, and the sizes it is made for."""

from __future__ import annotations

import ctypes
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field

import torch
from torch import Tensor

KEEP = 0.35
DTYPES = (torch.bfloat16, torch.float32)


@dataclass(frozen=True)
class Geometry:
    """A decoder's sizes.

    width: of the hidden states.   heads, kv_heads: of queries, and of keys and values.   head_dim: of one.
    """

    width: int
    layers: int
    heads: int
    kv_heads: int
    head_dim: int


MODELS = {
    "0.5b": Geometry(896, 24, 14, 2, 64),
    "7b": Geometry(3584, 28, 28, 4, 128),  # Qwen2.5-VL-7B
    "26b": Geometry(6144, 48, 48, 8, 128),  # InternVL2.5-26B
}


@dataclass(frozen=True)
class Sizes:
    """What to measure.   tokens: None, what each op's file finds telling.   models: names in MODELS.

    cache_bytes: of each cache that compact_kv_ works on.
    """

    device: torch.device
    tokens: tuple[int, ...] | None = None
    batches: tuple[int, ...] = (1,)
    models: tuple[str, ...] = ("0.5b", "7b")
    cache_bytes: int = 256 << 20

    def geometries(self) -> dict[str, Geometry]:
        """The geometries named by models."""
        return {name: MODELS[name] for name in self.models}


@dataclass(frozen=True)
class Case:
    """One row of the benchmark.

    name: of the inputs.   op: calls the native op.   baselines: name -> the same result in plain torch.
    verify: raises AssertionError unless they agree.   floors: name -> a plain copy of as many bytes as the op
    moves, or the op itself on an easier input.   bytes: how many the op has to read and write.
    flops: that it has to do; 0 where bytes are the bound.   precision: of the arithmetic that flops counts; says
    which ceiling of the device applies.
    parameters: what a goal is found by (`bench/goals.py`). model, tokens and batch are those of the Sizes that the
    case was made for, unless it says otherwise; the rest it has to say: rows (of select), window (probe rows), lse
    ("given" or "own"), layers, dtype ("bfloat16" ...), bits ("8", "4", "2", "4/2").
    """

    name: str
    op: Callable[[], object]
    baselines: dict[str, Callable[[], object]]
    verify: Callable[[], None]
    floors: dict[str, Callable[[], object]] = field(default_factory=dict)
    bytes: int = 0
    flops: int = 0
    precision: torch.dtype = torch.bfloat16
    parameters: Mapping[str, int | float | str] = field(default_factory=dict)


def require(same: bool, message: str) -> None:
    """Raises AssertionError with `message` unless `same`."""
    if not same:
        raise AssertionError(message)


def require_close(found: Tensor, wanted: Tensor, tolerance: float) -> None:
    """Raises AssertionError unless the two agree within the tolerance, absolute and relative."""
    torch.testing.assert_close(found.float(), wanted.float(), atol=tolerance, rtol=tolerance)


def dtype_name(dtype: torch.dtype) -> str:
    """float32 for torch.float32."""
    return str(dtype).removeprefix("torch.")


def plain_copies(size: int, device: torch.device) -> dict[str, Callable[[], object]]:
    """Ways to copy `size` bytes: torch's, and on a CPU libc's, which takes one thread but stores past the caches."""
    source = torch.ones(size, dtype=torch.uint8, device=device)
    target = torch.zeros_like(source)
    copies: dict[str, Callable[[], object]] = {"memcpy (torch)": lambda: target.copy_(source)}
    if device.type == "cpu":
        copies["memcpy (libc)"] = lambda: ctypes.memmove(target.data_ptr(), source.data_ptr(), size)
    return copies
