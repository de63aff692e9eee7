"""``lightvlm bench decoder``: prefill of a decoder of real geometry, with a plan and without.

Weights are random: time does not depend on them. Image features are given, so that the vision tower, which no
    plan
touches, is not in the figure. Baseline and methods run interleaved in one process on the same inputs; the
ratio is against the fastest baseline, and all of them are in the rows. Beside each ratio stands the ceiling
that FLOPs allow.
"""

from __future__ import annotations

import argparse
import statistics
import time
from collections.abc import Callable
from types import SimpleNamespace
from typing import TYPE_CHECKING, Any

import torch

from ..flops import prefill_flops
from ..methods import method_names
from ..models import find_adapter
from ..runtime import attach
from . import levels
from .cases._case import Geometry
from .common import describe

if TYPE_CHECKING:
    from transformers import PreTrainedModel

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
    levels.add_arguments(parser)
    parser.add_argument("--method", choices=method_names(), nargs="+", default=["lightvlm"])
    parser.add_argument("--dtype", choices=["float32", "float16", "bfloat16"], default="bfloat16")
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--threads", type=int, default=None)
    parser.add_argument("--rounds", type=int, default=5)


def geometry_of(name: str) -> Geometry:
    """A decoder's sizes, as cases want them."""
    width, layers, heads, kv_heads, _ = GEOMETRIES[name]
    return Geometry(width, layers, heads, kv_heads, width // heads)


def build_model(
    geometry: str, layers: int | None, dtype: torch.dtype, device: str, vocabulary: int = _VOCABULARY
) -> PreTrainedModel:
    """A Qwen2.5-VL with a random decoder of the geometry and the smallest vision tower."""
    from transformers import Qwen2_5_VLConfig, Qwen2_5_VLForConditionalGeneration

    width, depth, heads, kv_heads, mlp = GEOMETRIES[geometry]
    head = width // heads
    config = Qwen2_5_VLConfig(
        vision_config={
            "depth": 1, "hidden_size": 32, "num_heads": 2, "intermediate_size": 32, "out_hidden_size": width,
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


def build_inputs(model: PreTrainedModel, batch: int, image: int, text: int) -> dict[str, Any]:
    """One image of ``image`` tokens and ``text`` tokens around
    it, in every row; features instead of pixels."""
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
    return {
        "input_ids": ids.to(model.device),
        "attention_mask": torch.ones_like(ids).to(model.device),
        "image_grid_thw": grid.to(model.device),
        "mm_token_type_ids": (ids == _IMAGE).int().to(model.device),
        "mm_encoder_outputs": {"image": SimpleNamespace(pooler_output=features)},
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
    model = build_model(args.geometry, args.layers, getattr(torch, args.dtype), args.device)
    inputs = build_inputs(model, args.batch, args.image_tokens, args.text_tokens)
    length = args.image_tokens + args.text_tokens
    tried = levels.levels(args.method, args.keep, args.level, default=(0.35, 0.15, 0.03))
    knobs = {one.name: one.knob for one, _ in tried}
    plans = {(one.name, value): one.make(**{one.knob: value}) for one, value in tried}
    reports: dict[tuple[str, float], Any] = {}

    def baseline(static: bool) -> Callable[[], None]:
        def call() -> None:
            cache = StaticCache(model.config.text_config, max_cache_len=length) if static else None
            model(**_fresh(inputs), past_key_values=cache, use_cache=True)

        return call

    def reduced(key: tuple[str, float]) -> Callable[[], None]:
        def call() -> None:
            with attach(model, plans[key]) as handle:
                model(**_fresh(inputs), use_cache=True)
            reports[key] = handle.report()

        return call

    candidates: dict[Any, Callable[[], None]] = {
        "transformers sdpa, dynamic cache": baseline(False),
        "transformers sdpa, static cache": baseline(True),
    }
    methods = {key: reduced(key) for key in plans}
    times = interleaved({**candidates, **methods}, args.rounds, args.device)

    seconds = {name: statistics.median(values) for name, values in times.items()}
    fastest = min(candidates, key=lambda name: seconds[name])
    depth = args.layers or GEOMETRIES[args.geometry][1]
    prompt = f"{args.batch} x ({args.image_tokens} image + {args.text_tokens} text)"
    case = f"{args.geometry}, {depth} layers, {prompt}, {args.dtype}"
    adapter = find_adapter(model)
    full_flops = prefill_flops(adapter, [[length] * args.batch] * len(adapter.layers))
    rows: list[dict[str, Any]] = []
    for name in candidates:
        rows.append({"case": case, "method": name, "baseline": fastest, "seconds": seconds[name],
                     "baseline_seconds": seconds[fastest], "ratio": seconds[fastest] / seconds[name],
                     "flops": full_flops, "runs": times[name]})  # fmt: skip
    for key in methods:
        report = reports[key]
        ceiling = 1 / report.flops_share
        # rounds are paired: each ran baseline and method one after the other
        ratio = statistics.median(b / m for b, m in zip(times[fastest], times[key], strict=True))
        overhead = sum(report.op_seconds.values())
        name, knob = key[0], knobs[key[0]]
        also = "" if knob == "keep" else f", {knob} {key[1]:g}"
        rows.append({"case": case + also, "method": name, knob: key[1], "baseline": fastest, "seconds": seconds[key],
                     "baseline_seconds": seconds[fastest], "ratio": ratio, "flop_ceiling": ceiling,
                     "share_of_ceiling": ratio / ceiling, "op_seconds": report.op_seconds,
                     "op_share_of_baseline": overhead / seconds[fastest], "tokens_per_layer": report.tokens_per_layer,
                     "kv_bytes_used": report.kv_bytes_used, "kv_bytes_full": report.kv_bytes_full,
                     "stepped_aside": report.stepped_aside, "runs": times[key]})  # fmt: skip
    return {"kind": "decoder", **about, "rows": rows}


def _fresh(inputs: dict[str, Any]) -> dict[str, Any]:
    """transformers writes into the dictionary of encoder outputs it is given."""
    return {**inputs, "mm_encoder_outputs": dict(inputs["mm_encoder_outputs"])}


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
