"""One layer's attention under ZipVL against full causal attention: see `sparse.py`."""

from __future__ import annotations

import argparse
import itertools
import statistics
import time
from collections.abc import Callable, Iterator
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from ..flops import attention_flops
from ..sparse_attention import selected_attention
from .cases._case import Case, require
from .decoder import GEOMETRIES, geometry_of
from .jobs import TIME_IS_OVER, problem, skipped
from .measure import Bench, measure
from .memory import is_out_of_memory
from .sparse_inputs import Inputs, inputs_with, share_of
from .timing import time_on_cpu, time_on_cuda

Row = dict[str, Any]

_CHECKED = 8  # rows whose attention is computed in float64


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


@torch.inference_mode()
def layers(args: argparse.Namespace, bench: Bench, deadline: float) -> Iterator[Row]:
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
            yield problem("zipvl attention", name, error)


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
