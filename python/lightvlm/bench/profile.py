"""What profilers see of the ops: the part of ``profile_ncu.sh`` and ``profile_nsys.sh`` that is not shell.

python -m lightvlm.bench.profile once FILE [options of bench ops]
    calls each op of each case once, warm, in an NVTX range and between cudaProfilerStart and Stop; writes what
    was called to FILE.
python -m lightvlm.bench.profile report TOOL FOLDER [--reason TEXT] [options of bench ops]
    prints a JSON object from FOLDER/calls.json and FOLDER/kernels.csv. Where the profiler is missing, may not
    read the counters, or saw no kernel, its rows are those of ``bench ops`` instead: events and the computed
    roofline; "source" and "reason" say so.
"""

from __future__ import annotations

import argparse
import csv
import io
import json
import math
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import torch

from . import ops
from .cases import CASES, Sizes
from .floors import ceilings_of, floor_of
from .jobs import Job, split

Row = dict[str, Any]
TOOLS = ("ncu", "nsys")
FORBIDDEN = "ERR_NVGPUCTRPERM"
# ncu's metric, and what it is called here.
METRICS = {
    "gpu__time_duration.sum": "nanoseconds",
    "dram__bytes_read.sum": "dram_bytes_read",
    "dram__bytes_write.sum": "dram_bytes_written",
    "dram__throughput.avg.pct_of_peak_sustained_elapsed": "dram_percent",
    "lts__throughput.avg.pct_of_peak_sustained_elapsed": "l2_percent",
    "sm__throughput.avg.pct_of_peak_sustained_elapsed": "sm_percent",
    "sm__inst_executed_pipe_tensor.avg.pct_of_peak_sustained_active": "tensor_percent",
    "sm__warps_active.avg.pct_of_peak_sustained_active": "occupancy_percent",
    "launch__registers_per_thread": "registers",
    "launch__shared_mem_per_block_dynamic": "dynamic_shared_bytes",
    "l1tex__data_bank_conflicts_pipe_lsu.sum": "bank_conflicts",
}
_SCALES = {"": 1.0, "K": 1e3, "M": 1e6, "G": 1e9}
_TIMES = {
    "ns": 1.0,
    "us": 1e3,
    "ms": 1e6,
    "s": 1e9,
    "nsecond": 1.0,
    "usecond": 1e3,
    "msecond": 1e6,
    "second": 1e9,
}


def call_once(args: argparse.Namespace) -> list[Row]:
    """Calls each op of each case once under the profiler; what was called, with its floor."""
    device = torch.device(args.device)
    ceilings = ceilings_of(device)
    sizes = Sizes(device, tuple(args.tokens), tuple(args.batch), tuple(args.model), args.cache_mib << 20)
    called: list[Row] = []
    seen: set[tuple[str, str]] = set()
    with torch.inference_mode():
        for job in split(args.op, sizes):
            for case in _cases(job):
                if (job.op, case.name) in seen:
                    continue
                seen.add((job.op, case.name))
                for _ in range(2):
                    case.op()
                name = f"{job.op} | {case.name}"
                _under_profiler(case.op, name, device)
                floor, bound = floor_of(case, ceilings)
                called.append(
                    {"method": job.op, "case": case.name, "range": name, "bytes": case.bytes, "flops": case.flops,
                     "floor_microseconds": floor * 1e6, "floor_by": bound}
                )  # fmt: skip
    return called


def _cases(job: Job) -> Iterator[Any]:
    """Those that can be made; one that cannot is for ``bench ops`` to report."""
    try:
        yield from CASES[job.op](job.sizes)
    except RuntimeError as error:
        print(f"{job.op}, {job}: {error}", file=sys.stderr)


def _under_profiler(call: Any, name: str, device: torch.device) -> None:
    if device.type != "cuda":
        call()
        return
    torch.cuda.synchronize(device)
    torch.cuda.profiler.start()
    torch.cuda.nvtx.range_push(name)
    call()
    torch.cuda.synchronize(device)
    torch.cuda.nvtx.range_pop()
    torch.cuda.profiler.stop()


def report(tool: str, folder: Path, reason: str, args: argparse.Namespace) -> dict[str, Any]:
    """The JSON object; measures with events where the profiler gave nothing."""
    calls = _read_json(folder / "calls.json")
    csv_text, log = _read_text(folder / "kernels.csv"), _read_text(folder / "log")
    kernels = list((read_ncu if tool == "ncu" else read_nsys)(csv_text, calls))
    about = {"kind": "profile", "tool": tool}
    if FORBIDDEN in csv_text + log:
        reason = f"the driver does not let this user read the performance counters ({FORBIDDEN})"
    elif kernels:
        return {
            **about,
            "source": tool,
            "reason": None,
            "calls": with_kernel_times(calls, kernels),
            "kernels": kernels,
        }
    measured = ops.run(args)
    reason = reason or f"{tool} reported no kernel: {_last_line(log) or 'it said nothing'}"
    return {
        **about,
        **measured,
        "kind": "profile",
        "tool": tool,
        "source": "events and roofline",
        "reason": reason,
    }


def read_ncu(text: str, calls: Sequence[Row]) -> Iterator[Row]:
    """Kernels of ``ncu --csv --page raw``: a line of names, a line of units, a line for each kernel."""
    lines = text.splitlines()
    first = next((number for number, line in enumerate(lines) if line.startswith('"ID"')), None)
    if first is None:
        return
    names, units, *rows = csv.reader(lines[first:])
    for values in rows:
        if len(values) != len(names):
            continue
        found = dict(zip(names, values, strict=True))
        ranges = " ".join(value for name, value in found.items() if "Push/Pop" in name or "Range" in name)
        row: Row = {
            "kernel": found.get("Kernel Name", ""),
            "grid": found.get("Grid Size", ""),
            "block": found.get("Block Size", ""),
            "range": next((call["range"] for call in calls if call["range"] in ranges), None),
        }
        for metric, name in METRICS.items():
            if metric in found:
                row[name] = _number(found[metric], units[names.index(metric)])
        yield row


def read_nsys(text: str, calls: Sequence[Row]) -> Iterator[Row]:
    """Kernels in ranges of ``nsys stats --report nvtx_kern_sum --format csv``."""
    lines = text.splitlines()
    first = next((number for number, line in enumerate(lines) if line.startswith("NVTX Range,")), None)
    if first is None:
        return
    known = {call["range"] for call in calls}
    for found in csv.DictReader(io.StringIO("\n".join(lines[first:]))):
        name = (found.get("NVTX Range") or "").lstrip(":")
        if name in known:
            yield {
                "kernel": found.get("Kernel Name", ""),
                "range": name,
                "launches": _number(found.get("Kern Inst", ""), ""),
                "nanoseconds": _number(found.get("Total Time (ns)", ""), ""),
            }


def with_kernel_times(calls: Sequence[Row], kernels: Sequence[Row]) -> list[Row]:
    """The calls, each with the time that its kernels took together, and what share of it the floor is."""
    made = []
    for call in calls:
        times = [kernel.get("nanoseconds") for kernel in kernels if kernel["range"] == call["range"]]
        spent = sum(time for time in times if time is not None) / 1e3
        share = {"share_of_floor": call["floor_microseconds"] / spent} if spent and call["floor_by"] else {}
        made.append({**call, "kernel_microseconds": spent or None, "kernels": len(times), **share})
    return made


def _number(text: str, unit: str) -> float | None:
    """A figure as ncu and nsys write it, in bytes or nanoseconds where the unit is one of them."""
    try:
        value = float(text.replace(",", ""))
    except ValueError:
        return None
    if not math.isfinite(value):
        return None
    unit = unit.split("/")[0]
    if unit in _TIMES:
        return value * _TIMES[unit]
    if unit.lower().endswith("byte"):
        return value * _SCALES.get(unit[:-4].upper(), 1.0)
    return value


def _read_text(path: Path) -> str:
    return path.read_text(errors="replace") if path.exists() else ""


def _read_json(path: Path) -> list[Row]:
    try:
        found: list[Row] = json.loads(_read_text(path) or "[]")
        return found
    except json.JSONDecodeError:  # the profiled program was ended while it wrote
        return []


def _last_line(text: str) -> str:
    lines = [line.strip() for line in text.splitlines() if line.strip()]
    return lines[-1][:300] if lines else ""


def main(argv: Sequence[str] | None = None) -> int:
    """See the head of the file."""
    parser = argparse.ArgumentParser(prog="python -m lightvlm.bench.profile")
    commands = parser.add_subparsers(dest="command", required=True)
    once = commands.add_parser("once")
    once.add_argument("file", type=Path)
    reporting = commands.add_parser("report")
    reporting.add_argument("tool", choices=TOOLS)
    reporting.add_argument("folder", type=Path)
    reporting.add_argument("--reason", default="")
    for sub in (once, reporting):
        ops.add_arguments(sub)
        sub.set_defaults(device="cuda", tokens=[8192], batch=[1], model=["7b"], rounds=3, seconds=30.0)
    args = parser.parse_args(argv)
    ops.fill_in(args)
    if args.command == "once":
        args.file.write_text(json.dumps(call_once(args)))
        return 0
    print(json.dumps(report(args.tool, args.folder, args.reason, args), allow_nan=False))
    return 0


if __name__ == "__main__":
    sys.exit(main())
