"""What a device can do at most, and how long an op has to take on it at least.

The floor of a case is the larger of two times: its bytes over the bandwidth, and its FLOPs over the rate of
the arithmetic that does them. Known devices have figures that were measured once; of all others bandwidth and rate
are measured in the same run. Bytes count what is read plus what is written.

A floor counts device memory. Inputs that lie in a cache can be read faster, so a small or warm case may be under it.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any, Protocol

import torch

from .cases import Case

_TURNS, _LONG_ENOUGH = 9, 0.1  # at least so many, and so many seconds


class Ceilings(Protocol):
    """What a device can do at most."""

    @property
    def source(self) -> str:
        """Where the figures come from."""

    def bytes_per_second(self, size: int) -> float:
        """For an op that moves `size` bytes."""

    def flops_per_second(self, precision: torch.dtype) -> float:
        """For products of this precision, summed in float32."""


@dataclass(frozen=True)
class Known:
    """Figures of a device that was measured before."""

    source: str
    bandwidth: float
    rates: dict[torch.dtype, float]

    def bytes_per_second(self, size: int) -> float:
        """The same for every size."""
        return self.bandwidth

    def flops_per_second(self, precision: torch.dtype) -> float:
        """Of the precision; of float32 where it is not listed."""
        return self.rates.get(precision, self.rates[torch.float32])


# By the name that torch gives. H200: 4.3 TB/s is a device-to-device copy of 8.6 GB (4.8 by the datasheet). A bf16
# product of 8192 cubed runs at 769 to 798 TFLOP/s; products of attention's shape, one per pair of query rows and keys,
# reach 550 to 600 in the best kernels known. Plain float32 is the datasheet's.
KNOWN = {
    "NVIDIA H200": Known(
        "H200: copy measured at 4.3 TB/s; 600 TFLOP/s of bf16 in attention's shape; 67 of float32 (datasheet)",
        4.3e12,
        {torch.bfloat16: 600e12, torch.float16: 600e12, torch.float32: 67e12},
    ),
}


@dataclass
class Measured:
    """Measures a device when it is first asked: copies and reads of a size, square products of a precision."""

    device: torch.device
    bandwidths: dict[int, float] = field(default_factory=dict)
    rates: dict[torch.dtype, float] = field(default_factory=dict)

    @property
    def source(self) -> str:
        """What the figures are."""
        side = _side(self.device)
        return f"measured in this run: the faster of a copy and a sum of as many bytes; a product of {side} cubed"

    def bytes_per_second(self, size: int) -> float:
        """Of as many bytes, to the next power of two, at least 1 MiB and at most 256 MiB (GPU: 4 GiB)."""
        largest = 32 if self.device.type == "cuda" else 28
        bits = min(max(size - 1, 1).bit_length(), largest)
        size = 1 << max(bits, 20)
        if size not in self.bandwidths:
            self.bandwidths[size] = measure_bandwidth(size, self.device)
        return self.bandwidths[size]

    def flops_per_second(self, precision: torch.dtype) -> float:
        """Of a square product of the precision."""
        if precision not in self.rates:
            self.rates[precision] = measure_rate(_side(self.device), precision, self.device)
        return self.rates[precision]


def ceilings_of(device: torch.device) -> Ceilings:
    """Those known of the device, or those measured."""
    if device.type == "cuda":
        known = KNOWN.get(torch.cuda.get_device_name(device))
        if known is not None:
            return known
    return Measured(device)


def floor_of(case: Case, ceilings: Ceilings) -> tuple[float, str]:
    """(seconds, "bytes" or "flops"): which of the two bounds the case, and what it takes at least; (0, "") unknown."""
    moving = case.bytes / ceilings.bytes_per_second(case.bytes) if case.bytes else 0.0
    computing = case.flops / ceilings.flops_per_second(case.precision) if case.flops else 0.0
    if not moving and not computing:
        return 0.0, ""
    return (moving, "bytes") if moving >= computing else (computing, "flops")


def describe(ceilings: Ceilings) -> dict[str, Any]:
    """For the result: where the ceilings come from, and those that were used."""
    about: dict[str, Any] = {"source": ceilings.source}
    if isinstance(ceilings, Known):
        about["gigabytes_per_second"] = ceilings.bandwidth / 1e9
        rates = ceilings.rates
    elif isinstance(ceilings, Measured):
        about["gigabytes_per_second"] = {str(k): v / 1e9 for k, v in sorted(ceilings.bandwidths.items())}
        rates = ceilings.rates
    else:
        return about
    about["teraflops"] = {str(k).removeprefix("torch."): v / 1e12 for k, v in rates.items()}
    return about


def measure_bandwidth(size: int, device: torch.device) -> float:
    """Bytes read and written a second by the faster of a copy and a sum that move `size` bytes in all."""
    source = torch.ones(size // 4, device=device)
    target = torch.zeros(size // 8, device=device)
    half = source[: size // 8]
    return size / min(_fastest(lambda: target.copy_(half), device), _fastest(source.sum, device))


def measure_rate(side: int, precision: torch.dtype, device: torch.device) -> float:
    """FLOPs a second of a square product."""
    a, b = (torch.randn(side, side, device=device).to(precision) for _ in range(2))
    return 2.0 * side**3 / _fastest(lambda: a @ b, device)


def _side(device: torch.device) -> int:
    return 8192 if device.type == "cuda" else 1024


def _fastest(call: Callable[[], object], device: torch.device) -> float:
    """Seconds of the fastest of some turns, as a ceiling is what can be reached at all; more turns of a short call."""
    fastest, turns, begin = float("inf"), 0, time.perf_counter()
    while turns < _TURNS or (time.perf_counter() - begin < _LONG_ENOUGH and turns < 50 * _TURNS):
        if device.type == "cuda":
            torch.cuda.synchronize(device)
        start = time.perf_counter()
        call()
        if device.type == "cuda":
            torch.cuda.synchronize(device)
        fastest = min(fastest, time.perf_counter() - start)
        turns += 1
    return fastest
