"""One case of ``bench ops``: checked, timed, and set beside its baselines, its floor and its goal."""

from __future__ import annotations

import statistics
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch

from .cases import Case
from .cuda_device import Device
from .floors import Ceilings, floor_of
from .goals import CPU, goal_of
from .memory import memory_growth
from .timing import CACHES, Effort, Runs, time_on_cpu, time_on_cuda


@dataclass(frozen=True)
class Bench:
    """Where and how cases are measured.

    device: of torch.   cuda: what times there; None on a CPU.   name: of the device, as goals name it.
    caches: states of L2 to measure, of "cold" and "warm"; a CPU's caches are left alone.
    """

    device: torch.device
    effort: Effort
    ceilings: Ceilings
    cuda: Device | None = None
    name: str = CPU
    caches: tuple[str, ...] = CACHES


def measure(op: str, case: Case, bench: Bench) -> list[dict[str, Any]]:
    """The rows of a case, one for each state of the cache.

    Raises:
        AssertionError: the op and its baselines disagree; nothing is timed then.
    """
    case.verify()
    calls = {op: case.op, **case.baselines, **case.floors}
    growth = memory_growth(case.op, bench.device)
    if bench.cuda is None:
        return [_row(op, case, bench, Runs(eager=time_on_cpu(calls, bench.effort)), growth)]
    share = replace(bench.effort, seconds=bench.effort.seconds / max(1, len(bench.caches)))
    rows = []
    for cache in bench.caches:
        with bench.cuda.range(f"{op} | {case.name} | {cache}"):
            runs = time_on_cuda(calls, share, bench.cuda, cold=cache == "cold")
        rows.append(_row(op, case, bench, runs, growth) | {"cache": cache, **_by_mode(op, case, runs)})
    return rows


def _row(op: str, case: Case, bench: Bench, runs: Runs, growth: int | None) -> dict[str, Any]:
    times = {call: runs.best(call) for call in (op, *case.baselines, *case.floors)}
    seconds = {call: statistics.median(values) for call, values in times.items()}
    rivals = case.baselines or case.floors
    fastest = min(rivals, key=lambda rival: seconds[rival])
    row: dict[str, Any] = {
        "case": case.name,
        "method": op,
        "baseline": fastest,
        "seconds": seconds[op],
        "baseline_seconds": seconds[fastest],
        "ratio": paired(times[fastest], times[op]),
        "baselines": {rival: seconds[rival] for rival in rivals},
        "microseconds": seconds[op] * 1e6,
        "peak_memory_growth": growth,
        "parameters": dict(case.parameters),
        "runs": times,
    }
    if case.bytes:
        row |= {"bytes": case.bytes, "gigabytes_per_second": case.bytes / seconds[op] / 1e9}
    if case.flops:
        row |= {"flops": case.flops, "teraflops": case.flops / seconds[op] / 1e12}
    floor, bound = floor_of(case, bench.ceilings)
    if bound:
        row |= {"floor_microseconds": floor * 1e6, "floor_by": bound, "share_of_floor": floor / seconds[op]}
    if case.floors:
        copy = min(case.floors, key=lambda name: seconds[name])
        row |= {
            "memcpy": copy,
            "memcpy_gigabytes_per_second": case.bytes / seconds[copy] / 1e9,
            "share_of_memcpy": paired(times[copy], times[op]),
        }
    goal = goal_of(op, bench.name, case.parameters, case.bytes)
    if goal is not None:
        row |= {"goal": goal.text(), "goal_met": goal.met(row)}
    return row


def _by_mode(op: str, case: Case, runs: Runs) -> dict[str, Any]:
    """What a row has besides on CUDA: both modes of every call."""
    eager = _microseconds(runs.eager)
    fastest = min(case.baselines or case.floors, key=lambda rival: eager[rival])
    return {
        "mode": runs.mode(op),
        "modes": {call: runs.mode(call) for call in runs.eager},
        "eager_microseconds": eager,
        "graph_microseconds": _microseconds(runs.graph),
        "eager_ratio": paired(runs.eager[fastest], runs.eager[op]),
        "capture_failures": runs.failures,
    }


def _microseconds(runs: Mapping[str, Sequence[float]]) -> dict[str, float]:
    return {call: statistics.median(values) * 1e6 for call, values in runs.items()}


def paired(slower: Sequence[float], faster: Sequence[float]) -> float:
    """How many times faster, the median over rounds, each of which ran both one after the other."""
    return statistics.median(a / b for a, b in zip(slower, faster, strict=True))
