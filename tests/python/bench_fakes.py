"""Stand-ins for a clock and a GPU."""

from __future__ import annotations

import contextlib
import time
from collections.abc import Callable, Iterator

from lightvlm.bench.cuda_device import CaptureError


class Clock:
    """Stands still, but for the calls that it makes: no test waits, and none depends on a busy machine."""

    def __init__(self) -> None:
        self.now = 0.0

    def perf_counter(self) -> float:
        """As time.perf_counter."""
        return self.now

    def pause(self, milliseconds: float) -> Callable[[], None]:
        """A call that takes so long."""

        def call() -> None:
            self.now += milliseconds / 1e3

        return call


class RunningClock(Clock):
    """The real one."""

    now = property(lambda self: time.perf_counter(), lambda self, value: None)


class FakeDevice:
    """A CUDA device with a clock of its own: events read it, and a graph calls what it has captured."""

    def __init__(self, clock: Clock, uncapturable: tuple[Callable[[], object], ...] = ()) -> None:
        self.clock = clock
        self.lost = False
        self.ranges: list[str] = []
        self.flushes = 0
        self.graphs = 0
        self._uncapturable = uncapturable

    def synchronize(self) -> None:
        pass

    def elapsed(self, call: Callable[[], object]) -> float:
        start = self.clock.now
        call()
        return self.clock.now - start

    def flush(self) -> None:
        self.flushes += 1

    def capture(self, call: Callable[[], object], body: Callable[[], object]) -> Callable[[], object]:
        if call in self._uncapturable:
            raise CaptureError("waits for the device: it reads a tensor")
        self.graphs += 1
        return body

    @contextlib.contextmanager
    def range(self, name: str) -> Iterator[None]:
        self.ranges.append(name)
        yield
