"""``lightvlm bench sparse``: ZipVL's prefill, in which only some tokens attend, against full causal attention.

One layer's attention, from probes to output, on inputs that need a given share of the tokens (`sparse_inputs.py`); and
with ``--decoder`` the prefill of a whole decoder. Beside each ratio stands what it could be at most: attention of a
share r of the tokens does r^2 of the FLOPs, probes come on top, and a decoder has work besides attention.
"""

from __future__ import annotations

import argparse
import itertools
import math
import statistics
import sys
import time
from collections.abc import Callable, Iterator
from typing import TYPE_CHECKING, Any

import torch
import torch.nn.functional as F
from torch import Tensor

from ..flops import attention_flops, linear_weights, prefill_flops
from ..models import find_adapter
from ..plan import Plan
from ..runtime import attach
from ..sparse_attention import selected_attention
from . import floors
from .cases._case import Case, Geometry, require
from .common import describe
from .cuda_device import CudaDevice
from .decoder import GEOMETRIES, build_model, interleaved
from .jobs import TIME_IS_OVER, failed, skipped
from .measure import Bench, measure, paired
from .memory import is_out_of_memory
from .sparse_inputs import GivenShare, Inputs, inputs_with, share_of
from .timing import Effort, time_on_cpu, time_on_cuda

if TYPE_CHECKING:
    from transformers import PreTrainedModel

Row = dict[str, Any]

SHARES = (0.528, 0.421, 0.286)
"""Of the tokens that attend, as the paper (arXiv 2410.08584) reports them for its models and tasks."""
_CHECKED = 8  # rows whose attention is computed in float64


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
    rows = list(_layers(args, bench, deadline))
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


def geometry_of(name: str) -> Geometry:
    """A decoder's sizes, as cases want them."""
    width, layers, heads, kv_heads, _ = GEOMETRIES[name]
    return Geometry(width, layers, heads, kv_heads, width // heads)


def attention_share(name: str, tokens: int) -> float:
    """Of a decoder's prefill FLOPs, those of attention's two products."""
    width, _, heads, kv_heads, mlp = GEOMETRIES[name]
    head = width // heads
    weights = width * head * (2 * heads + 2 * kv_heads) + 3 * width * mlp
    products = attention_flops(width, tokens)
    return products / (products + 2 * weights * tokens)


def amdahl(share: float, ratio: float) -> float:
    """How many times faster the whole is, where a share of it is so many times faster."""
    return 1 / (1 - share + share / ratio)


# -- one layer's attention ---------------------------------------------------------------------------------------------


@torch.inference_mode()
def _layers(args: argparse.Namespace, bench: Bench, deadline: float) -> Iterator[Row]:
    geometry, dtype = geometry_of(args.geometry), getattr(torch, args.dtype)
    for tokens, share in itertools.product(args.tokens, args.share):
        heads = f"{geometry.heads}/{geometry.kv_heads} heads of {geometry.head_dim}"
        name = f"{args.batch} x {tokens} tokens, {heads}, {args.dtype}, {share:.1%} attend"
        if time.monotonic() > deadline:
            yield skipped("zipvl attention", name, TIME_IS_OVER)
            continue
        try:
            found = inputs_with(share, args.tau, args.batch, tokens, geometry, dtype, bench.device)
            yield from _layer(args, bench, name, found)
        except Exception as error:  # one size's trouble is a row
            if is_out_of_memory(error):
                yield skipped("zipvl attention", name, "needs more memory than there is")
            else:
                said = " ".join(str(error).split())[:500]
                yield failed("zipvl attention", name, f"{type(error).__name__}: {said}")


def _layer(args: argparse.Namespace, bench: Bench, name: str, inputs: Inputs) -> list[Row]:
    share = share_of(inputs.choose())
    batch, heads, tokens, width = inputs.query.shape
    full = batch * attention_flops(heads * width, tokens)
    probes = inputs.sparse.part.probe_rows(tokens)
    # the products of the probe rows with all keys, which is what scores cost
    probing = batch * 2 * len(probes) * tokens * heads * width
    flops = batch * attention_flops(heads * width, round(share * tokens)) + probing
    case = Case(
        name,
        inputs.attend,
        baselines(inputs),
        lambda: verify(inputs),
        flops=flops,
        precision=inputs.query.dtype,
    )
    rows = measure("zipvl attention", case, bench)
    alone = _attention_alone(inputs, bench)
    part = attention_share(args.geometry, tokens)
    for row in rows:
        overhead = max(0.0, row["seconds"] - alone)
        row |= {
            "tau": args.tau,
            "attending_share": share,
            "flops_full": full,
            "flops_reduction": 1 - share**2,
            "probe_flops_share": probing / full,
            "attention_seconds": alone,
            "overhead_seconds": overhead,
            "ceiling": 1 / (share**2 + probing / full),
            "ceiling_with_overhead": 1 / (share**2 + overhead / row["baseline_seconds"]),
            "attention_share_of_decoder": part,
            "decoder_ratio": amdahl(part, row["ratio"]),
            "decoder_ceiling": amdahl(part, 1 / share**2),
        }
    return rows


def baselines(inputs: Inputs) -> dict[str, Callable[[], object]]:
    """Full causal attention, as torch has it on the device."""
    query, key, value = inputs.query, inputs.key, inputs.value
    group = query.shape[1] // key.shape[1]

    def grouped() -> Tensor:
        return F.scaled_dot_product_attention(query, key, value, is_causal=True, enable_gqa=group > 1)

    def repeated() -> Tensor:
        keys, values = (x.repeat_interleave(group, dim=1) for x in (key, value))
        return F.scaled_dot_product_attention(query, keys, values, is_causal=True)

    if query.device.type != "cuda":
        return {"SDPA, causal, enable_gqa": grouped, "SDPA, causal, heads repeated": repeated}
    from torch.nn.attention import SDPBackend, sdpa_kernel

    def with_backend(backend: SDPBackend) -> Callable[[], Tensor]:
        def call() -> Tensor:
            with sdpa_kernel(backend):
                return grouped()

        return call

    found: dict[str, Callable[[], object]] = {}
    for name, backend in (("flash", SDPBackend.FLASH_ATTENTION), ("cuDNN", SDPBackend.CUDNN_ATTENTION)):
        call = with_backend(backend)
        try:
            call()
        except RuntimeError as error:
            if is_out_of_memory(error):
                raise
            continue  # this backend does not take these inputs
        found[f"SDPA, causal, {name}"] = call
    return found or {"SDPA, causal": grouped}


def verify(inputs: Inputs) -> None:
    """Some chosen rows of the output against float64, and zeros where a token was not chosen.

    Raises:
        AssertionError: it is something else.
    """
    out, chosen = inputs.attend(), inputs.chosen()
    group = inputs.query.shape[1] // inputs.key.shape[1]
    fine = 1e-4 if out.dtype == torch.float32 else 2e-2
    for row in sorted({0, len(out) - 1}):
        tokens = chosen.index[row, : int(chosen.count[row])].long()
        at = torch.linspace(0, len(tokens) - 1, _CHECKED, device=tokens.device).long()
        key, value = (
            x[row, :, tokens].double().repeat_interleave(group, 0) for x in (inputs.key, inputs.value)
        )
        query = inputs.query[row, :, tokens[at]].double()
        weights = query @ key.mT * query.shape[-1] ** -0.5
        later = torch.arange(len(tokens), device=tokens.device) > at[:, None]
        exact = (weights.masked_fill(later, -torch.inf).softmax(-1) @ value).transpose(0, 1)
        error = (out[row, tokens[at]] - exact).abs().max()
        require(bool(error <= fine * exact.abs().max()), f"attention of chosen tokens is off by {error:.2g}")
        others = chosen.inverse[row] < 0
        require(not bool(out[row][others].any()), "a token that was not chosen has an output")


def _attention_alone(inputs: Inputs, bench: Bench) -> float:
    """Seconds of gathers and attention, the choice being made."""
    query, key, value = (x.transpose(1, 2) for x in (inputs.query, inputs.key, inputs.value))
    chosen = inputs.chosen()

    def call() -> Tensor:
        return selected_attention(query, key, value, chosen, None)

    if bench.cuda is None:
        return statistics.median(time_on_cpu({"attention": call}, bench.effort)["attention"])
    return statistics.median(
        time_on_cuda({"attention": call}, bench.effort, bench.cuda, cold=False).best("attention")
    )


# -- a whole decoder ---------------------------------------------------------------------------------------------------


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
            if is_out_of_memory(error):
                yield skipped("zipvl", case, "needs more memory than there is")
            else:
                said = " ".join(str(error).split())[:500]
                yield failed("zipvl", case, f"{type(error).__name__}: {said}")


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
