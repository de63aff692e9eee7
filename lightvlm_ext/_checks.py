"""Checks of arguments, shared by the wrappers and the references.

Every message names the argument, what it got and what it wants, before anything is touched.
"""

from __future__ import annotations

import math
import numbers
from collections.abc import Sequence

import torch

FLOATING = (torch.float32, torch.float16, torch.bfloat16)
INT32_MAX = 2**31 - 1


def tensor(value: object, name: str) -> torch.Tensor:
    """`value` as a tensor, or TypeError."""
    if not isinstance(value, torch.Tensor):
        raise TypeError(f"{name}: got {type(value).__name__}, must be a torch.Tensor")
    return value


def dtype(value: torch.Tensor, name: str, *allowed: torch.dtype) -> None:
    """TypeError unless the dtype is one of `allowed`."""
    if value.dtype not in allowed:
        wanted = " or ".join(str(d).removeprefix("torch.") for d in allowed)
        raise TypeError(f"{name}: has dtype {str(value.dtype).removeprefix('torch.')}, must be {wanted}")


def shape(value: torch.Tensor, name: str, wanted: Sequence[int | str]) -> None:
    """ValueError unless the shape is `wanted`: ints are exact, a str names a free dimension."""
    found = value.shape
    if len(found) == len(wanted):
        for size, want in zip(found, wanted, strict=True):  # decoding asks at every token: no generator
            if size != want and not isinstance(want, str):
                break
        else:
            return
    text = ", ".join(str(w) for w in wanted) + ("," if len(wanted) == 1 else "")
    raise ValueError(f"{name}: has shape {tuple(value.shape)}, must be ({text})")


def same_device(value: torch.Tensor, name: str, other: torch.Tensor, other_name: str) -> None:
    """ValueError unless both are on one device."""
    if value.device != other.device:
        raise ValueError(f"{name}: is on {value.device}, must be on {other.device} as {other_name}")


def last_contiguous(value: torch.Tensor, name: str) -> None:
    """ValueError unless the last dimension is contiguous (or has at most one element)."""
    if value.dim() and value.shape[-1] > 1 and value.stride(-1) != 1:
        raise ValueError(
            f"{name}: last dimension has stride {value.stride(-1)}, must be contiguous (stride 1)"
        )


def writable(value: torch.Tensor, name: str) -> None:
    """ValueError where elements share memory, as of a tensor that was expanded."""
    stride = value.stride()
    if 0 in stride and any(s == 0 and n > 1 for s, n in zip(stride, value.shape, strict=True)):
        raise ValueError(f"{name}: shares memory with itself, must be disjoint to be written")


def integer(value: object, name: str, low: int, high: int = INT32_MAX) -> int:
    """`value` as an int in [low, high]."""
    if isinstance(value, int) and not isinstance(value, bool):
        number = value  # asked first, as torch.compile cannot look for __index__ in an int that varies
    elif isinstance(value, bool | torch.Tensor) or not hasattr(value, "__index__"):
        raise TypeError(f"{name}: got {type(value).__name__}, must be an int")
    else:
        number = value.__index__()
    if not low <= number <= high:
        limit = f">= {low}" if number < low else f"<= {high}"
        raise ValueError(f"{name}: got {number}, must be {limit}")
    return int(number)


def real(value: object, name: str) -> float:
    """`value` as a finite float."""
    if isinstance(value, bool) or not isinstance(
        value, (int, float, numbers.Real)
    ):  # numpy's are numbers.Real
        raise TypeError(f"{name}: got {type(value).__name__}, must be a float")
    number = float(value)
    if not -math.inf < number < math.inf:  # torch.compile can follow comparisons, not math.isfinite
        raise ValueError(f"{name}: got {value}, must be finite")
    return number


def choice(value: object, name: str, allowed: Sequence[str]) -> str:
    """`value`, which must be one of `allowed`."""
    if not isinstance(value, str) or value not in allowed:
        wanted = " or ".join(repr(a) for a in allowed)
        raise ValueError(f"{name}: got {value!r}, must be {wanted}")
    return value
