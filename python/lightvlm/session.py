"""A prompt's way through the layers of an attached decoder.

The host knows how long every row is at every layer; the device is asked only where the image tokens are, once
per prompt.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from lightvlm_ext import ops

from .contract.prefill import Picture, PrefillPart, Probe, StageInput
from .contract.stages import Stage
from .host import rectangular, upload
from .layout import FIRST_IMAGE, TEXT, BatchLayout, RowLayout
from .models.base import Adapter
from .probing import (
    coming_keys,
    coming_queries,
    gather_rows,
    probe_positions,
    question_tokens,
    scale_of,
    spread,
)


@dataclass(frozen=True)
class Level:
    """The batch between two stages: its rows, and the layers' inputs cut to their length."""

    rows: tuple[RowLayout, ...]
    length: int

    @property
    def starts(self) -> list[int]:
        """Padding of each row; rows stand flush right."""
        return [self.length - row.tokens for row in self.rows]

    @property
    def tail(self) -> int:
        """Tokens at the end of every row that no reduction touches."""
        return min((row.trailing_text for row in self.rows), default=0)


@dataclass(frozen=True)
class StagePlan:
    """A stage for this batch: what stays of every image, known before the layer runs."""

    stage: Stage
    after: Level
    pictures: tuple[tuple[Picture, ...], ...]

    @property
    def keep(self) -> list[list[int]]:
        """Tokens to keep of each image of each row."""
        return [[picture.keep for picture in row] for row in self.pictures]


Counts = Callable[[Stage, Sequence[Picture]], list[int]]


def plan_stage(
    level: Level, originals: Sequence[tuple[int, ...] | None], stage: Stage, counts: Counts
) -> StagePlan:
    """Counts and layout after a stage.

    Args:
        level: the batch before it.
        originals: tokens that the images of each row had at first; None: the row keeps all.
        counts: how many tokens of each image of a row stay (:meth:`PrefillPart.counts`).

    Raises:
        ValueError: a count below 1 or above what an image has.
    """
    rows, pictures = [], []
    for row, start, original in zip(level.rows, level.starts, originals, strict=True):
        found = _pictures(row, start, original)
        kept = [picture.tokens for picture in found] if original is None else counts(stage, found)
        if len(kept) != len(found) or any(not 1 <= k <= p.tokens for k, p in zip(kept, found, strict=True)):
            raise ValueError(f"counts must say 1 to {[p.tokens for p in found]} tokens an image, got {kept}")
        pictures.append(tuple(replace(picture, keep=k) for picture, k in zip(found, kept, strict=True)))
        left = iter(kept)
        runs = [run if run.image is None else replace(run, tokens=next(left)) for run in row.runs]
        rows.append(RowLayout(0, tuple(runs)))
    length = max(row.tokens for row in rows)
    return StagePlan(stage, Level(tuple(rows), length), tuple(pictures))


def _pictures(row: RowLayout, start: int, originals: tuple[int, ...] | None) -> list[Picture]:
    """The images of a row that begins at ``start``."""
    found, at = [], start
    for run in row.runs:
        if run.image is not None:
            original = run.tokens if originals is None else originals[run.image]
            found.append(Picture(run.image, at, at + run.tokens, original, run.tokens, run.grid))
        at += run.tokens
    return found


class Prefill:
    """Reduces the hidden states of one prompt on their way through the layers.

    The last ``drafts`` tokens are answers to be verified or rated, not part of the question: they do not score.
    """

    def __init__(
        self, part: PrefillPart, layout: BatchLayout, adapter: Adapter, device: torch.device, drafts: int = 0
    ) -> None:
        self.part = part
        self.drafts = drafts
        first = Level(layout.rows, layout.length)
        self.levels = [first]
        self.stages: dict[int, StagePlan] = {}
        # Each row decides for itself, so that it is reduced alike alone and in a batch.
        originals = [
            row.image_sizes if row.image_sizes and sum(row.image_sizes) >= part.min_image_tokens else None
            for row in layout.rows
        ]
        for stage in part.stages(len(adapter.layers)):
            planned = plan_stage(self.levels[-1], originals, stage, part.counts)
            if planned.after.rows != tuple(replace(row, leftpad=0) for row in self.levels[-1].rows):
                self.stages[stage.layer] = planned
                self.levels.append(planned.after)
        self.level = first
        self.shifts: list[tuple[int, Tensor]] = []
        """From which layer on generated tokens stand how far (B,) from where the model puts them."""
        self._adapter = adapter
        self._codes = upload(layout.codes, device)
        self._within = upload(layout.within, device)
        self._raters: Tensor | None = None
        self._sizes: Tensor | None = None
        self._first: Tensor | None = None
        self._next: Tensor | None = None
        self._inputs: dict[str, Any] = {}
        self._scores: Tensor | None = None
        self._keys: Tensor | None = None
        self._tower: list[Tensor] = []

    @property
    def reduced(self) -> bool:
        """Whether a stage has run: from then on layers get our inputs instead of the model's."""
        return self.level is not self.levels[0]

    def tokens_at(self, layer: int) -> Level:
        """The level that a layer computes on."""
        passed = sum(stage <= layer for stage in self.stages)
        return self.levels[passed]

    def begin(self, positions: Tensor) -> None:
        """At the decoder: positions (B, S) or (axes, B, S) of the tokens, as the rotary embedding gets them."""
        if positions.dim() == 3:
            positions = positions[-3:].amax(0)
        starts = upload(self.level.starts, positions.device, torch.int64)[:, None]
        positions = positions.expand(len(starts), -1)
        self._first = positions.gather(1, starts.clamp_max(positions.shape[1] - 1))
        self._next = positions.amax(-1) + 1

    def give_tower(self, scores: Tensor, keys: Tensor | None) -> None:
        """At the decoder: scores (B, S) and keys (B, S, Ct) of the vision tower, 0 for text."""
        self._tower = [scores] if keys is None else [scores, keys]

    def scores_at(self, layer: int) -> bool:
        """Whether the attention of this layer must be shown: a stage that wants it comes right after it."""
        probe = self.part.probe
        looks = self.part.wants_keys or (probe is not None and probe.layer == "before")
        return looks and layer + 1 in self.stages

    def score(self, query: Tensor, key: Tensor, scale: float | None) -> None:
        """Score this level's tokens. query (B, Hq, M, D), key (B, Hkv, M, D), as attention gets them."""
        probe = self.part.probe
        key = key.transpose(1, 2)
        if self.part.wants_keys:
            self._keys = key
        if probe is not None and probe.layer == "before":
            positions = probe_positions(self.level, probe, self.drafts)
            rows, row_pos = gather_rows(query.transpose(1, 2), positions)
            self._scores = self._probe(probe, rows, row_pos, key, scale)

    def _probe(
        self, probe: Probe, rows: Tensor, row_pos: list[list[int]], key: Tensor, scale: float | None
    ) -> Tensor:
        """Scores (B, M) from probe rows (B, W, Hq, D) at ``row_pos``, -1 for none, and keys (B, M, Hkv, D)."""
        if probe.axis == "query":
            return spread(probe, self.level, self.drafts, rows, row_pos, key, scale)
        at = upload(row_pos, rows.device)
        if self._raters is not None:
            rates = self._raters.gather(1, at.clamp_min(0).long())
            at = torch.where(rates, at, -1)
        return ops.importance(
            rows,
            key,
            scale=scale,
            row_pos=at,
            leftpad=upload(self.level.starts, rows.device),
            rows=probe.over_rows,
            heads=probe.over_heads,
        )

    def enter(self, layer: int, hidden: Tensor, kwargs: dict[str, Any]) -> Tensor:
        """The hidden states a layer shall get; its keyword arguments are cut to them in place."""
        if layer == 0 and self.stages:
            self._raters = self._choose_raters(hidden)
        stage = self.stages.get(layer)
        if stage is not None:
            self._look_ahead(layer, hidden, self._inputs if self.reduced else kwargs)
            hidden = self._reduce(stage, hidden, kwargs)
        if self.reduced:
            kwargs.update(self._inputs)
        return hidden

    def _choose_raters(self, hidden: Tensor) -> Tensor | None:
        pictures = [
            _pictures(row, start, None) for row, start in zip(self.level.rows, self.level.starts, strict=True)
        ]
        return self.part.raters(hidden, pictures, self._ends())

    def _ends(self) -> list[int]:
        """Where the question of each row ends."""
        return [
            start + question_tokens(row, self.drafts)
            for row, start in zip(self.level.rows, self.level.starts, strict=True)
        ]

    def _look_ahead(self, layer: int, hidden: Tensor, inputs: dict[str, Any]) -> None:
        """Score with the queries and keys that the coming layer would have, where the method asks for them."""
        probe = self.part.probe
        if probe is None or probe.layer != "coming":
            return
        module = self._adapter.layers[layer]
        positions = probe_positions(self.level, probe, self.drafts)
        tables = [_tokens_second(table, hidden.shape[0]) for table in inputs["position_embeddings"]]
        streams, row_pos = gather_rows([hidden, *tables], positions)
        rows = coming_queries(module, streams[0], streams[1], streams[2])
        key = coming_keys(module, hidden, tables[0], tables[1])
        self._scores = self._probe(probe, rows, row_pos, key, scale_of(module))
        if self.part.wants_keys:
            self._keys = key

    def kept(self) -> list[list[list[int]]]:
        """Row -> image -> indices (in the original image) of the tokens that are left; reads the device."""
        found = []
        for row, codes, within in zip(
            self.levels[0].rows, self._codes.tolist(), self._within.tolist(), strict=True
        ):
            images: list[list[int]] = [[] for _ in row.image_sizes]
            for code, index in zip(codes, within, strict=True):
                if code >= FIRST_IMAGE:
                    images[code - FIRST_IMAGE].append(index)
            found.append(images)
        return found

    def _segment(self) -> Tensor:
        return torch.where(self._codes >= FIRST_IMAGE, self._codes - FIRST_IMAGE, -1).to(torch.int32)

    def _reduce(self, stage: StagePlan, hidden: Tensor, kwargs: dict[str, Any]) -> Tensor:
        keep = upload(rectangular(stage.keep), hidden.device)
        if self.part.counts_sizes and self._sizes is None:
            self._sizes = torch.ones(hidden.shape[:2], device=hidden.device)
        text = self._codes == TEXT
        reduced = self.part.reduce(
            StageInput(
                stage=stage.stage,
                hidden=hidden,
                scores=self._scores,
                segment=self._segment(),
                within=self._within,
                text=text,
                question=self._question(text),
                keep=keep,
                capacity=stage.after.length,
                pictures=stage.pictures,
                keys=self._keys,
                tower_scores=self._tower[0] if self._tower else None,
                tower_keys=self._tower[1] if len(self._tower) > 1 else None,
                sizes=self._sizes,
            )
        )
        before = self._inputs if self.reduced else kwargs
        self._scores, self._keys, self._sizes = None, None, reduced.sizes
        self.level = stage.after
        self._cut(before, reduced.selection.index, reduced.selection.count, hidden.shape[0])
        if self.part.positions != "keep":
            self._renumber(stage, reduced.hidden)
        return reduced.hidden

    def _question(self, text: Tensor) -> Tensor:
        """Text (B, M) without drafts, by the rule of the probe rows (:func:`question_tokens`)."""
        if self.drafts == 0:
            return text
        rows = zip(self.level.rows, self.level.starts, strict=True)
        ends = upload([start + question_tokens(row, self.drafts) for row, start in rows], text.device)
        return text & (torch.arange(text.shape[1], device=text.device) < ends[:, None])

    def _cut(self, before: dict[str, Any], index: Tensor, count: Tensor, batch: int) -> None:
        """Cut everything that runs along the tokens to the kept ones, in one launch."""
        cos, sin = before["position_embeddings"]
        position_ids = before.get("position_ids")
        streams = [_tokens_second(cos, batch), _tokens_second(sin, batch), self._codes, self._within]
        if position_ids is not None:
            streams.append(_tokens_second(position_ids[..., None], batch))
        if self._raters is not None:
            streams.append(self._raters.int())
        streams += self._tower
        cut = ops.gather_tokens(streams, index, count, align="right")
        self._codes, self._within = cut[2], cut[3]
        self._tower = [cut.pop() for _ in self._tower][::-1]
        if self._raters is not None:
            self._raters = cut.pop().bool()
        self._inputs = {
            "position_embeddings": (_tokens_back(cut[0], cos.dim()), _tokens_back(cut[1], sin.dim())),
            "attention_mask": None,
        }
        if position_ids is not None:
            self._inputs["position_ids"] = _tokens_back(cut[4], position_ids.dim() + 1)[..., 0]

    def _renumber(self, stage: StagePlan, hidden: Tensor) -> None:
        """Number the tokens of rows that lost some one by one from where each row's first token stands (0, but where
        the caller's positions count padding), and say where generated ones go on."""
        assert self._first is not None
        assert self._next is not None
        device = hidden.device
        first, following = self._first.to(device), self._next.to(device)
        lost = [
            row.tokens < before.tokens
            for row, before in zip(self.level.rows, self.levels[0].rows, strict=True)
        ]
        changed = upload(lost, device, torch.bool)[:, None]
        starts = upload(self.level.starts, device)[:, None]
        slots = torch.arange(self.level.length, device=device)
        places = (slots - starts).clamp_min(0) + first
        if self.part.positions == "renumber_prompt":  # an answer stands where it would be generated
            changed = changed & (slots < upload(self._ends(), device)[:, None])
        tables = self._adapter.rotary_tables(hidden, places)
        old = self._inputs["position_embeddings"]
        self._inputs["position_embeddings"] = tuple(
            torch.where(changed[..., None], new, kept) for new, kept in zip(tables, old, strict=True)
        )
        position_ids = self._inputs.get("position_ids")
        if position_ids is not None:
            self._inputs["position_ids"] = torch.where(changed, places, position_ids)
        if self.part.positions == "renumber":
            behind = first[:, 0] + upload([row.tokens for row in self.level.rows], device)
            self.shifts.append((stage.stage.layer, torch.where(changed[:, 0], behind - following, 0)))


def text_places(layout: BatchLayout, prefill: Prefill | None, layers: int) -> list[list[list[int]]]:
    """For each layer and row, where text stands in what the layer computes on."""
    found = []
    for index in range(layers):
        level = prefill.tokens_at(index) if prefill is not None else Level(layout.rows, layout.length)
        found.append(
            [
                [start + at for at in row.text_positions()]
                for row, start in zip(level.rows, level.starts, strict=True)
            ]
        )
    return found


def _tokens_second(x: Tensor, batch: int) -> Tensor:
    """(..., B or 1, S, D) as (B, S, ..., D): rotary tables may
    have M-RoPE's axes in front, or one shared row."""
    if x.shape[-3] != batch:
        x = x.expand(*x.shape[:-3], batch, *x.shape[-2:])
    return x if x.dim() == 3 else x.permute(1, 2, 0, 3)


def _tokens_back(x: Tensor, dims: int) -> Tensor:
    """Undo :func:`_tokens_second`."""
    return x if dims == 3 else x.permute(2, 0, 1, 3)
