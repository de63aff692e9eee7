"""The method matrix: what every registered method is run with, on small models of every family.

A method is picked up from ``METHODS``. What makes it work on prompts of a few dozen tokens is read from its options;
what cannot be read there stands in a table below, with the reason.
"""

from __future__ import annotations

import functools
from collections.abc import Sequence
from typing import Any

import lightvlm
import torch
from lightvlm.catalogue import describe
from lightvlm.methods import METHODS
from lightvlm.methods.base import AttentionPart, CachePart, Picture, PrefillPart
from python.tiny import QWEN, Family, Image, Row, generate_logits, take_decoding
from torch import Tensor

LAYERS = 6
NAMES = sorted(METHODS)

SETTINGS: dict[str, dict[str, Any]] = {
    # 64 and 64 probe rows are more than a prompt has here, and at the published tau nearly all tokens attend
    "zipvl": {"tau": 0.6, "recent_rows": 4, "random_rows": 2},
    # images have 16 tokens, and a window must have 8
    "lightkv": {"windows": (1,)},
}
"""Options by method, where :func:`settings` does not find them."""

EVERYTHING: dict[str, dict[str, Any]] = {
    # decoding has a share of its own
    "lightvlm": {"decode_keep": None},
    # "keep" stores even what attends in 4 bits
    "zipvl": {"unimportant": "drop"},
}
"""Options besides the knob under which a method keeps everything, as it is."""

READS: dict[str, int] = {
    # tokens are stored in 4 bits or in 2 by what attended, which the device alone knows: once a prompt, for all layers
    "zipvl": 1,
    # layers share the budget by how sparse their attention was
    "vl_cache": 1,
}
"""Host reads between the layers of a prompt and nine further tokens, where there are any."""

_SMALL = {"interval": 6, "sinks": 2, "recent": 8, "keep": 0.3}
"""What options of these names are set to, or to the next value that their limits allow."""


def settings(name: str) -> dict[str, Any]:
    """Options under which a method has something to do: no prompt is too short, and the cache is compacted early.

    Options of a cache part may have ``decode_`` before their name. A knob that is no share gets its lowest level.
    """
    found: dict[str, Any] = {}
    for option in describe(name)["options"]:
        own = option["name"].removeprefix("decode_")
        if own in ("min_image_tokens", "min_tokens"):
            found[option["name"]] = option["low"]
        elif own in _SMALL and option["default"] is not None:
            found[option["name"]] = max(_SMALL[own], option.get("low", 0))
        elif option["name"] == METHODS[name].knob:
            found[option["name"]] = min(METHODS[name].levels)
    return found | SETTINGS.get(name, {})


def plan_of(name: str, **options: Any) -> lightvlm.Plan:
    """A method's plan for the small models."""
    options = settings(name) | options
    try:
        return lightvlm.method(name, **options)
    except (TypeError, ValueError) as error:
        raise ValueError(
            f"tests/python/matrix.py needs other options of {name} than {options}: {error}"
        ) from error


def everything(name: str) -> lightvlm.Plan:
    """The plan under which a method keeps everything: its knob at 1 where its levels are shares, at 16 where it says
    bits, and at more tokens than there are where it counts them."""
    knob, levels = METHODS[name].knob, METHODS[name].levels
    most: float = 1.0 if max(levels) <= 1 else 16 if knob.endswith("bits") else 1 << 20
    return plan_of(name, **{knob: most} | EVERYTHING.get(name, {}))


def rows_of(family: Family) -> list[Row]:
    """One image, no image, two images and much text, an image almost last; of several sizes where a family has them."""
    if family is not QWEN:
        return [
            [1, 2, Image(0), 3, 4, 5],
            [6, 7, 8],
            [1, Image(1), 9, Image(2), *range(10, 20)],
            [22, Image(3), 21],
        ]
    return [
        [1, 2, Image(0, 3, 6), 3, 4, 5],
        [6, 7, 8],
        [1, Image(1, 6, 6), 9, Image(2, 2, 5), *range(10, 20)],
        [22, Image(3, 5, 4), 23, Image(4, 1, 1), 21],
    ]


def build(family: Family, dtype: torch.dtype) -> Any:
    """A model of six layers, with heads of 32 channels, as a packed cache needs them, and a vision tower of three, the
    last of which is not read."""
    sizes: dict[str, Any] = {"num_hidden_layers": LAYERS, "head_dim": 32}
    if (
        family is QWEN
    ):  # its heads are as wide as its states have room for; weights of half the spread for twice the width
        sizes = {"num_hidden_layers": LAYERS, "hidden_size": 128, "initializer_range": 0.125}
        sizes["rope_parameters"] = {"rope_type": "default", "rope_theta": 10000.0, "mrope_section": [4, 6, 6]}
    shallow = family.build(**sizes)
    config = shallow.config
    if family is QWEN:
        config.vision_config.depth, config.vision_config.out_hidden_size = 3, 128
    else:
        config.vision_config.num_hidden_layers, config.vision_feature_layer = 3, -2
    torch.manual_seed(3)
    model = type(shallow)(config).to(dtype).eval()
    model.generation_config = shallow.generation_config
    return model


@functools.cache
def _baseline(model: Any, family: Family, tokens: int) -> tuple[Tensor, Tensor]:
    return generate_logits(model, family.batch(rows_of(family), model.dtype), tokens)


def baseline(model: Any, family: Family, tokens: int) -> tuple[Tensor, Tensor]:
    """Tokens (B, T) and logits (B, T, V) of the batch, without a plan; the model must not be attached."""
    assert model.model.language_model.config._attn_implementation == "sdpa"
    return _baseline(model, family, tokens)


@functools.cache
def limit_of(model: Any, family: Family) -> float:
    """How far logits of a batch may be from those of its rows: four times what they are without a plan.

    The least is 32 roundings of the largest logit, as a tiny batch may be equal by chance.
    """
    tokens, together = baseline(model, family, 8)
    rows = rows_of(family)
    alone = [generate_logits(model, family.batch([row], model.dtype), 8) for row in rows]
    assert torch.equal(torch.cat([found for found, _ in alone]), tokens)
    far = float((torch.cat([logits for _, logits in alone]) - together).abs().max())
    return max(4 * far, 32 * torch.finfo(model.dtype).eps * float(together.abs().max()))


def planned(part: PrefillPart, rows: Sequence[Row]) -> list[list[list[int]]]:
    """Layer -> row -> tokens of each image there, as the plan says without a model."""
    stages = {stage.layer: stage for stage in part.stages(LAYERS)}
    now = [[item.tokens for item in row if isinstance(item, Image)] for row in rows]
    found = []
    for layer in range(LAYERS):
        if layer in stages:
            for b, row in enumerate(rows):
                first = [item for item in row if isinstance(item, Image)]
                if first and sum(image.tokens for image in first) >= part.min_image_tokens:
                    now[b] = part.counts(stages[layer], _pictures(row, now[b]))
        found.append([list(counts) for counts in now])
    return found


def _pictures(row: Row, tokens: list[int]) -> list[Picture]:
    """The images of a row that have so many tokens left."""
    found: list[Picture] = []
    at = 0
    for item in row:
        if isinstance(item, Image):
            stop = at + tokens[len(found)]
            grid = (1, item.height, item.width)
            found.append(Picture(len(found), at, stop, item.tokens, keep=0, grid=grid))
            at = stop
        else:
            at += 1
    return found


def kept_of(kept: dict[int, Any], at: int, row: Row) -> list[list[list[int]]]:
    """Layer -> image -> tokens that are left of the row at place ``at`` of a batch, from :attr:`Run.kept`.

    Where no row loses a token there is no stage, so a row alone has fewer stages than in a batch.
    """
    now = [[*range(item.tokens)] for item in row if isinstance(item, Image)]
    found = []
    for layer in range(LAYERS):
        now = kept[layer][at] if layer in kept else now
        found.append(now)
    return found


def text_of(row: Row) -> int:
    """Text tokens of a row."""
    return sum(not isinstance(item, Image) for item in row)


def reduces(plan: lightvlm.Plan) -> bool:
    """Whether prefill gets shorter in some layer."""
    return isinstance(plan.prefill, PrefillPart) and bool(plan.prefill.stages(LAYERS))


def only_shortens(plan: lightvlm.Plan) -> bool:
    """Whether a prompt without an image is the model's own."""
    return reduces(plan) and plan.cache is None and plan.precision is None


def attention_is_ours(plan: lightvlm.Plan, report: Any) -> bool:
    """Whether logits came from our attention where the model's would have run (docs/decisions.md)."""
    return isinstance(plan.prefill, AttentionPart) or take_decoding(dict(report.op_calls)) > 0


def parts(slot: str) -> dict[str, Any]:
    """The parts of all methods' plans by kind."""
    found: dict[str, Any] = {}
    for name in NAMES:
        part = getattr(plan_of(name), slot)
        if part is not None:
            found.setdefault(part.kind, part)
    return found


class Choices:
    """Records what a cache part keeps of each layer, of the prompt and while decoding, and when."""

    def __init__(self, part: CachePart, length: int, monkeypatch: Any) -> None:
        self.problems: list[str] = []
        self._prompt: dict[int, tuple[list[int], int]] = {}
        self._decoded: dict[int, tuple[list[int], int]] = {}
        kind = type(part)
        choose, choose_prompt = kind.choose, getattr(kind, "choose_prompt", None)

        def decoding(this: Any, layer: Any, leftpad: list[int]) -> Any:
            found = choose(this, layer, leftpad)
            if found is not None:
                index, count, kept = found
                if count.tolist() != list(kept):
                    self.problems.append(f"{count.tolist()} tokens were chosen, but the host says {kept}")
                self._check(index, kept, layer.starts, layer.ends)
                self._decoded[id(layer)] = (list(kept), layer.seen)
            return found

        def reading(this: Any, seen: Any) -> Any:
            found = choose_prompt(this, seen)
            for (layer, _), choice in zip(seen, found, strict=True):
                if choice is not None:
                    self._check(choice.index, choice.kept, layer.starts, [layer.length] * len(choice.kept))
                    self._prompt[layer.layer] = (list(choice.kept), length)
            return found

        monkeypatch.setattr(kind, "choose", decoding)
        if choose_prompt is not None:
            monkeypatch.setattr(kind, "choose_prompt", reading)

    def _check(self, index: Tensor, kept: list[int], starts: list[int], ends: list[int]) -> None:
        """Ascending places of the row, of each head where heads differ."""
        for b, (rows, count) in enumerate(zip(index.tolist(), kept, strict=True)):
            for row in rows if index.dim() == 3 else [rows]:
                if row[:count] != sorted({*row[:count]} & {*range(starts[b], ends[b])}) or {*row[count:]} - {
                    -1
                }:
                    self.problems.append(f"row {b}: {count} tokens {row} of {starts[b]}..{ends[b]}")

    def holds(self, index: int, layer: Any) -> list[int] | None:
        """Tokens of each row that a layer must hold by now, or None where nothing was chosen."""
        last = self._decoded.get(id(layer)) or self._prompt.get(index)
        return None if last is None else [count + layer.seen - last[1] for count in last[0]]


def stored(layer: Any) -> list[int]:
    """Tokens of each row that a layer of a cache holds in its buffer."""
    return [end - start for start, end in zip(layer.starts, layer.ends, strict=True)]


def held(layer: Any) -> list[int]:
    """Tokens of each row that a layer of a cache holds, packed ones too."""
    packed = layer.packed.counts if layer.packed is not None else [0] * len(layer.starts)
    return [a + b for a, b in zip(stored(layer), packed, strict=True)]
