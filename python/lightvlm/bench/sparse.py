"""``lightvlm bench sparse``: ZipVL's prefill, in which only some tokens attend, against full causal attention.

One layer's attention, from probes to output, on inputs that need a given share of the tokens (`sparse_inputs.py`); and
with ``--decoder`` the prefill of a whole decoder. Beside each ratio stands what it could be at most: attention of a
share r of the tokens does r^2 of the FLOPs, probes come on top, and a decoder has work besides attention.
"""

from __future__ import annotations

import argparse
import math
import statistics
import sys
import time
from collections.abc import Callable, Iterator
from typing import TYPE_CHECKING, Any

import torch

from ..flops import linear_weights, prefill_flops
from ..models import find_adapter
from ..plan import Plan
from ..runtime import attach
from . import floors
from .common import describe
from .cuda_device import CudaDevice
from .decoder import GEOMETRIES, build_model, interleaved
from .jobs import TIME_IS_OVER, problem, skipped
from .measure import Bench, paired
from .sparse_inputs import GivenShare
from .sparse_layers import amdahl, layers
from .timing import Effort

if TYPE_CHECKING:
    from transformers import PreTrainedModel

Row = dict[str, Any]

SHARES = (0.528, 0.421, 0.286)
"""Of the tokens that attend, as the paper (arXiv 2410.08584) reports them for its models and tasks."""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Options of the benchmark."""
    parser.add_argument("--geometry", choices=sorted(GEOMETRIES), default="qwen2.5-0.5b")
    parser.add_argument("--tokens", type=int, nargs="+", default=[16384, 32768])
    parser.add_argument("--batch", type=int, default=1)
    parser.add_argument(
        "--share", type=float, nargs="+", default=list(SHARES), help="of the tokens that attend"
    )
    parser.add_argument("--tau", type=float, default=0.975, help="of the attention that they hold")
    parser.add_argument(
        "--decoder",
        action=argparse.BooleanOptionalAction,
        help="also the prefill of a whole decoder (default: on a GPU)",
    )
    parser.add_argument("--layers", type=int, help="of that decoder, fewer than the geometry has")
    parser.add_argument("--dtype", choices=["float32", "float16", "bfloat16"], default="bfloat16")
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--threads", type=int, default=None)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--seconds", type=float, default=math.inf, help="what is left after this is skipped")


def run(args: argparse.Namespace) -> dict[str, Any]:
    """Run the benchmark; returns the JSON object of ``lightvlm bench sparse``."""
    _check(args)
    if args.threads is not None:
        torch.set_num_threads(args.threads)
    about = describe(args.device)  # of the code that runs, whatever happens to the tree meanwhile
    device = torch.device(args.device)
    ceilings = floors.ceilings_of(device)
    cuda = None
    if device.type == "cuda":
        device = torch.device("cuda", device.index or 0)
        cuda = CudaDevice(device)
    bench = Bench(device, Effort(args.rounds), ceilings, cuda, caches=("warm",))
    deadline = time.monotonic() + args.seconds
    rows = list(layers(args, bench, deadline))
    if args.decoder if args.decoder is not None else cuda is not None:
        rows += _decoders(args, deadline)
    for row in rows:
        if "error" in row:
            print(f"{row['method']}, {row['case']}: {row['error']}", file=sys.stderr)
    return {"kind": "sparse", **about, "ceilings": floors.describe(ceilings), "rows": rows}


def exit_status(result: dict[str, Any]) -> int:
    """1 where attention was wrong or failed."""
    return int(any("error" in row for row in result["rows"]))


def _check(args: argparse.Namespace) -> None:
    smallest = {"rounds": args.rounds, "batch": args.batch}
    for name in ("layers", "threads"):
        if getattr(args, name) is not None:
            smallest[name] = getattr(args, name)
    for name, value in smallest.items():
        if value < 1:
            raise ValueError(f"--{name} must be at least 1, got {value}")
    if min(args.tokens) < 512:
        raise ValueError(f"--tokens must be at least 512, got {min(args.tokens)}")
    for name, values in (("share", args.share), ("tau", [args.tau])):
        for value in values:
            if not 0 < value < 1:
                raise ValueError(f"--{name} must be between 0 and 1, got {value}")
    if not args.seconds > 0:
        raise ValueError(f"--seconds must be above 0, got {args.seconds}")
    if torch.device(args.device).type == "cuda" and not torch.cuda.is_available():
        raise ValueError(f"--device {args.device}: this torch has no CUDA device")


@torch.inference_mode()
def _decoders(args: argparse.Namespace, deadline: float) -> Iterator[Row]:
    """Prefill of text: ZipVL asks no images of it. The share is given, as random weights attend to everything."""
    model = build_model(args.geometry, args.layers, getattr(torch, args.dtype), args.device)
    for tokens in args.tokens:
        case = f"{args.geometry}, {args.layers or GEOMETRIES[args.geometry][1]} layers, {args.batch} x {tokens} tokens"
        if time.monotonic() > deadline:
            yield skipped("zipvl", case, TIME_IS_OVER)
            continue
        try:
            yield from _decoder(args, model, f"{case}, {args.dtype}", tokens)
        except Exception as error:
            yield problem("zipvl", case, error)


def _decoder(args: argparse.Namespace, model: PreTrainedModel, case: str, tokens: int) -> Iterator[Row]:
    generator = torch.Generator().manual_seed(1)
    ids = torch.randint(8, 1024, (args.batch, tokens), generator=generator).to(args.device)
    reports: dict[float, Any] = {}

    def full() -> None:
        model(input_ids=ids, use_cache=True, logits_to_keep=1)

    def sparse(share: float) -> Callable[[], None]:
        def call() -> None:
            plan = Plan(prefill=GivenShare(tau=args.tau, share=share, min_tokens=1))
            with attach(model, plan) as handle:
                full()
            reports[share] = handle.report()

        return call

    baseline = "transformers sdpa, dynamic cache"
    calls = {baseline: full, **{share: sparse(share) for share in args.share}}
    times = interleaved(calls, args.rounds, args.device)
    adapter = find_adapter(model)
    linear = 2 * args.batch * tokens * sum(map(linear_weights, adapter.layers))
    whole = prefill_flops(adapter, [[tokens] * args.batch] * len(adapter.layers))
    seconds = {name: statistics.median(values) for name, values in times.items()}
    for share in args.share:
        report = reports[share]
        part = 1 - linear / whole
        attended = statistics.mean(report.attending_share)
        yield {
            "case": f"{case}, {share:.1%} attend",
            "method": "zipvl",
            "baseline": baseline,
            "seconds": seconds[share],
            "baseline_seconds": seconds[baseline],
            "ratio": paired(times[baseline], times[share]),
            "attending_share": attended,
            "flops_reduction": 1 - report.attention_flops_share,
            "attention_share_of_decoder": part,
            "decoder_ceiling": amdahl(part, 1 / report.attention_flops_share),
            "op_seconds": report.op_seconds,
            "stepped_aside": report.stepped_aside,
            "runs": {baseline: times[baseline], "zipvl": times[share]},
        }
