"""``lightvlm bench decode``: steps of a whole decoder on long caches, ours and transformers', and what each holds.

Caches are synthesised, not read from a prompt (`decode_caches.py`), so that any length costs seconds. A step is one
token for every row: embedding, all layers, logits, through the model's forward as generate() calls it. All candidates
take turns, and a cache grows by the few tokens that are decoded on it. Rows of one layer's attention follow, measured
as ``bench ops`` does. With ``--generate``, whole answers instead: `decode_generate.py`.
"""

from __future__ import annotations

import argparse
import math
import sys
import time
from collections.abc import Iterator
from typing import TYPE_CHECKING, Any

import torch

from . import decode_generate, floors
from .cases import Case
from .cases.decode_attention import of_size
from .common import describe
from .cuda_device import CudaDevice
from .decode_caches import BITS
from .decode_steps import VOCABULARY, room, sizes, steps
from .decoder import GEOMETRIES, geometry_of
from .jobs import TIME_IS_OVER, problem, skipped
from .measure import Bench, measure
from .timing import Effort

if TYPE_CHECKING:
    from rich.table import Table

Row = dict[str, Any]


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Options of the benchmark."""
    parser.add_argument("--geometry", choices=sorted(GEOMETRIES), default="qwen2.5-0.5b")
    parser.add_argument("--layers", type=int, default=None, help="fewer layers than the geometry has")
    parser.add_argument(
        "--vocabulary", type=int, help=f"tokens that the model knows (default: {VOCABULARY}; tiny: 1024)"
    )
    parser.add_argument("--tokens", type=int, nargs="+", default=[8192, 32768], help="that a cache holds")
    parser.add_argument("--batch", type=int, nargs="+", default=[1, 8, 32])
    parser.add_argument("--bits", choices=BITS, nargs="+", default=["16", "8", "4", "4/2"])
    parser.add_argument(
        "--loop",
        action="store_true",
        help="also with the steps of lightvlm.generate, on a GPU a CUDA graph",
    )
    parser.add_argument("--steps", type=int, default=4, help="tokens decoded in a round, timed together")
    parser.add_argument("--dtype", choices=["float32", "float16", "bfloat16"], default="bfloat16")
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--threads", type=int, default=None)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument(
        "--case-seconds",
        type=float,
        default=120.0,
        help="fewer rounds, down to 3, for caches whose rounds take longer than this together",
    )
    parser.add_argument("--seconds", type=float, default=math.inf, help="sizes left after this are skipped")
    parser.add_argument(
        "--attention",
        action=argparse.BooleanOptionalAction,
        default=True,
        help="rows of one layer's attention",
    )
    decode_generate.add_arguments(parser)


def run(args: argparse.Namespace) -> dict[str, Any]:
    """Run the benchmark; returns the JSON object of ``lightvlm bench decode``."""
    _check(args)
    if args.threads is not None:
        torch.set_num_threads(args.threads)
    about = describe(args.device)  # of the code that runs, whatever happens to the tree meanwhile
    if args.generate is not None:
        return {"kind": "decode", **about, "rows": decode_generate.run(args)}
    ceilings = floors.ceilings_of(torch.device(args.device))
    deadline = time.monotonic() + args.seconds
    rows = list(steps(args, ceilings, deadline))
    if args.attention:
        rows += _attention(args, ceilings, deadline)
    for row in rows:
        if "error" in row:
            print(f"{row['method']}, {row['case']}: {row['error']}", file=sys.stderr)
    return {"kind": "decode", **about, "ceilings": floors.describe(ceilings), "rows": rows}


def exit_status(result: dict[str, Any]) -> int:
    """1 where a candidate was wrong or failed."""
    return int(any("error" in row for row in result["rows"]))


def _check(args: argparse.Namespace) -> None:
    smallest = {
        "rounds": args.rounds,
        "steps": args.steps,
        "tokens": min(args.tokens),
        "batch": min(args.batch),
    }
    for name in ("layers", "threads", "vocabulary"):
        if getattr(args, name) is not None:
            smallest[name] = getattr(args, name)
    least = {"tokens": 256, "vocabulary": 16}  # below, nothing would be packed; and ids up to 7 are used
    for name, value in smallest.items():
        if value < least.get(name, 1):
            raise ValueError(f"--{name} must be at least {least.get(name, 1)}, got {value}")
    if torch.device(args.device).type == "cuda" and not torch.cuda.is_available():
        raise ValueError(f"--device {args.device}: this torch has no CUDA device")
    for name in ("case_seconds", "seconds"):
        if not getattr(args, name) > 0:
            raise ValueError(f"--{name.replace('_', '-')} must be above 0, got {getattr(args, name)}")
    if room(args) > 96:
        raise ValueError(
            f"--rounds + 1 times --steps must be at most 95, before tokens are packed, got {room(args) - 1}"
        )
    decode_generate.check(args)


def _attention(args: argparse.Namespace, ceilings: floors.Ceilings, deadline: float) -> Iterator[Row]:
    """One layer's decode attention in each number of bits against torch's and transformers', keys in 16 bits."""
    device = torch.device(args.device)
    cuda = None
    if device.type == "cuda":
        device = torch.device("cuda", device.index or 0)
        cuda = CudaDevice(device)
    bench = Bench(device, Effort(args.rounds, args.case_seconds), ceilings, cuda)
    for tokens, batch in sizes(args):
        if time.monotonic() > deadline:
            yield skipped("decode_attention", f"{batch} x {tokens} tokens", TIME_IS_OVER)
            continue
        listed = of_size(batch, tokens, args.geometry, geometry_of(args.geometry), device)
        try:
            for case in listed:
                if case.parameters["mass"] == "no" and case.parameters["bits"] in args.bits:
                    yield from _measured(case, bench)
        except Exception as error:
            yield problem("decode_attention", f"{batch} x {tokens} tokens", error)


@torch.inference_mode()
def _measured(case: Case, bench: Bench) -> list[Row]:
    try:
        return measure("decode_attention", case, bench)
    except Exception as error:
        return [problem("decode_attention", case.name, error)]


def table(result: dict[str, Any]) -> Table:
    """One line for each row; a row without figures says why it has none."""
    from .decode_table import table as made

    return made(result)
