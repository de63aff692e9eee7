"""What timing needs of a CUDA device: events, captures, a flush of L2, named ranges for profilers."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from typing import Protocol

import torch

_FLUSH = 2  # times the size of L2


class CaptureError(Exception):
    """A call could not be captured into a CUDA graph."""


class Device(Protocol):
    """The part of CUDA that timing uses; the tests have one without a GPU.

    lost: a capture failed in a way that leaves torch's allocator unusable; a new process is due.
    """

    lost: bool

    def synchronize(self) -> None:
        """Wait until the device has done everything."""

    def elapsed(self, call: Callable[[], object]) -> float:
        """Seconds between an event before the call and one after it."""

    def flush(self) -> None:
        """Fill L2 with something else."""

    def capture(self, call: Callable[[], object], body: Callable[[], object]) -> Callable[[], object]:
        """The replay of a graph of what `body` does, which is to repeat `call`. Raises CaptureError."""

    def range(self, name: str) -> contextlib.AbstractContextManager[None]:
        """A range that profilers show."""


class CudaDevice:
    """A device of torch.   nvtx: push ranges."""

    def __init__(self, device: torch.device, *, nvtx: bool = False) -> None:
        self.device, self.nvtx, self.lost = device, nvtx, False
        torch.cuda.set_device(device)
        self.l2_bytes = int(getattr(torch.cuda.get_device_properties(device), "L2_cache_size", 0)) or 64 << 20
        self._buffer = torch.ones(_FLUSH * self.l2_bytes // 4, device=device)
        self._sum = torch.empty((), device=device)
        self._stream = torch.cuda.Stream(device)

    def synchronize(self) -> None:
        """Wait until the device has done everything."""
        torch.cuda.synchronize(self.device)

    def elapsed(self, call: Callable[[], object]) -> float:
        """Seconds between an event before the call and one after it."""
        begin, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
        begin.record()
        call()
        end.record()
        end.synchronize()
        return float(begin.elapsed_time(end)) / 1e3

    def flush(self) -> None:
        """Read a buffer of twice the L2: reads, since lines that were written would have to be written back on the
        account of the next call."""
        torch.sum(self._buffer, dim=0, out=self._sum)

    def capture(self, call: Callable[[], object], body: Callable[[], object]) -> Callable[[], object]:
        """The replay of a graph of what `body` does, which is to repeat `call`.

        Raises:
            CaptureError: the call synchronises, or cannot be captured for another reason.
        """
        graph = torch.cuda.CUDAGraph()
        self._stream.wait_stream(torch.cuda.current_stream(self.device))
        problem: Exception | None = None
        with torch.cuda.stream(self._stream):
            self._refuse_synchronising(call)
            try:
                graph.capture_begin()
                try:
                    body()
                except Exception as error:
                    problem = error
                graph.capture_end()
            except Exception as error:
                problem = problem or error
        if problem is not None:
            self._recover()
            raise CaptureError(f"{type(problem).__name__}: {_first_line(problem)}") from None
        torch.cuda.current_stream(self.device).wait_stream(self._stream)
        return graph.replay

    def _refuse_synchronising(self, call: Callable[[], object]) -> None:
        """Found without a capture where torch can tell, since a capture that fails may leave its allocator unusable."""
        before = torch.cuda.get_sync_debug_mode()
        torch.cuda.set_sync_debug_mode("error")
        try:
            call()
        except RuntimeError as error:
            if "synchroniz" not in str(error):
                raise
            raise CaptureError(f"waits for the device: {_first_line(error)}") from None
        finally:
            torch.cuda.set_sync_debug_mode(before)

    def _recover(self) -> None:
        try:
            self.synchronize()
            torch.cuda.empty_cache()
        except RuntimeError:
            self.lost = True

    @contextlib.contextmanager
    def range(self, name: str) -> Iterator[None]:
        """An NVTX range."""
        if not self.nvtx:
            yield
            return
        torch.cuda.nvtx.range_push(name)
        try:
            yield
        finally:
            torch.cuda.nvtx.range_pop()


def _first_line(error: BaseException) -> str:
    lines = str(error).strip().splitlines()
    return lines[0][:300] if lines else ""
