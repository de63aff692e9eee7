"""``lightvlm bench decoder``: prefill of a decoder of real geometry, with a plan and without.

Weights are random: time does not depend on them. Image features are given, so that the vision tower is not in the
figure; a method that reads the tower's attention gets pixels, and so do baselines of its own, with a tower of the
smallest size. Baselines and methods run interleaved in one process on the same inputs; the ratio is against the
fastest baseline, and all of them are in the rows. Beside each ratio stand the ceiling that FLOPs allow, and how much
of the baseline's time the method's own work takes.
"""

from __future__ import annotations

import argparse
import statistics
import time
from collections.abc import Callable
from types import SimpleNamespace
from typing import TYPE_CHECKING, Any

import torch

from ..catalogue import parse_options
from ..flops import prefill_flops
from ..methods import METHODS
from ..models import find_adapter
from ..report import Report
from ..runtime import attach
from . import budgets, fidelity_rows
from .cases._case import Geometry
from .common import describe
from .fidelity_questions import needs_pixels
from .prompts import Prompts

if TYPE_CHECKING:
    from rich.table import Table
    from transformers import PreTrainedModel

    from .budgets import Setting

# Text decoders: width, layers, query heads, key/value heads, MLP width.
GEOMETRIES = {
    "tiny": (128, 4, 4, 2, 256),
    "qwen2.5-0.5b": (896, 24, 14, 2, 4864),
    "qwen2.5-vl-3b": (2048, 36, 16, 2, 11008),
    "qwen2.5-vl-7b": (3584, 28, 28, 4, 18944),
}
_IMAGE, _VOCABULARY = 1, 1024


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Options of the benchmark."""
    parser.add_argument("--geometry", choices=sorted(GEOMETRIES), default="qwen2.5-0.5b")
    parser.add_argument("--layers", type=int, default=None, help="fewer layers than the geometry has")
    parser.add_argument("--image-tokens", type=int, default=1000)
    parser.add_argument("--text-tokens", type=int, default=64)
    parser.add_argument("--batch", type=int, default=1)
    budgets.add_arguments(parser, ["lightvlm"])
    parser.add_argument("--dtype", choices=["float32", "float16", "bfloat16"], default="bfloat16")
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--threads", type=int, default=None)
    parser.add_argument("--rounds", type=int, default=5)


def geometry_of(name: str) -> Geometry:
    """A decoder's sizes, as cases want them."""
    width, layers, heads, kv_heads, _ = GEOMETRIES[name]
    return Geometry(width, layers, heads, kv_heads, width // heads)


def build_model(
    geometry: str,
    layers: int | None,
    dtype: torch.dtype,
    device: str,
    vocabulary: int = _VOCABULARY,
    tower_layers: int = 1,
) -> PreTrainedModel:
    """A Qwen2.5-VL with a random decoder of the geometry and the smallest vision tower."""
    from transformers import Qwen2_5_VLConfig, Qwen2_5_VLForConditionalGeneration

    width, depth, heads, kv_heads, mlp = GEOMETRIES[geometry]
    head = width // heads
    config = Qwen2_5_VLConfig(
        vision_config={
            "depth": tower_layers, "hidden_size": 32, "num_heads": 2, "intermediate_size": 32, "out_hidden_size": width,
            "fullatt_block_indexes": list(range(tower_layers)),
        },
        text_config={
            "hidden_size": width, "intermediate_size": mlp, "num_hidden_layers": layers or depth,
            "num_attention_heads": heads, "num_key_value_heads": kv_heads, "vocab_size": vocabulary,
            "rope_parameters": {"rope_type": "default", "rope_theta": 1e6, "mrope_section": _mrope(head)},
            "bos_token_id": 2, "eos_token_id": 3, "pad_token_id": 0,
        },
        image_token_id=_IMAGE, video_token_id=4, vision_start_token_id=5, vision_end_token_id=6,
    )  # fmt: skip
    torch.manual_seed(0)
    before = torch.get_default_dtype()
    torch.set_default_dtype(dtype)
    try:
        with torch.device(device):
            model: PreTrainedModel = Qwen2_5_VLForConditionalGeneration(config).eval()
            return model
    finally:
        torch.set_default_dtype(before)


def _mrope(head: int) -> list[int]:
    """Channels of the three rotary axes: a quarter for time, the rest for height and width."""
    half = head // 2
    side = (half - half // 4) // 2
    return [half - 2 * side, side, side]


def build_inputs(
    model: PreTrainedModel, batch: int, image: int, text: int, pixels: bool = False
) -> dict[str, Any]:
    """One image of ``image`` tokens and ``text`` tokens around it, in every row; features instead of pixels unless
    these are asked for."""
    generator = torch.Generator().manual_seed(1)
    before = min(8, text // 2)
    words = torch.randint(8, _VOCABULARY, (batch, text), generator=generator)
    ids = torch.cat([words[:, :before], torch.full((batch, image), _IMAGE), words[:, before:]], dim=1)
    width = model.config.text_config.hidden_size
    features = [
        torch.randn(image, width, generator=generator).to(model.device, model.dtype) for _ in range(batch)
    ]
    rows = max(1, round(image**0.5))
    while image % rows:
        rows -= 1
    grid = torch.tensor([[1, 2 * rows, 2 * (image // rows)]] * batch)
    shown: dict[str, Any] = {"mm_encoder_outputs": {"image": SimpleNamespace(pooler_output=features)}}
    if pixels:
        vision = model.config.vision_config
        width = vision.in_channels * vision.temporal_patch_size * vision.patch_size**2
        patches = torch.randn(int(grid.prod(1).sum()), width, generator=generator)
        shown = {"pixel_values": patches.to(model.device, model.dtype)}
    return {
        "input_ids": ids.to(model.device),
        "attention_mask": torch.ones_like(ids).to(model.device),
        "image_grid_thw": grid.to(model.device),
        "mm_token_type_ids": (ids == _IMAGE).int().to(model.device),
        **shown,
        "logits_to_keep": 1,
    }


def run(args: argparse.Namespace) -> dict[str, Any]:
    """Run the benchmark; returns the JSON object of ``lightvlm bench decoder``."""
    from transformers import StaticCache

    for name in ("image_tokens", "text_tokens", "batch", "rounds"):
        if getattr(args, name) < 1:
            raise ValueError(f"--{name.replace('_', '-')} must be at least 1, got {getattr(args, name)}")
    if args.threads is not None:
        torch.set_num_threads(args.threads)
    about = describe(args.device)  # of the code that runs, whatever happens to the tree meanwhile
    options = parse_options(args.option)
    sees = any(needs_pixels(METHODS[name].make()) for name in budgets.chosen(args.method))
    dtype = getattr(torch, args.dtype)
    model = build_model(args.geometry, args.layers, dtype, args.device, tower_layers=3 if sees else 1)
    adapter = find_adapter(model)
    sizes = (args.batch, args.image_tokens, args.text_tokens)
    inputs = {pixels: build_inputs(model, *sizes, pixels) for pixels in ((False, True) if sees else (False,))}
    length = args.image_tokens + args.text_tokens
    prompts = Prompts.of_batches(adapter, [inputs[False]])
    settings = budgets.settings(args, options, prompts, keep=(0.35, 0.15, 0.03))
    settings = budgets.accepted(settings, model)
    reports: dict[Any, list[Report]] = {one.key: [] for one in settings}

    def baseline(static: bool, pixels: bool) -> Callable[[], None]:
        def call() -> None:
            cache = StaticCache(model.config.text_config, max_cache_len=length) if static else None
            model(**_fresh(inputs[pixels]), past_key_values=cache, use_cache=True)

        return call

    def reduced(one: Setting) -> Callable[[], None]:
        def call() -> None:
            with attach(model, one.plans[0]) as handle:
                model(**_fresh(inputs[needs_pixels(one.plans[0])]), use_cache=True)
            reports[one.key].append(handle.report())

        return call

    candidates: dict[str, tuple[bool, Callable[[], None]]] = {}
    for pixels in inputs:
        for kind in ("dynamic", "static"):
            name = f"transformers sdpa, {kind} cache" + (", with the tower" if pixels else "")
            candidates[name] = pixels, baseline(kind == "static", pixels)
    methods = {one.key: reduced(one) for one in settings if one.plans}
    calls = {name: call for name, (_, call) in candidates.items()}
    times = interleaved({**calls, **methods}, args.rounds, args.device)

    seconds = {name: statistics.median(values) for name, values in times.items()}
    fastest = {
        pixels: min((name for name in calls if candidates[name][0] is pixels), key=lambda name: seconds[name])
        for pixels in inputs
    }
    depth = args.layers or GEOMETRIES[args.geometry][1]
    prompt = f"{args.batch} x ({args.image_tokens} image + {args.text_tokens} text)"
    case = f"{args.geometry}, {depth} layers, {prompt}, {args.dtype}"
    full_flops = prefill_flops(adapter, [[length] * args.batch] * len(adapter.layers))
    rows: list[dict[str, Any]] = []
    for name, (pixels, _) in candidates.items():
        best = fastest[pixels]
        rows.append({"case": case, "method": name, "baseline": best, "seconds": seconds[name],
                     "baseline_seconds": seconds[best], "ratio": seconds[best] / seconds[name],
                     "flops": full_flops, "runs": times[name]})  # fmt: skip
    for one in settings:
        if not one.plans:
            rows.append(fidelity_rows.about(case, one))
            continue
        best = fastest[needs_pixels(one.plans[0])]
        rows.append(_row(case, one, reports[one.key], best, times[best], times[one.key]))
    return {"kind": "decoder", **about, "rows": rows}


def _row(
    case: str, one: Setting, reports: list[Report], baseline: str, before: list[float], runs: list[float]
) -> dict[str, Any]:
    """The row of a method.   before, runs: seconds of the baseline and the method in each round."""
    report = reports[-1]
    ceiling = 1 / report.flops_share
    seconds, baseline_seconds = statistics.median(runs), statistics.median(before)
    # rounds are paired: each ran baseline and method one after the other
    ratio = statistics.median(b / m for b, m in zip(before, runs, strict=True))
    own = [each.own_seconds for each in reports[-len(runs) :]]  # without the warm-up
    also = "" if one.knob == "keep" else f", {one.knob} {one.value:g}"
    row = {**fidelity_rows.about(case + also, one), "baseline": baseline, "seconds": seconds,
           "baseline_seconds": baseline_seconds, "ratio": ratio, "flop_ceiling": ceiling,
           "share_of_ceiling": ratio / ceiling, "flops_share": report.flops_share, "op_seconds": report.op_seconds,
           "op_share_of_baseline": sum(report.op_seconds.values()) / baseline_seconds,
           "own_seconds": statistics.median(own), **fidelity_rows.overhead_of(own, before),
           "tokens_per_layer": report.tokens_per_layer,
           "kv_bytes_used": report.kv_bytes_used, "kv_bytes_full": report.kv_bytes_full,
           "stepped_aside": report.stepped_aside, "runs": runs}  # fmt: skip
    return row


def table(result: dict[str, Any]) -> Table:
    """One line a row, in the order of the rows."""
    from rich.table import Table

    made = Table(
        title=f"{result['rows'][0]['case']}\n{result['device']}, torch {result['torch']}, {result['commit']}",
        caption="own: the method's own work over the baseline's time, ! where above 3 %; - a plan stepped aside",
    )
    for name in ("method", "budget", "seconds", "ratio", "FLOP ceiling", "own", ""):
        made.add_column(name, justify="left" if name in ("method", "budget") else "right")
    for row in result["rows"]:
        budget = f"{row['budget']} {row['target']:g}" if "budget" in row else ""
        if "skipped" in row:
            made.add_row(row["method"], budget, row["skipped"])
            continue
        figures = [f"{row['seconds']:.4g}", f"{row['ratio']:.2f}"]
        if "overhead" in row:
            marks = "!" * row["overhead_listed"] + "-" * bool(row["stepped_aside"])
            figures += [f"{row['flop_ceiling']:.2f}", f"{row['overhead']:.1%}", marks]
        made.add_row(row["method"], budget, *figures)
    return made


def _fresh(inputs: dict[str, Any]) -> dict[str, Any]:
    """transformers writes into the dictionary of encoder outputs it is given."""
    return {name: dict(value) if isinstance(value, dict) else value for name, value in inputs.items()}


@torch.no_grad()
def interleaved(calls: dict[Any, Callable[[], None]], rounds: int, device: str) -> dict[Any, list[float]]:
    """Seconds of every call in every round; the calls of a round
    run one after the other, after one warm-up round."""
    times: dict[Any, list[float]] = {name: [] for name in calls}
    for turn in range(rounds + 1):
        for name, call in calls.items():
            synchronise(device)
            start = time.perf_counter()
            call()
            synchronise(device)
            if turn:
                times[name].append(time.perf_counter() - start)
    return times


def synchronise(device: str) -> None:
    """Wait until the device has done everything."""
    if device.startswith("cuda"):
        torch.cuda.synchronize()
