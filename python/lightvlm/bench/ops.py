"""``lightvlm bench ops``: each native op against the fastest other way to the same result.

Every call is checked against its baselines first. Then op and baselines take turns, one round after the other;
``ratio`` is the median over rounds of the fastest baseline's time over the op's. All baselines are in each
row. Ops that only move bytes stand beside a plain copy of as many bytes, the floor.
"""

from __future__ import annotations

import argparse
import math
import statistics
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch

from .cases import CASES, MODELS, Case, Sizes
from .common import describe

_WARM_UP = 2
_SHORTEST = 2e-3  # seconds that are timed at once
_MOST_REPEATS = 200


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Options of the benchmark."""
    parser.add_argument("--op", choices=sorted(CASES), nargs="+", default=sorted(CASES))
    parser.add_argument(
        "--tokens", type=int, nargs="+", default=None, help="default: what each op's cases find telling"
    )
    parser.add_argument("--batch", type=int, nargs="+", default=[1])
    parser.add_argument("--model", choices=sorted(MODELS), nargs="+", default=["0.5b", "7b"])
    parser.add_argument(
        "--cache-mib",
        type=int,
        default=256,
        help="size of each cache for compact_kv_, in MiB (default: %(default)s)",
    )
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--threads", type=int, default=None)
    parser.add_argument("--rounds", type=int, default=9)


def run(args: argparse.Namespace) -> dict[str, Any]:
    """Run the benchmark; returns the JSON object of ``lightvlm bench ops``."""
    smallest = {"rounds": args.rounds, "cache-mib": args.cache_mib, "batch": min(args.batch)}
    if args.tokens is not None:
        smallest["tokens"] = min(args.tokens)
    for name, value in smallest.items():
        if value < 1:
            raise ValueError(f"--{name} must be at least 1, got {value}")
    device = torch.device(args.device)
    if device.type == "cuda" and not torch.cuda.is_available():
        raise ValueError(f"--device {args.device}: this torch has no CUDA device")
    threads = torch.get_num_threads()
    if args.threads is not None:
        if args.threads < 1:
            raise ValueError(f"--threads must be at least 1, got {args.threads}")
        torch.set_num_threads(args.threads)
    try:
        with torch.inference_mode():
            rows = []
            sizes = Sizes(
                device,
                tuple(args.tokens) if args.tokens is not None else None,
                tuple(args.batch),
                tuple(args.model),
                args.cache_mib << 20,
            )
            for name in args.op:
                for case in CASES[name](sizes):
                    rows.append(measure(name, case, args.rounds, device))
            return {"kind": "ops", **describe(args.device), "rows": rows}
    finally:
        torch.set_num_threads(threads)


def measure(name: str, case: Case, rounds: int, device: torch.device) -> dict[str, Any]:
    """One row: checks the case, then times the op, its baselines and its floors in turns."""
    case.verify()
    calls = {name: case.op, **case.baselines, **case.floors}
    growth = _memory_growth(case.op, device)
    times = interleaved(calls, rounds, device)
    seconds = {call: statistics.median(values) for call, values in times.items()}
    fastest = min(case.baselines, key=lambda baseline: seconds[baseline])
    row: dict[str, Any] = {
        "case": case.name,
        "method": name,
        "baseline": fastest,
        "seconds": seconds[name],
        "baseline_seconds": seconds[fastest],
        "ratio": _paired(times[fastest], times[name]),
        "baselines": {baseline: seconds[baseline] for baseline in case.baselines},
        "peak_memory_growth": growth,
        "runs": times,
    }
    if case.floors:
        floor = min(case.floors, key=lambda copy: seconds[copy])
        row |= {
            "bytes": case.bytes,
            "gigabytes_per_second": case.bytes / seconds[name] / 1e9,
            "memcpy": floor,
            "memcpy_gigabytes_per_second": case.bytes / seconds[floor] / 1e9,
            "share_of_memcpy": _paired(times[floor], times[name]),
        }
    return row


def _paired(slower: Sequence[float], faster: Sequence[float]) -> float:
    """Rounds are paired: each ran both, one after the other."""
    return statistics.median(a / b for a, b in zip(slower, faster, strict=True))


def interleaved(
    calls: dict[str, Callable[[], object]], rounds: int, device: torch.device
) -> dict[str, list[float]]:
    """Seconds of every call in every round, after two rounds of warm-up; each round starts with another call.

    A call too short to time is repeated in each round.
    """
    times: dict[str, list[float]] = {name: [] for name in calls}
    repeats = dict.fromkeys(calls, 1)
    order = list(calls)
    for turn in range(-_WARM_UP, rounds):
        first = turn % len(order)
        for name in order[first:] + order[:first]:
            seconds = _time(calls[name], repeats[name], device)
            if turn >= 0:
                times[name].append(seconds)
            else:
                repeats[name] = min(_MOST_REPEATS, math.ceil(_SHORTEST / max(seconds, 1e-9)))
    return times


def _time(call: Callable[[], object], repeats: int, device: torch.device) -> float:
    """Seconds of one of `repeats` calls."""
    if device.type == "cuda":
        begin, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
        torch.cuda.synchronize(device)
        begin.record()
        for _ in range(repeats):
            call()
        end.record()
        end.synchronize()
        return begin.elapsed_time(end) / 1e3 / repeats
    start = time.perf_counter()
    for _ in range(repeats):
        call()
    return (time.perf_counter() - start) / repeats


def _memory_growth(call: Callable[[], object], device: torch.device) -> int | None:
    """Bytes by which a second call raises the peak of memory in use; None where the system does not tell."""
    call()
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)
        before = torch.cuda.max_memory_allocated(device)
        call()
        return torch.cuda.max_memory_allocated(device) - before
    status = Path("/proc/self/status")
    try:
        Path("/proc/self/clear_refs").write_text("5")  # the peak of the resident size begins anew
        before = _peak_resident(status)
        call()
        return _peak_resident(status) - before
    except (OSError, StopIteration):
        return None


def _peak_resident(status: Path) -> int:
    line = next(line for line in status.read_text().splitlines() if line.startswith("VmHWM"))
    return int(line.split()[1]) * 1024
