"""How the ops are timed. One file, so that every figure of ``bench ops`` means the same.

All calls of a case (the op, its baselines, plain copies) take turns: a round times each of them once, and starts
with another one than the round before. So a machine that is busy for a while is slow for all of them, and the ratio
of two calls is taken within each round. A run is what one round says of one call, in seconds; a figure is the median
of the runs.

CPU
    Wall clock. A call too short for the clock is repeated within the round and its time divided.

CUDA
    cache "warm": nothing happens between calls, inputs are in L2 as far as they fit.   cache "cold": before each call a
    buffer of twice the L2 is read, which leaves lines of that buffer there, and none that have to be written back.

    mode "eager": the device is idle; an event, the call from Python, an event. Launches from Python count, as they do
    for who calls the op so. A run is the median of several such calls.

    mode "graph": the calls are captured into a CUDA graph, several one after the other, and the graph's replay is timed
    with events and divided. So one run of kernels and the gap between two of them count, and the launch of the graph
    does not. Cold: the graph holds flush, call, flush, call ...; a second one holds the flushes alone; the difference
    is divided. A call that cannot be captured is reported with the reason and has eager figures alone.
"""

from __future__ import annotations

import math
import statistics
import time
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field

from .cuda_device import CaptureError, Device

Call = Callable[[], object]

WARM_UP = 2  # calls on CUDA
WARM = 0.05  # seconds of a call that is warm after one
SHORTEST = 2e-3  # seconds that are timed at once
MOST_REPEATS = 200
FEWEST_ROUNDS = 3
# On CUDA: seconds of calls in one graph or one run, and how many of them at most.
SHORTEST_SERIES = 1e-3
MOST_EAGER, MOST_CAPTURED = 10, 20
CACHES = ("cold", "warm")


@dataclass(frozen=True)
class Effort:
    """rounds: how often every call is timed.   seconds: fewer rounds rather than much longer than this for a case,
    but FEWEST_ROUNDS (or `rounds`, if that is less) in any case."""

    rounds: int = 9
    seconds: float = math.inf

    def for_calls(self, seconds: float) -> int:
        """Rounds, where all calls together take so long in one."""
        affordable = self.seconds / max(seconds, 1e-9)
        return min(self.rounds, max(FEWEST_ROUNDS, int(min(affordable, self.rounds))))


@dataclass
class Runs:
    """Runs of each call by mode, in seconds.   failures: call -> why it has no graph."""

    eager: dict[str, list[float]] = field(default_factory=dict)
    graph: dict[str, list[float]] = field(default_factory=dict)
    failures: dict[str, str] = field(default_factory=dict)

    def best(self, call: str) -> list[float]:
        """As a graph where there is one, else eager."""
        return self.graph.get(call) or self.eager[call]

    def mode(self, call: str) -> str:
        """Which of the two best() is."""
        return "graph" if self.graph.get(call) else "eager"


def in_turns(names: list[str], rounds: int) -> Iterator[tuple[int, str]]:
    """(round, name) with the names of each round beginning one further."""
    for turn in range(rounds):
        first = turn % len(names)
        for name in names[first:] + names[:first]:
            yield turn, name


def time_on_cpu(calls: Mapping[str, Call], effort: Effort) -> dict[str, list[float]]:
    """Seconds of every call in every round, after a warm-up."""
    repeats: dict[str, int] = {}
    round_seconds = 0.0
    for name, call in calls.items():
        seconds = _clock(call, 1)
        repeats[name] = min(MOST_REPEATS, math.ceil(SHORTEST / max(seconds, 1e-9)))
        if seconds < WARM:
            seconds = _clock(call, repeats[name])
        round_seconds += seconds * repeats[name]
    times: dict[str, list[float]] = {name: [] for name in calls}
    for _, name in in_turns(list(calls), effort.for_calls(round_seconds)):
        times[name].append(_clock(calls[name], repeats[name]))
    return times


def _clock(call: Call, repeats: int) -> float:
    start = time.perf_counter()
    for _ in range(repeats):
        call()
    return (time.perf_counter() - start) / repeats


def time_on_cuda(calls: Mapping[str, Call], effort: Effort, device: Device, *, cold: bool) -> Runs:
    """Runs of every call, eager and as a graph."""
    names = list(calls)
    runs = Runs()
    estimates = {name: _estimate(calls[name], device) for name in names}
    repeats = {name: _repeats(seconds, MOST_EAGER) for name, seconds in estimates.items()}
    replays: dict[str, _Replay] = {}
    flushes: dict[int, Call] = {}
    for name in names:
        count = _repeats(estimates[name], MOST_CAPTURED)
        try:
            if cold and count not in flushes:
                flushes[count] = device.capture(device.flush, _series(device.flush, count))
            replays[name] = _Replay(calls[name], count, device, flushes.get(count))
        except CaptureError as error:
            runs.failures[name] = str(error)
    cost = sum((estimates[name] + 1e-4) * repeats[name] for name in names)
    cost += sum(replay.cost(estimates[name]) for name, replay in replays.items())
    try:
        for _, name in in_turns(names, effort.for_calls(cost)):
            with device.range(f"{name} eager"):
                samples = [_eager(calls[name], device, cold=cold) for _ in range(repeats[name])]
            runs.eager.setdefault(name, []).append(statistics.median(samples))
            if name in replays:
                with device.range(f"{name} graph"):
                    runs.graph.setdefault(name, []).append(replays[name].seconds())
    finally:
        replays.clear()  # and with them the memory that their graphs hold
        flushes.clear()
    return runs


def _estimate(call: Call, device: Device) -> float:
    """Seconds of a call after warm-up, from one sample."""
    for _ in range(WARM_UP):
        call()
    device.synchronize()
    return _eager(call, device, cold=False)


def _repeats(seconds: float, most: int) -> int:
    return max(1, min(most, math.ceil(SHORTEST_SERIES / max(seconds, 1e-9))))


def _eager(call: Call, device: Device, *, cold: bool) -> float:
    if cold:
        device.flush()
    device.synchronize()
    return device.elapsed(call)


def _series(call: Call, count: int, between: Call | None = None) -> Callable[[], None]:
    def series() -> None:
        for _ in range(count):
            if between is not None:
                between()
            call()

    return series


class _Replay:
    """A captured series of one call.   flushes: the replay of as many flushes alone; None: the cache stays warm."""

    def __init__(self, call: Call, count: int, device: Device, flushes: Call | None) -> None:
        self._count, self._device, self._flushes = count, device, flushes
        self._graph = device.capture(call, _series(call, count, device.flush if flushes else None))

    def cost(self, seconds: float) -> float:
        """About how long seconds() takes, for a call that takes so long."""
        return 2 * self._count * (seconds + 1e-4 * (self._flushes is not None))

    def seconds(self) -> float:
        """Of one call; what runs after something else may be slow, so that each replay is timed the second time."""
        whole = self._replay(self._graph)
        if self._flushes is None:
            return whole / self._count
        # A call that costs less than the noise of the flushes took some time all the same.
        return max((whole - self._replay(self._flushes)) / self._count, 1e-9)

    def _replay(self, graph: Call) -> float:
        graph()
        self._device.synchronize()
        return self._device.elapsed(graph)
