"""LightKV: vision tokens are merged in windows, guided by the prompt, at a few layers of the decoder.

Source: Chen, Guo, Zimmermann, "Make Your LVLM KV Cache More Lightweight", arXiv 2605.00789 (TMLR 2026), and its code
(howtoosee/LightKV). In each window the tokens at even places are matched with the most similar ones at odd places
(cosine of hidden states, section 3.2), and a share rho of the best pairs is merged, weighted by what each token
receives from the prompt (xi, eq. 7 and 8): every text key spreads mass 1 over all queries, here without storing S x S
weights.

Where text and code differ, this follows the code: a window of m tokens loses floor(rho m), at most m // 2 (the text's
floor(rho m / 2) would not leave its own 1 - rho); the softmax runs over the queries, without a causal mask, and the
keys are all text tokens, those before an image too. Layers are counted as in the paper's eq. 9, which its 55 % come
from: the first of ``layers`` is how many layers see every token (the code's numbers are the index of the last such
layer, so one layer more does).

One addition: which half of a window the others merge into. The published way takes every other token; by default the
tokens choose themselves (``split="diverse"``): greedily the highest xi times its distance from those chosen, as many as
are left, and all others merge into the most similar of them. On validation scenes that is worth 2 points
(docs/lightkv.md); ``split="alternating"`` is the paper's.

Not as the code: it renumbers positions and lets generated tokens go on from the whole prompt's number; here tokens keep
theirs unless ``positions`` says so, which validation scenes favour (docs/lightkv.md). The code of its LLaVA decoder
replaces the weights by random numbers, under a note to remove that; we do not.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

import torch

from lightvlm_ext import ops

from ..host import rectangular, upload
from ..plan import KeepForLater, Plan, check_options, option, register_part
from .base import Picture, PrefillPart, Probe, Reduced, Stage, StageInput, check_keep, numbering
from .windows import Windows, windows_of

PUBLISHED_LAYERS = {40: (15, 23, 31), 32: (12, 18, 24), 28: (12, 17, 22)}
"""Stages by depth: LLaVA 13B (the paper's Table 6), LLaVA 7B and Qwen2.5-VL 7B (examples of its code)."""

_LARGE = 1024
"""Tokens of an image above which the windows of LLaVA-NeXT and Qwen2.5-VL are used, not those of LLaVA 1.5 (576)."""


def default_layers(layers: int, stages: int = 3) -> tuple[int, ...]:
    """The published layers of a depth; elsewhere, or for more stages, spread evenly from 3/8 to 31/40 of it."""
    if stages == 3 and layers in PUBLISHED_LAYERS:
        return PUBLISHED_LAYERS[layers]
    last = min(max(round(0.775 * layers), stages), layers - 1)
    first = max(0, min(round(0.375 * layers), last - stages + 1))
    return tuple(first + round(at * (last - first) / max(1, stages - 1)) for at in range(stages))


@dataclass(frozen=True)
class MatchingStage(Stage):
    """A stage that knows the shares merged at all stages up to it."""

    ratios: tuple[float, ...] = ()


@register_part("prefill", "lightkv")
@dataclass(frozen=True)
class LightKVPrefill(PrefillPart):
    """Windowed matching and prompt-guided message passing."""

    keep: float = option(
        0.125,
        "final share of each image's tokens; every stage at most halves them, so a small one takes more stages",
    )
    layers: tuple[int, ...] | None = option(
        None,
        "merge at the input of these layers; None: by depth, 15, 23, 31 of 40, 12, 18, 24 of 32, 12, 17, 22 of 28",
    )
    ratios: tuple[float, ...] | None = option(
        None,
        "share of each window merged at each stage, at most 0.5; None: the same at all, so that keep is left",
    )
    windows: tuple[int, ...] | None = option(
        None,
        "windows a side at each stage, the last one for all further ones; None: 4, 2, 1, and 6, 4, 2 for images of "
        "more than 1,024 tokens (6, 3, 1 on the image's own grid)",
        low=1,
    )
    raster: Literal["square", "grid"] = option(
        "square",
        "where tokens lie: what is left in its order on a square (the published way, only roughly spatial), or the "
        "original ones on the image's own grid",
        choices=("square", "grid"),
    )
    split: Literal["diverse", "alternating"] = option(
        "diverse",
        "which tokens of a window others merge into: those that weights and diversity choose, or every other one (the "
        "published way, and where there are no weights)",
        choices=("diverse", "alternating"),
    )
    guidance: Literal["prompt", "causal", "none"] = option(
        "prompt",
        "weights: what a token receives from all text keys, softmax over the queries; attention from the text after "
        "the image; or all the same, as they are at layer 0 in any case",
        choices=("prompt", "causal", "none"),
    )
    positions: str = numbering("keep")
    min_image_tokens: int = option(32, "step aside below this many image tokens in a prompt", low=0)

    def __post_init__(self) -> None:
        check_keep(self.keep)
        check_options(self)
        if self.ratios is not None:
            if not self.ratios or any(not 0 < ratio <= 0.5 for ratio in self.ratios):
                raise ValueError(f"ratios must lie in (0, 0.5], got {self.ratios}")
            left = math.prod(1 - ratio for ratio in self.ratios)
            if abs(left - self.keep) > 1e-6:
                raise ValueError(f"keep must be what ratios leave ({left:.6g}), got {self.keep}")
        if self.windows is not None:
            if not self.windows or min(self.windows) < 1 or list(self.windows) != sorted(self.windows)[::-1]:
                raise ValueError(f"windows must be at least 1 and not increase, got {self.windows}")
            pairs = zip(self.windows, self.windows[1:], strict=False)
            if self.raster == "grid" and any(
                self.windows[0] % side or before % side for before, side in pairs
            ):
                raise ValueError(
                    f"windows on the image's own grid must each divide the ones before, got {self.windows}"
                )

    def stages(self, layers: int) -> tuple[Stage, ...]:
        if self.keep >= 1:
            return ()
        ratios = self._ratios
        if self.layers is None and len(ratios) >= layers:
            raise ValueError(
                f"keep ({self.keep}) needs {len(ratios)} stages, more than a decoder of {layers} layers has"
            )
        at = default_layers(layers, len(ratios)) if self.layers is None else self.layers
        if not at or list(at) != sorted(set(at)) or at[0] < 0 or at[-1] >= layers:
            raise ValueError(f"layers must be ascending layer numbers within 0..{layers - 1}, got {at}")
        if len(at) != len(ratios):
            raise ValueError(f"ratios must have one entry per layer ({len(at)}), got {len(ratios)}")
        if max(ratios) > 0.5 + 1e-9:
            raise ValueError(
                f"keep ({self.keep}) needs at least {self._least} layers, as each at most halves, got {at}"
            )
        left = [math.prod(1 - ratio for ratio in ratios[: number + 1]) for number in range(len(at))]
        return tuple(
            MatchingStage(layer, left[number], ratios[: number + 1]) for number, layer in enumerate(at)
        )

    @property
    def _least(self) -> int:
        """Stages that ``keep`` takes if each halves."""
        return max(1, math.ceil(-math.log2(self.keep) - 1e-9))

    @property
    def _ratios(self) -> tuple[float, ...]:
        if self.ratios is not None:
            return self.ratios
        stages = len(self.layers) if self.layers is not None else max(3, self._least)
        return (1 - self.keep ** (1 / stages),) * stages

    @property
    def probe(self) -> Probe | None:
        if self.guidance == "none":
            return None
        if self.guidance == "causal":
            return Probe(rows="text", limit=256, over_rows="sum", over_heads="sum")
        return Probe(rows="all", axis="query", keys="text")

    def counts(self, stage: Stage, pictures: Sequence[Picture]) -> list[int]:
        found = self._windows(stage, pictures)
        return [picture.tokens for picture in pictures] if found is None else [one.left for one in found]

    def _windows(self, stage: Stage, pictures: Sequence[Picture]) -> list[Windows] | None:
        assert isinstance(stage, MatchingStage)
        sides = [self._sides(picture.original, len(stage.ratios)) for picture in pictures]
        return windows_of(pictures, sides, stage.ratios, self.raster) if pictures else None

    def _sides(self, tokens: int, stages: int) -> list[int]:
        """Windows a side at each stage for an image of so many tokens."""
        large = (6, 3, 1) if self.raster == "grid" else (6, 4, 2)
        sides = self.windows or (large if tokens > _LARGE else (4, 2, 1))
        return [sides[min(number, len(sides) - 1)] for number in range(stages)]

    def reduce(self, stage: StageInput) -> Reduced:
        assert stage.stage is not None
        batch, length, _ = stage.hidden.shape
        # what is no image has no window: text stays (-1), padding vanishes (-2)
        window = torch.full((batch, length), -1, dtype=torch.int32)
        tables: list[list[int]] = [[] for _ in range(batch)]
        merged: list[list[int]] = [[] for _ in range(batch)]
        left: list[list[int]] = [[] for _ in range(batch)]
        for row, pictures in enumerate(stage.pictures):
            stays = all(picture.keep == picture.tokens for picture in pictures)
            found = None if stays else self._windows(stage.stage, pictures)
            for picture, own in zip(pictures, found or (), strict=False):
                ids = own.of + len(merged[row])
                if self._on_grid(picture):
                    window[row, picture.start : picture.stop] = _LOOK_UP - len(tables[row])
                    tables[row] += ids.tolist()
                else:
                    window[row, picture.start : picture.stop] = ids.int()
                merged[row] += own.merged
                left[row] += [size - pairs for size, pairs in zip(own.sizes, own.merged, strict=True)]
        device = stage.hidden.device
        at = upload(window, device)
        if any(tables):  # by the token's place in its original image, which the device knows
            table = upload(rectangular(tables), device)
            place = (_LOOK_UP - at + stage.within).clamp(0, table.shape[1] - 1)
            at = torch.where(at <= _LOOK_UP, table.gather(1, place.long()), at)
        at = torch.where(stage.text | (stage.segment >= 0), at, -2)
        pairs, stay = (upload(rectangular(counts), device) for counts in (merged, left))
        weight = source = None
        if stage.scores is not None:
            weight = stage.scores.clamp_min(0)
        if weight is not None and self.split == "diverse":
            # as many tokens as are left choose themselves, window by window; the others are the sources, and all merge
            chosen = ops.select_diverse(weight, stage.hidden, keep=stay, segment=at.clamp_min(-1))
            source = chosen.inverse < 0
        result = ops.merge_pairs(
            stage.hidden,
            at,
            merge=pairs,
            weight=weight,
            source=source,
            eps=1e-8,
            align="right",
            capacity=stage.capacity,
        )
        return Reduced(result.selection, result.x)

    def _on_grid(self, picture: Picture) -> bool:
        return self.raster == "grid" and picture.grid is not None


_LOOK_UP = -16
"""A token whose window is looked up has this, less where its image's windows begin in the table."""


def LightKV(keep: float = 0.125, *, keep_for_later: KeepForLater = "offload", **options: object) -> Plan:
    """LightKV's plan: vision tokens merged in windows by prompt-guided message passing; the published half a stage.

    Args:
        keep: final share of each image's tokens, in (0, 1]; 1 keeps all. The published three halvings leave 0.125 of
            them at the end, and 55.3 % of the image's places in the cache of a 40-layer decoder.
        keep_for_later: see :class:`lightvlm.Plan`.
        options: see :class:`LightKVPrefill`.

    Raises:
        ValueError, TypeError: an option out of range; the message names it.
    """
    return Plan(
        prefill=LightKVPrefill(keep=keep, **options),  # type: ignore[arg-type]
        keep_for_later=keep_for_later,
    )
