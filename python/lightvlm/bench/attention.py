"""``lightvlm bench attention``: flash-attn's functions as this package offers them, against the kernels behind them.

Three questions: what the wrapper costs over the backend that it chooses; what importance costs over the call without
it; and whether a decoding step on a cache keeps up with SDPA on a preallocated one, which is given the fastest of its
forms, on one cache again and again and on many in turn. ``ratio`` above 1 is faster than the baseline.
"""

from __future__ import annotations

import argparse
import itertools
import math
import sys
import time
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import torch
import torch.nn.functional as F
from torch import Tensor

from .. import flash_attn_interface as fa
from ..attention.call import Call
from ..attention.choice import choose
from ..flops import attention_flops
from . import floors
from .cases import MODELS, Case, Geometry
from .cases._case import dtype_name, require_close
from .common import describe
from .cuda_device import CudaDevice
from .goals import CPU
from .jobs import TIME_IS_OVER, problem, skipped
from .measure import Bench, measure
from .timing import Effort

if TYPE_CHECKING:
    from rich.table import Table

Row = dict[str, Any]

WINDOW = 16
"""Rows that importance is taken from."""
IN_TURN = 256 << 20
"""Bytes of all the caches that take turns."""
_TOLERANCE = {torch.float32: 1e-4, torch.float16: 5e-3, torch.bfloat16: 4e-2}


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Options of the benchmark."""
    parser.add_argument("--model", choices=sorted(MODELS), nargs="+", default=["0.5b", "7b"])
    parser.add_argument("--tokens", type=int, nargs="+", default=[1024, 8192])
    parser.add_argument("--case", choices=sorted(CASES), nargs="+", default=sorted(CASES))
    parser.add_argument(
        "--dtype", choices=["float32", "float16", "bfloat16"], nargs="+", default=["bfloat16"]
    )
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--threads", type=int, default=None)
    parser.add_argument("--rounds", type=int, default=9)
    parser.add_argument("--seconds", type=float, default=math.inf, help="what is left after this is skipped")


def run(args: argparse.Namespace) -> dict[str, Any]:
    """Run the benchmark; returns the JSON object of ``lightvlm bench attention``."""
    _check(args)
    threads = torch.get_num_threads()
    if args.threads is not None:
        torch.set_num_threads(args.threads)
    try:
        with torch.inference_mode():
            return _run(args)
    finally:
        torch.set_num_threads(threads)


def _run(args: argparse.Namespace) -> dict[str, Any]:
    about = describe(args.device)
    device = torch.device(args.device)
    ceilings = floors.ceilings_of(device)
    cuda, name = None, CPU
    if device.type == "cuda":
        device = torch.device("cuda", device.index or 0)
        cuda, name = CudaDevice(device), torch.cuda.get_device_name(device)
    bench = Bench(device, Effort(args.rounds), ceilings, cuda, name, caches=("warm",))
    deadline = time.monotonic() + args.seconds
    rows: list[Row] = []
    for kind, model, tokens, dtype in itertools.product(args.case, args.model, args.tokens, args.dtype):
        rows += _rows(kind, model, tokens, getattr(torch, dtype), bench, deadline)
    for row in rows:
        if "error" in row:
            print(f"{row['method']}, {row['case']}: {row['error']}", file=sys.stderr)
    return {"kind": "attention", **about, "ceilings": floors.describe(ceilings), "rows": rows}


def table(result: dict[str, Any]) -> Table:
    """One line for each row."""
    from .ops_table import table as made

    return made(result)


def exit_status(result: dict[str, Any]) -> int:
    """1 where attention was wrong or failed."""
    return int(any("error" in row for row in result["rows"]))


def _rows(kind: str, model: str, tokens: int, dtype: torch.dtype, bench: Bench, deadline: float) -> list[Row]:
    heads = f"{MODELS[model].heads}/{MODELS[model].kv_heads} heads of {MODELS[model].head_dim}"
    name = f"{tokens} tokens, {heads} {dtype_name(dtype)} ({model})"
    if time.monotonic() > deadline:
        return [skipped(kind, name, TIME_IS_OVER)]
    try:
        case, backend = CASES[kind](name, MODELS[model], tokens, dtype, bench.device)
        return [row | {"backend": backend} for row in measure(kind, case, bench)]
    except Exception as error:  # one size's trouble is a row
        return [problem(kind, name, error)]


def _prompt(geometry: Geometry, tokens: int, dtype: torch.dtype, device: torch.device) -> list[Tensor]:
    """q, k, v of a prompt."""
    generator = torch.Generator(device).manual_seed(1)
    shapes = [(1, tokens, heads, geometry.head_dim) for heads in (geometry.heads, *[geometry.kv_heads] * 2)]
    return [torch.randn(shape, generator=generator, dtype=dtype, device=device) for shape in shapes]


def _cache(
    geometry: Geometry, tokens: int, dtype: torch.dtype, device: torch.device
) -> tuple[Tensor, Tensor]:
    """k and v, (1, tokens, Hkv, D)."""
    _, key, value = _prompt(geometry, tokens, dtype, device)
    return key, value


def _wrapper(
    name: str, geometry: Geometry, tokens: int, dtype: torch.dtype, device: torch.device
) -> tuple[Case, str]:
    """A causal prompt: the function against its backend, called without arguments to check."""
    q, k, v = _prompt(geometry, tokens, dtype, device)
    call = Call(q, k, v, tokens, tokens, geometry.head_dim**-0.5, right=0)
    backend = choose(call)
    query, key, value = (x.transpose(1, 2) for x in (q, k, v))

    def op() -> Any:
        return fa.flash_attn_func(q, k, v, causal=True)

    def verify() -> None:
        wanted = F.scaled_dot_product_attention(query, key, value, is_causal=True, enable_gqa=True)
        require_close(op(), wanted.transpose(1, 2), _TOLERANCE[dtype])

    case = Case(
        name,
        op,
        {f"the backend alone ({backend.name})": lambda: backend.run(call)},
        verify,
        flops=attention_flops(geometry.heads * geometry.head_dim, tokens),
        precision=dtype,
        parameters={"tokens": tokens, "batch": 1, "dtype": dtype_name(dtype)},
    )
    return case, backend.name


def _importance(
    name: str, geometry: Geometry, tokens: int, dtype: torch.dtype, device: torch.device
) -> tuple[Case, str]:
    """A causal prompt with importance from its last rows, against the same without."""
    q, k, v = _prompt(geometry, tokens, dtype, device)
    call = Call(q, k, v, tokens, tokens, geometry.head_dim**-0.5, right=0)

    def op() -> Any:
        return fa.flash_attn_func(q, k, v, causal=True, importance_window=WINDOW)

    def verify() -> None:
        rows = q[0, -WINDOW:].float().unflatten(1, (geometry.kv_heads, -1))
        logits = torch.einsum("wkgd,nkd->kgwn", rows, k[0].float()) * call.scale
        position = torch.arange(tokens, device=device)
        hidden = position > position[-WINDOW:, None]
        weights = logits.masked_fill(hidden, -math.inf).softmax(-1).flatten(0, 1).mean(0)
        wanted = weights.sum(0) / (~hidden).sum(0)
        require_close(op()[1][0] * tokens, wanted * tokens, _TOLERANCE[dtype])

    case = Case(
        name,
        op,
        {"without importance": lambda: fa.flash_attn_func(q, k, v, causal=True)},
        verify,
        flops=attention_flops(geometry.heads * geometry.head_dim, tokens)
        + 2 * WINDOW * tokens * geometry.heads * geometry.head_dim,
        precision=dtype,
        parameters={"tokens": tokens, "batch": 1, "window": WINDOW, "dtype": dtype_name(dtype)},
    )
    return case, choose(call).name


def _decode(
    name: str, geometry: Geometry, tokens: int, dtype: torch.dtype, device: torch.device
) -> tuple[Case, str]:
    """A decoding step that appends one token to a cache, against SDPA on a preallocated one that it is written into."""
    return _steps(name, geometry, tokens, dtype, device, caches=1)


def _decode_in_turn(
    name: str, geometry: Geometry, tokens: int, dtype: torch.dtype, device: torch.device
) -> tuple[Case, str]:
    """A step on each of so many caches that none is in the processor's cache when its turn comes. So it is in a model,
    whose weights and other layers come in between."""
    one = 2 * tokens * geometry.kv_heads * geometry.head_dim * dtype.itemsize
    caches = max(2, -(-IN_TURN // one))
    return _steps(f"{caches} x {name}", geometry, tokens, dtype, device, caches=caches)


def _steps(
    name: str, geometry: Geometry, tokens: int, dtype: torch.dtype, device: torch.device, *, caches: int
) -> tuple[Case, str]:
    room = tokens + 64
    stored = [_cache(geometry, room, dtype, device) for _ in range(caches)]
    q, k, v = _prompt(geometry, 1, dtype, device)
    lens = torch.tensor([tokens - 1], dtype=torch.int32, device=device)
    scale = geometry.head_dim**-0.5
    call = Call(q, *stored[0], 1, room, scale, lens=lens + 1)
    heads_first = [
        (key[:, :tokens].transpose(1, 2), value[:, :tokens].transpose(1, 2)) for key, value in stored
    ]
    grouped = q.view(1, geometry.kv_heads, -1, geometry.head_dim)

    def step(key: Tensor, value: Tensor) -> Tensor:
        found: Tensor = fa.flash_attn_with_kvcache(q, key, value, k, v, cache_seqlens=lens, causal=True)
        return found

    def op() -> list[Tensor]:
        return [step(*pair) for pair in stored]

    def products(key: Tensor, value: Tensor) -> Tensor:
        weights = (grouped @ key.transpose(2, 3) * scale).softmax(-1, dtype=torch.float32)
        return weights.to(dtype) @ value

    def after_write(attend: Callable[[Tensor, Tensor], Tensor]) -> Callable[[], object]:
        def call() -> list[Tensor]:
            found = []
            for (key, value), pair in zip(stored, heads_first, strict=True):
                key[:, tokens - 1 : tokens], value[:, tokens - 1 : tokens] = k, v
                found.append(attend(*pair))
            return found

        return call

    forms: dict[str, Callable[[Tensor, Tensor], Tensor]] = {
        "SDPA": lambda key, value: F.scaled_dot_product_attention(
            q.transpose(1, 2), key, value, enable_gqa=True
        ),
        "SDPA, group as queries": lambda key, value: F.scaled_dot_product_attention(grouped, key, value),
        "matmul, softmax, matmul": products,
    }

    def verify() -> None:
        for found, pair in zip(op(), heads_first, strict=True):
            wanted = F.scaled_dot_product_attention(grouped, *pair)
            require_close(found.view(grouped.shape), wanted, _TOLERANCE[dtype])

    case = Case(
        name,
        op,
        {form: after_write(attend) for form, attend in forms.items()},
        verify,
        bytes=2 * caches * tokens * geometry.kv_heads * geometry.head_dim * dtype.itemsize,
        parameters={"tokens": tokens, "batch": 1, "caches": caches, "dtype": dtype_name(dtype)},
    )
    return case, choose(call).name


CASES: dict[str, Callable[[str, Geometry, int, torch.dtype, torch.device], tuple[Case, str]]] = {
    "flash_attn_func": _wrapper,
    "importance_window": _importance,
    "flash_attn_with_kvcache": _decode,
    "flash_attn_with_kvcache_in_turn": _decode_in_turn,
}


def _check(args: argparse.Namespace) -> None:
    smallest = {"tokens": (min(args.tokens), 2 * WINDOW), "rounds": (args.rounds, 1)}
    if args.threads is not None:
        smallest["threads"] = (args.threads, 1)
    for name, (value, least) in smallest.items():
        if value < least:
            raise ValueError(f"--{name} must be at least {least}, got {value}")
    if not args.seconds > 0:
        raise ValueError(f"--seconds must be above 0, got {args.seconds}")
    if torch.device(args.device).type == "cuda" and not torch.cuda.is_available():
        raise ValueError(f"--device {args.device}: this torch has no CUDA device")
