"""``lightvlm bench ops``: each native op against the fastest other way to the same result.

Every call is checked against its baselines first. Then op and baselines take turns (`timing.py` says how they are
timed); ``ratio`` is the median over rounds of the fastest baseline's time over the op's. Beside each figure stands
the floor, what bytes or FLOPs cost on the device at least (`floors.py`), and the goal, if any (`goals.py`).
"""

from __future__ import annotations

import argparse
import functools
import math
import statistics
import sys
import time
from collections.abc import Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch

from . import floors
from .cases import CASES, MODELS, Sizes
from .common import describe
from .cuda_device import CudaDevice
from .gpu_state import gpu_state
from .isolate import Send, in_processes
from .jobs import DeviceLost, Job, Row, failed, run_job, skipped, split
from .measure import Bench
from .timing import CACHES, Effort, time_on_cuda

if TYPE_CHECKING:
    from rich.table import Table

GPU_TOKENS, GPU_BATCHES, GPU_MODELS = (2048, 8192, 32768, 131072), (1, 8, 32), ("7b", "26b")
_SILENCE = 120.0  # seconds that a case may take before its process counts as hung


@dataclass(frozen=True)
class Options:
    """What every process of a run has to know."""

    device: str
    threads: int | None
    effort: Effort
    caches: tuple[str, ...]
    nvtx: bool
    deadline: float

    def bench(self) -> Bench:
        """Ready to measure, in this process."""
        device = torch.device(self.device)
        if device.type != "cuda":
            return Bench(device, self.effort, floors.ceilings_of(device))
        device = torch.device("cuda", device.index or 0)
        cuda = CudaDevice(device, nvtx=self.nvtx)
        name = torch.cuda.get_device_name(device)
        return Bench(device, self.effort, floors.ceilings_of(device), cuda, name, self.caches)


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Options of the benchmark."""
    parser.add_argument("--op", choices=sorted(CASES), nargs="+", default=sorted(CASES))
    parser.add_argument(
        "--tokens",
        type=int,
        nargs="+",
        help="default: what each op's cases find telling; on a GPU 2k to 128k",
    )
    parser.add_argument("--batch", type=int, nargs="+", help="default: 1; on a GPU 1, 8 and 32")
    parser.add_argument(
        "--model", choices=sorted(MODELS), nargs="+", help="default: 0.5b and 7b; on a GPU 7b, 26b"
    )
    parser.add_argument(
        "--cache-mib", type=int, help="size of each cache for compact_kv_, in MiB (default: 256)"
    )
    parser.add_argument(
        "--quick", action="store_true", help="small sizes and two rounds, to see that all works"
    )
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--threads", type=int, default=None)
    parser.add_argument("--rounds", type=int, help="how often each call is timed (default: 9; on a GPU 5)")
    parser.add_argument(
        "--case-seconds",
        type=float,
        default=3.0,
        help="fewer rounds, down to 3, for a case that takes longer than this",
    )
    parser.add_argument("--seconds", type=float, default=math.inf, help="what is left after this is skipped")
    parser.add_argument(
        "--cache", choices=CACHES, nargs="+", default=list(CACHES), help="state of a GPU's L2"
    )
    parser.add_argument(
        "--isolate",
        action=argparse.BooleanOptionalAction,
        help="measure in a process of its own, so that a crash costs one op (default: on a GPU)",
    )
    parser.add_argument("--nvtx", action="store_true", help="name ranges for a profiler")


def run(args: argparse.Namespace) -> dict[str, Any]:
    """Run the benchmark; returns the JSON object of ``lightvlm bench ops``."""
    fill_in(args)
    device = torch.device(args.device)
    effort = Effort(args.rounds, args.case_seconds)
    deadline = time.monotonic() + args.seconds
    options = Options(args.device, args.threads, effort, tuple(args.cache), args.nvtx, deadline)
    tokens = tuple(args.tokens) if args.tokens is not None else None
    sizes = Sizes(device, tokens, tuple(args.batch), tuple(args.model), args.cache_mib << 20)
    jobs = split(args.op, sizes) if device.type == "cuda" else [Job(op, sizes) for op in args.op]
    about = describe(args.device)  # of the code that runs, whatever happens to the tree meanwhile
    before = gpu_state(device.index or 0) if device.type == "cuda" else None
    rows: list[Row] = []
    measure_all = _in_processes if args.isolate else _here
    for kind, content in measure_all(options, jobs):
        if kind == "about":
            about |= content
            continue
        rows.append(content)
        if "error" in content:
            print(f"{content['method']}, {content['case']}: {content['error']}", file=sys.stderr)
    if device.type == "cuda":
        about["gpu"] = {"before": before, "after": gpu_state(device.index or 0)}
    return {"kind": "ops", **about, "rows": rows}


def exit_status(result: dict[str, Any]) -> int:
    """1 where an op was wrong or failed."""
    return int(any("error" in row for row in result["rows"]))


def fill_in(args: argparse.Namespace) -> None:
    """Checks the options and gives each its default for the device and for --quick."""
    device = torch.device(args.device)
    on_gpu = device.type == "cuda"
    if on_gpu and not torch.cuda.is_available():
        raise ValueError(f"--device {args.device}: this torch has no CUDA device")
    if args.quick:
        defaults: dict[str, Any] = {
            "tokens": [256], "batch": [1], "model": ["0.5b"], "cache_mib": 4, "rounds": 2,
        }  # fmt: skip
    else:
        defaults = {
            "tokens": list(GPU_TOKENS) if on_gpu else None,
            "batch": list(GPU_BATCHES) if on_gpu else [1],
            "model": list(GPU_MODELS) if on_gpu else ["0.5b", "7b"],
            "cache_mib": 256,
            "rounds": 5 if on_gpu else 9,
        }
    for name, value in {**defaults, "isolate": on_gpu}.items():
        if getattr(args, name) is None:
            setattr(args, name, value)
    smallest = {"rounds": args.rounds, "cache-mib": args.cache_mib, "batch": min(args.batch)}
    if args.tokens is not None:
        smallest["tokens"] = min(args.tokens)
    if args.threads is not None:
        smallest["threads"] = args.threads
    for name, value in smallest.items():
        if value < 1:
            raise ValueError(f"--{name} must be at least 1, got {value}")
    for name in ("case_seconds", "seconds"):
        if not getattr(args, name) > 0:
            raise ValueError(f"--{name.replace('_', '-')} must be above 0, got {getattr(args, name)}")


def _here(options: Options, jobs: list[Job]) -> Iterator[tuple[str, Any]]:
    """("row", row) and ("about", what is to say of the whole run), all from this process."""
    found: list[tuple[str, Any]] = []

    def send(kind: str, number: int, content: Any) -> None:
        if kind in ("row", "about"):
            found.append((kind, content))

    done = work(options, set(), list(enumerate(jobs)), send)
    yield from found
    for job in jobs[done:]:
        yield "row", skipped(job.op, str(job), "the device was lost, and the process has no other")


def _in_processes(options: Options, jobs: list[Job]) -> Iterator[tuple[str, Any]]:
    """The same, the work being done in other processes."""
    seen: set[tuple[str, str]] = set()
    messages = in_processes(
        functools.partial(work, options, seen),
        jobs,
        group=lambda job: job.op,
        silence=_SILENCE,
        deadline=options.deadline + 5,
    )
    for kind, number, content in messages:
        if kind == "problem":
            yield "row", failed(jobs[number].op, str(jobs[number]), content)
        elif kind == "dropped":
            yield "row", skipped(jobs[number].op, str(jobs[number]), content)
        else:
            if kind == "row":
                seen.add((content["method"], content["case"]))
            yield kind, content


def work(options: Options, seen: set[tuple[str, str]], jobs: list[tuple[int, Job]], send: Send) -> int:
    """Does numbered jobs, see `isolate.Work`; returns how many. Fewer than all: the process is not to go on."""
    threads = torch.get_num_threads()
    if options.threads is not None:
        torch.set_num_threads(options.threads)
    try:
        with torch.inference_mode():
            bench = options.bench()
            if bench.cuda is not None:
                send("about", -1, {"empty_kernel_microseconds": _empty_kernel(bench)})
            for done, (number, job) in enumerate(jobs):
                send("begin", number, None)
                try:
                    for row in run_job(job, bench, seen, options.deadline):
                        send("row", number, row)
                except DeviceLost:
                    send("restart", number, None)
                    return done + 1
                send("about", number, {"ceilings": floors.describe(bench.ceilings)})
                send("end", number, None)
        return len(jobs)
    finally:
        torch.set_num_threads(threads)


def _empty_kernel(bench: Bench) -> dict[str, float]:
    """What a call costs that does next to nothing, timed as the ops are: no figure can be much below it."""
    assert bench.cuda is not None
    one = torch.zeros((), device=bench.device)
    found = {}
    for cache in bench.caches:
        runs = time_on_cuda({"empty": one.zero_}, bench.effort, bench.cuda, cold=cache == "cold")
        found[f"{cache} eager"] = statistics.median(runs.eager["empty"]) * 1e6
        if "empty" in runs.graph:
            found[f"{cache} graph"] = statistics.median(runs.graph["empty"]) * 1e6
    return found


def table(result: dict[str, Any]) -> Table:
    """One line for each row."""
    from .ops_table import table as made

    return made(result)
